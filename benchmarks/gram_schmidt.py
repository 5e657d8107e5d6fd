"""How exact the two Cholesky factorizations in collapse-06's Gram-Schmidt are, compared with a float32 QR.

    python benchmarks/gram_schmidt.py activations/... --steps 300

Trains the recipe. At regular intervals both methods and a float64 QR are applied to the free rows, and the rows that
each method computes are compared with those of the float64 QR. The script also prints the condition number of the free
rows of a group, since the errors depend on it.
"""

import argparse
from datetime import date
from pathlib import Path

import torch

import sae.train.variants  # noqa: F401  (registers the recipes)
from common import machine
from sae.cache.loader import BatchLoader
from sae.cache.reader import Cache
from sae.train.loop import Trainer
from sae.train.recipe import find_recipe
from sae.train.variant import RunConfig
from sae.train.variants.collapse.orthogonality import GramSchmidt, gram_schmidt, gram_schmidt_by_products


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--array", default="layer_12")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--every", type=int, default=50, help="steps between two comparisons")
    parser.add_argument("--lr", type=float, default=3e-4)
    args = parser.parse_args()
    cache = Cache(args.cache)
    d_in = len(cache.mean(args.array))
    torch.manual_seed(0)
    variant = find_recipe("collapse-06").make(RunConfig(d_in, args.width, args.steps, 1024), {"lr": args.lr})
    mean_D = torch.from_numpy(cache.mean(args.array)).float()
    variant.set_normalization(mean_D, cache.statistics(args.array)["mean_square_norm"])
    trainer = Trainer(variant, args.steps, "cpu")
    (orthogonal,) = (one for one in variant.mechanisms if isinstance(one, GramSchmidt))
    print(f"`python benchmarks/gram_schmidt.py`, {date.today()}, {machine()}.")
    print(f"collapse-06, {d_in} -> {args.width}, learning rate {args.lr:g}.\n")
    print(
        "| step | largest condition number | error of two Cholesky factorizations | of a float32 QR |\n"
        "|---|---|---|---|"
    )
    with BatchLoader(cache, args.array, 1024) as batches:
        for number in range(args.steps):
            trainer.run_periodic(number, trainer.step(next(batches)))
            if (number + 1) % args.every == 0:
                rows_GMD = orthogonal.rows.grouped(variant.sae).detach()  # the free rows
                exact_GMD = gram_schmidt(rows_GMD.double())
                both = (by(rows_GMD) for by in (gram_schmidt_by_products, gram_schmidt))
                errors = [float((found_GMD - exact_GMD).abs().max()) for found_GMD in both]
                condition = float(torch.linalg.cond(rows_GMD.double()).max())
                print(f"| {number + 1} | {condition:.1f} | {errors[0]:.1e} | {errors[1]:.1e} |", flush=True)


if __name__ == "__main__":
    main()
