"""A peer's trainers for bench_train.py, in the peer's environment: `python time_peer.py dictionary_learning`.

Reads requests, one JSON line each, and answers each with one line. The process works only while it answers, so that the
processes of several peers can take turns. A trainer is built at its first request, takes one untimed step, and is then
timed. The trainers are used as published, without removing deviations.
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
    """The batches that every side trains on."""
    random = torch.Generator().manual_seed(0)
    return [(torch.randn(batch, d_in, generator=random) / d_in**0.5).bfloat16() for _ in range(4)]


def timed(step: Callable[[int], object], steps: int) -> float:
    """Milliseconds of processor time per step."""
    started = time.process_time()
    for number in range(steps):
        step(number)
    return (time.process_time() - started) / steps * 1e3


def flops(step: Callable[[int], object]) -> int:
    """FLOP of the matrix products of a step. The FLOP of embedding_bag are not counted."""
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
    answers, sys.stdout = sys.stdout, sys.stderr  # what a peer prints must not be read as an answer
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "forget":
            opened.clear()
            answer: float = 0
        else:
            if request["recipe"] not in opened:
                opened[request["recipe"]] = peers_step(sys.argv[1], request["recipe"], request["options"])
                opened[request["recipe"]](0)
            step = opened[request["recipe"]]
            answer = flops(step) if request["do"] == "flops" else timed(step, request["steps"])
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
