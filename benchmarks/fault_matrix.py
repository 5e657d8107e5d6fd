"""Cause every fault of caches and harvests with the real `sae` command: `python benchmarks/fault_matrix.py`.

A random Gemma 2 with two blocks is used to harvest a small text. Each fault is then caused in a process or in the
files; the command's message, its exit code and what the next command does become a row of docs/lab/faults.md. The
script fails if an exit code is not the expected one, if a traceback was printed, or if bytes differ from those of an
undisturbed harvest. Commands run in processes forked from one that has already imported torch, unless the fault
concerns the start of a process (signals to its parents, locale, pipes, limits). `faults/` has the faults, one file per
group.
"""

import argparse
import datetime
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from faults.bad_input import bad_inputs, bad_saes, bad_values
from faults.command import HARVEST, OK, context, sae
from faults.damage import damage, side_arrays
from faults.disks import full_disks
from faults.inputs import copy_folder, make_model, make_text, spoil_weights
from faults.kills import dealt, kills, launched
from faults.models import bad_models
from faults.outputs import outputs
from faults.packages import packages
from faults.places import files_limit, neighbours, places, plans, removal
from faults.records import records_of_runs
from faults.shares import shares
from faults.table import Matrix
from faults.writers import writers

ROOT = Path(__file__).parents[1]
LONGEST = 800  # characters of a message on the page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="names of groups, separated by commas; docs/lab/faults.md is then not written")
    only = parser.parse_args().only
    started, where = time.monotonic(), os.getcwd()
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    os.environ.pop("SAE_HOME", None)
    context.set_forkserver_preload(
        [
            "sae.harvest.repair",
            "sae.train.run",
            "sae.train.variants",
            "datasets",
            "transformers.models.gemma2.modeling_gemma2",
        ]
    )
    m = Matrix()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            for name, seed in (("tiny", 0), ("other", 1), ("nan", 0)):
                make_model(name, seed)
            for name in ("bare", "torn", "lacking", "wide"):
                shutil.copytree("tiny", name)
            spoil_weights()
            rows = make_text()
            for name, more in (("whole", []), ("packed", ["--compress"]), ("single", ["--batch-contexts", 1])):
                outcome = sae(*HARVEST, *more, "--out", name)
                assert outcome.code == OK, outcome
            copy_folder("kept")
            for name in ("one", "two"):
                copy_folder(f"homes/activations/{name}")
            groups: dict[str, Callable[[Matrix], None]] = {
                "disks": full_disks,
                "kills": kills,
                "launched": launched,
                "dealt": dealt,
                "shares": shares,
                "damage": damage,
                "side": side_arrays,
                "neighbours": neighbours,
                "writers": writers,
                "texts": lambda m: bad_inputs(m, rows),
                "numbers": bad_values,
                "outputs": outputs,
                "saes": bad_saes,
                "records": records_of_runs,
                "models": bad_models,
                "places": places,
                "files": files_limit,
                "plans": plans,
                "removal": removal,
                "packages": packages,
            }
            for name, group in groups.items():
                if not only or name in only.split(","):
                    group_started = time.monotonic()
                    group(m)
                    print(f"        {name} took {time.monotonic() - group_started:.0f} s")
        finally:
            os.chdir(where)
    spent = time.monotonic() - started
    if not only:
        (ROOT / "docs" / "lab" / "faults.md").write_text(page(m, spent))
    print(f"{len(m.rows)} rows, {len(m.broken)} broken, {spent:.0f} s")
    if m.broken:
        sys.exit("\n\n".join(m.broken))


def page(m: Matrix, spent: float) -> str:
    commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "datasets", "zarr"))
    lines = [
        "# Failure modes and recovery",
        "",
        *textwrap.wrap(
            f"Made by `python benchmarks/fault_matrix.py` on {datetime.date.today()} at commit {commit.strip()}, "
            f"Python {platform.python_version()}, {packages}, {os.cpu_count()} cores, {spent:.0f} s. "
            "The script fails if an exit code is not the expected one, if a traceback is printed, or if a cache "
            "differs from an undisturbed one.",
            120,
        ),
        "",
        "Exit codes: 0 ok, 1 failed, 2 bad usage, 3 damaged data, 4 something outside is missing, 130 interrupted.",
        "",
        *textwrap.wrap(
            "A fault that begins with ... continues the row above it. In the last column, `verify 3, info 0` are the "
            "exit codes of `sae cache verify` and `sae cache info` after the damage. `harvest 0 (mended)` means that "
            "the same `sae harvest` restored the bytes of the undamaged cache, and `repair 0, the same bytes` that "
            "`sae cache repair` restored them.",
            120,
        ),
        "",
    ]
    for fault, said, code, after in m.rows:
        if not code and not said:
            lines += [
                "",
                f"## {fault}",
                "",
                "| fault | message | code | what is left, and what to do |",
                "|---|---|---|---|",
            ]
        else:
            lines.append(f"| {fault} | {shorten(said)} | {code} | {after} |")
    return "\n".join(lines) + "\n"


def shorten(message: str) -> str:
    """The beginning and the end of a long message, such as one that repeats a value nested 20,000 deep."""
    return message if len(message) <= LONGEST else f"{message[: LONGEST // 2]} ... {message[-LONGEST // 2 :]}"


if __name__ == "__main__":
    main()
