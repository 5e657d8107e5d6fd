"""The content and location of a local folder for pulled files. Names are `<cache>/<file of the cache>`."""

import contextlib
import os
import re
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ..common.files import free_space, sae_home
from .consistency import SIDE_ARRAYS, is_array_name

FREE_SHARE = 0.5  # of the disk's free space: the default size of the folder
RATE_SECONDS = 30.0  # seconds over which the rate of arrivals is measured
PART = ".part"  # suffix of a file that is being pulled: `<chunk>.<owner>.part`


class Contents(NamedTuple):
    """The files of a local folder, with their sizes in bytes."""

    whole: dict[str, int]  # chunks
    parts: dict[tuple[str, str], int]  # (chunk, owner): chunks that are being pulled
    other: int  # bytes of all other files


class Arrivals:
    """Measures the rate at which files have recently arrived."""

    def __init__(self) -> None:
        self._recent: deque[tuple[float, int]] = deque(maxlen=64)  # (time, bytes)

    def add(self, size: int) -> None:
        """Record that a file of `size` bytes has arrived."""
        self._recent.append((time.monotonic(), size))

    def bytes_per_second(self) -> float:
        """The rate over the last RATE_SECONDS."""
        now = time.monotonic()
        recent = [(at, size) for at, size in list(self._recent) if now - at < RATE_SECONDS]
        return sum(size for _, size in recent) / max(now - recent[0][0], 1.0) if recent else 0.0


def contents(folder: Path) -> Contents:
    """The files of a local folder, which need not exist."""
    found = Contents({}, {}, 0)
    other = 0
    for name, size in walk(folder, ""):
        if "/" not in name:
            continue  # the files in which processes state what they keep and pull
        if not is_chunk(name):
            other += size
        elif name.endswith(PART):
            found.parts[split_part(name)] = size
        else:
            found.whole[name] = size
    return found._replace(other=other)


def part_name(chunk: str, owner: str) -> str:
    """The name of the partial file into which a process pulls a chunk."""
    return f"{chunk}.{owner}{PART}" if owner else f"{chunk}{PART}"


def split_part(name: str) -> tuple[str, str]:
    """The inverse of `part_name`; the owner is "" if the name contains none."""
    plain = name.removesuffix(PART)
    match = re.fullmatch(r"(.+)\.([0-9a-f]{16})", plain)
    return (match[1], match[2]) if match else (plain, "")


def walk(folder: Path | str, prefix: str) -> Iterator[tuple[str, int]]:
    """Yield the name and the size in bytes of each file under a folder; a name is `prefix` plus the path relative to
    the folder.
    """
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                yield from walk(entry.path, f"{prefix}{entry.name}/")
            else:
                with contextlib.suppress(FileNotFoundError):
                    yield f"{prefix}{entry.name}", entry.stat().st_size


def is_chunk(name: str) -> bool:
    """Whether a name in the folder denotes a chunk of activations: `<cache>/layer_12/c.3.0`."""
    parts = name.split("/")
    is_array = len(parts) == 3 and is_array_name(parts[1]) and not parts[1].endswith(SIDE_ARRAYS)
    return is_array and parts[2].startswith("c.")


def default_place() -> Path:
    """The default place for pulled files: hidden, since activations/* lists caches."""
    return sae_home() / "activations" / ".pulled"


def default_size(folder: Path) -> int:
    """The default size of the folder in bytes: a share of the disk space that is free or used by the folder."""
    held = sum(size for _, size in walk(folder, ""))
    return int(FREE_SHARE * (free_space(folder) + held))
