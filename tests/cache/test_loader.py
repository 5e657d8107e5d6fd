"""Batches depend only on their number, not on who reads them or how fast."""

import threading
import time

import numpy as np
import pytest
import torch

from sae.cache.batch_order import BatchOrder
from sae.cache.loader import BatchLoader, ResidentLoader, open_loader
from sae.cache.reader import Cache
from sae.common.errors import DamagedError, UsageError

D = 8


def rows_of_batch(order: BatchOrder, batch: int) -> np.ndarray:
    """The rows of a batch, as indices into the whole cache."""
    first = np.concatenate([[0], np.cumsum(order.chunk_rows)])
    return np.concatenate([np.arange(p.start, p.start + p.rows) + first[p.chunk] for p in order.spans(batch)])


@pytest.fixture
def cache(write_cache, finite_bits):
    """A cache of 1,003 rows in windows and chunks of 128 rows; the last one has 107 rows."""
    return write_cache({5: finite_bits(1003, D)}, window_rows=128)


def take_batches(batches: BatchLoader, count: int) -> list[torch.Tensor]:
    return [next(batches).view(torch.int16).clone() for _ in range(count)]


def test_batches_are_the_rows_of_the_order(cache, finite_bits) -> None:
    rows, order = finite_bits(1003, D), BatchOrder(cache.chunk_rows, 60, seed=9)
    with BatchLoader(cache, "layer_05", 60, seed=9) as batches:
        for number in range(2 * order.batches_per_epoch + 1):
            read = next(batches)
            assert read.dtype == torch.bfloat16
            assert np.array_equal(read.view(torch.int16).numpy().view(np.uint16), rows[rows_of_batch(order, number)])


@pytest.mark.parametrize("start", [1, 7, 16, 40])
def test_starting_at_a_batch_equals_iterating_to_it(cache, start: int) -> None:
    with BatchLoader(cache, "layer_05", 60) as batches:
        expected = take_batches(batches, start + 3)[start:]
    with BatchLoader(cache, "layer_05", 60, batch=start) as batches:
        assert all(map(torch.equal, take_batches(batches, 3), expected)) and batches.batch == start + 3


@pytest.mark.parametrize(("threads", "depth"), [(1, 1), (1, 4), (3, 2), (4, 7)])
def test_threads_and_depth_change_nothing(cache, threads: int, depth: int) -> None:
    with (
        BatchLoader(cache, "layer_05", 60) as batches,
        BatchLoader(cache, "layer_05", 60, threads=threads, depth=depth) as others,
    ):
        assert all(map(torch.equal, take_batches(others, 40), take_batches(batches, 40)))


def test_a_batch_does_not_change_while_the_consumer_is_slow(cache) -> None:
    with BatchLoader(cache, "layer_05", 60) as batches:
        expected = take_batches(batches, 8)
    with BatchLoader(cache, "layer_05", 60, depth=2) as batches:
        for wanted in expected:
            read = next(batches)
            time.sleep(0.02)  # lets the reading threads get as far ahead as they can
            assert torch.equal(read.view(torch.int16), wanted)


def test_a_reading_error_is_raised_at_its_own_batch(cache) -> None:
    order = BatchOrder(cache.chunk_rows, 3, 0)  # with three lanes, some chunks are not read until a late batch
    touched = [{p.chunk for p in order.spans(n)} for n in range(order.batches_per_epoch)]
    last = max(range(8), key=lambda chunk: next(n for n, chunks in enumerate(touched) if chunk in chunks))
    number = next(n for n, chunks in enumerate(touched) if last in chunks)
    assert number > 0
    (cache.folder / f"layer_05/c.{last}.0").unlink()
    with BatchLoader(cache, "layer_05", 3, threads=3) as batches:
        take_batches(batches, number)
        for _ in range(2):  # the error persists
            with pytest.raises(DamagedError, match=rf"c\.{last}\.0 is listed in the cache but missing"):
                next(batches)


def test_threads_that_open_a_chunk_together_verify_it_once(cache, monkeypatch) -> None:
    checked = []

    def check(folder, array, chunk, record) -> None:
        time.sleep(0.01)  # gives the other threads time to reach the same chunk
        checked.append(chunk)

    monkeypatch.setattr("sae.cache.reader.check_chunk", check)
    with BatchLoader(cache, "layer_05", 60, threads=4) as batches:
        take_batches(batches, batches.order.batches_per_epoch)
    assert sorted(checked) == list(range(len(cache.chunk_rows)))


def test_any_error_of_a_reading_thread_reaches_the_caller(cache, monkeypatch) -> None:
    """If an error merely ended its thread, the caller would wait forever."""

    def shuffle(*_: object) -> None:
        raise MemoryError("no room for an order")

    batches = BatchLoader(cache, "layer_05", 60, threads=0)
    monkeypatch.setattr(batches.order, "_shuffle", shuffle)
    reader = threading.Thread(target=batches._read, daemon=True)
    reader.start()
    waiting = threading.Thread(target=lambda: pytest.raises(MemoryError, next, batches), daemon=True)
    waiting.start()
    waiting.join(60)
    stuck = waiting.is_alive()
    batches.close()
    assert not stuck


@pytest.mark.parametrize("n_batches", [0, 1, 5])
def test_closing_early_ends_the_threads(cache, n_batches: int) -> None:
    before = threading.active_count()
    batches = BatchLoader(cache, "layer_05", 60, threads=3, depth=2)
    take_batches(batches, n_batches)
    batches.close()
    assert threading.active_count() == before
    with pytest.raises(StopIteration):
        next(batches)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gets_the_same_batches(cache) -> None:
    with BatchLoader(cache, "layer_05", 60) as on_cpu, BatchLoader(cache, "layer_05", 60, device="cuda") as on_gpu:
        for _ in range(40):
            assert torch.equal(next(on_gpu).cpu().view(torch.int16), next(on_cpu).view(torch.int16))


# Outlier rows, in both loaders.


@pytest.mark.parametrize("loader", [BatchLoader, ResidentLoader])
def test_outliers_are_replaced_by_the_next_row_of_the_batch(
    outlier_cache: Cache, rows_with_outliers: torch.Tensor, outliers: list[int], loader
) -> None:
    first, order = np.cumsum([0, *outlier_cache.chunk_rows]), BatchOrder(outlier_cache.chunk_rows, 40, seed=1)
    seen = 0
    with loader(outlier_cache, "layer_05", 40, seed=1) as batches:
        for number in range(3 * order.batches_per_epoch):
            planned = np.concatenate(
                [first[p.chunk] + np.arange(p.start, p.start + p.rows) for p in order.spans(number)]
            )
            expected = []
            for at, row in enumerate(planned):
                seen += row in outliers
                while row in outliers:
                    at = (at + 1) % len(planned)
                    row = planned[at]
                expected.append(row)
            assert torch.equal(next(batches).view(torch.int16), rows_with_outliers[expected].view(torch.int16))
    assert seen >= 10  # outliers occurred


def test_a_batch_of_outliers_only_raises(outlier_cache: Cache) -> None:
    with BatchLoader(outlier_cache, "layer_05", 1) as batches:
        with pytest.raises(UsageError, match="Every row of a batch is over --max-norm. Harvest again"):
            for _ in range(outlier_cache.rows):
                next(batches)


# Compressed and resident arrays.


def test_a_compressed_cache_gives_the_same_batches(tmp_path, rows_with_outliers, make_writer, write_windows) -> None:
    read = []
    for compress in (False, True):
        bits = {5: rows_with_outliers.view(torch.int16).numpy().view(np.uint16)}
        writer = make_writer(tmp_path / str(compress), bits, 64, compress=compress)
        write_windows(writer, bits, list(writer.missing_windows()))
        writer.finish()
        cache = Cache(tmp_path / str(compress))
        assert np.array_equal(np.concatenate([cache.read_chunk("layer_05", n) for n in range(4)]), bits[5])
        with open_loader(cache, "layer_05", 24, seed=3, batch=2, device="cpu") as batches:
            read.append([next(batches).clone() for _ in range(20)])
    assert all(torch.equal(a.view(torch.int16), b.view(torch.int16)) for a, b in zip(*read, strict=True))


def test_the_resident_loader_gives_the_same_batches(outlier_cache: Cache) -> None:
    with (
        BatchLoader(outlier_cache, "layer_12", 24, seed=2, batch=5) as batches,
        ResidentLoader(outlier_cache, "layer_12", 24, seed=2, batch=5) as resident,
    ):
        for _ in range(25):
            assert torch.equal(next(batches).view(torch.int16), next(resident).view(torch.int16))
        assert batches.batch == resident.batch == 30
