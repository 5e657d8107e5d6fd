"""The ring of windows: its groups, its batches, and what it keeps on disk. tests/workflows tests streaming itself."""

from pathlib import Path

import numpy as np
import pytest
import torch

from sae.cache.batch_order import BatchOrder
from sae.cache.layout import Layout
from sae.cache.loader import BatchLoader
from sae.cache.reader import Cache
from sae.cache.ring import RingCache, WindowGroup
from sae.common.cache_schemas import RING_RECORD
from sae.common.errors import Interrupted, UsageError
from sae.common.files import digest_of

IDENTITY = {"model": {"name": "none", "revision": "0"}}


def make_ring(folder: Path, rows: int = 200, capacity: int = 4) -> RingCache:
    """A ring with windows of 16 rows. 200 rows make 13 windows, and the last one has 8 rows."""
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


def masked_ring(folder: Path, max_norm: float | None = 10.0, widths: dict[str, int] | None = None) -> RingCache:
    identity = Cache(folder).identity if (folder / "zarr.json").exists() else IDENTITY
    return RingCache(folder, identity, Layout(200, 16), widths or {"layer_05": 8}, 4, max_norm)


@pytest.fixture
def harvested_ring(tmp_path: Path, rows_with_outliers, make_writer, write_windows) -> RingCache:
    """A ring that holds all 13 windows of `rows_with_outliers`, with 16 rows per window."""
    bits = {5: rows_with_outliers.view(torch.int16).numpy().view(np.uint16)}
    folder = tmp_path / "ring"
    writer = make_writer(folder, bits, 16, **IDENTITY)
    masked_ring(tmp_path / "created").create(0)
    (tmp_path / "created" / "ring.json").rename(folder / "ring.json")
    write_windows(writer, bits, list(range(13)))
    return masked_ring(folder)


def group_of(ring: RingCache, number: int) -> WindowGroup:
    ring.mark_harvested(number)
    ring.wait_for_group(number, stopping=lambda: False)
    assert ring.current_group is not None
    return ring.current_group


def test_the_first_window_fixes_the_norm_limit_of_all(harvested_ring: RingCache, rows_with_outliers, outliers) -> None:
    ring, rows = harvested_ring, rows_with_outliers.double().numpy()
    (sentence,) = ring.fix_norm_limits()
    limit = ring.norm_limit("layer_05")
    assert limit == pytest.approx(10 * np.median(np.linalg.norm(rows[:16], axis=1)), rel=1e-6)
    assert f"rows with a norm over {limit:.4g}, 10x the median of the first window" in sentence
    for number in range(ring.n_groups):
        group = group_of(ring, number)
        first, size = 32 * number, sum(group.chunk_rows)
        inside = [row - first for row in outliers if 0 <= row - first < size]
        assert group.outlier_rows("layer_05").tolist() == inside
        kept = np.delete(rows[first : first + size], inside, 0)
        np.testing.assert_allclose(group.mean("layer_05"), kept.mean(0), rtol=1e-9, atol=1e-12)
        statistics = group.statistics("layer_05")
        assert statistics["count"] == len(kept)
        assert statistics["mean_square_norm"] == pytest.approx(np.square(kept).sum(1).mean(), rel=1e-9)
        batches = BatchLoader(group, "layer_05", 4, seed=0)
        with batches:
            for _ in range(batches.order.batches_per_epoch):
                assert next(batches).float().norm(dim=1).max() <= limit


def test_a_norm_limit_is_recorded_once(harvested_ring: RingCache) -> None:
    assert not harvested_ring.has_norm_limits
    harvested_ring.fix_norm_limits()
    harvested_ring.keep_only(range(1, 2))  # removes the window that the limit was computed from
    again = masked_ring(harvested_ring.folder)
    assert again.has_norm_limits and again.fix_norm_limits() == []
    assert again.norm_limit("layer_05") == harvested_ring.norm_limit("layer_05")
    # the recorded limit belongs to another --max-norm
    assert not masked_ring(again.folder, max_norm=5.0).has_norm_limits
    assert not masked_ring(again.folder, widths={"layer_05": 8, "layer_06": 8}).has_norm_limits


def test_a_ring_without_a_limit_masks_nothing(harvested_ring: RingCache) -> None:
    ring = masked_ring(harvested_ring.folder, max_norm=None)
    assert ring.has_norm_limits and ring.norm_limit("layer_05") is None and ring.fix_norm_limits() == []
    assert group_of(ring, 0).outlier_rows("layer_05").tolist() == []
    assert ring.array_digest("layer_05") != harvested_ring.array_digest("layer_05")


def test_a_ring_of_an_older_version_masks_nothing_until_it_starts_again(harvested_ring: RingCache) -> None:
    ring, record = harvested_ring, harvested_ring.folder / "ring.json"
    record.write_text('{"format": 1}')
    ring.create(first_group=2)
    assert ring.has_norm_limits and ring.norm_limit("layer_05") is None and ring.fix_norm_limits() == []
    ring.create(first_group=0)
    assert not ring.has_norm_limits and len(ring.fix_norm_limits()) == 1 and ring.norm_limit("layer_05") is not None


def test_the_digest_of_a_ring_with_the_default_limit_is_that_of_an_older_version(tmp_path: Path) -> None:
    """A streamed run that an older version began is therefore resumed."""
    ring = masked_ring(tmp_path)
    assert ring.max_norm == 10.0
    assert ring.array_digest("layer_05") == digest_of([ring.fingerprint, "layer_05", 2])
    digests = {masked_ring(tmp_path, max_norm).array_digest("layer_05") for max_norm in (10.0, 5.0, None)}
    assert len(digests) == 3


def test_a_file_that_is_being_written_is_kept(harvested_ring: RingCache) -> None:
    half = harvested_ring.folder / "layer_05" / "c.9.0.tmp-7"
    half.write_bytes(b"half")
    harvested_ring.keep_only(range(1))
    assert sorted(path.name for path in half.parent.glob("c.*")) == ["c.0.0", "c.1.0", half.name]


def test_what_was_harvested_before_a_failure_is_still_read(harvested_ring: RingCache) -> None:
    harvested_ring.mark_harvested(0)
    harvested_ring.report_failure(MemoryError("too little memory"))
    harvested_ring.wait_for_group(0, stopping=lambda: False)
    assert harvested_ring.current_group is not None and harvested_ring.current_group.number == 0
    with pytest.raises(MemoryError, match="too little memory"):
        harvested_ring.wait_for_group(1, stopping=lambda: False)


def test_fixing_a_limit_keeps_those_of_other_arrays(harvested_ring: RingCache) -> None:
    record = {"format": 1, "max_norm": 10.0, "norm_limits": {"layer_04": 3.0}}
    RING_RECORD.write(harvested_ring.folder / "ring.json", record)
    (sentence,) = harvested_ring.fix_norm_limits()
    assert sentence.startswith("layer_05: ") and harvested_ring.norm_limit("layer_04") == 3.0


def test_a_released_group_is_mapped_no_more(harvested_ring: RingCache) -> None:
    """A deleted file that is still mapped would keep its disk space."""
    harvested_ring.fix_norm_limits()
    with BatchLoader(group_of(harvested_ring, 0), "layer_05", 4, seed=0) as batches:
        next(batches)
    harvested_ring.release_group(0)
    assert not (harvested_ring.folder / "layer_05" / "c.0.0").exists()
    assert str(harvested_ring.folder) not in Path("/proc/self/maps").read_text()
