"""The sampling error of core's numbers for pairs of latents: the pairs of 1,024 drawn latents, compared with all pairs.

    python benchmarks/paired_latents.py runs/topk-... runs/batchtopk-...

For each run, the script computes the cosines between the activations of all pairs of latents, over rows of the cache on
which the run was trained. It then computes the same numbers over the pairs of randomly drawn latents, for many draws,
and prints their mean and standard deviation.
"""

import argparse
import statistics
from collections.abc import Mapping
from datetime import date
from pathlib import Path

import torch
from torch import Tensor

import sae
from common import machine
from sae.cache.loader import BatchLoader
from sae.cache.reader import Cache
from sae.common.files import read_json
from sae.evaluate.metrics.latent_pairs import PAIRED_LATENTS, PAIRED_TOKENS, LatentPairs, distribution, gram_cosines
from sae.evaluate.metrics.latent_pairs import upper_triangle as pairs_of

NUMBERS = {"mean": "mean", "quantile_99.9": "99.9 % quantile"}
BATCH = 1024


def absolute_cosines(run: Path) -> Tensor:
    """|cosine| between the activations of all pairs of alive latents of a run, shape (F, F)."""
    loaded, record = sae.load_sae(run), read_json(run / "run.json")
    cache = Cache(Path(record["cache_folders"][0]))
    pairs = LatentPairs(loaded.d_sae)
    with BatchLoader(cache, f"layer_{record['layer']:02d}", BATCH) as batches, torch.no_grad():
        for _ in range(PAIRED_TOKENS // BATCH):
            pairs.add(loaded.encode(next(batches).float()))
            pairs.end_batch()
    assert pairs.gram_FF is not None
    alive_F = pairs.gram_FF.diagonal() > 0
    return gram_cosines(pairs.gram_FF[alive_F][:, alive_F]).abs()


def draws(cosine_FF: Tensor, latents: int, count: int) -> list[Mapping[str, float]]:
    """For each of `count` draws of `latents` latents: the statistics of the cosines of all their pairs."""
    generator = torch.Generator().manual_seed(0)
    drawn = (torch.randperm(len(cosine_FF), generator=generator)[:latents] for _ in range(count))
    return [distribution(pairs_of(cosine_FF[chosen][:, chosen])) for chosen in drawn]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--latents", type=int, default=PAIRED_LATENTS, help="latents per draw")
    parser.add_argument("--draws", type=int, default=200)
    args = parser.parse_args()
    print(f"`python benchmarks/paired_latents.py`, {date.today()}, {machine()}.")
    print(f"{args.draws} draws of {args.latents:,} latents; {PAIRED_TOKENS:,} rows.\n")
    heads = [f"{title}, {what}" for title in NUMBERS.values() for what in ("all pairs", "mean of draws", "sd of draws")]
    print("\n".join([f"| run | {' | '.join(['alive latents', *heads])} |", "|---" * (2 + len(heads)) + "|"]))
    for run in args.runs:
        cosine_FF = absolute_cosines(run)
        whole, found = distribution(pairs_of(cosine_FF)), draws(cosine_FF, args.latents, args.draws)
        cells = []
        for name in NUMBERS:
            values = [one[name] for one in found]
            mean, sd = statistics.mean(values), statistics.stdev(values)
            cells += [f"{whole[name]:.4f}", f"{mean / whole[name] - 1:+.1%}", f"{sd:.4f} ({sd / whole[name]:.1%})"]
        print(f"| `{run.name}` | {len(cosine_FF):,} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
