"""Compute what readings would pull into a local folder, before anything is pulled."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .pulled_files import contents
from .reading import ChunkReading, schedule_of


class PullPlan(NamedTuple):
    """For each needed file: its bytes, whether it is in the folder, and how often it will be pulled."""

    sizes: np.ndarray
    present: np.ndarray
    counts: np.ndarray
    held: int  # bytes of all files that are in the folder now

    @property
    def bytes_to_pull(self) -> int:
        return int((self.counts * self.sizes).sum())

    @property
    def bytes_present(self) -> int:
        return int(self.sizes[self.present].sum())

    @property
    def bytes_missing(self) -> int:
        """The number of bytes by which the folder would grow if it had unlimited room."""
        return int(self.sizes[~self.present].sum())

    @property
    def pulled_again(self) -> int:
        """The number of pulls that fetch a file which was in the folder at an earlier time."""
        return int((self.counts - ~self.present).sum())


def plan_pulls(folder: Path, size: int, readings: Sequence[ChunkReading]) -> PullPlan:
    """The files that readings will pull into a folder of at most `size` bytes if they begin later and run one after the
    other.
    """
    found, (schedule, files) = contents(folder), schedule_of(readings)
    present = np.array([file.name in found.whole for file in files], bool)
    room, held = max(size - found.other, 0), found.other + sum(found.whole.values())
    if int(schedule.sizes.sum()) <= room:
        return PullPlan(schedule.sizes, present, (~present).astype(np.int64), held)
    return PullPlan(schedule.sizes, present, schedule.pulled(present, room), held)
