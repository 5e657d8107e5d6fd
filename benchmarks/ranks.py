"""The gain from several processes of a launcher: `python benchmarks/ranks.py train|harvest|evaluate [--rounds 3]`.

It compares the commands that a user would give, `torchrun --nproc_per_node 2 -m sae ...` and `sae ...`, in rounds, in
random order:

    pinned     one process on one core, and two processes on one core each (taskset); each has one thread
    unpinned   one process with two threads, and two processes with one thread each; the system chooses the cores

Three durations are printed: that of the work itself, according to the timestamps of the files that it writes; that of
the whole command, which starts Python, imports torch in every process and, if runs are assigned to processes, times a
few steps of each recipe; and the largest processor time of a process, which other work on the machine hardly changes.
The first two are meaningful only on a machine with two idle cores. Memory is the peak anonymous memory of each process.

    train      eight runs of relu, 576 -> 2,304, in batches of 1,024 tokens: eight seeds, which share a pass
    harvest    layer 12 of gemma-2-mini in windows of 8,192 rows; the work lasts from the end of cutting the text to the
               last commit, so it includes loading the model but not the statistics at the end
    evaluate   core of eight such SAEs of gemma-2-mini, 128 -> 2,304, with nothing computed before: the work is from the
               first stored pass of the model to the last result
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

from common import in_rounds, machine, make_cache

CORES = 2


class Measured(NamedTuple):
    """The measurements of a command that succeeded."""

    command: float  # seconds of wall time, from its start to its end
    work: float  # seconds between the first and the last file that count
    processor: float  # largest seconds of a process, in all its threads
    memory: dict[int, float]  # rank -> peak of anonymous memory, MB


class Process(NamedTuple):
    """The resources that a process has used so far."""

    rank: int
    memory: float  # anonymous, MB
    processor: float  # seconds


Files = tuple[str, str]  # patterns of the files whose timestamps are the beginning and the end of the work


def run(words: list[str], out: Path, files: Files, *, processes: int, threads: int, pinned: bool) -> Measured:
    """Run and measure `sae` with these arguments. `out` is SAE_HOME, and also the folder of the command's files."""
    sae = [sys.executable, "-P", "-m", "sae", *words]
    if pinned:  # the shell of each rank replaces itself with the command, on the core with the rank's number
        sae = ["sh", "-c", 'exec taskset -c "${LOCAL_RANK:-0}" "$@"', "sh", *sae]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [*torchrun, "--no-python", *sae] if processes > 1 else sae
    started = time.perf_counter()
    with (
        tempfile.TemporaryFile() as said,
        subprocess.Popen(command, env=environment(threads, out), stdout=said, stderr=said) as process,
    ):
        seen: list[Process] = []
        while process.poll() is None:
            pids = [process.pid, *descendants(process.pid)]
            seen += filter(None, (look_at(pid, launched=processes > 1) for pid in pids))
            time.sleep(0.02)
        seconds = time.perf_counter() - started
        if process.returncode:
            said.seek(0)
            tail = "\n".join(said.read().decode().splitlines()[-20:])
            raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n{tail}")
    ranks = sorted({one.rank for one in seen})
    assert ranks == list(range(processes)), f"expected {processes} processes, found {len(ranks)}"
    peaks = {rank: max(one.memory for one in seen if one.rank == rank) for rank in ranks}
    first, last = ([path.stat().st_mtime for path in out.glob(pattern)] for pattern in files)
    return Measured(seconds, max(last) - min(first), max(one.processor for one in seen), peaks)


def environment(threads: int, home: Path) -> dict[str, str]:
    root = str(Path(__file__).resolve().parents[2])  # the parent of the package's folder sae
    changes = {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.environ.get("PYTHONPATH", root), "SAE_HOME": str(home)}
    return os.environ | changes


def descendants(pid: int) -> list[int]:
    """All descendants of a process."""
    try:
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return [one for child in children for one in (child, *descendants(child))]


def look_at(pid: int, *, launched: bool) -> Process | None:
    """The resources of a process that has a rank or is the only process; None for the launcher and for ended
    processes."""
    folder = Path(f"/proc/{pid}")
    try:
        variables = (folder / "environ").read_bytes().split(b"\0")
        status = (folder / "status").read_text().splitlines()
        times = (folder / "stat").read_text().rpartition(")")[2].split()[11:13]  # user and system time, in ticks
    except OSError:
        return None
    ranks = [int(value.removeprefix(b"RANK=")) for value in variables if value.startswith(b"RANK=")]
    sizes = [int(line.split()[1]) / 1e3 for line in status if line.startswith("RssAnon")]
    if not sizes or (launched and not ranks):
        return None
    return Process(ranks[0] if ranks else 0, sizes[0], sum(map(int, times)) / os.sysconf("SC_CLK_TCK"))


def compare(measure: Callable[..., Measured], rounds: int) -> None:
    """Measure all ways in rounds. Print a line for each way, and the two ratios."""
    ways = {
        "pinned, one process": {"processes": 1, "threads": 1, "pinned": True},
        "pinned, two processes": {"processes": 2, "threads": 1, "pinned": True},
        "unpinned, one process of two threads": {"processes": 1, "threads": 2, "pinned": False},
        "unpinned, two processes": {"processes": 2, "threads": 1, "pinned": False},
    }
    found = in_rounds({name: partial(measure, **how) for name, how in ways.items()}, rounds)
    fields = ("work", "command", "processor")
    print(f"{'':38} {' '.join(f'{field:>12}' for field in fields)}   memory of each process, MB; times in seconds")
    for name, all_rounds in found.items():
        ranks = sorted(all_rounds[0].memory)
        memory = ", ".join(f"{max(one.memory[rank] for one in all_rounds):,.0f}" for rank in ranks)
        seconds = (median(getattr(one, field) for one in all_rounds) for field in fields)
        print(f"{name:38} {' '.join(f'{value:12.1f}' for value in seconds)}   {memory}")
    names = list(ways)
    for title, one, two in (("pinned", *names[:2]), ("unpinned", *names[2:])):
        for field in fields:
            ratios = [getattr(a, field) / getattr(b, field) for a, b in zip(found[one], found[two], strict=True)]
            spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
            print(f"{title}, {field}: two processes are {median(ratios):.2f} times as fast as one ({spread})")


def train(options: argparse.Namespace) -> None:
    """Eight runs; the work lasts from the first run.json to the last sae.json."""
    steps, rounds = options.steps, options.rounds
    with tempfile.TemporaryDirectory() as scratch:
        cache = make_cache(Path(scratch) / "cache", 0.4, d_in=576)
        words = ["train", "--cache", str(cache.folder), "--variant", "relu", "--width", "2304", "--batch-size", "1024"]
        words += ["--steps", str(steps), "--checkpoint-every", str(steps), "--device", "cpu"]
        words += [word for seed in range(8) for word in ("--seed", str(seed))]
        numbers = iter(range(1000))

        def measure(**how: object) -> Measured:
            out = Path(scratch) / f"runs{next(numbers)}"
            files = "*/run.json", "*/sae.json"
            return run([*words, "--out", str(out)], out, files, **how)  # type: ignore[arg-type]

        compare(measure, rounds)


def harvest(options: argparse.Namespace) -> None:
    """A harvest of the embedded text."""
    words = ["harvest", "--model", "gemma-2-mini", "--layer", "12", "--tokens", str(options.tokens)]
    words += ["--window", "8192", "--device", "cpu"]
    with tempfile.TemporaryDirectory() as scratch:
        numbers = iter(range(1000))

        def measure(**how: object) -> Measured:
            out = Path(scratch) / f"cache{next(numbers)}"
            files = "row_ctx/zarr.json", "commits/*.json"
            return run([*words, "--out", str(out)], out, files, **how)  # type: ignore[arg-type]

        compare(measure, options.rounds)


def evaluate(options: argparse.Namespace) -> None:
    """Evaluates eight SAEs, each time with a new SAE_HOME that has no stored results."""
    with tempfile.TemporaryDirectory() as scratch:
        made, cache = Path(scratch) / "made", Path(scratch) / "cache"
        width = ["--width", "2304", "--steps", str(options.steps), "--device", "cpu"]
        seeds = [word for seed in range(8) for word in ("--seed", str(seed))]
        for words in (
            ["harvest", "--model", "gemma-2-mini", "--layer", "12", "--tokens", "200k", "--out", str(cache)],
            ["train", "--cache", str(cache), "--variant", "relu", *width, *seeds, "--out", str(made / "runs")],
        ):
            subprocess.run([sys.executable, "-P", "-m", "sae", *words], env=environment(CORES, made), check=True)
        numbers = iter(range(1000))

        def measure(**how: object) -> Measured:
            home = Path(scratch) / f"home{next(numbers)}"
            shutil.copytree(made / "runs", home / "runs")
            words = ["evaluate", *map(str, sorted((home / "runs").iterdir())), "--suite", "core", "--device", "cpu"]
            files = "activations/evaluation/text_pass-*.json", "runs/*/evaluations/core.json"
            return run([*words, "--no-references"], home, files, **how)  # type: ignore[arg-type]

        compare(measure, options.rounds)


STAGES = {"train": train, "harvest": harvest, "evaluate": evaluate}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100, help="train: steps of each run")
    parser.add_argument("--tokens", type=int, default=131_072, help="harvest: rows, in windows of 8,192")
    options = parser.parse_args()
    if len(os.sched_getaffinity(0)) < CORES:
        raise SystemExit(f"needs {CORES} cores")
    print(machine())
    STAGES[options.stage](options)


if __name__ == "__main__":
    main()
