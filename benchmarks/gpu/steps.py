"""Parts about training steps: every recipe, resume, times, sparse and dense products, checkpoints."""

import tempfile
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from sizes import BUDGET, Sizes, seconds
from torch import Tensor

from sae.common.errors import UsageError
from sae.train import sparse_ops, variants  # noqa: F401  (registers the recipes)
from sae.train.capture import CapturedSteps
from sae.train.checkpoint import restore_checkpoint, save_checkpoint, training_state
from sae.train.checkpoint_writer import CheckpointWriter
from sae.train.compile import compile_step
from sae.train.kernels.choice import reason_against_kernels
from sae.train.loop import Trainer
from sae.train.passes import Resized, pass_memory
from sae.train.recipe import RECIPES, find_recipe
from sae.train.variant import RunConfig

Entries = Iterator[tuple[str, dict[str, Any]]]
TOTAL_STEPS = 4882  # length of the run that a step belongs to


def make_trainer(recipe: str, d_in: int, d_sae: int, batch: int, options: Mapping[str, Any] | None = None) -> Trainer:
    """A trainer as `sae train` makes it on a GPU, with kernels if they work. Raises UsageError if it cannot be made."""
    torch.manual_seed(0)
    variant = find_recipe(recipe).make(config_of(d_in, d_sae, batch), dict(options or {}))
    if not reason_against_kernels("cuda"):
        variant.use_kernels()
    trainer = Trainer(variant.to("cuda"), TOTAL_STEPS, "cuda")
    rows_RD = torch.randn(4 * batch, d_in)
    sample_ND = rows_RD if variant.reads_rows else None
    variant.set_normalization(rows_RD.mean(0).to("cuda"), float(rows_RD.square().sum(1).mean()), sample_ND)
    return trainer


def config_of(d_in: int, d_sae: int, batch: int) -> RunConfig:
    return RunConfig(d_in, d_sae, TOTAL_STEPS, batch, variance=24.0)


def options_of(recipe: str, k: int) -> dict[str, Any]:
    defaults = find_recipe(recipe).options
    fewer = isinstance(defaults.get("k"), int) and defaults["k"] < k
    return ({"k": k} if fewer else {}) | ({"memory_gb": 1000.0} if "memory_gb" in defaults else {})


def batch_of(rows: int, d_in: int) -> Tensor:
    return torch.randn(rows, d_in, generator=torch.Generator().manual_seed(1)).bfloat16().to("cuda")


def recipes(sizes: Sizes) -> Entries:
    """Run three steps of every recipe, treat any wait for the GPU as an error, and compare the peak of memory with the
    plan."""
    d_sae, rows = sizes.recipe
    x_BD = batch_of(rows, sizes.d_in)
    for recipe in RECIPES:
        torch.cuda.empty_cache()
        try:
            options, before = options_of(recipe, sizes.k), torch.cuda.memory_allocated()
            trainer = make_trainer(recipe, sizes.d_in, d_sae, rows, options)
            trainer.step(x_BD)  # in the first step the optimizer allocates its moments and CUDA loads kernels
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.set_sync_debug_mode("error")
            try:
                for _ in range(3):
                    trainer.step(x_BD)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            run = Resized(find_recipe(recipe), options, None, config_of(sizes.d_in, d_sae, rows))
            plan, peak = pass_memory([run], "cuda"), torch.cuda.max_memory_allocated() - before
            yield recipe, {"waits": 0, "peak_gb": peak / 1e9, "planned_gb": (plan.state + plan.step) / 1e9}
        except Exception as error:  # the other recipes are still tried
            yield recipe, {"error": f"{type(error).__name__}: {error}"}


def resume(sizes: Sizes) -> Entries:
    """Whether a resumed run ends with the same bits as one that did not stop there, with eager and captured steps."""
    d_sae, rows = sizes.recipe
    for recipe in BUDGET:
        options = options_of(recipe, sizes.k)
        for captured in (False, True):
            ends = []
            for stops in ((6,), (3, 6)):
                with tempfile.TemporaryDirectory() as folder:
                    ends.append(walk(recipe, options, sizes.d_in, d_sae, rows, stops, captured, Path(folder)))
            one, two = ends
            apart = [name for name in one if not torch.equal(one[name], two[name])]
            yield f"{recipe}{', captured' if captured else ''}", {"apart": apart}


def walk(
    recipe: str, options: dict[str, Any], d_in: int, d_sae: int, rows: int, stops: tuple[int, ...], captured: bool,
    folder: Path,
) -> dict[str, Tensor]:  # fmt: skip
    """The state at the last of the stops, for a run that is saved and loaded again at each earlier stop."""
    at = 0
    for stop in stops:
        trainer = make_trainer(recipe, d_in, d_sae, rows, options)
        graph = CapturedSteps(print) if captured else None
        if at:
            trainer.step(batch_of(rows, d_in))  # allocates the moments
            restore_checkpoint(trainer, folder, print)
        for number in range(at, stop):
            x_BD = batch_of(rows, d_in) * (1 + number)
            if graph is None or not graph.replay([trainer], x_BD):
                trainer.step(x_BD)
        at = stop
        save_checkpoint(trainer, folder, stop)
    return {name: tensor.cpu().clone() for name, tensor in training_state(trainer).items()}


def steps(sizes: Sizes) -> Entries:
    """Milliseconds of eager and captured steps, then of several runs in one graph, then of compiled steps."""
    for d_sae, rows in sizes.steps:
        for recipe in BUDGET:
            yield f"{recipe} {d_sae}x{rows}", step_times(recipe, d_sae, rows, sizes)
    d_sae, rows = sizes.steps[0]
    for recipe in ("relu", "topk"):
        runs = [
            make_trainer(recipe, sizes.d_in, d_sae, rows, options_of(recipe, sizes.k)) for _ in range(sizes.stacked)
        ]
        found = {"captured_ms": captured_ms(runs, batch_of(rows, sizes.d_in), sizes)}
        yield f"{sizes.stacked} x {recipe} {d_sae}x{rows}", found
        del runs
    d_sae, rows = sizes.steps[len(sizes.steps) // 2]
    for recipe in BUDGET:
        yield f"{recipe} {d_sae}x{rows}, compiled", step_times(recipe, d_sae, rows, sizes, compiled=True)


def step_times(recipe: str, d_sae: int, rows: int, sizes: Sizes, compiled: bool = False) -> dict[str, Any]:
    torch.cuda.empty_cache()
    x_BD = batch_of(rows, sizes.d_in)
    try:
        trainer = make_trainer(recipe, sizes.d_in, d_sae, rows, options_of(recipe, sizes.k))
        if compiled:
            reason = compile_step(trainer, rows)
            return {"refused": reason} if reason else {"compiled_ms": 1e3 * seconds(partial(trainer.step, x_BD), sizes)}
        eager = 1e3 * seconds(partial(trainer.step, x_BD), sizes)
        return {"eager_ms": eager, "captured_ms": captured_ms([trainer], x_BD, sizes)}
    except (UsageError, RuntimeError) as error:  # it cannot be made at this size, or does not fit
        return {"error": str(error).splitlines()[0]}


def captured_ms(trainers: list[Trainer], x_BD: Tensor, sizes: Sizes) -> float | None:
    """Milliseconds of one launch of the graph of these steps; None if CUDA refuses to capture them."""
    said: list[str] = []
    graph = CapturedSteps(said.append)
    for _ in range(3):
        if not graph.replay(trainers, x_BD):
            for trainer in trainers:
                trainer.step(x_BD)
    return None if said else 1e3 * seconds(lambda: graph.replay(trainers, x_BD), sizes)


def border(sizes: Sizes) -> Entries:
    """Milliseconds of a captured step of topk with sparse and with dense products, for each n/k."""
    d_sae, rows = sizes.border
    x_BD, never = batch_of(rows, sizes.d_in), float("inf")
    for ratio in sizes.ratios:
        found = {}
        for way, limit in (("sparse_ms", 0.0), ("dense_ms", never)):
            with mock.patch.dict(sparse_ops.SPARSE_FROM["cuda"], dict.fromkeys(sparse_ops.FLOPS, limit)):
                trainer = make_trainer("topk", sizes.d_in, d_sae, rows, {"k": d_sae // ratio})
                found[way] = captured_ms([trainer], x_BD, sizes)
        yield str(ratio), found


def checkpoints(sizes: Sizes) -> Entries:
    """Seconds for which saving a checkpoint stops training, and seconds until it is written; the first checkpoint also
    pins memory."""
    trainer: Any = make_trainer("topk", sizes.d_in, sizes.checkpoint, sizes.recipe[1], {"k": sizes.k})
    trainer.step(batch_of(sizes.recipe[1], sizes.d_in))
    gigabytes = sum(tensor.nbytes for tensor in training_state(trainer).values()) / 1e9
    with tempfile.TemporaryDirectory() as folder, CheckpointWriter("cuda") as writer:
        trainer.run, trainer.digest = SimpleNamespace(folder=Path(folder)), "0" * 64
        for number in range(1, 4):
            torch.cuda.synchronize()
            started = time.perf_counter()
            writer.save([trainer], number)
            queued = time.perf_counter() - started
            torch.cuda.synchronize()
            stalled = time.perf_counter() - started
            writer.wait()
            written = time.perf_counter() - started
            yield f"number {number}", {"gb": gigabytes, "host_s": queued, "stall_s": stalled, "written_s": written}
