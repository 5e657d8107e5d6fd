"""The ring of windows: its groups, its batches, and what it keeps on disk. Streaming itself: tests/workflows."""

from pathlib import Path

import numpy as np
import pytest

from sae.cache.batch_order import BatchOrder
from sae.cache.layout import Layout
from sae.cache.ring import RingCache
from sae.common.errors import Interrupted, UsageError

IDENTITY = {"model": {"name": "none", "revision": "0"}}


def make_ring(folder: Path, rows: int = 200, capacity: int = 4) -> RingCache:
    """Windows of 16 rows: 13 of them in 200 rows, the last with 8 rows."""
    return RingCache(folder, IDENTITY, Layout(rows, 16), {"layer_05": 8}, capacity)


def test_windows_are_read_in_groups_of_half_the_ring(tmp_path: Path) -> None:
    ring = make_ring(tmp_path)
    assert ring.n_groups == 7
    assert [ring.windows(range(n, n + 1)) for n in (0, 5, 6)] == [range(2), range(10, 12), range(12, 13)]
    assert [ring.chunk_rows(n) for n in (0, 6)] == [[16, 16], [8]]


def test_each_group_yields_its_whole_batches(tmp_path: Path) -> None:
    ring = make_ring(tmp_path)
    per_group = BatchOrder([16, 16], 10, 0).batches_per_epoch
    ends = ring.cumulative_batches(10)
    assert np.diff([0, *ends]).tolist() == [per_group] * 6 + [0]  # the last group has 8 rows
    assert [ring.group_at(batch, 10) for batch in (0, per_group - 1, per_group)] == [0, 0, 1]


@pytest.mark.parametrize("capacity", [0, 3])
def test_a_ring_that_cannot_be_halved_raises(tmp_path: Path, capacity: int) -> None:
    with pytest.raises(UsageError, match=f"--ring {capacity} cannot be halved"):
        make_ring(tmp_path, capacity=capacity)


def test_a_group_smaller_than_a_batch_raises(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Half of the ring holds 32 rows, fewer than one batch of 33"):
        make_ring(tmp_path).cumulative_batches(33)


def test_an_ordinary_cache_is_never_used_as_a_ring(two_layer_folder: Path) -> None:
    with pytest.raises(UsageError, match="is an ordinary cache"):
        make_ring(two_layer_folder)


def test_only_the_windows_of_some_groups_are_kept(tmp_path: Path, finite_bits, make_writer, write_windows) -> None:
    bits = {5: finite_bits(200, 8)}
    writer = make_writer(tmp_path, bits, 16)
    write_windows(writer, bits, list(range(13)))
    ring = make_ring(tmp_path / "other")
    ring.folder = tmp_path
    ring.keep_only(range(1, 3))
    assert list(writer.missing_windows()) == [0, 1, *range(6, 13)]
    assert sorted(int(path.name.split(".")[1]) for path in (tmp_path / "layer_05").glob("c.*")) == [2, 3, 4, 5]


def test_waiting_for_a_group_ends_with_the_harvest_or_on_request(tmp_path: Path) -> None:
    ring = make_ring(tmp_path)
    with pytest.raises(Interrupted, match="Stopped while waiting for the harvest"):
        ring.wait_for_group(0, stopping=lambda: True)
    ring.report_failure(MemoryError("too little memory"))
    with pytest.raises(MemoryError, match="too little memory"):
        ring.wait_for_group(0, stopping=lambda: False)
    ring.close()
    assert not ring.wait_for_room(5)
