"""Other processes, models and versions that use the same cache."""

import json
import signal
from pathlib import Path

from faults.command import BOTH, HARVEST, OK, OUTSIDE, SHAPE, TEXT, TRAIN, USAGE, Command, sae
from faults.inputs import copy_folder, count_commits, read_files, same_bytes, wait_until
from faults.table import Matrix


def writers(m: Matrix) -> None:
    m.head("Other processes, models and versions")
    out = Path("shared")
    holder = Command(*HARVEST, "--batch-contexts", 1, "--out", out)
    wait_until(holder, lambda: count_commits(out) >= 4)
    holder.send(signal.SIGSTOP)
    for words in ([*HARVEST, "--out", out], ["cache", "repair", out], ["cache", "rm", out, "--yes"]):
        name = " ".join(map(str, words[: 2 if words[0] == "cache" else 1]))
        m.row(
            f"`sae {name}` while another process writes the cache",
            sae(*words),
            OUTSIDE,
            "the other process's cache is unchanged",
            count_commits(out) >= 4,
        )
    for words in (["cache", "info", out], ["cache", "verify", out], [*TRAIN, "--cache", out]):
        name = " ".join(map(str, words[: 2 if words[0] == "cache" else 1]))
        m.row(f"`sae {name}` on a half written cache", sae(*words), USAGE, "unchanged")
    holder.send(signal.SIGKILL)
    holder.wait()
    outcome = sae(*HARVEST, "--batch-contexts", 1, "--out", out)
    note = next((line for line in outcome.err.splitlines() if "its lock was taken over" in line), "")
    m.row(
        "a lock of a process that no longer runs",
        outcome._replace(err=note + "\n"),
        OK,
        "the lock is taken over; the cache has the same bytes",
        bool(note),
        same_bytes(out, "single"),
    )

    m.row(
        "train on a cache of another model",
        sae(*TRAIN, "--cache", "whole", "--model", "gemma-2-mini"),
        USAGE,
        "nothing is written",
    )
    m.row(
        "train on a layer that the cache lacks",
        sae(*TRAIN, "--cache", "whole", "--layer", 7),
        USAGE,
        "nothing is written",
    )
    m.row(
        "train without --cache if there are several caches",
        sae(*TRAIN, env={"SAE_HOME": "homes"}),
        USAGE,
        "nothing is written",
    )
    for name, words in (
        ("another model", ["harvest", "--model", "./other", *TEXT, *BOTH, *SHAPE]),
        ("other windows", [*HARVEST, "--window", 512]),
        ("compression", [*HARVEST, "--compress"]),
        ("another seed", [*HARVEST, "--seed", 1]),
    ):
        m.row(
            f"harvest with {name} into this cache",
            sae(*words, "--out", "whole"),
            USAGE,
            "unchanged",
            same_bytes("whole", "kept"),
        )
    newer = copy_folder("newer")
    record = json.loads((newer / "zarr.json").read_text())
    record["attributes"]["format"] = 2
    (newer / "zarr.json").write_text(json.dumps(record))
    before = read_files(newer)
    for words in (
        [*TRAIN, "--cache", newer],
        [*HARVEST, "--out", newer],
        ["cache", "info", newer],
        ["cache", "verify", newer],
        ["cache", "repair", newer],
    ):
        name = " ".join(map(str, words[: 2 if words[0] == "cache" else 1]))
        m.row(
            f"`sae {name}` on a cache of a newer format", sae(*words), USAGE, "unchanged", read_files(newer) == before
        )
