"""Our cache against SAELens': `python benchmarks/peers/saelens_cache.py --peer their/env/bin/python [--gb 0.6]`.

Both sides get the same rows, each in its own process and environment, and take turns. The table has medians over
rounds.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import feed

HERE = Path(__file__).parent
DISTURBED, TRIES = 0.1, 4  # a run is repeated if other processes took more than this share of the cores
READS = {"disk": "opened, from the disk", "memory": "opened, from memory", "again": "left open, from memory"}


def runs(peer: str) -> dict[str, list[str]]:
    """Name -> command, to which the rows and the folder are appended."""
    ours, theirs = [sys.executable, str(HERE / "ours.py")], [peer, str(HERE / "saelens.py")]
    return {
        "ours": ours,
        "ours, not flushed": [*ours, "--no-flush"],
        "SAELens float32": theirs,
        "SAELens float16": [*theirs, "--dtype", "float16"],
    }


def processor_seconds() -> tuple[float, float, float]:
    """Seconds: processor time of the machine, stolen time included; processor time of the runs so far; wall time."""
    user, nice, system, _, _, *rest = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:9])
    runs = resource.getrusage(resource.RUSAGE_CHILDREN)
    machine = (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")
    return machine, runs.ru_utime + runs.ru_stime, time.perf_counter()


def others(before: tuple[float, float, float]) -> float:
    """The share of the cores that other processes have taken since the time of `before`."""
    machine, runs, clock = (now - then for now, then in zip(processor_seconds(), before, strict=True))
    return max(0.0, machine - runs) / clock / os.cpu_count()


def wait_for_quiet(seconds: float) -> None:
    while seconds > 0:
        before = processor_seconds()
        time.sleep(2)
        seconds -= 2
        if others(before) < DISTURBED / 2:
            return


def run(command: list[str], rows: Path, folder: Path, check: bool, keep_memory: bool) -> dict:
    # Each library uses its default number of threads.
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    if command[0] != sys.executable:
        environment.pop("PYTHONPATH", None)
    if keep_memory:
        environment["GLIBC_TUNABLES"] = f"glibc.malloc.mmap_threshold={2**40}:glibc.malloc.trim_threshold={2**40}"
    shutil.rmtree(folder, ignore_errors=True)
    wait_for_quiet(60)
    before = processor_seconds()
    done = subprocess.run(
        [*command, str(rows), str(folder), *["--check"] * check], capture_output=True, text=True, env=environment
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1]) | {"others": others(before)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", required=True, help="the Python of an environment with sae-lens")
    parser.add_argument("--gb", type=float, default=0.6, help="size of the rows in bfloat16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--keep-memory", action="store_true", help="let glibc keep freed memory, on both sides")
    args = parser.parse_args()
    commands = runs(args.peer)
    found: dict[str, list[dict]] = {name: [] for name in commands}
    with tempfile.TemporaryDirectory(dir=".") as temporary:
        rows = Path(temporary, "rows.bin")
        tokens = feed.make(rows, args.gb)
        for number in range(args.rounds):
            for name in list(commands)[:: 1 if number % 2 else -1]:
                for _ in range(TRIES):
                    check = not found[name]
                    found[name].append(run(commands[name], rows, Path(temporary, "cache"), check, args.keep_memory))
                    if found[name][-1]["others"] < DISTURBED:
                        break

    for name, results in found.items():
        share = ", ".join(f"{result['others']:.0%}" for result in results)
        about = [results[0][key] for key in ("versions", "check") if key in results[0]]
        found[name] = [result for result in results if result["others"] < DISTURBED]
        print(f"{name}: {len(found[name])} valid runs; other processes took {share} of the cores", *about, sep="; ")
        if not found[name]:
            raise SystemExit("Other processes disturbed every run. Try again on an idle machine.")
    median = {
        name: {key: statistics.median(r[key] for r in results) for key, v in results[-1].items() if type(v) is not str}
        for name, results in found.items()
    }

    ours, theirs, half = median["ours"], median["SAELens float32"], median["SAELens float16"]
    print(
        f"\n{tokens:,} tokens x {feed.D_IN}, {2 * tokens * feed.D_IN / 1e9:.2f} GB of bfloat16; {args.rounds} rounds\n"
    )
    print("| thousand tokens/s, medians | ours | SAELens float32 | ratio | SAELens float16 | ratio |")
    print("|---|---|---|---|---|---|")

    def line(label: str, a: float, b: float, c: float, digits: int = 0) -> None:
        print(f"| {label} | {a:,.{digits}f} | {b:,.{digits}f} | {a / b:.2f} | {c:,.{digits}f} | {a / c:.2f} |")

    lazy = median["ours, not flushed"]["write"]
    for label, a, b, c in (
        ("write, as each does: ours flushes (fsync), SAELens does not", ours["write"], theirs["write"], half["write"]),
        ("write, both flushed", ours["write"], theirs["write flushed"], half["write flushed"]),
        ("write, neither flushed", lazy, theirs["write"], half["write"]),
    ):
        line(label, a / 1e3, b / 1e3, c / 1e3)
    for batch in feed.READ_BATCHES:
        for key, where in READS.items():
            name = f"read {batch} {key}"
            for end, how in (("", ""), (" float32", ", ours converted to float32")):
                line(f"read {batch} rows, {where}{how}", ours[name + end] / 1e3, theirs[name] / 1e3, half[name] / 1e3)
    line("GB on disk", ours["bytes"] / 1e9, theirs["bytes"] / 1e9, half["bytes"] / 1e9, 3)


if __name__ == "__main__":
    main()
