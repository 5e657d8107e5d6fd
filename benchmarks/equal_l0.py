"""What each mechanism gives at equal L0: every system less what it adds something to, paired by seed, layer by layer.

    sae train --layer 5 --layer 12 --layer 19 --l0 32 --seed 0 --seed 1 --seed 2 --variant ...     (docs/findings.md)
    sae evaluate runs/*
    python benchmarks/equal_l0.py runs/* > table.md

Prints Markdown. A cell is the mean difference over seeds and half its 95 % interval by Student's t. `L0` is the mean
difference over all layers and seeds; `sign` counts there in how many pairs the first of the two has the larger KL score.
`also differs` are the shared
options in which two recipes differ beside what they are named for: such a line compares two whole systems, and says
nothing of one mechanism.

Seeds share the data, their order and the text of the evaluation; they differ in the weights at the start. All recipes of
a seed start from the same, but for `collapse-06` and later, whose rows start orthonormal. Where `--l0` moves a penalty,
what a recipe does with its own after a twentieth of the run does not count.
"""

import argparse
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from sae.common.errors import UsageError
from sae.common.files import read_json
from sae.evaluate.compare import ComparedRun, read_run
from sae.evaluate.metrics.base import MetricColumn
from sae.evaluate.metrics.registry import METRICS
from sae.evaluate.tables import paired_difference

PLAIN = "progressive-baseline"  # ReLU and L1, the encoder sees x and not x - b_dec: the papers' own SAE
L1 = "competition-baseline"  # the same with a penalty that warms up, and without weight decay
PAIRS = [  # what is added, to what
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
    ("scr_stdlib", "scr_metric_threshold_20"),
    ("tpp_stdlib", "tpp_threshold_20_total_metric"),
)
SHORT = {"absorption": "absorption, ", "sparse_probing_stdlib": "probing, "}
Runs = dict[tuple[str, int, int], ComparedRun]  # recipe, layer, seed -> run


def by_place(read: Iterable[ComparedRun]) -> Runs:
    """The runs by recipe, layer and seed. UsageError where two have the same: one of them would be passed over."""
    runs: Runs = {}
    for run in read:
        place = run.run["variant"], run.run["layer"], run.run["seed"]
        if place in runs:
            raise UsageError(
                f"{runs[place].folder} and {run.folder} have one recipe, layer and seed: give one of them."
            )
        runs[place] = run
    return runs


def beside(one: ComparedRun, other: ComparedRun) -> list[str]:
    """The options that both have, and in which they differ: rate, decay, whether the encoder sees x - b_dec, ..."""
    own, others = (
        run.run["resolved"] | {"pre_bias": read_json(run.folder / "sae.json", "pre_bias")["pre_bias"]}
        for run in (one, other)
    )
    return [name for name in own if name in others and own[name] != others[name]]


def found(metric: str, name: str) -> MetricColumn:
    return next(number for number in METRICS[metric].columns if number.name == name)


def pairs_of(runs: Runs, one: str, other: str, layer: int) -> list[tuple[ComparedRun, ComparedRun]]:
    seeds = sorted(seed for recipe, at, seed in runs if (recipe, at) == (one, layer))
    return [(runs[one, layer, seed], runs[other, layer, seed]) for seed in seeds if (other, layer, seed) in runs]


def difference(pairs: Sequence[tuple[ComparedRun, ComparedRun]], metric: str, name: str) -> str:
    return paired_difference(
        [pair for pair in pairs if all(metric in run.results for run in pair)], metric, found(metric, name)
    )


def lines(runs: Runs, layers: Sequence[int], numbers: Sequence[tuple[str, str]]) -> Iterator[list[str]]:
    kl = ("core", found("core", "kl_div_score"))
    for one, other in PAIRS:
        by_layer = [pairs_of(runs, one, other, layer) for layer in layers]
        cells = [difference(pairs, *number) for pairs in by_layer for number in numbers]
        everything = [pair for pairs in by_layer for pair in pairs]
        scores = [(a.value(*kl), b.value(*kl)) for a, b in everything]
        both = [(a, b) for a, b in scores if a is not None and b is not None]
        if any(cells):
            l0 = difference(everything, "core", "l0").split(" ")[0]
            sign = f"{sum(a > b for a, b in both)} of {len(both)}"
            yield [f"`{one}`", f"`{other}`", *cells, l0, sign, ", ".join(beside(*everything[0]))]


def table(runs: Runs, layers: Sequence[int], numbers: Sequence[tuple[str, str]]) -> None:
    at = {layer: f" L{layer}" if len(layers) > 1 else "" for layer in layers}
    named = [(f"{SHORT.get(metric, '')}{found(metric, name).heading}") for metric, name in numbers]
    heads = ["", "less", *(f"{head}{at[layer]}" for layer in layers for head in named), "L0", "sign", "also differs"]
    for line in (heads, ["---"] * len(heads), *lines(runs, layers, numbers)):
        print("| " + " | ".join(line) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    runs = by_place(read_run(folder) for folder in parser.parse_args().runs)
    layers = sorted({layer for _, layer, _ in runs})
    table(runs, layers, NUMBERS)
    for layer in layers:
        print(f"\nLayer {layer}\n")
        table(runs, [layer], ALSO)


if __name__ == "__main__":
    main()
