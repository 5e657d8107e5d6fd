"""Several machines that write one cache in a store, each with its own working folder: nothing is lost or mixed."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from sae.cache.object_store import ObjectStore, open_store
from sae.cache.opening import open_cache
from sae.cache.reader import Cache
from sae.cache.store_place import StorePlace
from sae.cache.writer import CacheWriter
from sae.common.errors import UnavailableError

ROWS, D = 40, 8  # three windows of 16


@pytest.fixture
def store(bucket: str) -> ObjectStore:
    return open_store(f"{bucket}/pile")


@pytest.fixture
def worker(store: ObjectStore, tmp_path: Path, tiny_cache: Cache, make_writer):
    """worker(name, {layer: bits}) -> the writer of a machine, which has fetched what there is and begun."""

    def begin(name: str, bits: dict[int, np.ndarray]) -> CacheWriter:
        folder = tmp_path / name
        local = make_writer(folder, bits, 16)
        writer = CacheWriter(folder, local.identity, local.layout, local.widths, StorePlace(store, folder))
        shutil.copy(tiny_cache.folder / "harvest.json", folder)
        writer.place.begin()
        return writer

    return begin


def assert_whole(store: ObjectStore, layers: list[int]) -> Cache:
    cache = open_cache(store.url)
    assert cache.layers == layers and len(list(cache.verify())) == len(cache.manifest["files"])
    return cache


@pytest.mark.parametrize("other", ["the same bytes", "other bytes"])
@pytest.mark.parametrize("step", ["publish", "create_commit"])
def test_two_machines_at_one_window_leave_the_objects_of_one(
    store: ObjectStore, worker, finite_bits, write_windows, monkeypatch: pytest.MonkeyPatch, step: str, other: str
) -> None:
    """The second commits all windows before a step of the first, whose GPU may compute other bytes."""
    first = {5: finite_bits(ROWS, D, 5)}
    second = first if other == "the same bytes" else {5: finite_bits(ROWS, D, 6)}
    writer, original = worker("first", first), getattr(StorePlace, step)

    def interrupted(self, *arguments):
        monkeypatch.setattr(StorePlace, step, original)
        write_windows(worker("second", second), second, [0, 1, 2])
        return original(self, *arguments)

    monkeypatch.setattr(StorePlace, step, interrupted)
    write_windows(writer, first, [0, 1, 2])
    assert writer.seal()
    cache = assert_whole(store, [5])
    assert np.array_equal(cache.read_chunk("layer_05", 1), second[5][16:32])
    assert not list(writer.folder.glob("*/c.*")) and writer.missing_windows() == {}


@pytest.mark.parametrize("step", ["seal", "_seal_root"])
def test_layers_that_are_sealed_at_once_are_both_there(
    store: ObjectStore, worker, finite_bits, write_windows, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """The second seals layer 12 before the manifest of the first, or between its manifest and its zarr.json."""
    bits = {5: finite_bits(ROWS, D, 5), 12: finite_bits(ROWS, D, 12)}
    writer, original = worker("first", {5: bits[5]}), getattr(StorePlace, step)
    write_windows(writer, {5: bits[5]}, [0, 1, 2])

    def interrupted(self):
        monkeypatch.setattr(StorePlace, step, original)
        second = worker("second", {12: bits[12]})
        if step == "_seal_root":
            second.place.fetch()  # on another machine it would know of the first's manifest
            second = CacheWriter(second.folder, second.identity, second.layout, second.widths, second.place)
        write_windows(second, {12: bits[12]}, [0, 1, 2])
        assert second.seal()
        return original(self)

    monkeypatch.setattr(StorePlace, step, interrupted)
    assert writer.seal()
    cache = assert_whole(store, [5, 12])
    assert set(cache.manifest["statistics"]) == {"layer_05", "layer_12"}


def test_sealing_again_writes_nothing(
    store: ObjectStore, worker, finite_bits, write_windows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where no listing shows what there is: commits are asked for by name."""
    bits = {5: finite_bits(ROWS, D, 5)}
    writer = worker("first", bits)
    write_windows(writer, bits, [0, 2])
    assert not writer.seal() and not store.exists("manifest.json")
    write_windows(worker("second", bits), bits, [1])
    assert writer.seal()
    before = {key: store.store.head(key)["last_modified"] for key, _ in store.list()}
    late = worker("late", bits)
    late.place.fetch()
    with monkeypatch.context() as patch:
        patch.setattr(ObjectStore, "list", lambda *arguments: iter(()))
        assert late.missing_windows() == {} and late.seal() and writer.seal()
    assert {key: store.store.head(key)["last_modified"] for key, _ in store.list()} == before


def test_a_store_that_never_keeps_still_ends_in_a_sentence(
    worker, finite_bits, write_windows, monkeypatch: pytest.MonkeyPatch
) -> None:
    bits = {5: finite_bits(ROWS, D, 5)}
    writer = worker("first", bits)
    write_windows(writer, bits, [0, 1, 2])
    monkeypatch.setattr(ObjectStore, "replace", lambda *arguments: False)
    with pytest.raises(UnavailableError, match="is being changed by others all the time. Run the same command again"):
        writer.seal()
