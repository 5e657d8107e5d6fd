"""A peer's trainers for bench_train.py, in the peer's environment: `python time_peer.py dictionary_learning`.

Reads one JSON line a request and answers with one: what is named is built on first use, takes one step that does not
count, and is timed. So the processes take turns, and only one works at a time. As published: no deviation is taken out.
"""

import importlib
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode


def batches(batch: int, d_in: int) -> list[Tensor]:
    """What everybody trains on."""
    random = torch.Generator().manual_seed(0)
    return [(torch.randn(batch, d_in, generator=random) / d_in**0.5).bfloat16() for _ in range(4)]


def timed(step: Callable[[int], object], steps: int) -> float:
    """Milliseconds of processor time a step."""
    started = time.process_time()
    for number in range(steps):
        step(number)
    return (time.process_time() - started) / steps * 1e3


def flops(step: Callable[[int], object]) -> int:
    """Of the matrix products of a step; of embedding_bag's none are counted."""
    with FlopCounterMode(display=False) as counter:
        step(0)
    return counter.get_total_flops()


def peers_step(name: str, recipe: str, options: dict[str, Any]) -> Callable[[int], object]:
    module = importlib.import_module(f"agree_{name}")
    torch.manual_seed(0)
    trainer, taken = module.build(recipe, options), 0
    x = [x_BD.float() for x_BD in batches(options["batch"], options["d_in"])]

    def step(number: int) -> None:
        nonlocal taken
        x_BD = x[number % len(x)]
        if name == "saelens":
            trainer.step(x_BD)
            trainer.n_training_steps += 1
        else:
            trainer.update(taken, x_BD)
        taken += 1

    return step


def main() -> None:
    torch.set_num_threads(1)
    opened: dict[str, Callable[[int], object]] = {}
    answers, sys.stdout = sys.stdout, sys.stderr  # a peer that prints does not answer for us
    for line in sys.stdin:
        asked = json.loads(line)
        if asked["do"] == "forget":
            opened.clear()
            found: float = 0
        else:
            if asked["recipe"] not in opened:
                opened[asked["recipe"]] = peers_step(sys.argv[1], asked["recipe"], asked["options"])
                opened[asked["recipe"]](0)
            step = opened[asked["recipe"]]
            found = flops(step) if asked["do"] == "flops" else timed(step, asked["steps"])
        print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    main()
