"""Measure for every recipe how far runs diverge under two versions of a step's arithmetic, and compare the distances
with the bounds in train/step_version.py.

    python -m sae.benchmarks.step_versions [--draws 6] [RUN ...]

The interrupted runs of tests/compatibility take their last 25 steps once unchanged, and then again with rounding
errors: noise is added to pre-activations, reconstructions and gradients, `ERROR` times their root mean square. This
noise is several times as large as the effect of summing in a different order. Values that are exactly zero, such as the
gradient of a latent that did not fire, stay zero in any order. Recipes that accept `--accumulate 4` are also run with
this option and without noise: the option adds up the same gradients in another order. For each recipe the script prints
the largest distances, over its runs and draws, next to their bounds: for all weights (norm of the difference divided by
the norm), and for each metric's mean.
"""

import argparse
import json
import os
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae.train import dense_ops
from sae.train.accumulate import reasons_against
from sae.train.checkpoint import load_training_state, training_state
from sae.train.loop import Trainer
from sae.train.plan import Run, TrainConfig, plan_training
from sae.train.progress import SILENT
from sae.train.run import prepare_trainer
from sae.train.sae import SAE
from sae.train.shared_pass import open_batches
from sae.train.step_version import rounding_bounds

OLD_HOME = Path(__file__).parents[1] / "tests" / "compatibility" / "fixtures" / "9a9a639" / "home"
ERROR = 2.0**-21  # eight times the largest error of one rounding in float32


def copy_home(home: Path) -> list[Path]:
    """A copy of the fixtures' SAE_HOME in the state after a kill, and the folders of its runs."""
    for name, to in (("model", "model"), ("caches", "activations"), ("trained", "runs")):
        shutil.copytree(OLD_HOME / name, home / to)
    for path in home.rglob("*.json*"):
        path.write_text(path.read_text().replace("@HOME@", str(home)))
    return sorted(path.parents[2] for path in home.glob("runs/*/checkpoints/*/state.json"))


class Rounding:
    """A context manager that adds errors to the values that a step computes."""

    def __init__(self, seed: int) -> None:
        self.random = torch.Generator().manual_seed(seed)

    def add(self, value: Tensor) -> Tensor:
        noise = torch.randn(value.shape, generator=self.random)
        return value + ERROR * value.detach().square().mean().sqrt() * noise * (value.detach() != 0)

    def __enter__(self) -> None:
        self.kept = SAE.pre_activations, SAE.decode, Trainer.backward, dense_ops.encode_relu_decode
        encode, decode, backward, relu = self.kept

        def with_errors(trainer: Trainer, x_BD: Tensor) -> Any:
            outputs = backward(trainer, x_BD)
            for parameter in trainer.variant.parameters():
                if parameter.grad is not None:
                    parameter.grad = self.add(parameter.grad)
            return outputs

        SAE.pre_activations = lambda sae, x_BD: self.add(encode(sae, x_BD))  # type: ignore[method-assign]
        SAE.decode = lambda sae, *args: self.add(decode(sae, *args))  # type: ignore[method-assign]
        Trainer.backward = with_errors  # type: ignore[method-assign]
        # ReLU alone computes no pre-activations. An error in a positive latent is the same as one in its
        # pre-activation.
        dense_ops.encode_relu_decode = lambda *args: tuple(map(self.add, relu(*args)))  # type: ignore[assignment]

    def __exit__(self, *_: object) -> None:
        SAE.pre_activations, SAE.decode, Trainer.backward, dense_ops.encode_relu_decode = self.kept  # type: ignore[method-assign]


class End(NamedTuple):
    """The state at the end of a run: the SAE's tensors, and the mean of each metric over the steps taken."""

    tensors: dict[str, Tensor]
    metrics: dict[str, float]


def take_steps(trainer: Trainer, start: dict[str, Tensor], batches: list[Tensor]) -> End:
    """Take steps, starting from a state."""
    load_training_state(trainer, {name: tensor.clone() for name, tensor in start.items()})
    for number, x_BD in enumerate(batches, int(start["i"])):
        trainer.run_periodic(number, trainer.step(x_BD))
    return End({name: t.clone() for name, t in trainer.variant.sae.state_dict().items()}, trainer.pop_metrics())


class Distance(NamedTuple):
    """The distances between two final states of a run, in the SAE's tensors and in the metrics."""

    weights: float
    metrics: dict[str, float]

    def largest(self, other: "Distance") -> "Distance":
        names = self.metrics.keys() | other.metrics.keys()
        metrics = {name: max(self.metrics.get(name, 0.0), other.metrics.get(name, 0.0)) for name in names}
        return Distance(max(self.weights, other.weights), metrics)


def distance(one: End, other: End) -> Distance:
    difference = torch.cat([(other.tensors[name] - tensor).flatten() for name, tensor in one.tensors.items()])
    norm = torch.cat([tensor.flatten() for tensor in one.tensors.values()]).norm()
    metrics = {name: abs(other.metrics[name] - value) / max(abs(value), 1e-9) for name, value in one.metrics.items()}
    return Distance(float(difference.norm() / norm), metrics)


def run_distance(run: Run, draws: int) -> Distance:
    """The largest distance that rounding causes in the remaining steps of an interrupted run."""
    trainer = prepare_trainer(run, "cpu", SILENT)
    start = {name: tensor.clone() for name, tensor in training_state(trainer).items()}
    with open_batches(run, trainer.steps_done, "cpu") as loader:
        batches = [next(loader).clone() for _ in range(run.steps - trainer.steps_done)]
    end, found = take_steps(trainer, start, batches), Distance(0.0, {})
    for seed in range(draws):
        with Rounding(seed):
            found = found.largest(distance(end, take_steps(trainer, start, batches)))
    if not reasons_against(trainer.variant):
        trainer.parts = 4
        found = found.largest(distance(end, take_steps(trainer, start, batches)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", action="append", help="default: all")
    parser.add_argument("--draws", type=int, default=20)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found: dict[str, Distance] = {}
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder).resolve()
        os.environ["SAE_HOME"] = str(home)
        for path in copy_home(home):
            name = path.name.split("-L")[0]
            if "ring" not in json.loads((path / "run.json").read_text()) and name in (asked.recipe or [name]):
                (run,) = plan_training(TrainConfig(resume=[path], device="cpu")).runs
                found[name] = run_distance(run, asked.draws).largest(found.get(name, Distance(0.0, {})))
    print(
        "| recipe | weights | bound | loss | bound | other metrics | bound | which |\n|---|---|---|---|---|---|---|---|"
    )
    for name, (weights, metrics) in found.items():
        bounds, loss = rounding_bounds(name), metrics.pop("loss")
        worst = max(metrics, key=lambda key: metrics[key])
        numbers = f"{weights:.1e} | {bounds.weights:g} | {loss:.1e} | {bounds.loss:g} | {metrics[worst]:.1e}"
        print(f"| {name} | {numbers} | {bounds.metrics:g} | {worst} |")


if __name__ == "__main__":
    main()
