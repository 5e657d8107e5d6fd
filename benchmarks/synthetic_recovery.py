"""Measure how well variants recover the atoms from which synthetic data is built.

    x = sum_i c_i a_i,     a_i unit vectors, about `l0` of them active, c_i uniform in [0.5, 1.5]

    python benchmarks/synthetic_recovery.py
    python benchmarks/synthetic_recovery.py --variant topk --variant jumprelu --steps 1000

Each atom is compared with the nearest decoder row by cosine. The table has the mean cosine over atoms before and after
training, and the number of atoms above 0.9 after it. Learning rates and penalties are chosen for this data. They
do not carry over to language models: the data has width 64, and training takes 3,000 steps. A dictionary has two
latents per atom: with one, each latent that dies or duplicates another would lose an atom.
"""

import argparse

import torch
from torch import Tensor
from torch.nn.functional import normalize

import sae.train.variants  # noqa: F401  (registers the recipes)
from sae.train.loop import Trainer
from sae.train.recipe import RECIPES, find_recipe
from sae.train.variant import RunConfig

ATOMS, D_IN, D_SAE, L0, BATCH = 128, 64, 256, 4, 512

# These options are added to lr = 3e-3. A recipe that is not listed gets k = 4 if it has an option k; otherwise it gets
# l1 = 0.2 if it has an option l1.
OPTIONS: dict[str, dict[str, float | int]] = {
    "jumprelu": {"l0": L0, "bandwidth": 0.1, "penalty_warmup": 1500},
    "jumprelu-step": {"penalty": 0.03, "bandwidth": 0.1, "penalty_warmup": 1500},
    "jumprelu-tanh": {"penalty": 1.0, "lr": 1e-3},
    "april": {"l1": 1.6},  # 0.2 sqrt(d_in)
    "p-anneal": {"l1": 0.1},
    "switch": {"k": L0, "experts": 4},
}


def options_of(name: str) -> dict[str, float | int]:
    options = find_recipe(name).options
    default = {"k": L0} if "k" in options else {"l1": 0.2} if "l1" in options else {}
    return {"lr": 3e-3} | OPTIONS.get(name, default)


class Atoms:
    """The true dictionary, and batches generated from it."""

    def __init__(self, seed: int = 0) -> None:
        # This seed differs from the seed of the weights: with the same seed, the weights would start as the atoms.
        self.random = torch.Generator().manual_seed(1000 + seed)
        self.atoms_AD = normalize(torch.randn(ATOMS, D_IN, generator=self.random), dim=1)

    def rows(self, count: int) -> Tensor:
        active_BA = torch.rand(count, ATOMS, generator=self.random) < L0 / ATOMS
        return (active_BA * (0.5 + torch.rand(count, ATOMS, generator=self.random))) @ self.atoms_AD

    def nearest_cosine(self, dec_FD: Tensor) -> Tensor:
        """The cosine between each atom and its nearest decoder row."""
        return (self.atoms_AD @ normalize(dec_FD, dim=1).T).max(1).values


def recover(name: str, steps: int, seed: int = 0) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Train a variant on fresh rows. Returns each atom's cosine before and after, and metrics of the last 50 steps."""
    data = Atoms(seed)
    torch.manual_seed(seed)
    sample = data.rows(20_000)
    config = RunConfig(D_IN, D_SAE, steps, BATCH, variance=float(sample.var(0).mean()))
    variant = find_recipe(name).make(config, options_of(name))
    variant.set_normalization(sample.mean(0), float(sample.square().sum(1).mean()))
    trainer, before_A = Trainer(variant, steps, "cpu"), data.nearest_cosine(variant.sae.W_dec.detach())
    for number in range(steps):
        if number == steps - 50:
            trainer.pop_metrics()
        trainer.run_periodic(number, trainer.step(data.rows(BATCH)))
    return before_A, data.nearest_cosine(variant.sae.W_dec.detach()), trainer.pop_metrics()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", action="append", help="repeatable; default: all")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"| variant | options | before | after | atoms > 0.9 | L0 | EV | dead |\n|{'---|' * 8}")
    for name in args.variant or sorted(RECIPES):
        before_A, cosine_A, metrics = recover(name, args.steps, args.seed)
        options = ", ".join(f"{key}={value:g}" for key, value in options_of(name).items())
        print(
            f"| {name} | {options} | {float(before_A.mean()):.3f} | {float(cosine_A.mean()):.3f} "
            f"| {int((cosine_A > 0.9).sum())} of {ATOMS} "
            f"| {metrics['l0']:.1f} | {metrics['explained_variance']:.3f} | {metrics['dead']:.0%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
