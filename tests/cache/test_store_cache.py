"""A cache in an object store: the same rows, statistics and text as from its folder, through a bounded local folder."""

from pathlib import Path

import numpy as np
import pytest
import torch

from sae.cache.opening import open_cache
from sae.cache.reader import Cache


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
