"""What is lost if a step compares only some pairs of latents: papers 002 and 003, on gemma-2-mini.

    sae harvest --model gemma-2-mini --layer 12 --tokens 2400k
    python benchmarks/pair_choice.py activations/... --out FOLDER > benchmarks/results/DATE-pair-choice.md

There are two tables for each of `decorrelation` and `competition`.

    runs       the same recipe with all pairs, with the pairs that a step compares by default, and without the penalty,
               three seeds each. The columns are scores on held-out text and the penalty. This penalty is computed over
               all pairs of latents, on rows that no run has read. A cell is the mean over seeds and the half-width of
               its 95 % interval. Further rows have the differences from the runs with all pairs, seed by seed.
    overlap    along one run in which a step compares only some pairs: the share of these pairs in the penalty of all
               pairs, and the penalty estimated from these pairs divided by the penalty of all pairs.

For `decorrelation` the script also compares two gradients of the penalty on the same latents: the average of the
gradients from the blocks that several steps compare, and the gradient from all pairs.
"""

import argparse
import statistics
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import sae
import sae.train.variants  # noqa: F401  (registers the recipes)
from common import ARRAY, machine
from sae.cache.loader import BatchLoader
from sae.cache.reader import Cache
from sae.train.loop import Trainer
from sae.train.recipe import find_recipe
from sae.train.step import Step
from sae.train.variant import RunConfig, Variant
from sae.train.variants.competition.pairs import DensePairs, PairTable
from sae.train.variants.competition.penalty import CompetitionLoss
from sae.train.variants.decorrelation import Decorrelation, random_order

# With blocks of 64, `decorrelation` has eight blocks in a dictionary of 512, as it has by default in one of 2048.
BLOCK, K = 64, 32
# At any width, a step chooses 0.13 pairs per latent with blocks of 256, and 0.03 pairs per latent with blocks of 64.
DEFAULT_BLOCK = 256
CHOICES: Mapping[str, Mapping[str, dict[str, Any]]] = {  # recipe -> what a step compares -> options
    "decorrelation": {
        "all pairs": {"pair_choice": "exact"},
        f"blocks of {DEFAULT_BLOCK}": {"block": DEFAULT_BLOCK},
        f"blocks of {BLOCK}": {"block": BLOCK},
        "no penalty": {"pair_choice": "exact", "strength": 0.0},
    },
    "competition": {
        "all pairs": {"k": K, "pair_store": "dense"},
        "a table": {"k": K, "turns": 1},
        "an eighth of a table": {"k": K},
        "no penalty": {"k": K, "strength": 0.0},
    },
}
SAMPLED = 25  # steps between two measurements of the overlap
UNREAD = 32  # batches that no run has read


class Sizes(NamedTuple):
    d_sae: int
    steps: int
    batch: int
    seeds: int


def read_batches(cache: Cache, sizes: Sizes, first: int, count: int) -> Iterator[Tensor]:
    with BatchLoader(cache, ARRAY, sizes.batch, batch=first, threads=1) as loader:
        yield from islice(loader, count)


def latents_step(f_BF: Tensor, trained: sae.SAE | None = None) -> Step:
    """A step object from which a loss can read the latents and the SAE."""
    nothing = f_BF[:, :0]
    return Step(torch.tensor(0), trained, None, nothing, f_BF, f_BF, nothing)  # type: ignore[arg-type]


# --- runs -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def decorrelation_of(trained: sae.SAE, batches: Sequence[Tensor]) -> dict[str, float]:
    """R of equation (3) over all pairs, tau of equation (4), which is the correlation that a pair has to exceed, and
    the mean correlation."""
    found: dict[str, list[float]] = {"R": [], "tau": [], "mean correlation": []}
    for x_BD in batches:
        step = latents_step(trained.encode(x_BD.float()))
        found["R"].append(float(Decorrelation(pair_choice="exact")(step)))
        found["tau"].append(float(step.metrics["tau"]))
        found["mean correlation"].append(float(step.metrics["mean_correlation"]))
    return {name: statistics.mean(values) for name, values in found.items()}


@torch.no_grad()
def competition_of(trained: sae.SAE, batches: Sequence[Tensor]) -> dict[str, float]:
    """The mean of c <f_i, f_j>^2 over all pairs that exceed tau in equation (5), the number of these pairs, and their
    mean c."""
    pairs = DensePairs(trained.d_sae)
    for x_BD in batches:
        pairs.after_step(latents_step(trained.encode(x_BD.float())))
    loss = CompetitionLoss(pairs, K / trained.d_sae)
    unit = sae.SAE(trained.d_in, trained.d_sae)
    unit.W_dec.copy_(F.normalize(trained.W_dec, dim=1))
    step = latents_step(batches[0][:, :0], unit)
    value = float(loss(step))
    return {"penalty": value, "pairs": float(step.metrics["pairs_above"]), "c": float(step.metrics["mean_coefficient"])}


MEASURES = {"decorrelation": decorrelation_of, "competition": competition_of}
SCORES = {"KL score": "kl_div_score", "EV": "fve", "L0": "l0"}  # heading -> its name in a result of `core`
EVALUATED = 32_768  # held-out tokens


def find_score(metrics: Mapping[str, Any], name: str) -> float:
    """The number called `name` in the results of `core`, in whichever group it is."""
    return float(next(group[name] for group in metrics.values() if name in group))


def train_and_measure(cache: Cache, recipe: str, sizes: Sizes, out: Path) -> dict[str, list[dict[str, float]]]:
    """The numbers of each seed, for each choice of pairs."""
    unread = [x_BD.clone() for x_BD in read_batches(cache, sizes, sizes.steps, UNREAD)]
    runs = {
        choice: sae.train_saes(
            recipe, cache=cache, layers=12, seeds=range(sizes.seeds), steps=sizes.steps, width=sizes.d_sae,
            batch_size=sizes.batch, options=options, out=out / choice.replace(" ", "-"), device="cpu",
        )
        for choice, options in CHOICES[recipe].items()
    }  # fmt: skip
    all_runs = [run for seeds in runs.values() for run in seeds]
    rows = sae.evaluate_saes(all_runs, suite="core", tokens=EVALUATED, references=False, device="cpu")
    numbers = [
        {heading: find_score(row.results["core"].metrics, name) for heading, name in SCORES.items()}
        | MEASURES[recipe](run.load(), unread)
        for run, row in zip(all_runs, rows, strict=True)
    ]
    return {choice: numbers[place * sizes.seeds :][: sizes.seeds] for place, choice in enumerate(runs)}


def interval(values: Sequence[float]) -> str:
    """Mean and half-width of the 95 % interval by Student's t."""
    from scipy.stats import t

    mean = statistics.mean(values)
    half = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    digits = 1 if abs(mean) >= 30 or half >= 1 else 4
    return f"{mean:.{digits}f} ±{half:.{digits}f}"


def runs_table(found: Mapping[str, list[dict[str, float]]]) -> list[str]:
    every = next(iter(found.values()))
    names = list(every[0])
    lines = [f"| a step compares | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for choice, seeds in found.items():
        lines.append(f"| {choice} | {' | '.join(interval([one[name] for one in seeds]) for name in names)} |")
    for choice, seeds in list(found.items())[1:]:
        differences = [[one[name] - all_[name] for one, all_ in zip(seeds, every, strict=True)] for name in names]
        lines.append(f"| {choice} − all pairs | {' | '.join(interval(values) for values in differences)} |")
    return lines


# --- overlap ----------------------------------------------------------------------------------------------------------


def trained_steps(
    cache: Cache, recipe: str, options: dict[str, Any], sizes: Sizes
) -> Iterator[tuple[int, Step, Variant]]:
    """Train seed 0. After each step, yields the step's number, the step's tensors as the losses saw them, and the
    variant."""
    torch.manual_seed(0)
    config = RunConfig(cache.array(ARRAY).shape[1], sizes.d_sae, sizes.steps, sizes.batch)
    variant = find_recipe(recipe).make(config, options)
    variant.set_normalization(torch.from_numpy(cache.mean(ARRAY)).float(), cache.statistics(ARRAY)["mean_square_norm"])
    trainer = Trainer(variant, sizes.steps, "cpu")
    for number, x_BD in enumerate(read_batches(cache, sizes, 0, sizes.steps)):
        step = trainer.step(x_BD)
        yield number, step, variant
        trainer.run_periodic(number, step)


def gradient(loss: Decorrelation, f_BF: Tensor, i: int) -> Tensor:
    latents_BF = f_BF.clone().requires_grad_()
    step = latents_step(latents_BF)
    step.i = torch.tensor(i)
    loss(step).backward()
    assert latents_BF.grad is not None
    return latents_BF.grad


def decorrelation_overlap(cache: Cache, sizes: Sizes) -> list[str]:
    lines = [
        "| steps | R over all pairs | R from blocks / R | share of R in the blocks | tau | tau from blocks / tau |"
    ]
    lines += ["|---" * 6 + "|"]
    seen: list[tuple[float, ...]] = []
    alike: list[str] = []
    exact = Decorrelation(pair_choice="exact")
    for number, step, variant in trained_steps(cache, "decorrelation", {"block": BLOCK}, sizes):
        quarter = (number + 1) % (sizes.steps // 4) == 0
        term = variant.terms["decorrelation"]
        assert isinstance(term, Decorrelation)
        if (number + 1) % SAMPLED == 0:
            f_BF = step.f_BF.detach()
            every = latents_step(f_BF)
            with torch.no_grad():
                unit_BF = f_BF / f_BF.norm(dim=0).clamp_min(1e-8)
                chosen = exact.choose((unit_BF.T @ unit_BF)[None], every)
                blocks = round(sizes.d_sae / BLOCK)
                block_F = random_order(torch.tensor(number), term.seed, sizes.d_sae).argsort() // (
                    sizes.d_sae // blocks
                )
                over_P = (chosen.value_P - chosen.tau) * chosen.passes_P
                first_P, second_P = chosen.index_P // sizes.d_sae, chosen.index_P % sizes.d_sae
                held = over_P[block_F[first_P] == block_F[second_P]].sum() / over_P.sum()
                whole = float(over_P.mean())
            again = latents_step(f_BF)
            again.i = torch.tensor(number)
            seen.append((whole, float(term(again)), float(held), float(chosen.tau), float(again.metrics["tau"])))
        if quarter:
            R, by_blocks, held, tau, tau_blocks = (statistics.mean(values) for values in zip(*seen, strict=True))
            lines.append(
                f"| to {number + 1} | {R:.4f} | {by_blocks / R:.3f} | {held:.3f} | {tau:.4f} | {tau_blocks / tau:.3f} |"
            )
            to_all = gradient(exact, step.f_BF.detach(), 0)
            averaged, cosines = torch.zeros_like(to_all), {}
            for i in range(256):
                averaged += gradient(term, step.f_BF.detach(), i)
                if i + 1 in (1, 16, 64, 256):
                    cosines[i + 1] = float(F.cosine_similarity(averaged.flatten(), to_all.flatten(), dim=0))
            ratio = float(averaged.norm() / 256 / to_all.norm())
            alike.append(f"| {number + 1} | {' | '.join(f'{c:.3f}' for c in cosines.values())} | {ratio:.3f} |")
            seen = []
    lines += [
        "",
        "The next table compares gradients with respect to the latents of one batch: the gradient of the blocks,",
        "averaged over 1 to 256 steps, with the gradient of all pairs.",
        "",
    ]
    lines += [
        "| step | cosine with the gradient of all pairs: 1 step | 16 steps | 64 steps | 256 steps "
        "| ratio of lengths, 256 steps |"
    ]
    return [*lines, "|---" * 6 + "|", *alike]


def competition_overlap(cache: Cache, sizes: Sizes) -> list[str]:
    lines = [
        "| steps | pairs over tau | penalty over all pairs | share of it in the table | share of it in the compared "
        "pairs | penalty from the compared pairs / penalty |"
    ]
    lines += ["|---" * 6 + "|"]
    seen: list[tuple[float, ...]] = []
    dense = DensePairs(sizes.d_sae)
    exact = CompetitionLoss(dense, K / sizes.d_sae)
    for number, step, variant in trained_steps(cache, "competition", {"k": K}, sizes):
        dense.after_step(step)
        loss = variant.terms["competition"]
        assert isinstance(loss, CompetitionLoss) and isinstance(loss.pairs, PairTable)
        table = loss.pairs
        if (number + 1) % SAMPLED == 0 and number > table.every:
            with torch.no_grad():
                sample = latents_step(step.f_BF.detach(), step.sae)
                sample.i = torch.tensor(number)
                weight_FF, count = exact.weights(step.sae)
                part_FF = weight_FF * exact.similarity(step.sae.W_dec).square()
                total = part_FF.sum()
                held = part_FF[table.first_P, table.second_P].sum() / total
                first_A, second_A = (table.in_turn(ends, sample.i) for ends in (table.first_P, table.second_P))
                compared = part_FF[first_A, second_A].sum() / total
                seen.append((float(count), float(exact(sample)), float(held), float(compared), float(loss(sample))))
        if (number + 1) % (sizes.steps // 4) == 0 and seen:
            count, penalty, held, compared, found = (statistics.mean(values) for values in zip(*seen, strict=True))
            cells = f"{count:.0f} | {penalty:.3f} | {held:.3f} | {compared:.3f} | {found / penalty:.3f}"
            lines.append(f"| to {number + 1} | {cells} |")
            seen = []
    return lines


OVERLAP_OF = {
    "decorrelation": f"with blocks of {BLOCK} latents",
    "competition": "that compares an eighth of its table in each step",
}
EXPLAINED = {
    "decorrelation": "R (equation (3) of paper 003), tau (equation (4), the correlation that a pair has to exceed)\n"
    "and the mean correlation are computed over all pairs.",
    "competition": "`penalty` is the mean of `c <f_i, f_j>^2` over all pairs that exceed tau in equation (5) of\n"
    "paper 002, `pairs` is the number of these pairs, and `c` is their mean c.",
}
OVERLAPS = {"decorrelation": decorrelation_overlap, "competition": competition_overlap}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="where runs are written; finished ones are kept")
    parser.add_argument("--recipe", action="append", choices=list(CHOICES), help="default: both")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    cache, sizes = Cache(args.cache), Sizes(args.width, args.steps, args.batch, args.seeds)
    print("# Steps that compare all pairs of latents, and steps that compare some\n")
    print(f"`python benchmarks/pair_choice.py`, {date.today()}, {machine()}.")
    print(f"SAEs with {sizes.d_sae} latents were trained on layer 12 of {cache.model} for {sizes.steps} steps of")
    print(f"{sizes.batch} tokens with {sizes.seeds} seeds. Cells with ± are means over the seeds with half-widths of")
    print("95 % intervals (Student's t).")
    for recipe in args.recipe or CHOICES:
        print(f"\n## `{recipe}`\n\n{EXPLAINED[recipe]}\n")
        print(*runs_table(train_and_measure(cache, recipe, sizes, args.out / recipe)), sep="\n", flush=True)
        print(f"\nThe next table follows one run {OVERLAP_OF[recipe]}. Each row is a mean over a quarter of the run:\n")
        print(*OVERLAPS[recipe](cache, sizes), sep="\n", flush=True)


if __name__ == "__main__":
    main()
