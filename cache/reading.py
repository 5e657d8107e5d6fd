"""A sequence of steps that read chunks of an array, for example training batches. Some chunks may be in a store.

`open_reading` returns a `ChunkReading`; its `step` waits until the chunks of a step are in the local folder, and keeps
them there during the step. For a cache on a disk there is nothing to wait for.
"""

import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from .batch_order import BatchOrder
from .chunk_schedule import ChunkSchedule

ENDLESS = sys.maxsize
KNOWN_EPOCHS = 3  # planned at a time, including the current epoch
SIZED_EPOCHS = 64  # searched for the step that needs the most bytes at once


class FileSource(Protocol):
    """A cache in a store from which chunks are pulled."""

    def fetch_chunk(self, file: str) -> bytes: ...  # verified
    def verify_file(self, file: str) -> None: ...  # in the local folder; raises DamagedError
    def forget_chunk(self, file: str) -> None: ...  # close its memory map: the file may be removed


class StoredFile(NamedTuple):
    """The file of a chunk in a store."""

    source: FileSource
    file: str  # relative to its cache
    name: str  # relative to the local folder
    size: int


class Folder(Protocol):
    """The local folder that a reading pulls into; see local_folder.LocalFolder."""

    folder: Path
    size: int
    say: Callable[[str], None]

    def expect(self, readings: "Sequence[ChunkReading]") -> None: ...
    def check_size(self, readings: "Sequence[ChunkReading]", processes: int = 1) -> None: ...
    def begin(self, reading: "ChunkReading", expected_until: int | None = None) -> None: ...
    def wait(self, reading: "ChunkReading", step: int, files: Mapping[str, StoredFile]) -> None: ...
    def done(self, reading: "ChunkReading", step: int) -> None: ...
    def end(self, reading: "ChunkReading") -> None: ...


class ChunkReading:
    """Steps that read chunks. Steps begin in order and may end in any order.

    Args:
        folder: where chunks are pulled to.
        files: the file of each chunk; None for a chunk that is already on a disk.
        uses: the steps in a range that read each chunk, in the form of `BatchOrder.uses`.
        steps: the steps that will be read, up to ENDLESS.
        per_epoch: the number of steps after which the same chunks are read again.
        key: two readings of the same steps have equal keys.
    """

    def __init__(
        self, folder: Folder, files: Sequence[StoredFile | None], uses: Callable[[range], np.ndarray], steps: range,
        per_epoch: int, key: object = None,
    ) -> None:  # fmt: skip
        self.folder, self.files, self.uses, self.steps, self.per_epoch = folder, files, uses, steps, per_epoch
        self.key = key
        self.position = steps.start  # all earlier steps have been read
        self._read: set[int] = set()  # later steps that have been read
        self.closed = False

    def known_steps(self, epochs: int = KNOWN_EPOCHS) -> range:
        """The steps that are planned now: the rest of this epoch and the next epochs."""
        stop = (self.position // self.per_epoch + epochs) * self.per_epoch
        return range(self.position, max(self.position, min(self.steps.stop, stop)))

    @cached_property
    def least(self) -> int:
        """The largest number of bytes that any of the next steps needs."""
        return schedule_of([self], SIZED_EPOCHS)[0].most_at_once()

    def finish(self, step: int) -> None:
        """Record that a step has been read."""
        self._read.add(step)
        while self.position in self._read:
            self._read.remove(self.position)
            self.position += 1

    @contextmanager
    def step(self, number: int, chunks: Collection[int]) -> Iterator[None]:
        """Wait until the chunks of a step are present. The chunks stay as long as the context is open.

        Raises the error of the pull if a chunk cannot be pulled, and ReadingClosed if the reading is closed.
        """
        files = (self.files[chunk] for chunk in chunks)
        self.folder.wait(self, number, {file.name: file for file in files if file is not None})
        try:
            yield
        finally:
            self.folder.done(self, number)

    def close(self) -> None:
        """End the reading. Threads that wait for its chunks get ReadingClosed."""
        self.folder.end(self)


class ReadingClosed(Exception):
    """The reading was closed while a step waited for its chunks."""


class DiskReading:
    """A reading of a cache on a disk. It never waits."""

    def step(self, number: int, chunks: Collection[int]) -> AbstractContextManager[None]:
        return nullcontext()

    def close(self) -> None:
        """Does nothing."""


class ChunkSource(Protocol):
    """The interface of an object that chunks are read from."""

    @property
    def chunk_rows(self) -> list[int]: ...
    def stored_files(self, name: str) -> tuple[Folder, list[StoredFile | None]] | None: ...


def batch_reading(source: ChunkSource, name: str, order: BatchOrder, batches: range) -> ChunkReading | None:
    """Return a `ChunkReading` for batches of an array, not yet begun; None if no chunk of the array is in a store."""
    if (stored := source.stored_files(name)) is None:
        return None
    return ChunkReading(*stored, order.uses, batches, order.batches_per_epoch, key_of(stored[1], order))


def key_of(files: Sequence[StoredFile | None], order: BatchOrder) -> object:
    """The key of a reading. Two readings of the same batches have equal keys."""
    return next(file.name for file in files if file is not None), len(files), order.batch_size, order.seed


def open_reading(
    source: ChunkSource, name: str, order: BatchOrder, batches: range, expected: bool = False
) -> ChunkReading | DiskReading:
    """Begin to read batches of an array. `expected`: whether the batches were announced to the local folder
    (`expect`).
    """
    if (reading := batch_reading(source, name, order, batches)) is None:
        return DiskReading()
    reading.folder.begin(reading, batches.stop if expected else None)
    return reading


def open_chunk_reading(
    source: ChunkSource, name: str, order: BatchOrder, expected: bool = False
) -> ChunkReading | DiskReading:
    """Begin to read all chunks of an array one after the other, instead of the batches; step n reads chunk n."""
    if (stored := source.stored_files(name)) is None:
        return DiskReading()
    folder, files = stored

    def uses(steps: range) -> np.ndarray:
        return np.repeat(np.arange(steps.start, steps.stop)[:, None], 3, 1)

    reading = ChunkReading(folder, files, uses, range(len(files)), len(files), key_of(files, order))
    folder.begin(reading, ENDLESS if expected else None)
    return reading


def schedule_of(readings: Sequence[ChunkReading], epochs: int = KNOWN_EPOCHS) -> tuple[ChunkSchedule, list[StoredFile]]:
    """The schedule of consecutive readings, each starting at its position, and the files in the order of their numbers
    in the schedule.
    """
    numbers: dict[str, int] = {}
    files: list[StoredFile] = []
    uses, offset = [np.empty((0, 3), np.int64)], 0
    for reading in readings:
        steps = reading.known_steps(epochs)
        in_chunks = reading.uses(steps)
        number_of_chunk = np.full(len(reading.files), -1)
        for chunk in np.unique(in_chunks[:, 0]).tolist():
            if (file := reading.files[chunk]) is not None:
                number_of_chunk[chunk] = numbers.setdefault(file.name, len(files))
                if number_of_chunk[chunk] == len(files):
                    files.append(file)
        in_chunks = in_chunks[number_of_chunk[in_chunks[:, 0]] >= 0]
        shift = offset - steps.start
        uses.append(np.stack([number_of_chunk[in_chunks[:, 0]], in_chunks[:, 1] + shift, in_chunks[:, 2] + shift], 1))
        offset += len(steps)
    return ChunkSchedule(np.concatenate(uses), np.array([file.size for file in files], np.int64)), files
