"""Steps of every recipe on the simulated GPU, to compare with the same steps on the CPU."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import sae.train.variants  # noqa: F401  (registers the recipes)
from sae.common.precision import PRECISIONS
from sae.train import activation_functions, sparse_ops
from sae.train.checkpoint import restore_checkpoint, save_checkpoint, training_state
from sae.train.kernel_update import KernelUpdate
from sae.train.loop import Trainer
from sae.train.parse import parse_options
from sae.train.recipe import find_recipe
from sae.train.sae import SAE, fold_normalization, load_sae, save_sae
from sae.train.variant import RunConfig, Variant

from .functions import simulated_gpu
from .ledger import watch

D_IN, D_SAE, BATCH, STEPS = 16, 128, 32, 4
NEVER = 1 << 40


def walk(
    recipe: str,
    options: tuple[str, ...] = (),
    paper_exact: bool = False,
    d_sae: int = D_SAE,
    sparse: bool = False,
    autocast: bool = False,
    parts: int = 1,
    kernels: bool = False,
) -> dict[str, Any]:
    """Do everything that a run does, from its start to the saved SAE, on both devices.

    `sparse` says whether products with few latents are sparse. Without `autocast` both devices use the same arithmetic.
    Each batch is computed in `parts` parts. With `kernels` both devices use the operators of the kernels, which compute
    the same results on a CPU.

    Returns:
        waits: operations that made the host wait in a step
        unordered: operations that can give other bits in a second run on a GPU
        reads: what the host reads for a log
        apart: each number or tensor in which the devices differ -> the difference relative to the CPU's largest element
        dead: the largest number of dead latents in a step
    """
    with same_arithmetic(sparse), tempfile.TemporaryDirectory() as folder:
        precision = None if autocast else "float32"
        cpu = Walk(recipe, options, paper_exact, d_sae, "cpu", Path(folder) / "cpu", parts, precision, kernels)
        expected = cpu.run()
        with simulated_gpu():
            gpu = Walk(recipe, options, paper_exact, d_sae, "cuda", Path(folder) / "cuda", parts, precision, kernels)
            found = gpu.run()
    apart = differences(expected, found)
    return {"waits": gpu.waits, "unordered": gpu.unordered, "reads": gpu.reads, "dead": gpu.dead, "apart": apart}


@contextlib.contextmanager
def same_arithmetic(sparse: bool) -> Iterator[None]:
    """Let both devices find the largest latents in the same way, and use sparse products on both or on neither.

    Which latents are the largest does not depend on how they are found, but the order in which they are summed does.
    """
    borders = dict.fromkeys(PRECISIONS, 1 if sparse else NEVER)
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(sparse_ops.SPARSE_FROM, dict.fromkeys(("cpu", "cuda"), borders)))
        stack.enter_context(mock.patch.object(activation_functions, "topk_indices", plain_topk))
        yield


def plain_topk(z_BF: Tensor, k: int) -> Tensor:
    return z_BF.topk(k, sorted=False).indices


class Walk:
    """A short run of one recipe on one device, and its results."""

    def __init__(
        self,
        recipe: str,
        options: tuple[str, ...],
        paper_exact: bool,
        d_sae: int,
        device: str,
        folder: Path,
        parts: int,
        precision: str | None = "float32",
        kernels: bool = False,
    ) -> None:
        self.recipe, self.options, self.parts, self.precision = recipe, options, parts, precision
        self.kernels, self.updates = kernels, kernels  # whether kernels choose latents, and whether they update weights
        self.config = RunConfig(D_IN, d_sae, 30, BATCH, paper_exact=paper_exact, variance=24.0)
        self.device, self.folder = device, folder
        self.waits: list[str] = []
        self.unordered: list[str] = []
        self.reads: list[str] = []  # what the host reads for a log
        self.dead = 0  # the largest number of dead latents in a step
        self.trainer: Trainer  # the one that took the steps

    def new_trainer(self) -> Trainer:
        """Make a trainer whose periodic mechanisms act every second step and whose latents die after one silent batch.

        Some latents are silent from the start.
        """
        torch.manual_seed(0)
        recipe = find_recipe(self.recipe)
        variant = recipe.make(self.config, parse_options(list(self.options), [recipe])[self.recipe])
        if self.kernels:
            with contextlib.nullcontext() if self.updates else mock.patch.object(Variant, "updates_at_once", False):
                variant.use_kernels()
        variant.dead.after_tokens = BATCH
        variant.sae.b_enc.data[:16] = -0.4
        for mechanism in variant.mechanisms:
            if mechanism.every:
                mechanism.every = min(mechanism.every, 2)
        trainer = Trainer(variant.to(self.device), 30, self.device, self.parts, self.precision)
        rows_RD = batches(1, 4 * BATCH)[0].float()
        sample_ND = rows_RD if variant.reads_rows else None
        variant.set_normalization(rows_RD.mean(0).to(self.device), float(rows_RD.square().sum(1).mean()), sample_ND)
        return trainer

    def run(self) -> dict[str, Any]:
        self.trainer = trainer = self.new_trainer()
        for number, x_BD in enumerate(batches(STEPS, BATCH)):
            x_BD = x_BD.to(self.device)
            with watch() as seen:
                step = trainer.step(x_BD)
            self.waits += [wait for wait in seen.waits if wait not in self.waits]
            self.dead = max(self.dead, int(trainer.variant.dead.real_A.sum()))
            with watch() as between:
                trainer.run_periodic(number, step)
            unordered = [*seen.unordered, *between.unordered]
            self.unordered += [line for line in unordered if line not in self.unordered]
        with watch() as logging:
            metrics = trainer.pop_metrics()
        self.reads = [str(entry) for entry in logging.entries]
        save_checkpoint(trainer, self.folder, STEPS)
        saved = {name: tensor.clone() for name, tensor in training_state(trainer).items()}
        resumed = self.new_trainer()
        assert restore_checkpoint(resumed, self.folder, print) == STEPS
        for name, tensor in training_state(resumed).items():
            assert tensor.device == saved[name].device and torch.equal(tensor, saved[name]), f"{name} is not restored"
        resumed.step(x_BD)
        return {
            "metrics": metrics,
            "state": on_cpu(saved),
            "sae": self.finish(trainer, x_BD),
            "resumed": on_cpu(training_state(resumed)),
        }

    @torch.no_grad()
    def finish(self, trainer: Trainer, x_BD: Tensor) -> dict[str, Tensor]:
        """Do what a run does at its end (calibrate, fold, export, save), then load the SAE and use it."""
        variant = trainer.variant
        step = trainer.forward(x_BD)
        for mechanism in variant.mechanisms:
            mechanism.calibrate(step)
        layer_norm = variant.optimization.normalize == "layer_norm"
        folded: SAE = fold_normalization(variant.sae, variant.scale, variant.mean_D, layer_norm)
        for mechanism in variant.mechanisms:
            mechanism.export(folded)
        save_sae(folded, self.folder, {"layer": 0})
        loaded = load_sae(self.folder, self.device)
        f_BF = loaded.encode(x_BD)
        return on_cpu({**loaded.state_dict(), "f": f_BF, "x_hat": loaded.decode(f_BF, x_BD)})


def batches(count: int, rows: int) -> list[Tensor]:
    """Batches of sums of a few directions. Every call returns the same ones."""
    generator = torch.Generator().manual_seed(1)
    atoms_FD = torch.randn(24, D_IN, generator=generator)
    made = []
    for _ in range(count):
        active_BF = torch.rand(rows, 24, generator=generator) < 0.15
        weight_BF = active_BF * (1 + torch.rand(rows, 24, generator=generator))
        made.append((weight_BF @ atoms_FD + 0.5).bfloat16())
    return made


def on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}


def differences(expected: dict[str, Any], found: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """For each name whose values differ in a bit, the largest difference over the largest expected element."""
    apart: dict[str, float] = {}
    for name in expected.keys() | found.keys():
        one, other = expected.get(name), found.get(name)
        if isinstance(one, dict) and isinstance(other, dict):
            apart |= differences(one, other, f"{prefix}{name}/")
        elif one is None or other is None:
            apart[f"{prefix}{name}"] = float("inf")
        else:
            a, b = torch.as_tensor(one, dtype=torch.float64), torch.as_tensor(other, dtype=torch.float64)
            if a.shape != b.shape:
                apart[f"{prefix}{name}"] = float("inf")
            elif not torch.equal(a.nan_to_num(), b.nan_to_num()):
                apart[f"{prefix}{name}"] = float((a - b).abs().max() / a.abs().max().clamp(min=1e-30))
    return apart


def with_and_without_kernels(
    recipe: str, precision: str, options: tuple[str, ...] = (), parts: int = 1, l0: float | None = None, fault: str = ""
) -> dict[str, Any]:
    """Compare a run on the GPU whose weights are updated by kernels with one whose weights are updated by torch.

    In both, kernels choose the largest latents, mechanisms act between steps, and the run is resumed. Returns the
    differences (`apart`), whether the operator updated the weights (`used`), whether each copy in bfloat16 equals its
    weight at the end (`copied`), and the waits of the run with kernels (`waits`).
    """
    with simulated_gpu(), same_arithmetic(sparse=False), tempfile.TemporaryDirectory() as folder, broken(fault):
        walks = [
            Walk(recipe, options, False, D_SAE, "cuda", Path(folder) / str(number), parts, precision, kernels=True)
            for number in range(2)
        ]
        walks[0].updates = False
        for walk in walks:
            walk.config = walk.config._replace(l0=l0)
        apart = differences(*(walk.run() for walk in walks))
        update = walks[1].trainer.update
        used = isinstance(update, KernelUpdate)
        copied = [torch.equal(c, w.bfloat16()) for w, c in update.copies.items()] if used else None
    return {"apart": apart, "used": used, "copied": copied, "waits": walks[1].waits}


@contextlib.contextmanager
def broken(fault: str) -> Iterator[None]:
    """Inject the fault that copies of the weights are not renewed after something else has written the weights."""
    if fault == "renews_no_copies":
        with mock.patch.object(KernelUpdate, "renew_copies", lambda update: None):
            yield
    else:
        yield
