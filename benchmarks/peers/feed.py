"""Code shared by both sides of saelens_cache.py: their input rows, timing, dropping files from the page cache, and the
check. Needs only numpy."""

import contextlib
import gc
import json
import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

D_IN, CONTEXT, BATCH_CONTEXTS = 2304, 128, 32
TOKENS_A_BATCH = BATCH_CONTEXTS * CONTEXT  # tokens per pass of a model
READ_BATCHES = (2048, 4096)


def make(path: Path, gigabytes: float) -> int:
    """Write normally distributed rows as bfloat16 bits, for a number of forward passes that is a multiple of four.
    Returns the number of tokens."""
    batches = 4 * max(1, round(gigabytes * 1e9 / (2 * D_IN * TOKENS_A_BATCH) / 4))
    rng = np.random.default_rng(0)
    with path.open("wb") as file:
        for _ in range(batches):
            bits = rng.standard_normal((TOKENS_A_BATCH, D_IN), np.float32).view(np.uint32)
            file.write((bits >> 16).astype(np.uint16).data)
    return batches * TOKENS_A_BATCH


def load(path: Path) -> np.ndarray:
    """(contexts, CONTEXT, D_IN) uint16, in memory before timing starts."""
    return np.fromfile(path, np.uint16).reshape(-1, CONTEXT, D_IN)


def ids(contexts: int) -> np.ndarray:
    return np.arange(contexts * CONTEXT, dtype=np.uint32).reshape(contexts, CONTEXT) % 32_000


def timed(work: Callable[[], object]) -> float:
    gc.collect()  # otherwise files mapped by an earlier pass would stay in memory
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in files(folder))


def each_file(folder: Path, act: Callable[[int], object]) -> None:
    for path in files(folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            act(descriptor)
        finally:
            os.close(descriptor)


def flush(folder: Path) -> None:
    each_file(folder, os.fsync)


def forget(folder: Path) -> None:
    """Drop the flushed files from the page cache, so that the next pass reads from the disk."""
    gc.collect()
    each_file(folder, lambda descriptor: os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED))


def passes(folder: Path, tokens: int, opened: Callable[[int], Generator[Any]]) -> dict[str, float]:
    """Tokens per second of `opened(batch_size)`, an endless iterator of batches, over one pass of the cache.

    Rates are measured from the disk and from memory, both including opening and first touch, and then again with the
    iterator left open.
    """
    rates = {}
    for batch in READ_BATCHES:
        count = tokens // batch

        def take(batches: Iterator[Any], count: int = count) -> None:
            for _ in range(count):
                next(batches)

        def whole(batch: int = batch) -> None:
            with contextlib.closing(opened(batch)) as batches:
                take(batches)

        forget(folder)
        rates[f"read {batch} disk"] = count * batch / timed(whole)
        rates[f"read {batch} memory"] = count * batch / timed(whole)
        with contextlib.closing(opened(batch)) as batches:
            take(batches)
            rates[f"read {batch} again"] = count * batch / timed(lambda: take(batches))
    return rates


def row_hashes(bits: np.ndarray) -> np.ndarray:
    """A 64-bit hash of each row of 16-bit words."""
    weights = np.random.default_rng(1).integers(0, 2**63, bits.shape[1], dtype=np.uint64) | np.uint64(1)
    parts = np.array_split(bits, -(-len(bits) // 512))
    return np.concatenate([(part * weights).sum(1, dtype=np.uint64) for part in parts])


def check(fed: np.ndarray, stored: Iterable[np.ndarray], served: Iterable[np.ndarray]) -> str:
    """Compare hashes of rows, to check that the cache contains exactly the input rows, and that batches contain no
    other rows."""
    expected = np.sort(row_hashes(fed.reshape(-1, D_IN)))
    held, given = np.sort(np.concatenate(list(stored))), np.concatenate(list(served))
    if len(np.unique(expected)) != len(expected):
        raise SystemExit("two input rows have the same hash")
    if not np.array_equal(expected, held):
        raise SystemExit("the cache does not contain exactly the input rows")
    if not np.isin(given, expected).all():
        raise SystemExit("a batch contains a row that is not an input row")
    distinct = len(np.unique(given))
    return f"contains all {len(held):,} input rows; one pass returned {len(given):,} rows, {distinct:,} distinct"


def print_result(result: dict[str, Any]) -> None:
    print(json.dumps(result))
