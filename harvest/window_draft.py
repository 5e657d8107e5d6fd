"""Drafts: the rows of a window computed so far, on disk, so that an interrupted window is not started over.

    drafts/000000/000000.safetensors   rows in the order in which they were computed: each array, row_ctx, row_pos
    drafts/000000/state.json           what computed them, the checksum of each part, where to continue; written last

A window is committed as a whole, and a slow machine can take hours to compute it. A draft is saved every SAVE_SECONDS
and on Ctrl-C; a machine that computes a window in less time needs none. A draft is used only by a harvest that would
compute the same bytes: with another device, version or number of contexts per pass, the window is started over. The
draft is removed once the window is committed.
"""

import contextlib
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
import safetensors
import safetensors.numpy

from ..common.cache_schemas import DRAFT_RECORD
from ..common.errors import DamagedError, UnavailableError
from ..common.files import atomic_write, digest_of, read_file

SAVE_SECONDS = 60.0  # time after which the rows computed since the last part are saved as a new part
WORTH_SAVING = 5.0  # on Ctrl-C, unsaved rows are saved if computing them took more seconds than this


class ComputedRows(NamedTuple):
    """How far a window has been computed. A single value, so that an interrupt cannot leave it half updated."""

    rows: int
    context: int  # the next one to compute


class WindowDraft:
    """The draft of a window. `owner` is everything that determines the draft's bytes, including software and device."""

    def __init__(self, folder: Path, window: int, owner: Any) -> None:
        self.folder, self.owner = draft_folder(folder, window), digest_of(owner)
        self.checksums: list[str] = []
        self.saved_rows, self.saved_at = 0, time.monotonic()
        self.has_room = True

    def load(self, arrays: Mapping[str, np.ndarray], slot: np.ndarray, start: ComputedRows) -> ComputedRows:
        """Copy the rows of the draft into `arrays`, row n to slot[n]; returns where to continue.

        Returns `start` if there is no draft, or if the draft is damaged or has another owner.
        """
        with contextlib.suppress(DamagedError):  # also raised if there is none
            state = DRAFT_RECORD.read(self.folder / "state.json")
            if state["owner"] != self.owner:
                return start
            rows = 0
            for number, checksum in enumerate(state["checksums"]):
                part = self._read_part(number, checksum)
                target = slot[rows : rows + len(part["row_ctx"])]
                for name, values in arrays.items():
                    values[target] = part[name]
                rows += len(target)
            self.checksums, self.saved_rows = state["checksums"], rows
            return ComputedRows(rows, state["context"])
        return start

    def _read_part(self, number: int, checksum: str) -> dict[str, np.ndarray]:
        path = self._part_file(number)
        data = read_file(path)
        if f"{google_crc32c.value(data):08x}" != checksum:
            raise DamagedError(f"{path} does not have its recorded checksum.")
        return safetensors.numpy.load(data)

    @property
    def seconds(self) -> float:
        """The seconds since the last part was saved, or since the window was begun."""
        return time.monotonic() - self.saved_at

    def save(self, arrays: Mapping[str, np.ndarray], slot: np.ndarray, progress: ComputedRows) -> None:
        """Save the rows computed since the last part was saved.

        If the disk is full, the draft is removed, because the window itself needs the space.
        """
        if progress.rows == self.saved_rows or not self.has_room:
            return
        new = slot[self.saved_rows : progress.rows]
        try:
            if not self.checksums:  # the old parts have another owner
                shutil.rmtree(self.folder, ignore_errors=True)
            data = safetensors.numpy.save({name: values[new] for name, values in arrays.items()})
            atomic_write(self._part_file(len(self.checksums)), data)
            self.checksums = [*self.checksums, f"{google_crc32c.value(data):08x}"]
            state = {"owner": self.owner, "checksums": self.checksums, "context": progress.context}
            DRAFT_RECORD.write(self.folder / "state.json", state)
        except UnavailableError:
            self.has_room = False
            shutil.rmtree(self.folder, ignore_errors=True)
        self.saved_rows, self.saved_at = progress.rows, time.monotonic()

    def _part_file(self, number: int) -> Path:
        return self.folder / f"{number:06d}.safetensors"


def draft_folder(folder: Path, window: int) -> Path:
    return folder / "drafts" / f"{window:06d}"


def remove_draft(folder: Path, window: int) -> None:
    """Remove the draft of a window that is committed, and the folder of drafts if this was the last draft."""
    shutil.rmtree(draft_folder(folder, window), ignore_errors=True)
    with contextlib.suppress(OSError):  # there are other drafts, or no folder
        (folder / "drafts").rmdir()


def remove_other_drafts(folder: Path, windows: Mapping[int, Any]) -> None:
    """Remove the drafts of all windows not in `windows`; a killed harvest can leave drafts of committed windows."""
    for path in (folder / "drafts").glob("*"):
        if not path.name.isdecimal() or int(path.name) not in windows:
            shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        (folder / "drafts").rmdir()
