"""Schedule the files for a known sequence of reads: when each is needed, and which to keep if not all fit.

A *step* reads several files at once. All steps are known in advance, because the batch number determines the rows. If a
file has to be pulled and there is no room, the file whose next use is farthest away is removed (Belady 1966, A study of
replacement algorithms for virtual-storage computer). This rule pulls the fewest files if all files have the same size.
A file is pulled ahead only once the file that it replaces has been read, so reading ahead causes no additional pulls
(the "conservative" rule of Cao et al. 1995, A study of integrated prefetching and caching strategies).
"""

import heapq
from typing import NamedTuple

import numpy as np

NEVER = np.iinfo(np.int64).max


class Pull(NamedTuple):
    """A file to pull, the step that needs it, the files to remove for it, and the step after which they may be
    removed.
    """

    file: int
    needed: int
    evict: list[int]
    after: int  # the last step before `needed` that reads one of `evict`; -1: none does


class ChunkSchedule:
    """The steps at which files, numbered from 0, are needed.

    A row of `uses` (n, 3) is a file and the first and last step of a *stretch*: a range of consecutive steps that all
    read the file. Stretches of the same file may overlap, for example if lanes share a chunk. `sizes` (files,) are in
    bytes.
    """

    def __init__(self, uses: np.ndarray, sizes: np.ndarray) -> None:
        self.sizes = np.asarray(sizes, np.int64)
        self.file, self.first, self.last = merge_stretches(uses)
        self.by_first = np.argsort(self.first, kind="stable")
        self._span = int(self.last.max(initial=0)) + 2
        self._first_keys, self._last_keys = (self.file * self._span + steps for steps in (self.first, self.last))

    def next_use(self, files: np.ndarray, step: int) -> np.ndarray:
        """For each file, the first step at or after `step` that needs it, or NEVER."""
        at = np.searchsorted(self._last_keys, files * self._span + min(step, self._span - 1))
        found = at.clip(max=max(len(self.file) - 1, 0))
        if not len(self.file):
            return np.full(len(files), NEVER)
        is_used = (at < len(self.file)) & (self.file[found] == files)
        return np.where(is_used, np.maximum(self.first[found], step), NEVER)

    def last_use(self, files: np.ndarray, step: int) -> np.ndarray:
        """For each file, the last step before `step` that needs it, or -1."""
        at = np.searchsorted(self._first_keys, files * self._span + min(step, self._span - 1)) - 1
        if not len(self.file):
            return np.full(len(files), -1)
        found = at.clip(min=0)
        is_used = (at >= 0) & (self.file[found] == files)
        return np.where(is_used, np.minimum(self.last[found], step - 1), -1)

    def needed_at(self, step: int) -> np.ndarray:
        """The files that a step needs."""
        return self.file[(self.first <= step) & (self.last >= step)]

    def most_at_once(self) -> int:
        """The largest number of bytes that one step needs."""
        if not len(self.file):
            return 0
        steps = np.concatenate([self.first, self.last + 1])
        change = np.concatenate([self.sizes[self.file], -self.sizes[self.file]])
        order = np.lexsort((change, steps))  # at each step, bytes no longer needed are subtracted first
        return int(np.cumsum(change[order]).max())

    def next_pull(
        self, position: int, present: np.ndarray, kept: np.ndarray, free: int, wanted: int | None = None
    ) -> Pull | None:
        """The next pull, given that all steps before `position` have been read. None if no file is missing, or if there
        is no room for a missing file as long as the `kept` files stay.

        Args:
            position: the first step that has not been read.
            present: (files,) bool, the files that exist or are being pulled.
            kept: (files,) bool, the files that must not be removed.
            free: bytes that can be used without removing a file.
            wanted: a file that has to be pulled now, regardless of when the schedule needs it; any file that is not
                `kept` can be removed for it.
        """
        if wanted is not None:
            file, needed, spared = wanted, position, position - 1
        else:
            missing = np.flatnonzero((self.last[self.by_first] >= position) & ~present[self.file[self.by_first]])
            if not len(missing):
                return None
            stretch = self.by_first[missing[0]]
            file, needed = int(self.file[stretch]), max(int(self.first[stretch]), position)
            spared = needed
        if self.sizes[file] <= free:
            return Pull(file, needed, [], -1)
        candidates = np.flatnonzero(present & ~kept)
        later = self.next_use(candidates, needed)
        candidates, later = candidates[later > spared], later[later > spared]
        before = np.where(self.next_use(candidates, position) < needed, self.last_use(candidates, needed), -1)
        order = np.lexsort((before, -later))  # of files needed equally late, the one removable soonest comes first
        room = np.cumsum(self.sizes[candidates[order]]) + free
        if not len(room) or room[-1] < self.sizes[file]:
            return None
        count = int(np.searchsorted(room, self.sizes[file])) + 1
        evict = order[:count]
        return Pull(file, needed, candidates[evict].tolist(), int(before[evict].max()))

    def pulled(self, present: np.ndarray, capacity: int) -> np.ndarray:
        """How often each file is pulled when all steps are read, (files,) int64; the `present` files exist already.

        The result does not depend on the speed of the link or the reader.
        """
        counts, held = np.zeros(len(self.sizes), np.int64), present.copy()
        following = np.full(len(self.file), NEVER)  # the first step of the file's next stretch
        same = self.file[1:] == self.file[:-1]
        following[:-1][same] = self.first[1:][same]
        used = int(self.sizes[held].sum())
        idle = [
            (-step, file) for file, step in enumerate(self.next_use(np.arange(len(held)), 0).tolist()) if held[file]
        ]
        heapq.heapify(idle)  # (-next step, file) of files not being read; may contain stale entries
        key = {file: step for step, file in idle}
        reading: list[tuple[int, int, int]] = []  # (last step, file, -next step)
        for at in self.by_first.tolist():
            file, first = int(self.file[at]), int(self.first[at])
            while reading and reading[0][0] < first:
                _, done, step = heapq.heappop(reading)
                key[done] = step
                heapq.heappush(idle, (step, done))
            key.pop(file, None)
            if not held[file]:
                counts[file] += 1
                held[file], used = True, used + int(self.sizes[file])
            heapq.heappush(reading, (int(self.last[at]), file, -int(following[at])))
            while used > capacity and idle:
                step, other = heapq.heappop(idle)
                if key.get(other) == step:
                    del key[other]
                    held[other], used = False, used - int(self.sizes[other])
        return counts


def merge_stretches(uses: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The stretches in `uses`, as three arrays: file, first step and last step. They are sorted by file and first
    step; stretches of a file that overlap or adjoin are merged.
    """
    file, first, last = uses[np.lexsort((uses[:, 1], uses[:, 0]))].astype(np.int64).T
    if not len(file):
        return file, first, last
    span = int(last.max()) + 2
    reached = np.maximum.accumulate(file * span + last)
    begins = np.concatenate([[True], file[1:] * span + first[1:] > reached[:-1] + 1])
    begins[1:] |= file[1:] != file[:-1]
    start = np.flatnonzero(begins)
    return file[start], first[start], np.maximum.reduceat(last, start)
