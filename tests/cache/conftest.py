"""Caches that are written directly from chosen rows, without a model."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from sae.cache.contexts import Contexts
from sae.cache.hooks import Hook
from sae.cache.layout import BLOSC, FORMAT, Layout
from sae.cache.reader import Cache
from sae.cache.writer import CacheWriter, WindowRows

IDENTITY = {"format": FORMAT, "model": {"name": "none", "revision": "0"}, "data": {"name": "counted"}, "seed": 0}
OUTLIERS = [3, 4, 5, 47, 199]


def _finite_bits(rows: int, d_in: int, seed: int = 0) -> np.ndarray:
    bits = np.random.default_rng(seed).integers(0, 0x5F80, (rows, d_in), np.uint16)
    bits |= np.random.default_rng(seed + 1).integers(0, 2, bits.shape, np.uint16) << 15
    bits[0, :2] = 0x0000, 0x8000
    return bits


def _make_writer(
    folder: Path, bits: dict[int, np.ndarray], window_rows: int, *, compress: bool = False, **identity: object
) -> CacheWriter:
    rows = len(next(iter(bits.values())))
    n = -(-rows // 7)
    if not (folder / "zarr.json").exists():
        ids = np.arange(n * 8, dtype=np.uint32).reshape(n, 8)
        document = np.arange(n, dtype=np.uint32)
        Contexts(ids, np.full(n, 8, np.uint16), document, np.zeros(n, bool)).write(folder)
    widths = {Hook(layer).array: layer_bits.shape[1] for layer, layer_bits in bits.items()}
    layout = Layout(rows, window_rows, compress=compress)
    whole_identity = {
        **IDENTITY, "tokens": rows, "window_rows": window_rows, "chunk_rows": layout.chunk_rows,
        "storage_dtype": layout.storage_dtype, "compress": BLOSC if compress else None, **identity,
    }  # fmt: skip
    return CacheWriter(folder, whole_identity, layout, widths)


def _write_windows(
    writer: CacheWriter, bits: dict[int, np.ndarray], windows: list[int], *, replace: bool = False
) -> None:
    for window in windows:
        rows = writer.layout.row_range(window)
        row = np.arange(rows.start, rows.stop)
        block = {Hook(layer).array: layer_bits[rows.start : rows.stop] for layer, layer_bits in bits.items()}
        origins = (row // 7).astype(np.uint32), (1 + row % 7).astype(np.uint16)
        writer.write_window(window, WindowRows(block, *origins), {}, replace=replace)


def _write_cache(folder: Path, bits: dict[int, np.ndarray], window_rows: int = 16) -> Cache:
    writer = _make_writer(folder, bits, window_rows)
    _write_windows(writer, bits, list(writer.missing_windows()))
    writer.finish()
    return Cache(folder)


@pytest.fixture
def finite_bits() -> Callable[..., np.ndarray]:
    """finite_bits(rows, d_in, seed) returns the uint16 bits of bfloat16 numbers below 2^64, including both zeros."""
    return _finite_bits


@pytest.fixture
def make_writer() -> Callable[..., CacheWriter]:
    """make_writer(folder, {layer: bits}, window_rows) returns a writer whose cache has its contexts but no window yet.

    Row r is at position 1 + r % 7 of context r // 7.
    """
    return _make_writer


@pytest.fixture
def write_windows() -> Callable[..., None]:
    """write_windows(writer, {layer: bits}, windows, replace=False) writes and commits these windows."""
    return _write_windows


@pytest.fixture
def write_cache(tmp_path: Path) -> Callable[..., Cache]:
    """write_cache({layer: bits}, window_rows=16, name="cache") -> a complete cache."""
    return lambda bits, window_rows=16, name="cache": _write_cache(tmp_path / name, bits, window_rows)


@pytest.fixture(scope="session")
def two_layer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache to copy.

    It has 40 rows of 8 numbers for layers 5 and 12, in three windows of one chunk each with 16, 16 and 8 rows.
    """
    bits = {layer: _finite_bits(40, 8, seed=layer) for layer in (5, 12)}
    return _write_cache(tmp_path_factory.mktemp("two-layers") / "cache", bits).folder


@pytest.fixture(scope="session")
def twenty_chunks(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """A cache of layer 5 with 2,560 rows of 8 numbers, in 20 windows of one chunk each. Do not modify it."""
    return _write_cache(tmp_path_factory.mktemp("twenty-chunks") / "cache", {5: _finite_bits(2560, 8)}, 128)


@pytest.fixture
def cache(two_layer_folder: Path, tmp_path: Path) -> Cache:
    """A copy of `two_layer_folder` that a test may damage."""
    return Cache(shutil.copytree(two_layer_folder, tmp_path / "cache"))


@pytest.fixture
def outliers() -> list[int]:
    """The indices of the outlier rows in `rows_with_outliers`."""
    return OUTLIERS


@pytest.fixture
def rows_with_outliers() -> torch.Tensor:
    """(200, 8) bfloat16 rows with norms of about 3, except for five outliers that are a hundred times as long."""
    rows = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    rows[OUTLIERS] *= 100
    return rows.bfloat16()


@pytest.fixture(params=[False, True], ids=["raw", "compressed"])
def outlier_cache(request: pytest.FixtureRequest, tmp_path: Path, rows_with_outliers: torch.Tensor) -> Cache:
    """A cache whose layers 5 and 12 both hold `rows_with_outliers`, in windows of 16 rows, with max_norm 10."""
    layer_bits = rows_with_outliers.view(torch.int16).numpy().view(np.uint16)
    bits = {5: layer_bits, 12: layer_bits}
    writer = _make_writer(tmp_path / "outliers", bits, 16, compress=request.param)
    _write_windows(writer, bits, list(writer.missing_windows()))
    writer.finish(max_norm=10)
    return Cache(tmp_path / "outliers")
