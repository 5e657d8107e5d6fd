"""A cache that keeps only a ring of windows on disk: windows are harvested before training needs them and deleted after
training has read them.

`sae train --stream` uses it. The file ring.json marks the folder, so that deleted windows do not count as damage.

Windows are processed in groups of half the ring: training reads one group while the next is harvested. A group is read
as one epoch of a `BatchOrder`, whose epoch number is the number of the group; the rows left over at the end of the
group are dropped. So the rows of a batch depend only on the sizes, the seed and the batch size.

The position of the ring is not recorded. The training checkpoints determine which group is needed. The windows of that
group and the next group may exist; other windows are deleted, and missing windows are harvested. The bytes of a window
do not depend on when it is harvested.
"""

import threading
import time
from collections.abc import Callable, Mapping
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..common.cache_schemas import COMMIT_RECORD, RING_RECORD, WindowCommit
from ..common.errors import Interrupted, UsageError
from ..common.files import digest_of
from .batch_order import BatchOrder
from .chunks import read_chunk
from .consistency import check_commit
from .hooks import Hook
from .layout import FORMAT, ArraySpec, Layout, commit_file, fingerprint_of, is_ring_cache
from .outliers import MAX_NORM, iterate_rows, norm_limit, rows_above
from .reader import Cache

GROUPS_ON_DISK = 2  # one group is read while the other is written


class RingCache:
    """A ring of windows, shared by the thread that harvests them and the thread that trains on them.

    `capacity` is the number of windows that the ring keeps on disk. In every window, rows whose norm is over `max_norm`
    x the median norm of the first window are outliers. ring.json records this limit, which never changes.

    Raises UsageError if `capacity` is not an even number of at least 2, or if the folder holds an ordinary cache.
    """

    def __init__(
        self, folder: Path, identity: dict[str, Any], layout: Layout, widths: Mapping[str, int], capacity: int,
        max_norm: float | None = MAX_NORM,
    ) -> None:  # fmt: skip
        if capacity < GROUPS_ON_DISK or capacity % GROUPS_ON_DISK:
            raise UsageError(
                f"--ring {capacity} cannot be halved: training reads one half while the other is harvested. "
                "Give an even number of windows, 2 or more."
            )
        if (folder / "zarr.json").exists() and not is_ring_cache(folder):
            raise UsageError(
                f"{folder} is an ordinary cache, and --stream would delete its windows once they are read. "
                "Train on it without --stream, or give another --cache."
            )
        self.folder, self.identity, self.layout, self.widths = folder, identity, layout, dict(widths)
        self.capacity, self.max_norm = capacity, max_norm
        self.fingerprint = fingerprint_of(identity)
        self.n_groups = -(-layout.n_windows // (capacity // GROUPS_ON_DISK))
        self.cumulative_batches = cache(self._cumulative_batches)
        self.current_group: WindowGroup | None = None  # the group that training reads
        self._training_at = 0  # the group that training reads or waits for
        self._harvested = 0  # groups before this number are on disk
        self._failure: BaseException | None = None
        self._closed = False
        self._changed = threading.Condition()

    # --- sizes: pure functions ---------------------------------------------------------------------------------------

    def windows(self, groups: range) -> range:
        """The windows of a range of groups."""
        per_group = self.capacity // GROUPS_ON_DISK
        return range(groups.start * per_group, min(groups.stop * per_group, self.layout.n_windows))

    def chunk_rows(self, group: int) -> list[int]:
        """The number of rows in each chunk of a group."""
        size = self.layout.chunk_rows
        windows = map(self.layout.row_range, self.windows(range(group, group + 1)))
        return [min(size, rows.stop - start) for rows in windows for start in range(rows.start, rows.stop, size)]

    def _cumulative_batches(self, batch_size: int) -> list[int]:
        """For each group, the number of batches up to its end. Raises UsageError if the first group has fewer rows than
        one batch.
        """
        sizes = [self.chunk_rows(group) for group in range(self.n_groups)]
        if sum(sizes[0]) < batch_size:
            raise UsageError(
                f"Half of the ring holds {sum(sizes[0]):,} rows, fewer than one batch of {batch_size:,}. "
                "Give a larger --ring or --window, more --tokens, or a smaller --batch-size."
            )
        batches = [
            BatchOrder(rows, batch_size, 0).batches_per_epoch if sum(rows) >= batch_size else 0 for rows in sizes
        ]
        return np.cumsum(batches).tolist()

    def group_at(self, batch: int, batch_size: int) -> int:
        """The group that a batch is read from."""
        return int(np.searchsorted(self.cumulative_batches(batch_size), batch, side="right"))

    def array(self, name: str) -> ArraySpec:
        """The shape and storage of an activation array."""
        return self.layout.activation_arrays(name, self.widths[name])[0]

    def require_array(self, layer: int, site: str = "resid_post") -> str:
        """The name of the array of a layer and site."""
        return Hook(layer, site).array

    def array_digest(self, name: str) -> str:
        """A digest of everything that determines the rows of an array and the order in which they are read."""
        masked = [] if self.max_norm == MAX_NORM else [self.max_norm]  # older versions had no `max_norm`
        return digest_of([self.fingerprint, name, self.capacity // GROUPS_ON_DISK, *masked])

    # --- files -------------------------------------------------------------------------------------------------------

    def create(self, first_group: int) -> None:
        """Mark the folder as a ring, before anything else is written into it.

        A ring of an older version records no `max_norm`. Such a ring masks nothing, unless it restarts at the first
        group.
        """
        path = self.folder / "ring.json"
        if not path.exists() or (first_group == 0 and RING_RECORD.read(path).get("max_norm") != self.max_norm):
            RING_RECORD.write(path, {"format": FORMAT, "max_norm": self.max_norm})

    @property
    def has_norm_limits(self) -> bool:
        """Whether the norm limits of all arrays are fixed, or no limit is needed."""
        limits = self._norm_limits()
        return limits is None or set(self.widths) <= set(limits)

    def _norm_limits(self) -> dict[str, float] | None:
        """Array name -> norm limit, as recorded in ring.json for this `max_norm`; None if nothing is masked."""
        path = self.folder / "ring.json"
        record: dict[str, Any] = dict(RING_RECORD.read(path)) if path.exists() else {"max_norm": self.max_norm}
        if self.max_norm is None or "max_norm" not in record:
            return None
        return record.get("norm_limits", {}) if record["max_norm"] == self.max_norm else {}

    def norm_limit(self, name: str) -> float | None:
        """The norm limit of an array: a row with a larger norm is an outlier. None if there is no limit.

        The limit is known once the first window is harvested.
        """
        limits = self._norm_limits()
        return None if limits is None else limits[name]

    def fix_norm_limits(self) -> list[str]:
        """Record the limits that follow from window 0, if they are not yet recorded. Window 0 must be on disk.

        Returns a sentence for each array whose limit was not recorded before.
        """
        known = self._norm_limits()
        if known is None or self.has_norm_limits:
            return []
        norms = {name: self.layout.activation_arrays(name, self.widths[name])[1] for name in self.widths.keys() - known}
        limits = {}
        for name, array in sorted(norms.items()):
            files = self.read_commit(0, name)["files"]
            limits[name] = norm_limit(read_chunk(self.folder, array, 0, files), self.max_norm)
        record = {"format": FORMAT, "max_norm": self.max_norm, "norm_limits": {**known, **limits}}
        RING_RECORD.write(self.folder / "ring.json", record)
        return [
            f"{name}: rows with a norm over {limit:.4g}, {self.max_norm:g}x the median of the first window, are masked."
            for name, limit in limits.items()
        ]

    def read_commit(self, window: int, name: str) -> WindowCommit:
        """The commit of a window of an array. Raises DamagedError if the commit is missing or damaged, or belongs to
        another window.
        """
        path = self.folder / commit_file(window, name)
        commit = COMMIT_RECORD.read(path)
        check_commit(path, commit, self.fingerprint, self.layout)
        return commit

    def keep_only(self, groups: range) -> None:
        """Delete every window outside these groups; commits first, so that a commit never lists a deleted file."""
        windows = self.windows(groups)
        kept = {commit_file(window, name) for window in windows for name in self.widths}
        for array in self.layout.arrays(self.widths):
            kept |= {array.chunk_file(chunk) for chunk in self.layout.chunk_range(array, windows)}
        for pattern in ("commits/*.json", "row_*/c.*", "layer_*/c.*"):
            for path in self.folder.glob(pattern):
                if path.relative_to(self.folder).as_posix() not in kept and ".tmp-" not in path.name:
                    path.unlink()

    # --- called by training ------------------------------------------------------------------------------------------

    def wait_for_group(self, group: int, stopping: Callable[[], bool]) -> float:
        """Wait until a group is harvested and make it the current one; returns the seconds waited.

        Raises Interrupted as soon as `stopping()` is true, and the harvest's error if the harvest fails first.
        """
        started = time.perf_counter()
        with self._changed:
            while not self._changed.wait_for(lambda: self._harvested > group or self._failure, timeout=0.1):
                if stopping():
                    raise Interrupted(
                        "Stopped while waiting for the harvest. Everything is saved; run the same command to continue."
                    )
            if self._harvested <= group and self._failure is not None:
                raise self._failure
        self.current_group = WindowGroup(self, group)
        return time.perf_counter() - started

    def locate_batch(self, batch: int, batch_size: int) -> tuple["WindowGroup", int]:
        """The current group, and the number of a training batch within the `BatchOrder` of this group.

        The `BatchOrder` is endless: after the last batch of the group, another epoch of the same group follows.
        """
        assert self.current_group is not None
        group = self.current_group
        before = [0, *self.cumulative_batches(batch_size)][group.number]
        batches_in_group = self.cumulative_batches(batch_size)[group.number] - before
        return group, group.number * batches_in_group + batch - before

    def release_group(self, group: int) -> None:
        """Delete a group once every run has a checkpoint at the end of the group, and let the harvest continue."""
        if self.current_group is not None:
            self.current_group.close()
        with self._changed:
            self.keep_only(range(group + 1, group + 1 + GROUPS_ON_DISK))
            self._training_at = group + 1
            self._changed.notify_all()

    def close(self) -> None:
        """Close the ring because training has ended; `wait_for_room` then returns False."""
        if self.current_group is not None:
            self.current_group.close()
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    # --- called by the harvest ---------------------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """Whether training has ended."""
        return self._closed

    def start_at(self, group: int) -> None:
        """Set the first group that training needs, and delete all windows except those of this group and the next."""
        self.keep_only(range(group, group + GROUPS_ON_DISK))
        self._training_at = self._harvested = group

    def wait_for_room(self, group: int) -> bool:
        """Wait until a group may be written; False if training has ended."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or group < self._training_at + GROUPS_ON_DISK)
            return not self._closed

    def mark_harvested(self, group: int) -> None:
        """Record that a group is completely on disk."""
        with self._changed:
            self._harvested = group + 1
            self._changed.notify_all()

    def report_failure(self, error: BaseException) -> None:
        """Record the error that ended the harvest; `wait_for_group` raises it for the first group that is missing."""
        with self._changed:
            self._failure = error
            self._changed.notify_all()


class WindowGroup(Cache):
    """The windows of one group of a ring, as a cache whose manifest is the union of the windows' commits."""

    def __init__(self, ring: RingCache, number: int) -> None:
        super().__init__(ring.folder)
        self.ring, self.number, self.windows = ring, number, ring.windows(range(number, number + 1))
        self.first_chunk = self.windows.start * self.layout.window_rows // self.layout.chunk_rows

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """The record of each file of the group; there are no statistics."""
        commits = [self.ring.read_commit(window, name) for window in self.windows for name in self.ring.widths]
        return {"files": {file: record for commit in commits for file, record in commit["files"].items()}}

    @property
    def chunk_rows(self) -> list[int]:
        """The number of rows in each chunk of the group."""
        return self.ring.chunk_rows(self.number)

    def read_rows(self, name: str, index: int, start: int, count: int) -> list[np.ndarray]:
        """Read `count` rows, from row `start` on, of the group's chunk number `index`; see `Cache.read_rows`."""
        return super().read_rows(name, self.first_chunk + index, start, count)

    def norm_limit(self, name: str) -> float | None:
        """The norm limit of an array: a row with a larger norm is an outlier. The ring's first window determines the
        limit.
        """
        return self.ring.norm_limit(name)

    def outlier_rows(self, name: str) -> np.ndarray:
        """The rows of the group that training must ignore because their norm is over the limit, ascending."""
        return rows_above(self.row_norms(name), self.norm_limit(name))

    def row_norms(self, name: str) -> np.ndarray:
        """The L2 norm of every row of the group, (rows,) float32."""
        return np.concatenate(self._window_chunks(f"{name}.row_norm"))

    def _window_chunks(self, name: str) -> list[np.ndarray]:
        """The chunks of a small array, one for each window of the group, verified."""
        array = self.array(name)
        return [read_chunk(self.folder, array, window, self.manifest["files"]) for window in self.windows]

    def mean_and_mean_square(self, name: str) -> np.ndarray:
        """The elementwise mean and mean square (2, d_in) float64 of the group's rows, without outlier rows."""
        sums = sum((chunk[0] for chunk in self._window_chunks(f"{name}.moments")), start=np.zeros(()))
        norms = self.row_norms(name)
        outliers = rows_above(norms, self.norm_limit(name))
        rows = outliers + self.windows.start * self.layout.window_rows
        files = self.manifest["files"]
        for values in iterate_rows(self.folder, self.layout, name, rows, norms[outliers], files):
            sums = sums - np.stack([values.sum(0), np.square(values).sum(0)])
        return sums / (sum(self.chunk_rows) - len(outliers))

    def mean(self, name: str) -> np.ndarray:
        """The mean row (d_in,) float64 of the group."""
        return self.mean_and_mean_square(name)[0]

    def statistics(self, name: str) -> dict[str, Any]:
        """`count` and `mean_square_norm` of the group's rows, without outlier rows."""
        count = sum(self.chunk_rows) - len(self.outlier_rows(name))
        return {"count": count, "mean_square_norm": float(self.mean_and_mean_square(name)[1].sum())}

    def close(self) -> None:
        """Close the memory maps: a deleted file keeps its disk space as long as it is mapped."""
        self._open_chunk_cached.cache_clear()
        self._decode_block.cache_clear()
