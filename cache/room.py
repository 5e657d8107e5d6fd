"""Decide, from a listing of a local folder, which file to pull next, which files to remove for it, and which to keep.

Nothing here touches the folder. The caller holds the folder's lock from before the listing until the decision has been
carried out; see shared_folder.py for the protocol.
"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..common.errors import UsageError
from ..common.files import folder_bytes, free_space
from ..common.formatting import format_bytes
from .chunk_schedule import NEVER, ChunkSchedule
from .pulled_files import Contents
from .reading import StoredFile
from .shared_folder import Statement, kept_by

OTHER_DISK = "free space, or give a --local-folder on another disk."


class Needs(NamedTuple):
    """The files of a folder that this process reads, and their order."""

    schedule: ChunkSchedule
    files: Sequence[StoredFile]  # as the schedule numbers them
    number: Mapping[str, int]  # name -> its number
    position: int  # the first step of the schedule that has not been read
    least: int  # bytes of the step that needs the most
    reading: Mapping[str, StoredFile]  # the files of the steps that are being read
    waiting: Mapping[str, StoredFile]  # the files of the waiting step served first
    waits_behind: bool  # whether that step and the schedule's first step are from different readings
    pulling: Collection[str]  # by this process
    damaged: Collection[str]  # to be pulled again although they are present
    failed: Collection[str]  # not to be pulled for now


class Decision(NamedTuple):
    """The next action. If `pull` is None, there may be room once step `after` has ended; if `after` is NEVER, no file
    is needed.
    """

    pull: StoredFile | None
    remove: list[str]
    after: int = -1
    blocked: bool = False  # a step waits, and there is no room for one of its files


class Room:
    """The state of a folder that this process shares with others and that may hold at most `size` bytes."""

    def __init__(self, needs: Needs, found: Contents, others: Collection[Statement], size: int) -> None:
        self.needs, self.found, self.kept_elsewhere = needs, found, kept_by(others)
        self.room = size - found.other
        self.reserved_elsewhere = sum(one.least for one in others)
        left = max(0, self.room - needs.least - self.reserved_elsewhere)
        self.share = needs.least + left // (1 + len(others))
        self.on_its_way = set(needs.pulling).union(*(one.pulling for one in others))
        self.served = {**needs.reading, **needs.waiting}  # kept even if they exceed this process's share
        self.whole = found.whole.keys() - needs.damaged
        self.there = self._mask([*self.whole, *self.on_its_way])

    def _mask(self, names: Collection[str]) -> np.ndarray:
        mask = np.zeros(len(self.needs.files), bool)
        mask[[number for name in names if (number := self.needs.number.get(name)) is not None]] = True
        return mask

    def kept(self) -> dict[str, StoredFile]:
        """The files that this process keeps: those being read or waited for, then those needed later, in the order of
        need, up to its share.
        """
        schedule, position, files = self.needs.schedule, self.needs.position, self.needs.files
        served = self._mask([*self.served, *self.needs.pulling])
        others = np.flatnonzero(self.there & ~served)
        needed = schedule.next_use(others, position)
        others = others[np.argsort(needed, kind="stable")][: int((needed < NEVER).sum())]
        left = self.share - int(schedule.sizes[served].sum())
        others = others[np.cumsum(schedule.sizes[others]) <= left]
        return {files[number].name: files[number] for number in [*np.flatnonzero(served).tolist(), *others.tolist()]}

    def next(self) -> Decision:
        """The file to pull now, and the files to remove for it."""
        needs, schedule = self.needs, self.needs.schedule
        served, failed = self._mask([*self.served]), self._mask(needs.failed)
        fixed = self._mask([*self.kept_elsewhere, *self.on_its_way]) | failed
        useless = {
            name: size
            for name, size in self.found.whole.items()
            if name not in needs.number and name not in self.kept_elsewhere
        }
        free = self.room - sum(self.found.whole.values()) - sum(self.found.parts.values())
        present = self.there | failed
        lacking = [n for name in needs.waiting if not present[n := needs.number[name]]]
        free_then = free + sum(useless.values())
        if lacking and needs.waits_behind:
            pull = schedule.next_pull(needs.position, present, fixed | served, free_then, lacking[0])
        else:
            pull = schedule.next_pull(needs.position, present, fixed, free_then)
        if pull is None or not self._fits(pull.file, pull.needed):
            is_missing = (schedule.next_use(np.flatnonzero(~present), needs.position) < NEVER).any()
            return Decision(None, [], needs.position if is_missing else NEVER, bool(lacking))
        if served[pull.evict].any():  # a later step, which began before an earlier one, needs one of these files
            return Decision(None, [])
        if pull.after >= needs.position:
            return Decision(None, [], pull.after)
        remove = [needs.files[number].name for number in pull.evict]
        short = int(schedule.sizes[pull.file] - schedule.sizes[pull.evict].sum()) - free
        for name, size in useless.items():
            if short > 0:
                remove.append(name)
                short -= size
        return Decision(needs.files[pull.file], remove)

    def _fits(self, file: int, needed: int) -> bool:
        """Whether a file, together with all files that are needed earlier, fits into this process's share of the
        folder.
        """
        schedule, position = self.needs.schedule, self.needs.position
        if needed <= position:
            return True
        before = self.there & (schedule.next_use(np.arange(len(self.there)), position) <= needed)
        before |= self._mask([*self.served])
        return int(schedule.sizes[before].sum() + schedule.sizes[file]) <= self.share

    def describe(self) -> str:
        """A short description of what occupies the room that a step waits for."""
        kept = sum(size for name, size in self.found.whole.items() if name in self.kept_elsewhere)
        coming = sum(self.found.parts.values())
        return f"other processes keep {format_bytes(kept)} there, and {format_bytes(coming)} are being pulled"


def check_room(folder: Path, size: int, small: int, least: int, elsewhere: int) -> None:
    """Raise UsageError if a folder of `size` bytes has no room for one step of every process.

    Args:
        folder: the folder.
        size: maximum bytes in the folder.
        small: bytes of files that are never removed.
        least: bytes that one step of this process needs.
        elsewhere: bytes that the other processes need together, for one step each.
    """
    if least + elsewhere + small <= size:
        return
    needed = room_for(least + elsewhere + small)
    disk = free_space(folder) + folder_bytes(folder)
    beside = f", other processes that share the folder need {format_bytes(elsewhere)} for theirs" * (elsewhere > 0)
    first = " All processes use the size given to the first one, so start all of them with this size." * (elsewhere > 0)
    raise UsageError(
        f"--local-cache {format_bytes(size)} is too small: one step reads {format_bytes(least)} of chunks{beside}, and "
        f"other files in {folder} take {format_bytes(small)}. "
        + (
            f"Give --local-cache {format_bytes(needed)} or more; additional room is used to read ahead.{first}"
            if needed <= disk
            else f"It needs {format_bytes(needed)}, but its disk has only {format_bytes(disk)}: {OTHER_DISK}"
        )
    )


def room_for(size: int) -> int:
    """A little more than `size` bytes, so that the number is still large enough after it is rounded for display."""
    return int(1.005 * size + 1e5)
