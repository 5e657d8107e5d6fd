"""Shuffled batches at the speed of a memory copy, in an order that is a pure function of the batch number.

The rows of a window were permuted when they were written. An epoch is the chunks in a seeded order, laid end to end as
one stream; the stream is cut into `lanes` equal segments; batch t is the t-th block of B/lanes rows of every lane. So a
read is contiguous and a batch still mixes rows from up to as many windows as there are lanes: per row, the expected
number of others of its own context is about B L (1/(lanes W) + 1/T) for contexts of L rows, windows of W and T rows in all.
"""

import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from ..common.errors import UsageError
from .layout import Array

LANES = 32
DEVICE_SHARE = 0.4  # of a GPU's free memory: a cache that takes less is kept there
ALIGN = 8  # rows: lanes then start on a page, 8 x 4608 bytes being nine of them


class BatchSource(Protocol):
    """What batches are read from: a Cache, or several as one."""

    @property
    def chunk_rows(self) -> list[int]: ...
    def array(self, name: str) -> Array: ...
    def rows_of(self, name: str, index: int, start: int, count: int) -> list[np.ndarray]: ...
    def marked(self, name: str) -> np.ndarray: ...


class Span(NamedTuple):
    chunk: int
    start: int
    rows: int


def lane_count(batch_size: int) -> int:
    """The largest divisor of the batch size up to 32."""
    return next(n for n in range(min(LANES, batch_size), 0, -1) if batch_size % n == 0)


class BatchOrder:
    """Batch number -> rows. The same for everybody who has the seed; nothing to save but the number."""

    def __init__(self, chunk_rows: list[int], batch_size: int, seed: int) -> None:
        self.chunk_rows, self.batch_size, self.seed = np.asarray(chunk_rows, np.int64), batch_size, seed
        self.lanes = lane_count(batch_size)
        self.block = batch_size // self.lanes
        rows = int(self.chunk_rows.sum())
        align = ALIGN if rows >= 64 * batch_size else 1
        segment = rows // self.lanes // align * align
        self.batches_per_epoch = segment // self.block
        if not self.batches_per_epoch:
            raise UsageError(
                f"The cache has {rows:,} rows, fewer than one batch of {batch_size:,}. Harvest more tokens or use a smaller --batch-size."
            )
        self.lane_start = np.arange(self.lanes) * segment
        self._epoch = -1

    def _shuffle(self, epoch: int) -> None:
        if epoch != self._epoch:
            self._order = np.random.Generator(np.random.Philox(key=[self.seed, epoch])).permutation(
                len(self.chunk_rows)
            )
            self._end = np.cumsum(self.chunk_rows[self._order])
            self._epoch = epoch

    def pieces(self, batch: int) -> list[Span]:
        """Where the rows of a batch are, in their order."""
        epoch, within = divmod(batch, self.batches_per_epoch)
        self._shuffle(epoch)
        first = self.lane_start + within * self.block
        at = np.searchsorted(self._end, first, side="right")
        chunk = self._order[at]
        left = self._end[at] - first  # in the chunk where a lane's block begins
        found = []
        lanes = (a.tolist() for a in (at, chunk, self.chunk_rows[chunk] - left, left))
        for position, index, offset, inside in zip(*lanes, strict=True):
            rows = min(self.block, inside)
            found.append(Span(index, offset, rows))
            while rows < self.block:  # the block goes on in the chunk that comes next in the epoch's order
                position += 1
                index = int(self._order[position])
                taken = min(self.block - rows, int(self.chunk_rows[index]))
                found.append(Span(index, 0, taken))
                rows += taken
        return found


class BatchLoader:
    """An endless stream of (batch_size, d_in) bfloat16 tensors of one array, starting at any batch.

    Threads read ahead into a few slots. A thread takes the next number and a free slot at once, so a batch never waits
    for a slot that a later one holds. A tensor handed out is overwritten after the next call of `next`. The position is
    two integers: seed and `batch`. On a GPU the slots are pinned, and a copy stream sends batch n + 1 while the caller
    computes on batch n.
    """

    def __init__(
        self, cache: BatchSource, name: str, batch_size: int, *, seed: int = 0, batch: int = 0, device: torch.device | str = "cpu",
        depth: int = 4, threads: int = 2,
    ) -> None:  # fmt: skip
        self.cache, self.name, self.batch, self.device = cache, name, batch, torch.device(device)
        self.plan = BatchOrder(cache.chunk_rows, batch_size, seed)
        self.waited = 0.0  # seconds that training stood still for data
        self._marks = OutlierMask(cache, name)
        d_in = cache.array(name).shape[1]
        gpu = self.device.type == "cuda"
        self._slots = [torch.empty(batch_size, d_in, dtype=torch.bfloat16, pin_memory=gpu) for _ in range(depth)]
        self._sender = HostToDevice(self._slots, self.device) if gpu else None
        self._free = deque(range(depth))
        self._following = batch  # the next batch to be read
        self._read_ahead: dict[int, int | BaseException] = {}  # batch -> its slot, or why it could not be read
        self._lent: int | None = None  # the slot that the caller has
        self._closed = False
        lock = threading.Lock()
        self._one_is_free, self._one_is_read = threading.Condition(lock), threading.Condition(lock)
        self._planning = threading.Lock()  # a plan keeps the order of the epoch that was asked for last
        self._threads = [threading.Thread(target=self._read, daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def _read(self) -> None:
        while True:
            with self._one_is_free:
                self._one_is_free.wait_for(lambda: self._closed or self._free)
                if self._closed:
                    return
                # What was given back last is still near the core; on a GPU what was given back first has been sent.
                slot = self._free.popleft() if self._sender else self._free.pop()
                number, self._following = self._following, self._following + 1
            read: int | BaseException = slot
            try:
                with self._planning:
                    pieces = self.plan.pieces(number)
                if self._sender:
                    self._sender.wait_until_sent(slot)
                self._fill(self._slots[slot], pieces)
            except BaseException as error:  # handed to the training thread, which raises it
                read = error
            with self._one_is_read:
                self._read_ahead[number] = read
                self._one_is_read.notify()

    def _fill(self, slot: Tensor, pieces: list[Span]) -> None:
        rows = as_uint16(slot)
        parts = (part for piece in pieces for part in self.cache.rows_of(self.name, *piece))
        np.concatenate(list(parts), out=rows)  # one call: threads that copy piece by piece queue for the interpreter
        marked, instead = self._marks.replaced(pieces)
        if len(marked):
            rows[marked] = rows[instead]

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        number, started = self.batch, time.perf_counter()
        with self._one_is_read:
            if self._lent is not None:
                self._free.append(self._lent)
                self._lent = None
                self._one_is_free.notify()
            self._one_is_read.wait_for(lambda: self._closed or number in self._read_ahead)
            if self._closed:
                raise StopIteration
            slot = self._read_ahead[number]
            if isinstance(slot, BaseException):
                raise slot
            self._lent = self._read_ahead.pop(number)
            following = self._read_ahead.get(number + 1)
        self.waited += time.perf_counter() - started
        self.batch += 1
        if self._sender is None:
            return self._slots[slot]
        return self._sender.take(number, slot, following if isinstance(following, int) else None)

    def close(self) -> None:
        with self._one_is_free:
            self._closed = True
            self._one_is_free.notify_all()
        for thread in self._threads:
            thread.join()
        if self._sender:
            self._sender.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class HostToDevice:
    """Host slots -> two buffers on the GPU, over a stream of their own; nothing here stops the host."""

    def __init__(self, slots: list[Tensor], device: torch.device) -> None:
        self.slots, self.stream = slots, torch.cuda.Stream(device)
        self.buffers = [torch.empty_like(slots[0], device=device) for _ in range(2)]
        self.free: list[torch.cuda.Event | None] = [None, None]  # what was computed on a buffer has come to its end
        self.sent: list[torch.cuda.Event | None] = [None] * len(slots)
        self.last = -1  # the last batch that was sent
        self.stream.wait_stream(torch.cuda.current_stream(device))  # what had the buffers' memory before is through

    def take(self, number: int, slot: int, following: int | None) -> Tensor:
        """The buffer that holds batch `number` of `slot`; batch `number + 1` is sent meanwhile when it has a slot."""
        computing = torch.cuda.current_stream(self.buffers[0].device)
        if self.last < number:
            self._send(number, slot)
        self.free[(number + 1) % 2] = computing.record_event()  # all work on batch number - 1 was queued before this
        if following is not None:
            self._send(number + 1, following)
        computing.wait_event(self.sent[slot])  # type: ignore[arg-type]
        return self.buffers[number % 2]

    def _send(self, number: int, slot: int) -> None:
        buffer = number % 2
        if (event := self.free[buffer]) is not None:
            self.stream.wait_event(event)
        with torch.cuda.stream(self.stream):
            self.buffers[buffer].copy_(self.slots[slot], non_blocking=True)
        self.sent[slot], self.last = self.stream.record_event(), number

    def close(self) -> None:
        """The buffers' memory may be used again by what is queued after this, not while a batch is still on its way."""
        torch.cuda.current_stream(self.buffers[0].device).wait_stream(self.stream)

    def wait_until_sent(self, slot: int) -> None:
        """Called by the thread that wants to fill the slot again."""
        if (event := self.sent[slot]) is not None:
            event.synchronize()


class ResidentLoader:
    """The same stream as Batches, from a copy of the whole array on the device."""

    def __init__(
        self, cache: BatchSource, name: str, batch_size: int, *, seed: int = 0, batch: int = 0, device: torch.device | str = "cpu"
    ) -> None:  # fmt: skip
        self.batch, self.plan, self._marks = (
            batch,
            BatchOrder(cache.chunk_rows, batch_size, seed),
            OutlierMask(cache, name),
        )
        self.first = np.cumsum([0, *cache.chunk_rows])
        d_in = cache.array(name).shape[1]
        self._rows = torch.empty(int(self.first[-1]), d_in, dtype=torch.bfloat16, device=device)
        started = time.perf_counter()
        for chunk, size in enumerate(cache.chunk_rows):
            rows = torch.empty(size, d_in, dtype=torch.bfloat16)
            np.concatenate(cache.rows_of(name, chunk, 0, size), out=as_uint16(rows))
            self._rows[self.first[chunk] : self.first[chunk + 1]] = rows.to(device)
        self.waited = time.perf_counter() - started
        self._buffers = [torch.empty(batch_size, d_in, dtype=torch.bfloat16, device=device) for _ in range(2)]

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        pieces = self.plan.pieces(self.batch)
        starts = [int(self.first[p.chunk]) + p.start for p in pieces]
        buffer = self._buffers[self.batch % 2]
        parts = [self._rows[at : at + p.rows] for at, p in zip(starts, pieces, strict=True)]
        torch.cat(parts, out=buffer)
        marked, instead = self._marks.replaced(pieces)
        if len(marked):
            buffer[torch.from_numpy(marked)] = buffer[torch.from_numpy(instead)]
        self.batch += 1
        return buffer

    def close(self) -> None:
        del self._rows

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class OutlierMask:
    """Marked rows get no weight: another row of their batch, the next that is not marked, stands in their place."""

    def __init__(self, cache: BatchSource, name: str) -> None:
        self.marked, self.first = cache.marked(name), np.cumsum([0, *cache.chunk_rows])

    def replaced(self, pieces: list[Span]) -> tuple[np.ndarray, np.ndarray]:
        """Positions in the batch that hold marked rows, and the positions of what stands in for them."""
        if not len(self.marked):
            return self.marked, self.marked
        first = np.array([self.first[p.chunk] + p.start for p in pieces])
        sizes = np.array([p.rows for p in pieces])
        rows = np.concatenate([np.arange(at, at + size) for at, size in zip(first, sizes, strict=True)])
        at = np.searchsorted(self.marked, rows).clip(max=len(self.marked) - 1)
        is_marked = self.marked[at] == rows
        marked, good = np.flatnonzero(is_marked), np.flatnonzero(~is_marked)
        if not len(good):
            raise UsageError("A batch holds only rows marked by --max-norm. Harvest again with a larger --max-norm.")
        return marked, good[np.searchsorted(good, marked) % len(good)]


def open_loader(
    cache: BatchSource, name: str, batch_size: int, *, seed: int, batch: int, device: torch.device | str
) -> BatchLoader | ResidentLoader:
    """The stream of batches for a device: from a copy on a GPU that has room for the whole array, else read ahead."""
    if torch.device(device).type == "cuda":
        d_in = cache.array(name).shape[1]
        if 2 * sum(cache.chunk_rows) * d_in < DEVICE_SHARE * torch.cuda.mem_get_info(device)[0]:
            return ResidentLoader(cache, name, batch_size, seed=seed, batch=batch, device=device)
    return BatchLoader(cache, name, batch_size, seed=seed, batch=batch, device=device)


def copy_batches(stream: BatchLoader | ResidentLoader, last: int | None, dtype: torch.dtype) -> Iterator[Tensor]:
    """The batches of a stream before batch `last`, each a tensor of its own; the stream is closed behind them."""
    with stream:
        while last is None or stream.batch < last:
            yield next(stream).to(dtype, copy=True)


def as_uint16(rows: Tensor) -> np.ndarray:
    """The bits (rows, d_in) uint16 of a bfloat16 tensor on the host, sharing its memory."""
    return rows.view(torch.int16).numpy().view(np.uint16)
