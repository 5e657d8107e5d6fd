"""Several caches are read as one: the rows of each cache follow those of the cache before it."""

import numpy as np
import pytest
import torch

from sae.cache.batch_order import BatchOrder
from sae.cache.concat import COMPATIBLE_KEYS, ConcatCache
from sae.cache.loader import BatchLoader
from sae.cache.opening import concat_caches
from sae.cache.reader import Cache
from sae.common.errors import UsageError

D = 8
SAME = {
    "model": {"name": "none", "revision": "0"}, "dtype": "float32", "attention": "eager", "tokenizer": "0" * 64,
    "context": 8, "held_out": 0.1, "skip": [0], "pack": False, "seed": 0,
}  # fmt: skip
OTHER = {
    "model": {"name": "none", "revision": "1"}, "dtype": "bfloat16", "attention": "sdpa", "tokenizer": "1" * 64,
    "context": 16, "held_out": 0.2, "skip": [0, 1], "pack": True, "seed": 1,
}  # fmt: skip


@pytest.fixture
def write(tmp_path, finite_bits, make_writer, write_windows):
    def write_cache(name: str, rows: int, bits_seed: int, max_norm: float | None = None, **identity: object) -> Cache:
        bits = {5: finite_bits(rows, D, bits_seed)}
        writer = make_writer(tmp_path / name, bits, 64, **SAME | {"data": {"name": name, "revision": name}} | identity)
        write_windows(writer, bits, list(writer.missing_windows()))
        writer.finish(max_norm)
        return Cache(tmp_path / name)

    return write_cache


def test_batches_are_those_of_the_concatenated_rows(write, finite_bits) -> None:
    combined = concat_caches([write("one", 300, 0).folder, write("two", 170, 1).folder])
    rows = np.concatenate([finite_bits(300, D, 0), finite_bits(170, D, 1)])
    first_row, order = np.cumsum([0, *combined.chunk_rows]), BatchOrder(combined.chunk_rows, 50, 7)
    assert combined.rows == 470 and combined.chunk_rows == [64, 64, 64, 64, 44, 64, 64, 42]
    with BatchLoader(combined, combined.require_array(5), 50, seed=7) as batches:
        for number in range(2 * order.batches_per_epoch):
            orderned = np.concatenate([rows[first_row[p.chunk] + p.start :][: p.rows] for p in order.spans(number)])
            assert np.array_equal(next(batches).view(torch.int16).numpy().view(np.uint16), orderned)


def test_a_cache_in_a_store_and_one_in_a_folder_are_read_as_one(write) -> None:
    one, two = write("one", 300, 0, max_norm=2.0), write("two", 170, 1)
    mixed, on_disk = concat_caches([f"file://{one.folder}", two.folder]), concat_caches([one.folder, two.folder])
    assert mixed.array_digest("layer_05") == on_disk.array_digest("layer_05")
    assert (mixed.mean("layer_05") == on_disk.mean("layer_05")).all()
    with BatchLoader(mixed, "layer_05", 50, seed=2) as stored, BatchLoader(on_disk, "layer_05", 50, seed=2) as other:
        assert all(torch.equal(next(stored), next(other)) for _ in range(2 * other.order.batches_per_epoch))


def test_statistics_cover_all_rows(write, finite_bits) -> None:
    combined = ConcatCache([write("one", 300, 0, max_norm=2.0), write("two", 170, 1)])
    outliers = combined.caches[0].outlier_rows("layer_05")
    assert len(outliers) and np.array_equal(combined.outlier_rows("layer_05"), outliers)
    bits = np.concatenate([np.delete(finite_bits(300, D, 0), outliers, 0), finite_bits(170, D, 1)])
    rows, statistics = torch.from_numpy(bits).view(torch.bfloat16).double().numpy(), combined.statistics("layer_05")
    np.testing.assert_allclose(combined.mean("layer_05"), rows.mean(0), rtol=1e-9)
    assert statistics["count"] == len(rows)
    assert statistics["mean_square_norm"] == pytest.approx((rows**2).sum(1).mean(), rel=1e-9)
    assert statistics["variance"] == pytest.approx(rows.var(0).mean(), rel=1e-9)


def test_outliers_are_counted_over_all_caches(write) -> None:
    combined = ConcatCache([write("one", 300, 0), write("two", 170, 1, max_norm=2.0)])
    assert np.array_equal(combined.outlier_rows("layer_05"), 300 + combined.caches[1].outlier_rows("layer_05"))


def test_the_digest_depends_on_all_caches_and_their_order(write) -> None:
    one, two = write("one", 300, 0), write("two", 170, 1)
    digests = {ConcatCache(caches).array_digest("layer_05") for caches in ([one], [two], [one, two], [two, one])}
    assert len(digests) == 4


@pytest.mark.parametrize("key", COMPATIBLE_KEYS)
def test_incompatible_caches_raise(write, key: str) -> None:
    one, two = write("one", 100, 0), write("two", 100, 1, **{key: OTHER[key]})
    with pytest.raises(UsageError, match=f"one and .*two cannot be combined: they differ in {key}. Use caches"):
        ConcatCache([one, two])


def test_a_cache_given_twice_raises(write) -> None:
    one = write("one", 100, 0)
    with pytest.raises(UsageError, match="The same cache was given twice"):
        concat_caches([one.folder, one.folder])
    assert isinstance(concat_caches([one.folder]), Cache)


def test_the_limit_is_one_that_no_row_of_training_exceeds(write) -> None:
    one, two, free = write("one", 300, 0, max_norm=2.0), write("two", 170, 1, max_norm=3.0), write("free", 64, 2)
    limits = [cache.norm_limit("layer_05") for cache in (one, two)]
    assert limits[0] != limits[1]
    for caches in ([one, two], [two, one]):
        assert ConcatCache(caches).norm_limit("layer_05") == max(limits)
    assert ConcatCache([one, free]).norm_limit("layer_05") is None
