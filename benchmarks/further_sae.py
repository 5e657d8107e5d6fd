"""The time that `sae evaluate` takes for one more SAE with the quick suite and one thread, if the model's results are
on disk.

    python benchmarks/further_sae.py [--width 4x] [--systems 3] [--metrics core,absorption]

Harvests gemma-2-mini and trains systems with three seeds each; these SAEs need not be good. For the first three SAEs
everything is computed, including the results of the model and the references. Each other system adds three SAEs and the
stability of their three pairs. The time that the command takes when there is nothing to measure is subtracted. Times
are processor seconds, which hardly depend on other work on the machine.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from common import machine

SEEDS = ("--seed=0", "--seed=1", "--seed=2")
QUICK = "core,absorption,stability,sparse_probing_stdlib"
STEPS, RECIPES = 100, ("topk", "batchtopk", "jumprelu", "relu", "matryoshka")


def sae(home: Path, *arguments: str | Path) -> float:
    """Run a command with one thread and `home` as SAE_HOME. Returns the processor seconds that it took."""
    threads = {
        name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
    }
    before = used()
    done = subprocess.run(
        [sys.executable, "-P", "-m", "sae", *map(str, arguments)], env=os.environ | threads | {"SAE_HOME": str(home)},
        cwd=home, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"sae {arguments[0]} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return used() - before


def used() -> float:
    """Processor seconds of all finished child processes."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", default="4x")
    parser.add_argument("--tokens", default="500k")
    parser.add_argument("--systems", type=int, default=3, choices=range(2, len(RECIPES) + 1))
    parser.add_argument("--metrics", default=QUICK, help="metrics, measured one at a time (%(default)s)")
    parser.add_argument("--set", action="append", default=[], help="as for `sae evaluate`; can be repeated")
    asked = parser.parse_args()
    options = [part for one in asked.set for part in ("--set", one)]
    print(machine("scikit-learn"), "\n")
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        sae(home, "harvest", "--model", "gemma-2-mini", "--layer", "12", "--tokens", asked.tokens)
        systems = []
        for recipe in RECIPES[: asked.systems]:
            sae(home, "train", "--variant", recipe, "--width", asked.width, "--steps", str(STEPS), *SEEDS)
            systems.append([path.parent for path in home.glob("runs/*/run.json") if of(path, recipe)])
        evaluate = partial(sae, home, "evaluate", *options, "--suite")
        costs = {metric: [evaluate(metric, *runs) for runs in systems] for metric in asked.metrics.split(",")}
        start = evaluate(asked.metrics, *systems[0])
    print(f"gemma-2-mini, {asked.tokens} tokens, width {asked.width}; the command itself takes {start:.1f} s\n")
    print(f"| metric | {' | '.join(('first three SAEs', *RECIPES[1 : asked.systems]))} | per additional SAE, s |")
    print(f"|---|{'---|' * asked.systems}---|")
    more = {metric: (statistics.mean(spent[1:]) - start) / len(SEEDS) for metric, spent in costs.items()}
    for metric, spent in costs.items():
        print(f"| {metric} | {' | '.join(f'{one:.1f}' for one in spent)} | {more[metric]:.1f} |")
    print(f"| all | {'| ' * asked.systems}| {sum(more.values()):.1f} |")


def of(path: Path, recipe: str) -> bool:
    return bool(json.loads(path.read_text())["variant"] == recipe)


if __name__ == "__main__":
    main()
