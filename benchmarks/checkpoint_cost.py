"""The cost of a checkpoint on a CPU, written while training waits and written by a background thread.

    python -m sae.benchmarks.checkpoint_cost [--rounds 7] [--recipe topk ...] [--size 576x2304x1024 ...]

Every round takes the same steps three times, in random order: without a checkpoint, and in each of the two ways with
one checkpoint in the middle. The columns, per checkpoint: `processor` is the additional processor time of all threads
of the process, compared with the steps alone; `training` is the same for the training thread alone; `held` is the
wall-clock time for which `save` blocked this thread. Processor time is nearly independent of other work on the machine.
`share` is the checkpoints' share of the time of a run with a checkpoint every 1,000 steps, computed from `processor`
and from `training`.
"""

import argparse
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from sae.benchmarks.common import in_rounds, machine, medians
from sae.train import variants  # noqa: F401  (registers the recipes)
from sae.train.checkpoint_writer import CheckpointWriter
from sae.train.loop import Trainer
from sae.train.memory import state_bytes
from sae.train.recipe import find_recipe
from sae.train.variant import RunConfig

RECIPES, SIZES = ("relu", "topk", "batchtopk"), ("576x2304x1024", "2304x4096x1024")
EVERY, STEPS = 1000, 4


class Cost(NamedTuple):
    """Seconds of one round."""

    processor: float
    training: float
    held: float


def take_round(trainer: Any, x_BD: torch.Tensor, writer: CheckpointWriter | None) -> Cost:
    """Take `STEPS` steps. If `writer` is given, also save a checkpoint after half of the steps, and wait at the end
    until the checkpoint is written."""
    processor, training, held = time.process_time(), time.thread_time(), 0.0
    for number in range(STEPS):
        trainer.step(x_BD)
        if writer is not None and number == STEPS // 2 - 1:
            started = time.perf_counter()
            writer.save([trainer], int(trainer.i))
            held = time.perf_counter() - started
    if writer is not None:
        writer.wait()
    return Cost(time.process_time() - processor, time.thread_time() - training, held)


def measure(name: str, size: str, rounds: int) -> str:
    d_in, d_sae, tokens = map(int, size.split("x"))
    torch.manual_seed(0)
    variant = find_recipe(name).make(RunConfig(d_in, d_sae, 100_000, tokens), {})
    trainer: Any = Trainer(variant, 100_000, "cpu")
    x_BD = torch.randn(tokens, d_in).bfloat16()
    with tempfile.TemporaryDirectory(dir=".") as folder:
        trainer.run, trainer.digest = SimpleNamespace(folder=Path(folder)), "0" * 64
        with CheckpointWriter("cpu", background=False) as waits, CheckpointWriter("cpu") as background:
            writers = {"steps": None, "waits": waits, "background": background}
            for writer in writers.values():
                take_round(trainer, x_BD, writer)  # the first call allocates the copies and the moments
            ways = {way: lambda writer=writer: take_round(trainer, x_BD, writer) for way, writer in writers.items()}
            costs = in_rounds(ways, rounds)
    found = {
        part: medians({way: [getattr(c, part) for c in some] for way, some in costs.items()}) for part in Cost._fields
    }
    step, cells = found["processor"]["steps"] / STEPS, [name, size, f"{state_bytes(variant) / 1e6:.0f}"]
    cells.append(f"{1e3 * step:.0f}")
    for way in ("waits", "background"):
        processor, training = (found[part][way] - found[part]["steps"] for part in ("processor", "training"))
        cells += [f"{1e3 * seconds:.0f}" for seconds in (processor, training, found["held"][way])]
        cells.append(" / ".join(f"{seconds / (EVERY * step):.2%}" for seconds in (processor, training)))
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", action="append")
    parser.add_argument("--size", action="append", help="d_in x d_sae x tokens")
    parser.add_argument("--rounds", type=int, default=7)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{machine('safetensors')}; one thread of torch; times in ms per checkpoint\n")
    parts = ("processor", "training", "held", f"share at {EVERY:,}")
    heads = [f"{way}: {part}" for way in ("waits", "background") for part in parts]
    heads = ["recipe", "d_in x d_sae x tokens", "state, MB", "step, ms", *heads]
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    for size in asked.size or SIZES:
        for name in asked.recipe or RECIPES:
            print(measure(name, size, asked.rounds), flush=True)


if __name__ == "__main__":
    main()
