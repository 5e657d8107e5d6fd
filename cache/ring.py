"""A cache of which only a ring of windows is on the disk: harvested ahead of training, removed behind it.

    ring.json            that this is one, so that nobody takes the windows that are gone for missing ones

Windows are taken in groups of half the ring: training reads one group while the next is harvested. A group is a small
epoch of `Plan`, with its number as the epoch's: its chunks in a seeded order, cut into lanes; the rows left over at its
end are dropped. So batch number -> rows is a pure function of the sizes, the seed and the batch size.

Nothing is written down about where the ring stands. Training's checkpoints say which group it needs; windows of that
group and the next may exist, others are removed, and what lacks is harvested, to the same bytes whenever that is.
"""

import threading
import time
from collections.abc import Callable, Mapping
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..common.errors import Interrupted, UsageError
from ..common.files import digest_of, read_json, write_json
from .chunks import map_rows
from .layout import FORMAT, Array, Hook, Layout, fingerprint_of
from .loader import BatchOrder
from .reader import Cache, is_ring
from .writer import commit_file

AHEAD = 2  # groups on the disk: one is read, one is written


class RingCache:
    """The windows of a harvest in groups, and what the harvest and training tell each other of them."""

    def __init__(
        self, folder: Path, identity: dict[str, Any], layout: Layout, widths: Mapping[str, int], size: int
    ) -> None:
        if size < AHEAD or size % AHEAD:
            raise UsageError(
                f"--ring {size} cannot be halved: training reads one half while the other is harvested. "
                "Give an even number of windows, 2 or more."
            )
        if (folder / "zarr.json").exists() and not is_ring(folder):
            raise UsageError(
                f"{folder} is a cache to keep, and a ring removes what was read. Train on it without --stream, or give another --cache."
            )
        self.folder, self.identity, self.layout, self.widths, self.size = folder, identity, layout, dict(widths), size
        self.fingerprint = fingerprint_of(identity)
        self.groups = -(-layout.windows // (size // AHEAD))
        self.ends = cache(self._ends)
        self.group: WindowGroup | None = None  # the one that training reads
        self._at = self._harvested = 0  # the group that training reads or waits for; groups before this are there
        self._failed: BaseException | None = None
        self._closed = False
        self._turn = threading.Condition()

    # --- sizes: pure functions -----------------------------------------------------------------------------------

    def windows(self, groups: range) -> range:
        """The windows of some groups."""
        each = self.size // AHEAD
        return range(groups.start * each, min(groups.stop * each, self.layout.windows))

    def chunk_rows(self, group: int) -> list[int]:
        """How many rows each chunk of a group holds."""
        size = self.layout.chunk_rows
        windows = map(self.layout.window, self.windows(range(group, group + 1)))
        return [min(size, rows.stop - start) for rows in windows for start in range(rows.start, rows.stop, size)]

    def _ends(self, batch_size: int) -> list[int]:
        """For each group, how many batches there are up to its end. UsageError when there are none."""
        sizes = [self.chunk_rows(group) for group in range(self.groups)]
        if sum(sizes[0]) < batch_size:
            raise UsageError(
                f"Half of the ring holds {sum(sizes[0]):,} rows, fewer than one batch of {batch_size:,}. "
                "Give a larger --ring or --window, more --tokens, or a smaller --batch-size."
            )
        batches = [
            BatchOrder(rows, batch_size, 0).batches_per_epoch if sum(rows) >= batch_size else 0 for rows in sizes
        ]
        return np.cumsum(batches).tolist()

    def group_of(self, batch: int, batch_size: int) -> int:
        return int(np.searchsorted(self.ends(batch_size), batch, side="right"))

    def array(self, name: str) -> Array:
        return self.layout.activations(name, self.widths[name])[0]

    def require(self, layer: int, site: str = "resid_post") -> str:
        return Hook(layer, site).array

    def digest(self, name: str) -> str:
        """What decides the rows of an array and the order in which they are read."""
        return digest_of([self.fingerprint, name, self.size // AHEAD])

    # --- files -----------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Say that the folder holds a ring, before anything else stands in it."""
        if not is_ring(self.folder):
            write_json(self.folder / "ring.json", {"format": FORMAT})

    def keep(self, groups: range) -> None:
        """Remove every window that is not of these groups; the records first, so that what they list is there."""
        windows = self.windows(groups)
        kept = {commit_file(window, name) for window in windows for name in self.widths}
        for array in self.layout.arrays(self.widths):
            kept |= {array.file(chunk) for chunk in self.layout.chunks_of(array, windows)}
        for pattern in ("commits/*.json", "row_*/c.*", "layer_*/c.*"):
            for path in self.folder.glob(pattern):
                if path.relative_to(self.folder).as_posix() not in kept and ".tmp-" not in path.name:
                    path.unlink()

    # --- training ----------------------------------------------------------------------------------------------------

    def wait_for(self, group: int, stopping: Callable[[], bool]) -> float:
        """Open a group when it is there; returns the seconds that it took.

        Raises Interrupted when asked to stop, and what the harvest raised when it will not come.
        """
        started = time.perf_counter()
        with self._turn:
            while not self._turn.wait_for(lambda: self._harvested > group or self._failed, timeout=0.1):
                if stopping():
                    raise Interrupted(
                        "Stopped while waiting for the harvest; everything is saved. The same command goes on."
                    )
            if self._harvested <= group:
                raise self._failed  # type: ignore[misc]
        self.group = WindowGroup(self, group)
        return time.perf_counter() - started

    def source(self, batch: int, batch_size: int) -> tuple["WindowGroup", int]:
        """The group that training reads, and a batch's number in the endless stream of it; after its last comes another epoch."""
        assert self.group is not None
        before = [0, *self.ends(batch_size)][self.group.number]
        each = self.ends(batch_size)[self.group.number] - before
        return self.group, self.group.number * each + batch - before

    def release(self, group: int) -> None:
        """Every run has a checkpoint at the end of the group: remove it and make room."""
        if self.group is not None:
            self.group.close()
        with self._turn:
            self.keep(range(group + 1, group + 1 + AHEAD))
            self._at = group + 1
            self._turn.notify_all()

    def close(self) -> None:
        """Training ends: the harvest should, too."""
        if self.group is not None:
            self.group.close()
        with self._turn:
            self._closed = True
            self._turn.notify_all()

    # --- the harvest -------------------------------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        return self._closed

    def start(self, group: int) -> None:
        """Training goes on with this group: clear away what is not of it or the next."""
        self.keep(range(group, group + AHEAD))
        self._at = self._harvested = group

    def room_for(self, group: int) -> bool:
        """Wait until a group may be written; False when training has ended."""
        with self._turn:
            self._turn.wait_for(lambda: self._closed or group < self._at + AHEAD)
            return not self._closed

    def harvested(self, group: int) -> None:
        with self._turn:
            self._harvested = group + 1
            self._turn.notify_all()

    def fail(self, error: BaseException) -> None:
        """The harvest has ended with an error, which training raises when it is through with what there is."""
        with self._turn:
            self._failed = error
            self._turn.notify_all()


class WindowGroup(Cache):
    """The windows of a group as a cache: what there is of it is what their records list."""

    def __init__(self, ring: RingCache, number: int) -> None:
        super().__init__(ring.folder)
        self.ring, self.number, self.windows = ring, number, ring.windows(range(number, number + 1))
        self.first_chunk = self.windows.start * self.layout.window_rows // self.layout.chunk_rows

    @cached_property
    def manifest(self) -> dict[str, Any]:
        records = [commit_file(window, name) for window in self.windows for name in self.ring.widths]
        commits = [read_json(self.folder / record, "files") for record in records]
        return {"files": {file: found for commit in commits for file, found in commit["files"].items()}}

    @property
    def chunk_rows(self) -> list[int]:
        return self.ring.chunk_rows(self.number)

    def rows_of(self, name: str, index: int, start: int, count: int) -> list[np.ndarray]:
        return super().rows_of(name, self.first_chunk + index, start, count)

    def marked(self, name: str) -> np.ndarray:
        """None: the median norm of all rows is not known before the last."""
        return np.array([], np.int64)

    def moments(self, name: str) -> np.ndarray:
        """The mean and the mean square (2, d_in) of the group's rows, float64."""
        array = self.array(f"{name}.moments")
        for window in self.windows:
            self.check(array.file(window))
        return sum(map_rows(self.folder, array, window)[0] for window in self.windows) / sum(self.chunk_rows)

    def mean(self, name: str) -> np.ndarray:
        return self.moments(name)[0]

    def statistics(self, name: str) -> dict[str, Any]:
        return {"count": sum(self.chunk_rows), "mean_square_norm": float(self.moments(name)[1].sum())}

    def close(self) -> None:
        """Let go of the files: what is mapped keeps its room on the disk after it was removed."""
        self._opened.cache_clear()
        self._block.cache_clear()
