"""Planned and measured memory of training, for a recipe of every family at two sizes, on a CPU.

    python -m sae.benchmarks.step_memory [--recipe relu ...] [--size 256x1024x512 ...]

Each measurement runs in a separate process. The process trains for a few steps and reads metrics; half of the latents
are dead, and between two of the steps every mechanism acts. The measured memory is the growth of the process's peak
resident set (VmHWM of /proc) since torch was loaded and a tiny step was taken. `planned` is what `sae train` plans,
without batches and checkpoints.
"""

import argparse
import subprocess
import sys
from pathlib import Path

RECIPES = (
    "relu", "april", "p-anneal", "topk", "batchtopk", "jumprelu", "jumprelu-tanh", "gated", "switch", "matryoshka",
    "ortsae", "frozen-decoder", "decorrelation", "competition", "collapse-10", "hierarchical", "progressive",
)  # fmt: skip
SIZES = ("576x2304x1024", "576x8192x2048")  # d_in, d_sae, tokens


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def measure(name: str, size: str, parts: int) -> None:
    """Print the planned and the measured bytes of a recipe."""
    import torch

    from sae.common.device import keep_freed_memory
    from sae.train.loop import Trainer
    from sae.train.memory import DEAD_SHARE, run_memory, untrained_variant
    from sae.train.passes import Resized
    from sae.train.recipe import find_recipe
    from sae.train.variant import RunConfig

    keep_freed_memory()  # as `sae train` does
    d_in, d_sae, tokens = map(int, size.split("x"))

    def train(run: Resized, steps: int) -> None:
        trainer = Trainer(untrained_variant(run, "cpu"), run.config.steps, "cpu", run.config.accumulate)
        dead = trainer.variant.dead
        dead.index_A = torch.arange(round(DEAD_SHARE * run.config.d_sae))
        dead.real_A = torch.ones(len(dead.index_A))
        for mechanism in trainer.variant.mechanisms:
            mechanism.every = mechanism.every and 2
        dead.every = None  # keeps the list of dead latents
        x_BD = torch.randn(run.config.batch_size, run.config.d_in).bfloat16()
        for number in range(steps):
            trainer.run_periodic(number, trainer.step(x_BD))
        trainer.pop_metrics()

    run = Resized(find_recipe(name), {}, None, RunConfig(d_in, d_sae, 1000, tokens, accumulate=parts))
    planned = run_memory(run, "cpu")
    train(Resized(run.recipe, {}, None, RunConfig(64, 512, 10, 64)), 2)  # libraries are loaded
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    train(run, 4)
    print(planned.state, planned.step, resident("VmHWM") - before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", action="append")
    parser.add_argument("--size", action="append", help="d_in x d_sae x tokens, such as 576x2304x1024")
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        return measure(*asked.one, asked.accumulate)
    print(
        "| recipe | d_in x d_sae x tokens | state, MB | in a step, MB | planned, MB | measured, MB | measured/planned |"
    )
    print("|---|---|---|---|---|---|---|")
    for size in asked.size or SIZES:
        for name in asked.recipe or RECIPES:
            command = [sys.executable, "-P", "-m", "sae.benchmarks.step_memory", "--one", name, size]
            done = subprocess.run(
                [*command, "--accumulate", str(asked.accumulate)], capture_output=True, text=True, check=True
            )
            state, step, measured = (int(number) / 1e6 for number in done.stdout.split())
            planned = state + step
            numbers = f"{state:.1f} | {step:.1f} | {planned:.1f} | {measured:.1f} | {measured / planned:.2f}"
            print(f"| {name} | {size} | {numbers} |", flush=True)
    return None


if __name__ == "__main__":
    main()
