"""Several caches read as one are one after the other."""

import numpy as np
import pytest
import torch

from sae.cache.concat import COMPATIBLE_KEYS, ConcatCache, concat_caches
from sae.cache.loader import BatchLoader, BatchOrder
from sae.cache.reader import Cache
from sae.common.errors import UsageError

D = 8
SAME = dict.fromkeys(COMPATIBLE_KEYS, 1) | {"model": {"name": "none", "revision": "0"}}


@pytest.fixture
def write(tmp_path, bits_of, begin_cache, write_some):
    def written(name: str, rows: int, kind: int, max_norm: float | None = None, **identity: object) -> Cache:
        bits = {5: bits_of(rows, D, kind)}
        writer = begin_cache(tmp_path / name, bits, 64, **SAME | {"data": {"name": name, "revision": name}} | identity)
        write_some(writer, bits, list(writer.missing_windows()))
        writer.finish(max_norm)
        return Cache(tmp_path / name)

    return written


def test_batches_are_those_of_the_rows_laid_end_to_end(write, bits_of) -> None:
    joined = concat_caches([write("one", 300, 0).folder, write("two", 170, 1).folder])
    rows = np.concatenate([bits_of(300, D, 0), bits_of(170, D, 1)])
    first, plan = np.cumsum([0, *joined.chunk_rows]), BatchOrder(joined.chunk_rows, 50, 7)
    assert joined.rows == 470 and joined.chunk_rows == [64, 64, 64, 64, 44, 64, 64, 42]
    with BatchLoader(joined, joined.require_array(5), 50, seed=7) as batches:
        for number in range(2 * plan.batches_per_epoch):
            planned = np.concatenate([rows[first[p.chunk] + p.start :][: p.rows] for p in plan.spans(number)])
            assert np.array_equal(next(batches).view(torch.int16).numpy().view(np.uint16), planned)


def test_statistics_are_those_of_all_rows(write, bits_of) -> None:
    joined = ConcatCache([write("one", 300, 0, max_norm=2.0), write("two", 170, 1)])
    marked = joined.caches[0].outlier_rows("layer_05")
    assert len(marked) and np.array_equal(joined.outlier_rows("layer_05"), marked)
    bits = np.concatenate([np.delete(bits_of(300, D, 0), marked, 0), bits_of(170, D, 1)])
    rows, found = torch.from_numpy(bits).view(torch.bfloat16).double().numpy(), joined.statistics("layer_05")
    np.testing.assert_allclose(joined.mean("layer_05"), rows.mean(0), rtol=1e-9)
    assert found["count"] == len(rows)
    assert found["mean_square_norm"] == pytest.approx((rows**2).sum(1).mean(), rel=1e-9)
    assert found["variance"] == pytest.approx(rows.var(0).mean(), rel=1e-9)


def test_marks_of_the_second_come_after_the_first(write) -> None:
    joined = ConcatCache([write("one", 300, 0), write("two", 170, 1, max_norm=2.0)])
    assert np.array_equal(joined.outlier_rows("layer_05"), 300 + joined.caches[1].outlier_rows("layer_05"))


def test_the_digest_is_that_of_all(write) -> None:
    one, two = write("one", 300, 0), write("two", 170, 1)
    digests = {ConcatCache(caches).array_digest("layer_05") for caches in ([one], [two], [one, two], [two, one])}
    assert len(digests) == 4


@pytest.mark.parametrize("key", COMPATIBLE_KEYS)
def test_caches_of_another_class_are_refused(write, key: str) -> None:
    other = {"model": {"name": "other", "revision": "0"}} if key == "model" else {key: 2}
    one, two = write("one", 100, 0), write("two", 100, 1, **other)
    with pytest.raises(UsageError, match=f"one and .*two cannot be combined: they differ in {key}. Use caches"):
        ConcatCache([one, two])


def test_a_cache_given_twice_is_refused(write) -> None:
    one = write("one", 100, 0)
    with pytest.raises(UsageError, match="The same cache was given twice"):
        concat_caches([one.folder, one.folder])
    assert isinstance(concat_caches([one.folder]), Cache)
