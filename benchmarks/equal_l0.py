"""What each mechanism gives at equal L0: every system less what it adds something to, paired by seed, layer by layer.

    sae train --layer 5 --layer 12 --layer 19 --l0 32 --seed 0 --seed 1 --seed 2 --variant ...     (docs/findings.md)
    sae evaluate runs/*
    python benchmarks/equal_l0.py runs/* > table.md

Prints Markdown. A cell is the mean difference over seeds and half its 95 % interval by Student's t. `L0` is the mean
difference over all layers and seeds, and `sign` counts there in how many pairs the first has the larger KL score.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from sae.evaluate.compare import Compared, read_run
from sae.evaluate.metric import Number
from sae.evaluate.suites import METRICS
from sae.evaluate.table import paired

PLAIN = "progressive-baseline"  # ReLU and L1, the encoder sees x and not x - b_dec: the papers' own SAE
PAIRS = [  # what is added, to what
    *((name, PLAIN) for name in ("progressive", "progressive-no-ema", "progressive-no-competition")),
    ("competition", "competition-off"),
    ("decorrelation", PLAIN),
    *((name, PLAIN) for name in ("hierarchical", "hierarchical-window")),
    *((name, PLAIN) for name in ("collapse-06", "collapse-08", "collapse-09", "collapse-10")),
    *((name, PLAIN) for name in ("relu", "gated", "jumprelu", "topk", "batchtopk", "matryoshka", "ortsae")),
    *((name, "topk") for name in ("batchtopk", "matryoshka", "ortsae", "competition")),
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
Runs = dict[tuple[str, int, int], Compared]  # recipe, layer, seed -> run


def found(metric: str, name: str) -> Number:
    return next(number for number in METRICS[metric].numbers if number.name == name)


def pairs_of(runs: Runs, one: str, other: str, layer: int) -> list[tuple[Compared, Compared]]:
    seeds = sorted(seed for recipe, at, seed in runs if (recipe, at) == (one, layer))
    return [(runs[one, layer, seed], runs[other, layer, seed]) for seed in seeds if (other, layer, seed) in runs]


def difference(pairs: Sequence[tuple[Compared, Compared]], metric: str, name: str) -> str:
    return paired([pair for pair in pairs if all(metric in run.results for run in pair)], metric, found(metric, name))


def lines(runs: Runs, layers: Sequence[int], numbers: Sequence[tuple[str, str]]) -> Iterator[list[str]]:
    kl = ("core", found("core", "kl_div_score"))
    for one, other in PAIRS:
        by_layer = [pairs_of(runs, one, other, layer) for layer in layers]
        cells = [difference(pairs, *number) for pairs in by_layer for number in numbers]
        everything = [pair for pairs in by_layer for pair in pairs]
        more = sum((a.value(*kl) or 0) > (b.value(*kl) or 0) for a, b in everything)
        if any(cells):
            l0 = difference(everything, "core", "l0").split()[0]
            yield [f"`{one}`", f"`{other}`", *cells, l0, f"{more} of {len(everything)}"]


def table(runs: Runs, layers: Sequence[int], numbers: Sequence[tuple[str, str]]) -> None:
    at = {layer: f" L{layer}" if len(layers) > 1 else "" for layer in layers}
    heads = [
        f"{SHORT.get(metric, '')}{found(metric, name).heading}{at[layer]}"
        for layer in layers
        for metric, name in numbers
    ]
    heads = ["", "less", *heads, "L0", "sign"]
    for line in (heads, ["---"] * len(heads), *lines(runs, layers, numbers)):
        print("| " + " | ".join(line) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    read = [read_run(folder) for folder in parser.parse_args().runs]
    runs: Runs = {(run.run["variant"], run.run["layer"], run.run["seed"]): run for run in read}
    layers = sorted({layer for _, layer, _ in runs})
    table(runs, layers, NUMBERS)
    for layer in layers:
        print(f"\nLayer {layer}\n")
        table(runs, [layer], ALSO)


if __name__ == "__main__":
    main()
