"""How the cost of paper 003's penalty grows with the width n; the paper claims O(n).

    python benchmarks/bench_decorrelation_scaling.py > benchmarks/results/DATE-decorrelation-scaling.md

Trains `decorrelation`, and `relu` without a pre-bias: the paper's SAE with and without the penalty. Both have the same
d_in, batch size and rows, and run once per round, in random order. Times are processor time of one thread. Three
quantities are measured for each width:

    plain    a step without the penalty: O(n)
    added    the time that the penalty adds to such a step: the difference within a round
    search the part of `added` that needs no gradient: equation (2) for all pairs, their mean and standard deviation,
    and the top 0.1 %

For each, `p` in `time ~ n^p` is fitted to the medians by least squares in logarithms; 1 is O(n), 2 is O(n^2). On CUDA
(`--device cuda`) times are wall-clock times of a synchronized device.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from typing import NamedTuple

import torch

import sae.train.variants  # noqa: F401  (registers the recipes)
from common import in_rounds, machine
from sae.train.loop import Trainer
from sae.train.recipe import find_recipe
from sae.train.step import Step
from sae.train.variant import RunConfig

STEPS = 100_000  # length of the run that the timed step belongs to; no latent is dead yet
SYSTEMS: Mapping[str, Mapping[str, object]] = {
    "decorrelation": {"pair_choice": "exact"},
    "relu": {"pre_bias": False},
}


class Times(NamedTuple):
    """Milliseconds at one width, one value per round."""

    plain: list[float]
    full: list[float]
    search: list[float]

    @property
    def added(self) -> list[float]:
        return [full - plain for full, plain in zip(self.full, self.plain, strict=True)]


def milliseconds(work: Callable[[], object], device: str, repeats: int) -> float:
    """Milliseconds per call: processor time on a CPU, wall-clock time on a GPU."""
    if device == "cpu":
        started = time.process_time()
        for _ in range(repeats):
            work()
        return (time.process_time() - started) / repeats * 1e3
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(repeats):
        work()
    torch.cuda.synchronize()
    return (time.perf_counter() - started) / repeats * 1e3


def make_trainer(recipe: str, config: RunConfig, device: str, x_BD: torch.Tensor) -> Trainer:
    """A trainer after one step, so that Adam's state exists."""
    torch.manual_seed(0)
    trainer = Trainer(find_recipe(recipe).make(config, SYSTEMS[recipe]).to(device), config.steps, device)
    trainer.step(x_BD)
    return trainer


def search(trainer: Trainer, x_BD: torch.Tensor) -> Callable[[], object]:
    """A function that computes the penalty of a step, but no gradients."""
    with torch.no_grad(), trainer.autocast():
        pre_BF, f_BF, recon_BD, kept = trainer.variant.sae(x_BD)
    step = Step(trainer.i, trainer.variant.sae, trainer.optimizer, x_BD, pre_BF, f_BF, recon_BD, kept)
    return lambda: trainer.variant.terms["decorrelation"](step)  # its latents carry no gradient


def measure(config: RunConfig, device: str, rounds: int, repeats: int) -> Times:
    random = torch.Generator().manual_seed(0)
    x_BD = (torch.randn(config.batch_size, config.d_in, generator=random) / config.d_in**0.5).to(device)
    trainers = {recipe: make_trainer(recipe, config, device, x_BD) for recipe in SYSTEMS}
    ways: dict[str, Callable[[], float]] = {
        recipe: lambda trainer=trainer: milliseconds(lambda: trainer.step(x_BD), device, repeats)
        for recipe, trainer in trainers.items()
    }
    find_pairs = search(trainers["decorrelation"], x_BD)
    find_pairs()
    ways["search"] = lambda: milliseconds(find_pairs, device, repeats)
    times = in_rounds(ways, rounds)
    return Times(times["relu"], times["decorrelation"], times["search"])


def exponent(sizes: Sequence[int], times: Sequence[float]) -> float:
    """p of the least-squares fit log time = p log n + c; NaN if a time is not positive."""
    if min(times) <= 0:
        return math.nan
    log_n, log_time = [math.log(n) for n in sizes], [math.log(value) for value in times]
    return statistics.linear_regression(log_n, log_time).slope


SHOWN = {
    "plain": "step without the penalty", "added": "time added by the penalty", "search": "search for pairs",
}  # fmt: skip


def page(widths: Sequence[int], times: Sequence[Times], d_in: int, batch: int, device: str, rounds: int) -> str:
    """The page for benchmarks/results, in Markdown."""
    kinds = {name: [getattr(one, name) for one in times] for name in ("plain", "added", "search")}
    middle = {name: [statistics.median(values) for values in rows] for name, rows in kinds.items()}
    fits = {name: exponent(widths, values) for name, values in middle.items()}
    upper = {name: exponent(widths[-2:], values[-2:]) for name, values in middle.items()}
    where = machine() if device == "cpu" else f"{torch.cuda.get_device_name()}; {machine()}"
    clock = "processor time on one thread" if device == "cpu" else "wall-clock time"
    lines = [
        "# Scaling of selective decorrelation (paper 003) in the width\n",
        f"`python benchmarks/bench_decorrelation_scaling.py`, {date.today()}, {where}.",
        f"d_in is {d_in}, and a step has {batch} tokens. Times are {clock}: medians of {rounds} rounds, with the",
        "smallest and the largest in parentheses.\n",
        "| n | updates per second without the penalty | with the penalty | ratio of step times | ms added by the "
        "penalty | of which ms for the search |",
        "|---|---|---|---|---|---|",
    ]
    for n, one in zip(widths, times, strict=True):
        plain, full = statistics.median(one.plain), statistics.median(one.full)
        added, found = (
            f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"
            for values in (one.added, one.search)
        )
        lines.append(f"| {n} | {1e3 / plain:.1f} | {1e3 / full:.1f} | {full / plain:.2f} | {added} | {found} |")
    lines += [
        "\n| time ~ n^p | p over all widths | p between the two largest |",
        "|---|---|---|",
        *(f"| {SHOWN[name]} | {fits[name]:.2f} | {upper[name]:.2f} |" for name in kinds),
        "\nThe paper claims that selecting pairs reduces the complexity from O(n^2) to O(n), p = 1. The gradient "
        "involves only the selected pairs, but finding them requires the correlations of all pairs.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192], help="n, rising")
    parser.add_argument("--d-in", type=int, default=256)
    parser.add_argument("--batch", type=int, default=2048, help="tokens")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=1, help="steps timed at once")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if len(args.width) < 2 or sorted(set(args.width)) != args.width:
        parser.error("give at least two widths, each larger than the one before")
    torch.set_num_threads(1)
    times = [
        measure(RunConfig(args.d_in, width, STEPS, args.batch), args.device, args.rounds, args.repeats)
        for width in args.width
    ]
    print(page(args.width, times, args.d_in, args.batch, args.device, args.rounds))


if __name__ == "__main__":
    main()
