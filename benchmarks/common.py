"""What the benchmarks share: synthetic rows, a cache of them, timing in rounds, memory, and the machine in words."""

import multiprocessing
import os
import platform
import random
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

import numpy as np
import torch

from sae.cache.contexts import Contexts
from sae.cache.layout import FORMAT, Layout
from sae.cache.loader import as_uint16
from sae.cache.reader import Cache
from sae.cache.writer import CacheWriter, WindowRows

T = TypeVar("T")

D_IN, CONTEXT, ARRAY = 2304, 128, "layer_12"  # Gemma-2-2B's width
WINDOW = 65_536


def model_like_rows(rows: int, d_in: int = D_IN, seed: int = 0) -> np.ndarray:
    """Bits (rows, d_in) of rows shaped like a language model's: dimensions of unequal scale, six of them 20 to 80 times
    the others, and norms that differ from row to row."""
    random = torch.Generator().manual_seed(seed)
    scale_D = (0.4 * torch.randn(d_in, generator=random)).exp()
    scale_D[torch.randperm(d_in, generator=random)[:6]] *= torch.linspace(20, 80, 6)
    found = torch.empty(rows, d_in, dtype=torch.bfloat16)
    for part in found.split(4096):
        norm_R = (0.25 * torch.randn(len(part), 1, generator=random)).exp()
        tail_RD = (5 / (torch.randn(3, *part.shape, generator=random).square().sum(0) + 2)).sqrt()
        part.copy_(torch.randn(part.shape, generator=random) * tail_RD * norm_R * scale_D)
    return as_uint16(found)


def make_cache(folder: Path, gigabytes: float, *, compress: bool = False) -> Cache:
    """A cache written as a harvest writes it. Every window holds the same rows, and the text is counted."""
    window = min(WINDOW, int(gigabytes * 1e9 / 2 / D_IN) // CONTEXT * CONTEXT)
    count = round(gigabytes * 1e9 / 2 / D_IN / window)
    layout = Layout(count * window, window, compress=compress)
    write_text(folder, layout.rows)
    writer = CacheWriter(folder, identity(), layout, {ARRAY: D_IN})
    bits = model_like_rows(window)
    for number in writer.missing_windows():
        at = np.arange(window) + number * window
        rows = WindowRows({ARRAY: bits}, (at // CONTEXT).astype(np.uint32), (at % CONTEXT).astype(np.uint16))
        writer.write_window(number, rows, {})
    writer.finish()
    return Cache(folder)


def write_text(folder: Path, rows: int) -> None:
    """Contexts of zeros: what a cache needs beside its activations."""
    n = rows // CONTEXT
    ids = np.zeros((n, CONTEXT), np.uint32)
    Contexts(ids, np.full(n, CONTEXT, np.uint16), np.arange(n, dtype=np.uint32), np.zeros(n, bool)).write(folder)


def identity() -> dict[str, Any]:
    return {"format": FORMAT, "model": {"name": "none", "revision": "0"}, "data": {"name": "synthetic"}}


class Spent(NamedTuple):
    wall: float
    processor: float  # seconds of it, of all threads: what others do on the machine does not move it much

    @classmethod
    def since(cls, started: "Spent") -> "Spent":
        now = cls.now()
        return cls(now.wall - started.wall, now.processor - started.processor)

    @classmethod
    def now(cls) -> "Spent":
        return cls(time.perf_counter(), time.process_time())


def in_rounds(ways: Mapping[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """What each way returns, `rounds` times; in every round all of them, in random order."""
    found: dict[str, list[T]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name in random.sample(list(ways), len(ways)):
            found[name].append(ways[name]())
    return found


def medians(times: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(found) for name, found in times.items()}


def drop_from_page_cache(folder: Path) -> None:
    """The next read of these files comes from the disk, or from what the disk itself remembers."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def alone(function: Callable[..., T], *arguments: object) -> T:
    """The result of a function of a script, run in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


class AnonymousPeak:
    """`with AnonymousPeak() as peak: ...`, then `peak.mb`: the most memory of its own that the process had meanwhile.

    Pages of mapped files are the system's and do not count. Read every ten milliseconds.
    """

    def __enter__(self) -> Self:
        self.mb, self._over = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while True:
            line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
            self.mb = max(self.mb, int(line.split()[1]) / 1e3)
            if self._over.wait(0.01):
                return

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def machine(*packages: str) -> str:
    """Where and with what a benchmark ran."""
    cores = len(os.sched_getaffinity(0))
    chip = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "")
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "numpy", *packages))
    return f"{cores} cores of {chip or platform.machine()}, {platform.system()}, python {platform.python_version()}, {versions}; commit {commit()}"


def commit() -> str:
    asked = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return subprocess.run(asked, capture_output=True, text=True).stdout.strip() or "unknown"
