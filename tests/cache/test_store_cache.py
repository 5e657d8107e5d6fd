"""A cache in an object store gives the same rows, statistics and text as its folder.

Its files pass through a local folder of limited size.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from sae.cache.catalog import find_by_fingerprint
from sae.cache.object_store import ObjectStore
from sae.cache.opening import open_cache
from sae.cache.reader import Cache
from sae.common.errors import DamagedError


def batches_of(cache, layer: int, **options) -> list[torch.Tensor]:
    return list(cache.batches(layer, batch_size=16, dtype="bfloat16", **options))


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


@pytest.fixture(params=["raw", "compressed"])
def disk_cache(request: pytest.FixtureRequest, make_writer, write_windows, tmp_path: Path) -> Cache:
    """300 rows of two layers with six outlier rows, in windows of 32 rows, one chunk each."""
    rows = torch.randn(2, 300, 8, generator=torch.Generator().manual_seed(0))
    rows[:, [3, 4, 40, 71, 72, 299]] *= 100
    bits = {
        layer: x.bfloat16().view(torch.int16).numpy().view(np.uint16) for layer, x in zip((5, 12), rows, strict=True)
    }
    writer = make_writer(tmp_path / "disk", bits, 32, compress=request.param == "compressed")
    write_windows(writer, bits, list(writer.missing_windows()))
    writer.finish(max_norm=10)
    return Cache(tmp_path / "disk")


def test_a_cache_in_a_store_reads_like_its_folder(disk_cache: Cache) -> None:
    address = f"file://{disk_cache.folder}"
    cache = open_cache(address)
    assert cache.place == address and repr(address)[1:-1] in repr(cache)
    assert (cache.committed_windows, cache.hooks) == (disk_cache.committed_windows, disk_cache.hooks)
    for name in ("layer_05", "layer_12"):
        assert cache.array_digest(name) == disk_cache.array_digest(name)
        assert len(cache.outlier_rows(name)) == 6
        assert np.array_equal(cache.mean(name), disk_cache.mean(name))
        assert np.array_equal(cache.row_norms(name), disk_cache.row_norms(name))
        assert np.array_equal(cache.read_chunk(name, 3), disk_cache.read_chunk(name, 3))
    for held_out in (True, False):
        texts = cache.contexts(held_out=held_out), disk_cache.contexts(held_out=held_out)
        assert all(np.array_equal(one, other) for one, other in zip(*(t.arrays().values() for t in texts), strict=True))
    assert same(batches_of(cache, 5, seed=3, epochs=2), batches_of(disk_cache, 5, seed=3, epochs=2))
    cache.check_sizes()


def test_what_changes_in_the_store_is_seen_when_the_cache_is_opened_again(
    make_writer, write_windows, finite_bits, tmp_path: Path
) -> None:
    bits = {layer: finite_bits(40, 8, layer) for layer in (5, 12)}
    for layers in ([5], [5, 12]):
        some = {layer: bits[layer] for layer in layers}
        writer = make_writer(tmp_path / "disk", some, 16)
        write_windows(writer, some, [0, 1, 2])
        assert writer.seal()
        cache = open_cache(f"file://{tmp_path}/disk")
        assert cache.layers == layers and set(cache.manifest["statistics"]) == {f"layer_{n:02d}" for n in layers}
    assert find_by_fingerprint(cache.fingerprint, cache.place).place == cache.place
    assert find_by_fingerprint("0" * 64, cache.place) is None
    (tmp_path / "disk" / "manifest.json").unlink()
    with pytest.raises(DamagedError, match="manifest.json"):
        _ = open_cache(cache.place).manifest


def test_a_damaged_file_is_replaced_and_never_missing(disk_cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process that shares the local folder is about to read it."""
    cache = open_cache(f"file://{disk_cache.folder}")
    assert len(cache.row_norms("layer_05")) == 300
    files = sorted(cache.folder.glob("layer_05.row_norm/*"))
    for path in files:
        path.write_bytes(b"x" + path.read_bytes()[1:])
    get, missing = ObjectStore.get, []

    def seen(store: ObjectStore, key: str) -> bytes:
        missing.extend(path for path in files if not path.exists())
        return get(store, key)

    again = open_cache(cache.place)
    monkeypatch.setattr(ObjectStore, "get", seen)
    assert np.array_equal(again.row_norms("layer_05"), disk_cache.row_norms("layer_05"))
    assert missing == [] and len(files) > 10


def test_what_arrives_damaged_never_takes_the_place_of_a_file(
    disk_cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = open_cache(f"file://{disk_cache.folder}")
    assert len(cache.row_norms("layer_05")) == 300
    path = cache.folder / "layer_05.row_norm" / "c.3"
    path.write_bytes(b"damaged")
    again, get = open_cache(cache.place), ObjectStore.get
    monkeypatch.setattr(ObjectStore, "get", lambda store, key: b"half" if "row_norm/c." in key else get(store, key))
    with pytest.raises(DamagedError, match=rf"{cache.place}/layer_05.row_norm/c\.\d+ is not the file .* cache repair"):
        again.row_norms("layer_05")
    assert path.read_bytes() == b"damaged"
