"""A cache written from rows that a test chose, without a model."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sae.cache.contexts import Contexts
from sae.cache.layout import FORMAT, Hook, Layout
from sae.cache.reader import Cache
from sae.cache.writer import CacheWriter, WindowRows

IDENTITY = {"format": FORMAT, "model": {"name": "none", "revision": "0"}, "data": {"name": "counted"}}


def finite_bits(rows: int, d_in: int, seed: int = 0) -> np.ndarray:
    """(rows, d_in) uint16: bfloat16 numbers of every exponent under 2^64, both zeros among them."""
    bits = np.random.default_rng(seed).integers(0, 0x5F80, (rows, d_in), np.uint16)
    bits |= np.random.default_rng(seed + 1).integers(0, 2, bits.shape, np.uint16) << 15
    bits[0, :2] = 0x0000, 0x8000
    return bits


def begin(
    folder: Path, bits: dict[int, np.ndarray], window: int, *, compress: bool = False, **identity: object
) -> CacheWriter:
    """A writer of these rows, of which nothing is written yet: row r is position 1 + r % 7 of context r // 7."""
    rows = len(next(iter(bits.values())))
    n = -(-rows // 7)
    if not (folder / "zarr.json").exists():
        Contexts(
            np.arange(n * 8, dtype=np.uint32).reshape(n, 8), np.full(n, 8, np.uint16), np.arange(n, dtype=np.uint32),
            np.zeros(n, bool),
        ).write(folder)  # fmt: skip
    widths = {Hook(layer).array: block.shape[1] for layer, block in bits.items()}
    return CacheWriter(folder, {**IDENTITY, **identity}, Layout(rows, window, compress=compress), widths)


def write_windows(writer: CacheWriter, bits: dict[int, np.ndarray], windows: list[int]) -> None:
    for window in windows:
        at = writer.layout.row_range(window)
        row = np.arange(at.start, at.stop)
        block = {Hook(layer).array: rows[at.start : at.stop] for layer, rows in bits.items()}
        writer.write_window(
            window, WindowRows(block, (row // 7).astype(np.uint32), (1 + row % 7).astype(np.uint16)), {}
        )


def write_whole(folder: Path, bits: dict[int, np.ndarray], window: int = 16) -> Cache:
    writer = begin(folder, bits, window)
    write_windows(writer, bits, list(writer.missing_windows()))
    writer.finish()
    return Cache(folder)


@pytest.fixture
def write_cache(tmp_path: Path) -> Callable[..., Cache]:
    """write_cache({layer: bits}, window=16) -> the whole cache of them."""
    return lambda bits, window=16, name="cache": write_whole(tmp_path / name, bits, window)


@pytest.fixture(scope="session")
def two_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers 5 and 12, 40 rows of 8: with windows of 16, three windows of one chunk, the last of 8 rows."""
    bits = {layer: finite_bits(40, 8, seed=layer) for layer in (5, 12)}
    return write_whole(tmp_path_factory.mktemp("whole") / "cache", bits).folder


@pytest.fixture
def bits_of() -> Callable[..., np.ndarray]:
    return finite_bits


@pytest.fixture
def begin_cache() -> Callable[..., CacheWriter]:
    return begin


@pytest.fixture
def write_some() -> Callable[..., None]:
    return write_windows
