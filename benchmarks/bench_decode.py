"""The n/k above which gathering rows is faster: `python benchmarks/bench_decode.py [--d-in 128,512,2304]`.

Times whole training steps of `topk`, once with dense products and once by gathering the rows of the active latents
(`train/sparse_ops.py`). Both have the same weights and batches, and run once per round, in random order. Times are
processor time of one thread, which other work on the machine hardly changes. The ratio to the dense step, `by rows /
dense`, is below 1 where gathering is faster. `sparse_ops.SPARSE_FROM` is set from this table.
"""

import argparse
import statistics
from collections.abc import Callable

import torch

from common import Spent, in_rounds, machine
from sae.train import sparse_ops
from sae.train.loop import Trainer
from sae.train.recipe import find_recipe
from sae.train.variant import RunConfig

ALWAYS = {"cpu": {"float32": 1.0}}


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def make_step(
    config: RunConfig, k: int, x_BD: torch.Tensor, sparse_from: dict[str, dict[str, float]]
) -> Callable[[], float]:
    """A function that returns the milliseconds of a training step. Rows are gathered at and above the n/k in
    `sparse_from`."""
    torch.manual_seed(0)
    trainer = Trainer(find_recipe("topk").make(config, {"k": k}), config.steps, "cpu")

    def step() -> float:
        sparse_ops.SPARSE_FROM = sparse_from
        started = Spent.now()
        trainer.step(x_BD)
        return Spent.since(started).processor * 1e3

    step()
    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-in", type=numbers, default=[128, 512, 2304])
    parser.add_argument("--width", type=numbers, default=[1, 8], help="times d_in")
    parser.add_argument("--ratio", type=numbers, default=[4, 8, 16, 32, 64, 128], help="n/k")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(machine())
    print("\n| d_in | n | k | n/k | dense, ms | by rows, ms | by rows / dense |\n|---|---|---|---|---|---|---|")
    for d_in in args.d_in:
        x_BD = torch.randn(args.batch, d_in).bfloat16()
        for n in (width * d_in for width in args.width):
            config = RunConfig(d_in, n, 1000, args.batch)
            for k in (n // ratio for ratio in args.ratio):
                ways = {
                    "dense": make_step(config, k, x_BD, {}),
                    "rows": make_step(config, k, x_BD, {"cpu": {"float32": 1}}),
                }
                median = {name: statistics.median(times) for name, times in in_rounds(ways, args.rounds).items()}
                share = median["rows"] / median["dense"]
                times = f"{median['dense']:.1f} | {median['rows']:.1f} | {share:.2f}"
                print(f"| {d_in} | {n} | {k} | {n / k:.0f} | {times} |")


if __name__ == "__main__":
    main()
