"""Disks that are full or read-only."""

from pathlib import Path

from faults.command import HARVEST, OK, OUTSIDE, TRAIN, sae
from faults.inputs import copy_folder, count_commits, disk, remount, same_bytes
from faults.table import Matrix


def full_disks(m: Matrix) -> None:
    m.head("The disk")
    with disk("small", "400k") as found:
        if found is None:
            m.rows.append(("a full or read-only disk", "not tried here: mounting is not permitted", "", ""))
            return
        outcome = sae(*HARVEST, "--out", "small/cache")
        left = [p.name for p in Path("small").rglob("*") if p.is_file() and p.name[0] != "."]
        m.row("disk too small, seen before", outcome, OUTSIDE, "nothing is written", not left)
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
