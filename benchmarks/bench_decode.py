"""From which n/k on are rows gathered? `python benchmarks/bench_decode.py [--d-in 128,512,2304] [--n 2304,18432]`.

Whole training steps of `topk`, once by dense products and once by the rows of the chosen latents (`train/sparse_ops.py`), the
same weights and batches, in rounds, in random order. One thread, and its processor time: what others do on the machine
hardly moves it. `of dense` is below 1 where rows are faster; `sparse_ops.SPARSE_FROM` is set from this table.
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


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def step_of(setting: RunConfig, k: int, x_BD: torch.Tensor, ways: dict[str, int]) -> Callable[[], float]:
    """Milliseconds of a step that gathers rows from these n/k on."""
    torch.manual_seed(0)
    training = Trainer(find_recipe("topk").make(setting, {"k": k}), setting.steps, "cpu")

    def step() -> float:
        sparse_ops.SPARSE_FROM = ways
        started = Spent.now()
        training.step(x_BD)
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
    asked = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(machine())
    print("\n| d_in | n | k | n/k | dense, ms | by rows, ms | of dense |\n|---|---|---|---|---|---|---|")
    for d_in in asked.d_in:
        x_BD = torch.randn(asked.batch, d_in).bfloat16()
        for n in (width * d_in for width in asked.width):
            setting = RunConfig(d_in, n, 1000, asked.batch)
            for k in (n // ratio for ratio in asked.ratio):
                ways = {"dense": step_of(setting, k, x_BD, {}), "rows": step_of(setting, k, x_BD, {"cpu": 1})}
                found = {name: statistics.median(times) for name, times in in_rounds(ways, asked.rounds).items()}
                share = found["rows"] / found["dense"]
                print(
                    f"| {d_in} | {n} | {k} | {n / k:.0f} | {found['dense']:.1f} | {found['rows']:.1f} | {share:.2f} |"
                )


if __name__ == "__main__":
    main()
