"""The order of rows is a pure function of the batch number; each row comes at most once per epoch, well mixed."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sae.cache.batch_order import ALIGN, BatchOrder, lane_count
from sae.common.errors import UsageError


def rows_of_batch(order: BatchOrder, batch: int) -> np.ndarray:
    """The rows of a batch, counted over the whole cache."""
    first = np.concatenate([[0], np.cumsum(order.chunk_rows)])
    return np.concatenate([np.arange(p.start, p.start + p.rows) + first[p.chunk] for p in order.spans(batch)])


chunk_lists = st.lists(st.integers(1, 300), min_size=1, max_size=12)


@settings(max_examples=150)
@given(chunk_lists, st.integers(1, 97), st.integers(0, 2**32), st.integers(0, 3))
def test_each_row_occurs_at_most_once_per_epoch(chunks: list[int], batch_size: int, seed: int, epoch: int) -> None:
    assume(sum(chunks) >= batch_size)
    order = BatchOrder(chunks, batch_size, seed)
    start = epoch * order.batches_per_epoch
    batches = [rows_of_batch(order, start + n) for n in range(order.batches_per_epoch)]
    assert all(len(batch) == batch_size for batch in batches)
    seen = np.concatenate(batches)
    assert len(np.unique(seen)) == len(seen) and seen.max() < sum(chunks)
    assert sum(chunks) - len(seen) < batch_size + ALIGN * order.lanes


@settings(max_examples=50)
@given(chunk_lists, st.integers(1, 97), st.integers(0, 500))
def test_spans_do_not_depend_on_earlier_calls(chunks: list[int], batch_size: int, batch: int) -> None:
    assume(sum(chunks) >= batch_size)
    used = BatchOrder(chunks, batch_size, seed=3)
    for earlier in range(0, batch, 50):
        used.spans(earlier)
    assert used.spans(batch) == BatchOrder(chunks, batch_size, seed=3).spans(batch)


def test_epochs_and_seeds_differ() -> None:
    order, other = BatchOrder([64] * 32, 64, seed=0), BatchOrder([64] * 32, 64, seed=1)
    first, second = rows_of_batch(order, 0), rows_of_batch(order, order.batches_per_epoch)
    assert not np.array_equal(first, second) and not np.array_equal(first, rows_of_batch(other, 0))


def test_spans_lie_inside_their_chunks() -> None:
    order = BatchOrder([100, 7, 300, 1, 92], 50, seed=5)
    for batch in range(3 * order.batches_per_epoch):
        for span in order.spans(batch):
            assert span.rows > 0 and span.start + span.rows <= order.chunk_rows[span.chunk]


@pytest.mark.parametrize(("batch_size", "lanes"), [(4096, 32), (48, 24), (31, 31), (37, 1), (1, 1), (1000, 25)])
def test_lanes_are_the_largest_divisor_up_to_32(batch_size: int, lanes: int) -> None:
    assert lane_count(batch_size) == lanes


def test_a_cache_smaller_than_a_batch_raises() -> None:
    BatchOrder([50, 49], 99, 0)
    with pytest.raises(UsageError, match="99 rows, fewer than one batch of 100. Harvest more tokens") as raised:
        BatchOrder([50, 49], 100, 0)
    assert raised.value.exit_code == 2


def test_mixing_follows_the_formula() -> None:
    """On average, B L (1/(lanes W) + 1/T) other rows of a batch come from the same context as a given row of it."""
    T, W, L, B, chunk = 262_144, 8192, 64, 1024, 256
    rng = np.random.default_rng(0)
    context = np.concatenate([w * W // L + rng.permutation(W) // L for w in range(T // W)])
    order = BatchOrder([chunk] * (T // chunk), B, seed=0)
    partners = 0
    for batch in range(order.batches_per_epoch):
        _, counts = np.unique(context[rows_of_batch(order, batch)], return_counts=True)
        partners += (counts * (counts - 1)).sum() / B
    assert partners / order.batches_per_epoch == pytest.approx(B * L * (1 / (order.lanes * W) + 1 / T), rel=0.1)


def test_batches_of_an_epoch_go_forward_through_each_lane() -> None:
    """One chunk of 640 rows and batches of 32: lane n begins at row 20 n, and batch t has row t of every lane."""
    order = BatchOrder([640], 32, seed=0)
    assert (order.lanes, order.batches_per_epoch) == (32, 20)
    for batch in (0, 1, 19, 20):
        assert [(span.start, span.rows) for span in order.spans(batch)] == [(20 * n + batch % 20, 1) for n in range(32)]
