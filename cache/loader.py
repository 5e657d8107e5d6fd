"""Load shuffled batches at the speed of a memory copy, in the order of cache/batch_order.py.

`open_loader` picks the loader for a device: `BatchLoader` reads ahead in threads, `ResidentLoader` keeps a copy of the
whole array on the GPU.
"""

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Protocol, Self

import numpy as np
import torch
from torch import Tensor

from ..common.device import copy_to_device
from ..common.errors import Interrupted, UsageError
from ..common.memory import available_memory
from .batch_order import BatchOrder, Span
from .layout import ArraySpec
from .reading import ENDLESS, ChunkReading, Folder, StoredFile, open_chunk_reading, open_reading

POLL_SECONDS = 0.5
DEVICE_SHARE = 0.4  # an array that takes less than this share of a GPU's free memory is copied there as a whole


class BatchSource(Protocol):
    """The source of batches: a `Cache`, a `ConcatCache`, or a group of windows of a `RingCache`."""

    @property
    def chunk_rows(self) -> list[int]: ...  # the number of rows in each chunk
    def array(self, name: str) -> ArraySpec: ...
    def read_rows(self, name: str, index: int, start: int, count: int) -> list[np.ndarray]: ...
    def outlier_rows(self, name: str) -> np.ndarray: ...
    def stored_files(self, name: str) -> tuple[Folder, list[StoredFile | None]] | None: ...


class BatchLoader:
    """An iterator over the batches of one array, each (batch_size, d_in) bfloat16. The iterator starts at batch `batch`
    and ends before batch `stop`; by default it never ends.

    A batch may be overwritten as soon as `next` is called again. The seed and the number `batch` of the next batch are
    its complete state. `seconds_waited` is the time that the caller has waited for data. `store_failure` is the error
    that `next` raised because a batch did not arrive from a store, or because `should_stop` ended the wait for it.

    Threads read ahead into a few slots. A thread takes the next batch number and a free slot in one step, so a batch
    never waits for a slot that a later batch holds. On a GPU the slots are pinned, and a separate CUDA stream copies
    batch n + 1 while the caller computes on batch n.

    The chunks of a cache in a store are pulled into the local folder, as far ahead as the folder has room. `expected`
    says whether the batches of this loader were announced with `LocalFolder.expect`.

    Raises UsageError if there are fewer rows than one batch. If a reading thread fails, `next` raises its error when
    the batch is due.
    """

    def __init__(
        self,
        cache: BatchSource,
        name: str,
        batch_size: int,
        *,
        seed: int = 0,
        batch: int = 0,
        device: torch.device | str = "cpu",
        depth: int = 4,
        threads: int = 2,
        stop: int = ENDLESS,
        expected: bool = False,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.cache, self.name, self.batch, self.device = cache, name, batch, torch.device(device)
        self.order = BatchOrder(cache.chunk_rows, batch_size, seed)
        self.seconds_waited, self.stop, self._should_stop = 0.0, stop, should_stop
        self.store_failure: BaseException | None = None
        self._outliers = OutlierMask(cache, name)
        d_in = cache.array(name).shape[1]
        self._reading = open_reading(cache, name, self.order, range(batch, stop), expected)
        self._in_store = isinstance(self._reading, ChunkReading)
        gpu = self.device.type == "cuda"
        self._slots = [torch.empty(batch_size, d_in, dtype=torch.bfloat16, pin_memory=gpu) for _ in range(depth)]
        self._copier = HostToDevice(self._slots, self.device) if gpu else None
        self._free_slots = deque(range(depth))
        self._next_to_read = batch
        self._read_ahead: dict[
            int, int | BaseException
        ] = {}  # batch number -> its slot, or the error that reading raised
        self._lent_slot: int | None = None  # the slot that the caller is using
        self._closed = False
        lock = threading.Lock()
        self._slot_freed, self._batch_read = threading.Condition(lock), threading.Condition(lock)
        self._threads = [threading.Thread(target=self._read, daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def _read(self) -> None:
        while True:
            with self._slot_freed:
                self._slot_freed.wait_for(lambda: self._closed or self._free_slots or self._next_to_read >= self.stop)
                if self._closed or self._next_to_read >= self.stop:
                    return
                # On a CPU, take the slot freed last, which is still in the CPU cache. On a GPU, take the slot freed
                # first, which has already been copied.
                slot = self._free_slots.popleft() if self._copier else self._free_slots.pop()
                number, self._next_to_read = self._next_to_read, self._next_to_read + 1
            result: int | BaseException = slot
            try:
                spans = self.order.spans(number)
                if self._copier:
                    self._copier.wait_until_copied(slot)
                with self._reading.step(number, {span.chunk for span in spans}):
                    self._fill(self._slots[slot], spans)
            except BaseException as error:  # the training thread raises it
                result = error
            with self._batch_read:
                self._read_ahead[number] = result
                self._batch_read.notify()

    def _fill(self, slot: Tensor, spans: list[Span]) -> None:
        rows = as_uint16(slot)
        parts = [part for span in spans for part in self.cache.read_rows(self.name, *span)]
        np.concatenate(parts, out=rows)  # one call: copying single spans makes threads queue for the interpreter lock
        outliers, replacements = self._outliers.replacements(spans)
        if len(outliers):
            rows[outliers] = rows[replacements]

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        number, started = self.batch, time.perf_counter()
        if number >= self.stop:
            raise StopIteration
        with self._batch_read:
            if self._lent_slot is not None:
                self._free_slots.append(self._lent_slot)
                self._lent_slot = None
                self._slot_freed.notify()
            while not self._batch_read.wait_for(lambda: self._closed or number in self._read_ahead, POLL_SECONDS):
                if self._in_store and self._should_stop():
                    self.store_failure = Interrupted("Stopped while waiting for the store.")
                    raise self.store_failure
            if self._closed:
                raise StopIteration
            slot = self._read_ahead[number]
            if isinstance(slot, BaseException):
                self.store_failure = slot if self._in_store else None
                raise slot
            del self._read_ahead[number]
            self._lent_slot = slot
            next_slot = self._read_ahead.get(number + 1)
        self.seconds_waited += time.perf_counter() - started
        self.batch += 1
        if self._copier is None:
            return self._slots[slot]
        return self._copier.take(number, slot, next_slot if isinstance(next_slot, int) else None)

    def close(self) -> None:
        """Stop the reading threads; `next` then raises StopIteration."""
        with self._slot_freed:
            self._closed = True
            self._slot_freed.notify_all()
        self._reading.close()
        for thread in self._threads:
            thread.join()
        if self._copier:
            self._copier.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class HostToDevice:
    """Copies host slots into two buffers on the GPU, on a separate CUDA stream; never blocks the host."""

    def __init__(self, slots: list[Tensor], device: torch.device) -> None:
        self.slots, self.stream = slots, torch.cuda.Stream(device)
        self.buffers = [torch.empty_like(slots[0], device=device) for _ in range(2)]
        self.free: list[torch.cuda.Event | None] = [None, None]  # events: the computation on each buffer has finished
        self.copied: list[torch.cuda.Event | None] = [None] * len(slots)
        self.last_copied = -1  # the last batch whose copy was queued
        self.stream.wait_stream(
            torch.cuda.current_stream(device)
        )  # until work that used the buffers' memory has finished

    def take(self, number: int, slot: int, next_slot: int | None) -> Tensor:
        """Return the buffer into which batch `number` is copied from `slot`; also queue the copy of the next batch if
        that batch is in a slot.
        """
        compute_stream = torch.cuda.current_stream(self.buffers[0].device)
        if self.last_copied < number:
            self._copy(number, slot)
        # All work on batch `number - 1` was queued before this event, so the event marks when that batch's buffer is
        # free.
        self.free[(number + 1) % 2] = compute_stream.record_event()
        if next_slot is not None:
            self._copy(number + 1, next_slot)
        copied = self.copied[slot]
        assert copied is not None
        compute_stream.wait_event(copied)
        return self.buffers[number % 2]

    def _copy(self, number: int, slot: int) -> None:
        buffer = number % 2
        if (event := self.free[buffer]) is not None:
            self.stream.wait_event(event)
        with torch.cuda.stream(self.stream):
            self.buffers[buffer].copy_(self.slots[slot], non_blocking=True)
        self.copied[slot], self.last_copied = self.stream.record_event(), number

    def wait_until_copied(self, slot: int) -> None:
        """Block until the last copy of a slot has finished; called by the thread that is about to refill the slot."""
        if (event := self.copied[slot]) is not None:
            event.synchronize()

    def close(self) -> None:
        """Make work that is queued after this call wait for the last copy, since that work may reuse the buffers'
        memory.
        """
        torch.cuda.current_stream(self.buffers[0].device).wait_stream(self.stream)


class ResidentLoader:
    """The same batches as `BatchLoader`, from a copy of the whole array on the device."""

    def __init__(
        self,
        cache: BatchSource,
        name: str,
        batch_size: int,
        *,
        seed: int = 0,
        batch: int = 0,
        device: torch.device | str = "cpu",
        expected: bool = False,
    ) -> None:
        self.batch = batch
        self.order = BatchOrder(cache.chunk_rows, batch_size, seed)
        self._outliers = OutlierMask(cache, name)
        self.first_row = np.cumsum([0, *cache.chunk_rows])
        d_in = cache.array(name).shape[1]
        self._rows = torch.empty(int(self.first_row[-1]), d_in, dtype=torch.bfloat16, device=device)
        started = time.perf_counter()
        with contextlib.closing(open_chunk_reading(cache, name, self.order, expected)) as reading:
            for chunk, size in enumerate(cache.chunk_rows):
                rows = torch.empty(size, d_in, dtype=torch.bfloat16)
                with reading.step(chunk, [chunk]):
                    np.concatenate(cache.read_rows(name, chunk, 0, size), out=as_uint16(rows))
                self._rows[self.first_row[chunk] : self.first_row[chunk + 1]] = rows.to(device)
        self.seconds_waited = time.perf_counter() - started
        self.store_failure: BaseException | None = None
        self._buffers = [torch.empty(batch_size, d_in, dtype=torch.bfloat16, device=device) for _ in range(2)]

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        spans = self.order.spans(self.batch)
        starts = [int(self.first_row[span.chunk]) + span.start for span in spans]
        buffer = self._buffers[self.batch % 2]
        parts = [self._rows[start : start + span.rows] for start, span in zip(starts, spans, strict=True)]
        torch.cat(parts, out=buffer)
        outliers, replacements = self._outliers.replacements(spans)
        if len(outliers):
            target, source = (
                copy_to_device(torch.from_numpy(rows), buffer.device) for rows in (outliers, replacements)
            )
            buffer[target] = buffer[source]
        self.batch += 1
        return buffer

    def close(self) -> None:
        """Free the copy of the array."""
        del self._rows

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class OutlierMask:
    """Keeps outlier rows out of batches: each is replaced by the next row of its batch that is not an outlier."""

    def __init__(self, cache: BatchSource, name: str) -> None:
        self.outlier_rows, self.first_row = cache.outlier_rows(name), np.cumsum([0, *cache.chunk_rows])

    def replacements(self, spans: list[Span]) -> tuple[np.ndarray, np.ndarray]:
        """The positions of outliers in a batch, and for each the position of the row that replaces it.

        Raises UsageError if every row of the batch is an outlier.
        """
        if not len(self.outlier_rows):
            return self.outlier_rows, self.outlier_rows
        starts = [int(self.first_row[span.chunk]) + span.start for span in spans]
        rows = np.concatenate([np.arange(at, at + span.rows) for at, span in zip(starts, spans, strict=True)])
        nearest = np.searchsorted(self.outlier_rows, rows).clip(max=len(self.outlier_rows) - 1)
        is_outlier = self.outlier_rows[nearest] == rows
        outliers, others = np.flatnonzero(is_outlier), np.flatnonzero(~is_outlier)
        if not len(others):
            raise UsageError("Every row of a batch is over --max-norm. Harvest again with a larger --max-norm.")
        return outliers, others[np.searchsorted(others, outliers) % len(others)]


def open_loader(
    cache: BatchSource,
    name: str,
    batch_size: int,
    *,
    seed: int,
    batch: int,
    device: torch.device | str,
    reserve: float = 0.0,
    stop: int = ENDLESS,
    expected: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
) -> BatchLoader | ResidentLoader:
    """Open the loader for a device: `ResidentLoader` on a GPU with room for the whole array, otherwise `BatchLoader`.

    `reserve` is the number of bytes on the device that the caller will still need. The other arguments are passed to
    `BatchLoader`.

    Raises UsageError if there are fewer rows than one batch.
    """
    if torch.device(device).type == "cuda":
        d_in = cache.array(name).shape[1]
        free = available_memory(str(device))
        if 2 * sum(cache.chunk_rows) * d_in < min(DEVICE_SHARE * free, free - reserve):
            return ResidentLoader(cache, name, batch_size, seed=seed, batch=batch, device=device, expected=expected)
    return BatchLoader(
        cache, name, batch_size, seed=seed, batch=batch, device=device, stop=stop, expected=expected,
        should_stop=should_stop,
    )  # fmt: skip


def copy_batches(loader: BatchLoader | ResidentLoader, stop: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """Iterate over copies of the batches before number `stop`; closes the loader at the end."""
    with loader:
        while loader.batch < stop:
            yield next(loader).to(dtype, copy=True)


def as_uint16(rows: Tensor) -> np.ndarray:
    """The bits of a bfloat16 tensor on the CPU as a uint16 array that shares its memory."""
    return rows.view(torch.int16).numpy().view(np.uint16)
