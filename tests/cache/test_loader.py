"""Batches: a pure function of the number, whoever reads them and however slowly."""

import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sae.cache.loader import ALIGN, BatchLoader, BatchOrder, lane_count
from sae.common.errors import DamagedError, UsageError

D = 8


def rows_of(plan: BatchOrder, batch: int) -> np.ndarray:
    """The numbers of a batch's rows in the cache, counted from its first chunk."""
    first = np.concatenate([[0], np.cumsum(plan.chunk_rows)])
    return np.concatenate([np.arange(p.start, p.start + p.rows) + first[p.chunk] for p in plan.spans(batch)])


chunk_lists = st.lists(st.integers(1, 300), min_size=1, max_size=12)


@settings(max_examples=150, deadline=None)
@given(chunk_lists, st.integers(1, 97), st.integers(0, 2**32), st.integers(0, 3))
def test_each_row_at_most_once_an_epoch(chunks: list[int], batch_size: int, seed: int, epoch: int) -> None:
    assume(sum(chunks) >= batch_size)
    plan = BatchOrder(chunks, batch_size, seed)
    start = epoch * plan.batches_per_epoch
    batches = [rows_of(plan, start + n) for n in range(plan.batches_per_epoch)]
    assert all(len(batch) == batch_size for batch in batches)
    seen = np.concatenate(batches)
    assert len(np.unique(seen)) == len(seen) and seen.max() < sum(chunks)
    assert sum(chunks) - len(seen) < batch_size + ALIGN * plan.lanes


@settings(max_examples=50, deadline=None)
@given(chunk_lists, st.integers(1, 97), st.integers(0, 500))
def test_a_fresh_plan_gives_the_same_pieces(chunks: list[int], batch_size: int, batch: int) -> None:
    assume(sum(chunks) >= batch_size)
    used = BatchOrder(chunks, batch_size, seed=3)
    for earlier in range(0, batch, 50):
        used.spans(earlier)
    assert used.spans(batch) == BatchOrder(chunks, batch_size, seed=3).spans(batch)


def test_epochs_and_seeds_differ() -> None:
    plan, other = BatchOrder([64] * 32, 64, seed=0), BatchOrder([64] * 32, 64, seed=1)
    first, second = rows_of(plan, 0), rows_of(plan, plan.batches_per_epoch)
    assert not np.array_equal(first, second) and not np.array_equal(first, rows_of(other, 0))


def test_pieces_lie_inside_their_chunks() -> None:
    plan = BatchOrder([100, 7, 300, 1, 92], 50, seed=5)
    for batch in range(3 * plan.batches_per_epoch):
        for piece in plan.spans(batch):
            assert piece.rows > 0 and piece.start + piece.rows <= plan.chunk_rows[piece.chunk]


@pytest.mark.parametrize(("batch_size", "lanes"), [(4096, 32), (48, 24), (31, 31), (37, 1), (1, 1), (1000, 25)])
def test_lanes_are_the_largest_divisor_up_to_32(batch_size: int, lanes: int) -> None:
    assert lane_count(batch_size) == lanes


def test_a_cache_smaller_than_a_batch_is_refused() -> None:
    BatchOrder([50, 49], 99, 0)
    with pytest.raises(UsageError, match="99 rows, fewer than one batch of 100. Harvest more tokens") as refused:
        BatchOrder([50, 49], 100, 0)
    assert refused.value.exit_code == 2


def test_mixing_is_that_of_the_formula() -> None:
    """P = B L (1/(lanes W) + 1/T): a row's expected number of others of its own context in its batch."""
    T, W, L, B, chunk = 262_144, 8192, 64, 1024, 256
    rng = np.random.default_rng(0)
    context = np.concatenate([w * W // L + rng.permutation(W) // L for w in range(T // W)])
    plan = BatchOrder([chunk] * (T // chunk), B, seed=0)
    partners = 0
    for batch in range(plan.batches_per_epoch):
        _, counts = np.unique(context[rows_of(plan, batch)], return_counts=True)
        partners += (counts * (counts - 1)).sum() / B
    assert partners / plan.batches_per_epoch == pytest.approx(B * L * (1 / (plan.lanes * W) + 1 / T), rel=0.1)


@pytest.fixture
def cache(write_cache, bits_of):
    """1,003 rows in windows and chunks of 128, the last of 107."""
    return write_cache({5: bits_of(1003, D)}, window=128)


def take(batches: BatchLoader, count: int) -> list[torch.Tensor]:
    return [next(batches).view(torch.int16).clone() for _ in range(count)]


def test_batches_are_the_plan_applied_to_the_whole_array(cache, bits_of) -> None:
    rows, plan = bits_of(1003, D), BatchOrder(cache.chunk_rows, 60, seed=9)
    with BatchLoader(cache, "layer_05", 60, seed=9) as batches:
        for number in range(2 * plan.batches_per_epoch + 1):
            read = next(batches)
            assert read.dtype == torch.bfloat16
            assert np.array_equal(read.view(torch.int16).numpy().view(np.uint16), rows[rows_of(plan, number)])


@pytest.mark.parametrize("start", [1, 7, 16, 40])
def test_starting_at_a_batch_is_having_come_there(cache, start: int) -> None:
    with BatchLoader(cache, "layer_05", 60) as batches:
        expected = take(batches, start + 3)[start:]
    with BatchLoader(cache, "layer_05", 60, batch=start) as batches:
        assert all(map(torch.equal, take(batches, 3), expected)) and batches.batch == start + 3


@pytest.mark.parametrize(("threads", "depth"), [(1, 1), (1, 4), (3, 2), (4, 7)])
def test_threads_and_depth_change_nothing(cache, threads: int, depth: int) -> None:
    with (
        BatchLoader(cache, "layer_05", 60) as batches,
        BatchLoader(cache, "layer_05", 60, threads=threads, depth=depth) as others,
    ):
        assert all(map(torch.equal, take(others, 40), take(batches, 40)))


def test_a_slow_consumer_sees_no_batch_change_under_it(cache) -> None:
    with BatchLoader(cache, "layer_05", 60) as batches:
        expected = take(batches, 8)
    with BatchLoader(cache, "layer_05", 60, depth=2) as batches:
        for wanted in expected:
            read = next(batches)
            time.sleep(0.02)  # readers run ahead as far as they may
            assert torch.equal(read.view(torch.int16), wanted)


def test_a_reader_s_error_comes_at_its_own_batch(cache) -> None:
    plan = BatchOrder(cache.chunk_rows, 3, 0)  # three lanes come to some chunks late
    touched = [{p.chunk for p in plan.spans(n)} for n in range(plan.batches_per_epoch)]
    last = max(range(8), key=lambda chunk: next(n for n, chunks in enumerate(touched) if chunk in chunks))
    number = next(n for n, chunks in enumerate(touched) if last in chunks)
    assert number > 0
    (cache.folder / f"layer_05/c.{last}.0").unlink()
    with BatchLoader(cache, "layer_05", 3, threads=3) as batches:
        take(batches, number)
        for _ in range(2):  # and stays
            with pytest.raises(DamagedError, match=rf"c\.{last}\.0 is listed in the cache but missing"):
                next(batches)


def test_threads_that_come_to_a_chunk_together_check_it_once(cache, monkeypatch) -> None:
    checked = []

    def check(folder, array, chunk, record) -> None:
        time.sleep(0.01)  # the others arrive
        checked.append(chunk)

    monkeypatch.setattr("sae.cache.reader.check_chunk", check)
    with BatchLoader(cache, "layer_05", 60, threads=4) as batches:
        take(batches, batches.order.batches_per_epoch)
    assert sorted(checked) == list(range(len(cache.chunk_rows)))


def test_a_failure_of_the_order_reaches_the_caller(cache, monkeypatch) -> None:
    """Whatever a reading thread meets: a thread that died of it would be waited for without end."""

    def shuffle(*_: object) -> None:
        raise MemoryError("no room for an order")

    batches = BatchLoader(cache, "layer_05", 60, threads=0)
    monkeypatch.setattr(batches.order, "_shuffle", shuffle)
    reader = threading.Thread(target=batches._read, daemon=True)
    reader.start()
    waited = threading.Thread(target=lambda: pytest.raises(MemoryError, next, batches), daemon=True)
    waited.start()
    waited.join(10)
    stuck = waited.is_alive()
    batches.close()
    assert not stuck


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_closing_early_ends_the_threads(cache, taken: int) -> None:
    before = threading.active_count()
    batches = BatchLoader(cache, "layer_05", 60, threads=3, depth=2)
    take(batches, taken)
    batches.close()
    assert threading.active_count() == before
    with pytest.raises(StopIteration):
        next(batches)


def test_a_layer_that_is_not_there_is_named(cache) -> None:
    with pytest.raises(UsageError, match=r"holds layer 5, not layer 12. Add it with `sae harvest --layer 12`"):
        cache.require_array(12)
    with pytest.raises(UsageError, match=r"not mlp_out of layer 5. Add it with `sae harvest --layer 5 --site mlp_out`"):
        cache.require_array(5, "mlp_out")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gets_the_same_batches(cache) -> None:
    with BatchLoader(cache, "layer_05", 60) as on_cpu, BatchLoader(cache, "layer_05", 60, device="cuda") as on_gpu:
        for _ in range(40):
            assert torch.equal(next(on_gpu).cpu().view(torch.int16), next(on_cpu).view(torch.int16))
