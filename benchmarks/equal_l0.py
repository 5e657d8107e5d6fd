"""The effect of each mechanism at equal L0: pairs of systems, compared seed by seed and layer by layer.

    sae train --layer 5 --layer 12 --layer 19 --l0 32 --seed 0 --seed 1 --seed 2 --variant ...
    sae evaluate runs/*
    python benchmarks/equal_l0.py runs/* > table.md

The whole `sae train` command is in docs/explanation/findings.md.

Prints Markdown. A cell is the mean difference over seeds and the half-width of its 95 % confidence interval by
Student's t. `L0` is the mean difference over all layers and seeds. `sign` counts in how many pairs the first system has
the larger KL score. `also differs` lists shared options in which the two recipes differ besides the mechanism: a line
with such options compares two whole systems, so no effect can be attributed to the mechanism alone.

Seeds share the data, its order and the evaluation text; they differ in the initial weights. All recipes of a seed start
from the same weights, except `collapse-06` and later, whose rows start orthonormal. If `--l0` controls a penalty, the
recipe's own schedule of that penalty has no effect after a twentieth of the run.
"""

import argparse
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from sae.common.errors import UsageError
from sae.evaluate.compared_runs import ComparedRun, read_run
from sae.evaluate.metrics.base import MetricColumn
from sae.evaluate.metrics.registry import METRICS
from sae.evaluate.tables import paired_difference
from sae.train.sae import read_sae_record

PLAIN = "progressive-baseline"  # ReLU and L1, with x as the encoder's input instead of x - b_dec: the papers' own SAE
L1 = "competition-baseline"  # PLAIN with a warm-up of the penalty and without weight decay
PAIRS = [  # (system with the mechanism, system without it)
    ("progressive", PLAIN),
    ("progressive-no-competition", PLAIN),
    ("progressive", "progressive-no-competition"),
    ("progressive-no-ema", "progressive"),
    ("competition", "competition-off"),
    *(("decorrelation", base) for base in (L1, PLAIN)),
    ("hierarchical-window", PLAIN),
    *(("hierarchical", base) for base in ("hierarchical-window", PLAIN)),
    *((name, base) for name in ("collapse-06", "collapse-08", "collapse-09", "collapse-10") for base in (L1, PLAIN)),
    ("collapse-08", "collapse-06"),
    ("collapse-09", "collapse-08"),
    ("collapse-10", "collapse-09"),
    ("relu", L1),  # x - b_dec
    *((name, "relu") for name in ("gated", "jumprelu", "topk")),
    ("batchtopk", "topk"),
    *((name, "batchtopk") for name in ("matryoshka", "ortsae")),
    *((name, PLAIN) for name in ("relu", "gated", "jumprelu", "topk", "batchtopk")),
    *((name, "topk") for name in ("competition-off", "competition")),
]
NUMBERS = (("core", "kl_div_score"), ("core", "fve"))
ALSO = (
    ("core", "mean"),
    ("core", "quantile_99.9"),
    ("absorption", "mean_full_absorption_score"),
    ("sparse_probing_stdlib", "sae_top_1_test_accuracy"),
)
SHORT = {"absorption": "absorption, ", "sparse_probing_stdlib": "probing, "}
Runs = dict[tuple[str, int, int], ComparedRun]  # recipe, layer, seed -> run


def index_runs(all_runs: Iterable[ComparedRun]) -> Runs:
    """Runs by recipe, layer and seed. Raises UsageError if two runs have the same recipe, layer and seed, since one of
    the two would be ignored."""
    runs: Runs = {}
    for run in all_runs:
        key = run.record["variant"], run.record["layer"], run.record["seed"]
        if key in runs:
            raise UsageError(
                f"{runs[key].folder} and {run.folder} have the same recipe, layer and seed. Give one of them."
            )
        runs[key] = run
    return runs


def other_differences(one: ComparedRun, other: ComparedRun) -> list[str]:
    """The options in which the two runs differ: lr, weight decay, pre_bias (input x - b_dec), ..."""
    options, other_options = (
        run.record["resolved"] | {"pre_bias": read_sae_record(run.folder)["pre_bias"]} for run in (one, other)
    )
    return [name for name in options if name in other_options and options[name] != other_options[name]]


def find_column(metric: str, name: str) -> MetricColumn:
    return next(column for column in METRICS[metric].columns if column.name == name)


def pairs_of(runs: Runs, one: str, other: str, layer: int) -> list[tuple[ComparedRun, ComparedRun]]:
    seeds = sorted(seed for recipe, at, seed in runs if (recipe, at) == (one, layer))
    return [(runs[one, layer, seed], runs[other, layer, seed]) for seed in seeds if (other, layer, seed) in runs]


def difference(pairs: Sequence[tuple[ComparedRun, ComparedRun]], metric: str, name: str) -> str:
    return paired_difference(
        [pair for pair in pairs if all(metric in run.results for run in pair)], metric, find_column(metric, name)
    )


def lines(runs: Runs, layers: Sequence[int], numbers: Sequence[tuple[str, str]]) -> Iterator[list[str]]:
    kl = ("core", find_column("core", "kl_div_score"))
    for one, other in PAIRS:
        by_layer = [pairs_of(runs, one, other, layer) for layer in layers]
        cells = [difference(pairs, *number) for pairs in by_layer for number in numbers]
        everything = [pair for pairs in by_layer for pair in pairs]
        scores = [(a.value(*kl), b.value(*kl)) for a, b in everything]
        both = [(a, b) for a, b in scores if a is not None and b is not None]
        if any(cells):
            l0 = difference(everything, "core", "l0").split(" ")[0]
            sign = f"{sum(a > b for a, b in both)} of {len(both)}"
            yield [f"`{one}`", f"`{other}`", *cells, l0, sign, ", ".join(other_differences(*everything[0]))]


def table(runs: Runs, layers: Sequence[int], numbers: Sequence[tuple[str, str]]) -> None:
    at = {layer: f" L{layer}" if len(layers) > 1 else "" for layer in layers}
    named = [(f"{SHORT.get(metric, '')}{find_column(metric, name).heading}") for metric, name in numbers]
    heads = ["", "less", *(f"{head}{at[layer]}" for layer in layers for head in named), "L0", "sign", "also differs"]
    for line in (heads, ["---"] * len(heads), *lines(runs, layers, numbers)):
        print("| " + " | ".join(line) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    runs = index_runs(read_run(folder) for folder in parser.parse_args().runs)
    layers = sorted({layer for _, layer, _ in runs})
    table(runs, layers, NUMBERS)
    for layer in layers:
        print(f"\nLayer {layer}\n")
        table(runs, [layer], ALSO)


if __name__ == "__main__":
    main()
