"""Disks that are full or read-only."""

import shutil
from pathlib import Path

from faults.command import HARVEST, OK, OUTSIDE, TRAIN, Command, sae
from faults.inputs import copy_folder, count_commits, disk, remount, same_bytes, wait_until
from faults.table import Matrix


def full_disks(m: Matrix) -> None:
    m.head("The disk")
    with disk("small", "400k") as found:
        if found is None:
            m.rows.append(("a full or read-only disk", "not tried here: mounting is not permitted", "", ""))
            return
        outcome = sae(*HARVEST, "--out", "small/cache")
        left = [p.name for p in Path("small").rglob("*") if p.is_file() and p.name[0] != "."]
        m.row("disk too small, noticed before the harvest", outcome, OUTSIDE, "nothing is written", not left)
    for number, size in enumerate(range(1000, 2000, 140)):
        with disk(f"full{number}", f"{size}k"):
            out = Path(f"full{number}/cache")
            outcome = sae(*HARVEST, "--out", out)
            where = "complete" if outcome.code == OK else f"{count_commits(out)} commits"
            remount(f"full{number}", "size=10m")
            again = sae(*HARVEST, "--out", out)
            holds = (again.code == OK, same_bytes(out))
            if outcome.code or not all(holds):
                after = f"{where}; after space was freed the same command ended with {again.code} and the same bytes"
                m.row(f"disk of {size} kB, full in the middle", outcome, OUTSIDE, after, *holds)
    full_while_training(m)
    with disk("locked", "10m"):
        copy_folder("locked/cache")
        remount("locked", "ro")
        for words, code in (
            (["cache", "info", "locked/cache"], OK),
            (["cache", "verify", "locked/cache"], OK),
            (["cache", "list"], OK),
            ([*TRAIN, "--cache", "locked/cache", "--steps", 5, "--out", "runs-elsewhere"], OK),
            ([*TRAIN, "--cache", "locked/cache", "--steps", 5, "--out", "locked/runs"], OUTSIDE),
            ([*HARVEST, "--out", "locked/cache"], OUTSIDE),
            ([*HARVEST, "--out", "locked/new"], OUTSIDE),
            (["cache", "repair", "locked/cache"], OUTSIDE),
            (["cache", "rm", "locked/cache", "--yes"], OUTSIDE),
        ):
            outcome = sae(*words)
            name = " ".join(map(str, words[: 2 if words[0] == "cache" else 1]))
            into = "" if words[0] == "cache" else f" {words[-2]} {words[-1]}"
            m.row(f"read-only disk: `sae {name}{into}`", outcome, code, "unchanged", same_bytes("locked/cache"))
        remount("locked", "rw")


def full_while_training(m: Matrix) -> None:
    """A disk that another program fills between two checkpoints: lines of metrics still fit on it, but a checkpoint
    does not."""
    words = [*TRAIN, "--cache", "whole", "--steps", 600, "--checkpoint-every", 20]
    with disk("filling", "4m"):
        command = Command(*words, "--out", "filling/runs")
        wait_until(command, lambda: any(Path("filling/runs").glob("*/checkpoints/step-00000040/state.json")))
        free = shutil.disk_usage("filling").free
        Path("filling/other").write_bytes(bytes(free - 30_000))
        outcome = command.wait()
        (run,) = Path("filling/runs").iterdir()
        whole = sorted(path.parent.name for path in run.glob("checkpoints/*/state.json"))
        Path("filling/other").unlink()
        again = sae(*words, "--out", "filling/runs")
        undisturbed = sae(*words, "--out", "runs-undisturbed")
        files = [next(Path(out).glob("*/sae.safetensors")) for out in ("filling/runs", "runs-undisturbed")]
        m.row(
            "disk full while a checkpoint is written and training goes on",
            outcome,
            OUTSIDE,
            f"{len(whole)} checkpoints; after space was freed the same command goes on, and ends in the same bytes",
            len(whole) == 2,
            again.code == undisturbed.code == OK,
            files[0].read_bytes() == files[1].read_bytes(),
        )
