"""Code shared by the benchmarks: synthetic rows, a cache of them, timing in rounds, memory, a description of the
machine."""

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
    """Bfloat16 bits, shape (rows, d_in), of rows that resemble a language model's activations.

    Dimensions have unequal scales: six dimensions are 20 to 80 times as large as the others. Norms differ from row to
    row.
    """
    random = torch.Generator().manual_seed(seed)
    scale_D = (0.4 * torch.randn(d_in, generator=random)).exp()
    scale_D[torch.randperm(d_in, generator=random)[:6]] *= torch.linspace(20, 80, 6)
    x_RD = torch.empty(rows, d_in, dtype=torch.bfloat16)
    for part in x_RD.split(4096):
        norm_R = (0.25 * torch.randn(len(part), 1, generator=random)).exp()
        tail_RD = (5 / (torch.randn(3, *part.shape, generator=random).square().sum(0) + 2)).sqrt()
        part.copy_(torch.randn(part.shape, generator=random) * tail_RD * norm_R * scale_D)
    return as_uint16(x_RD)


def make_cache(
    folder: Path, gigabytes: float, *, compress: bool = False, d_in: int = D_IN, most: int = WINDOW
) -> Cache:
    """A cache, written as a harvest writes it. All windows (at most `most` rows) have the same content; token ids are
    0."""
    window = min(most, int(gigabytes * 1e9 / 2 / d_in) // CONTEXT * CONTEXT)
    count = round(gigabytes * 1e9 / 2 / d_in / window)
    layout = Layout(count * window, window, compress=compress)
    write_text(folder, layout.rows)
    writer = CacheWriter(folder, identity(), layout, {ARRAY: d_in})
    bits = model_like_rows(window, d_in)
    for number in writer.missing_windows():
        row = np.arange(window) + number * window
        rows = WindowRows({ARRAY: bits}, (row // CONTEXT).astype(np.uint32), (row % CONTEXT).astype(np.uint16))
        writer.write_window(number, rows, {})
    writer.finish()
    return Cache(folder)


def write_text(folder: Path, rows: int) -> None:
    """Write the text that a cache needs in addition to its activations: contexts of zeros."""
    n = rows // CONTEXT
    ids = np.zeros((n, CONTEXT), np.uint32)
    Contexts(ids, np.full(n, CONTEXT, np.uint16), np.arange(n, dtype=np.uint32), np.zeros(n, bool)).write(folder)


def identity() -> dict[str, Any]:
    names = {"model": {"name": "none", "revision": "0"}, "data": {"name": "synthetic"}}
    return {"format": FORMAT, **names, "context": CONTEXT}


class Spent(NamedTuple):
    """Seconds of wall and processor time.

    Processor time is the sum over all threads. It hardly depends on what else runs on the machine.
    """

    wall: float
    processor: float

    @classmethod
    def since(cls, started: "Spent") -> "Spent":
        now = cls.now()
        return cls(now.wall - started.wall, now.processor - started.processor)

    @classmethod
    def now(cls) -> "Spent":
        return cls(time.perf_counter(), time.process_time())


def in_rounds(ways: Mapping[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """The results of each function, one per round. Every round calls each function once, in random order."""
    results: dict[str, list[T]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name in random.sample(list(ways), len(ways)):
            results[name].append(ways[name]())
    return results


def medians(times: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def drop_from_page_cache(folder: Path) -> None:
    """Drop these files from the page cache, so that the next read comes from the disk or from the disk's own cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def in_new_process(function: Callable[..., T], *arguments: object) -> T:
    """Call a function of a script in a new process, and return its result."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


class AnonymousPeak:
    """Peak of the process's anonymous memory, in MB: `with AnonymousPeak() as peak: ...`, then `peak.mb`.

    Pages of mapped files belong to the system and are not counted. Sampled every ten milliseconds.
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
    """The machine, the versions and the commit that a benchmark ran with."""
    cores = len(os.sched_getaffinity(0))
    chip = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "")
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "numpy", *packages))
    return (
        f"{cores} cores of {chip or platform.machine()}, {platform.system()}, python {platform.python_version()}, "
        f"{versions}; commit {commit()}"
    )


def commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"
