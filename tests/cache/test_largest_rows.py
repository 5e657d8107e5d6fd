"""Sealing in a store gives the statistics of a cache on disk and needs only a few requests for each window."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from obstore.store import MemoryStore

from sae.cache import largest_rows
from sae.cache.largest_rows import decode_largest, encode_largest
from sae.cache.layout import ArraySpec
from sae.cache.object_store import ObjectStore
from sae.cache.reader import Cache
from sae.cache.store_place import StorePlace
from sae.cache.writer import CacheWriter
from sae.common.cache_schemas import HARVEST_RECORD

REQUEST = {"model": "none", "dataset": None, "tokens": 200, "context": 8, "held_out": None, "window": 16}
WINDOWS = 13
Change = Callable[[ObjectStore], None]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The objects that are read from stores, whole or in part."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    asked: list[str] = []
    for name in ("get", "get_ranges"):
        original = getattr(ObjectStore, name)

        def noted(store: ObjectStore, key: str, *arguments, original=original):
            asked.append(key)
            return original(store, key, *arguments)

        monkeypatch.setattr(ObjectStore, name, noted)
    return asked


@pytest.fixture
def writer(outlier_cache: Cache, rows_with_outliers, make_writer, write_windows, tmp_path: Path) -> CacheWriter:
    """A writer that has written every window of layer 5 of `outlier_cache` to a store and has not sealed them."""
    bits = {5: rows_with_outliers.view(torch.int16).numpy().view(np.uint16)}
    local = make_writer(folder := tmp_path / "working", bits, 16, compress=outlier_cache.layout.compress)
    HARVEST_RECORD.write(folder / "harvest.json", REQUEST)
    place = StorePlace(ObjectStore("s3://memory/pile", MemoryStore()), folder)
    writer = CacheWriter(folder, local.identity, local.layout, local.widths, place)
    place.begin()
    write_windows(writer, bits, list(range(WINDOWS)))
    return writer


def flip_a_bit(store: ObjectStore) -> None:
    for key, _ in store.list("largest"):
        data = bytearray(store.get(key))
        data[-6] ^= 1  # of the last row
        store.put(key, bytes(data))


def swap(store: ObjectStore) -> None:
    """Give each window the largest rows of another window."""
    keys = sorted(key for key, _ in store.list("largest"))
    data = [store.get(key) for key in keys]
    for key, other in zip(keys, data[1:] + data[:1], strict=True):
        store.put(key, other)


def remove(store: ObjectStore) -> None:
    """Delete the largest rows of all windows, which a cache of an earlier version does not have."""
    store.delete(key for key, _ in list(store.list("largest")))


def cut(store: ObjectStore) -> None:
    for key, size in list(store.list("largest")):
        store.put(key, store.get(key)[: size // 2])


@pytest.mark.parametrize(
    ("max_norm", "share", "chunk_rows", "is_enough"),  # the share of a window's rows that is kept
    [(10.0, 0.5, 4, True), (10.0, 0.1, 16, False), (1.05, 0.2, 4, False), (None, 0.001, 16, True)],
)
def test_the_statistics_are_those_of_a_disk(
    outlier_cache: Cache, rows_with_outliers, make_writer, write_windows, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, asked: list[str], max_norm: float | None, share: float, chunk_rows: int,
    is_enough: bool, request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    monkeypatch.setattr(largest_rows, "SHARE", share)
    monkeypatch.setattr("sae.cache.layout.CHUNK_ROWS", chunk_rows)
    writer = request.getfixturevalue("writer")
    asked.clear()
    assert writer.seal(max_norm)
    assert is_enough != any(key.startswith("layer_05/c.") for key in asked)
    bits = {5: rows_with_outliers.view(torch.int16).numpy().view(np.uint16)}
    disk = make_writer(tmp_path / "disk", bits, 16, compress=outlier_cache.layout.compress)
    write_windows(disk, bits, list(range(WINDOWS)))
    assert disk.seal(max_norm)
    assert writer.place.store.get("manifest.json") == (tmp_path / "disk/manifest.json").read_bytes()


@pytest.mark.parametrize("change", [flip_a_bit, swap, remove, cut])
def test_largest_rows_that_are_missing_damaged_or_of_other_files_change_nothing(
    writer: CacheWriter, outlier_cache: Cache, asked: list[str], change: Change
) -> None:
    store = writer.place.store
    assert store is not None
    change(store)
    asked.clear()
    assert writer.seal(10) and any(key.startswith("layer_05/c.") for key in asked)
    assert Cache(writer.folder).statistics("layer_05") == outlier_cache.statistics("layer_05")


def test_a_window_needs_as_many_requests_whatever_its_rows_are(
    writer: CacheWriter, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sealing reads a window's largest rows up to three times, and its other files once.

    The other files are its commit, norms, moments, row_ctx and row_pos.
    """
    asked.clear()
    assert writer.seal(None)
    for window in range(WINDOWS):
        sides = [f"layer_05.row_norm/c.{window}", f"layer_05.moments/c.{window}.0.0", f"row_ctx/c.{window}"]
        for key in (f"commits/{window:06d}.layer_05.json", *sides):
            assert asked.count(key) == 1
        assert asked.count(f"largest/{window:06d}.layer_05") <= 3
    assert len(asked) <= WINDOWS * 8 + 6


@pytest.mark.parametrize("rows", [1, 2, 999, 5000])
def test_what_is_kept_is_the_largest_and_is_read_back(rows: int) -> None:
    rng, array = np.random.default_rng(0), ArraySpec("layer_05", (rows, 4), (rows, 4), "bfloat16")
    norms, bits = rng.permutation(rows).astype(np.float32), rng.integers(0, 1 << 16, (rows, 4), np.uint16)
    files = {"layer_05/c.0.0": {"bytes": 1, "crc32c": "00000000"}}
    found = decode_largest(encode_largest(files, norms, bits), files, array)
    assert found is not None
    kept, values = found
    assert len(kept) == -(-3 * rows // 1000) and norms[kept].min() >= rows - len(kept)
    assert (np.diff(kept) > 0).all() and np.array_equal(values, bits[kept])
    for other in (files | {"row_ctx/c.0": {"bytes": 1, "crc32c": "00000000"}}, {}):
        assert decode_largest(encode_largest(files, norms, bits), other, array) is None


def test_rows_that_max_norm_can_make_outliers_are_kept_too() -> None:
    norms, bits = np.ones(10_000, np.float32), np.zeros((10_000, 2), np.uint16)
    array = ArraySpec("layer_05", (10_000, 2), (10_000, 2), "bfloat16")
    for far, expected in ((10, 30), (100, 100), (390, 390), (900, 400)):
        norms[:] = 1
        norms[:far] = 5
        found = decode_largest(encode_largest({}, norms, bits), {}, array)
        assert found is not None and len(found[0]) == expected and (found[0] < far).sum() == min(far, expected)
