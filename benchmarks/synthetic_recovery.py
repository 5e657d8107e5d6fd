"""Which variants find the atoms that data was made of?

    x = sum_i c_i a_i,     a_i unit vectors, about `l0` of them active, c_i uniform in [0.5, 1.5]

    python benchmarks/synthetic_recovery.py
    python benchmarks/synthetic_recovery.py --variant topk --variant jumprelu --steps 1000

For each atom, the cosine of the nearest decoder row; the table has its mean over atoms before and after training, and
how many are above 0.9 in the end. Rates and penalties are for this data: width 64 and 3,000 steps are far from a
language model. A dictionary has two latents for an atom: with one, whoever dies or doubles loses an atom.
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

# Beside the rate of 3e-3, k = 4 where a recipe has a k, and l1 = 0.2 where it has none but an l1.
OPTIONS: dict[str, dict[str, float | int]] = {
    "jumprelu": {"l0": L0, "bandwidth": 0.1, "penalty_warmup": 1500},
    "jumprelu-step": {"penalty": 0.03, "bandwidth": 0.1, "penalty_warmup": 1500},
    "jumprelu-tanh": {"penalty": 1.0, "lr": 1e-3},
    "april": {"l1": 1.6},  # 0.2 sqrt(d_in)
    "p-anneal": {"l1": 0.1},
    "switch": {"k": L0, "experts": 4},
}


def options_of(name: str) -> dict[str, float | int]:
    own = find_recipe(name).options
    usual = {"k": L0} if "k" in own else {"l1": 0.2} if "l1" in own else {}
    return {"lr": 3e-3} | OPTIONS.get(name, usual)


class Atoms:
    """The dictionary, and batches made of it."""

    def __init__(self, seed: int = 0) -> None:
        self.random = torch.Generator().manual_seed(1000 + seed)  # not the weights' seed: they would start as the atoms
        self.atoms_AD = normalize(torch.randn(ATOMS, D_IN, generator=self.random), dim=1)

    def rows(self, count: int) -> Tensor:
        active_BA = torch.rand(count, ATOMS, generator=self.random) < L0 / ATOMS
        return (active_BA * (0.5 + torch.rand(count, ATOMS, generator=self.random))) @ self.atoms_AD

    def found(self, dec_FD: Tensor) -> Tensor:
        """The cosine of each atom's nearest decoder row."""
        return (self.atoms_AD @ normalize(dec_FD, dim=1).T).max(1).values


def recover(name: str, steps: int, seed: int = 0) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Train a variant on fresh rows; the cosine of each atom before and after, and the metrics of the last fifty steps."""
    data = Atoms(seed)
    torch.manual_seed(seed)
    sample = data.rows(20_000)
    setting = RunConfig(D_IN, D_SAE, steps, BATCH, variance=float(sample.var(0).mean()))
    variant = find_recipe(name).make(setting, options_of(name))
    variant.set_normalization(sample.mean(0), float(sample.square().sum(1).mean()))
    training, before_A = Trainer(variant, steps, "cpu"), data.found(variant.sae.W_dec.detach())
    for number in range(steps):
        if number == steps - 50:
            training.pop_metrics()
        training.run_periodic(number, training.step(data.rows(BATCH)))
    return before_A, data.found(variant.sae.W_dec.detach()), training.pop_metrics()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", action="append", help="repeats; all without it")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    print(f"| variant | options | before | after | atoms > 0.9 | L0 | EV | dead |\n|{'---|' * 8}")
    for name in asked.variant or sorted(RECIPES):
        before_A, cosine_A, metrics = recover(name, asked.steps, asked.seed)
        options = ", ".join(f"{key}={value:g}" for key, value in options_of(name).items())
        print(
            f"| {name} | {options} | {float(before_A.mean()):.3f} | {float(cosine_A.mean()):.3f} | {int((cosine_A > 0.9).sum())} of {ATOMS} "
            f"| {metrics['l0']:.1f} | {metrics['explained_variance']:.3f} | {metrics['dead']:.0%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
