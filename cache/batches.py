"""Shuffled batches at the speed of a memory copy, in an order that is a pure function of the batch number.

The rows of a window were permuted when they were written. An epoch is the chunks in a seeded order, laid end to end as
one stream; the stream is cut into `lanes` equal segments; batch t is the t-th block of B/lanes rows of every lane. So a
read is contiguous and a batch still mixes rows from up to as many windows as there are lanes: per row, the expected
number of others of its own context is about B L (1/(lanes W) + 1/T) for contexts of L rows, windows of W and T rows in all.
"""

import threading
import time
from collections.abc import Iterator
from typing import NamedTuple, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from .errors import UsageError
from .layout import Array

LANES = 32
DEVICE_SHARE = 0.4  # of a GPU's free memory: a cache that takes less is kept there
ALIGN = 8  # rows: lanes then start on a page, 8 x 4608 bytes being nine of them


class Source(Protocol):
    """What batches are read from: a Cache, or several as one."""

    @property
    def chunk_rows(self) -> list[int]: ...
    def array(self, name: str) -> Array: ...
    def copy_rows(self, name: str, index: int, start: int, out: np.ndarray) -> None: ...
    def marked(self, name: str) -> np.ndarray: ...


class Piece(NamedTuple):
    chunk: int
    start: int
    rows: int


def lanes_of(batch_size: int) -> int:
    """The largest divisor of the batch size up to 32."""
    return next(n for n in range(min(LANES, batch_size), 0, -1) if batch_size % n == 0)


class Plan:
    """Batch number -> rows. The same for everybody who has the seed; nothing to save but the number."""

    def __init__(self, chunk_rows: list[int], batch_size: int, seed: int) -> None:
        self.chunk_rows, self.batch_size, self.seed = np.asarray(chunk_rows, np.int64), batch_size, seed
        self.lanes = lanes_of(batch_size)
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

    def pieces(self, batch: int) -> list[Piece]:
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
            found.append(Piece(index, offset, rows))
            while rows < self.block:  # the block goes on in the chunk that comes next in the epoch's order
                position += 1
                index = int(self._order[position])
                taken = min(self.block - rows, int(self.chunk_rows[index]))
                found.append(Piece(index, 0, taken))
                rows += taken
        return found


class Batches:
    """An endless stream of (batch_size, d_in) bfloat16 tensors of one array, starting at any batch.

    Threads read ahead into a ring of buffers; batch n always uses slot n mod depth and belongs to thread n mod threads.
    A tensor handed out is overwritten after the next call of `next`. The position is two integers: seed and `batch`.
    On a GPU the slots are pinned, and a copy stream sends batch n + 1 while the caller computes on batch n.
    """

    def __init__(
        self, cache: Source, name: str, batch_size: int, *, seed: int = 0, batch: int = 0, device: torch.device | str = "cpu",
        depth: int = 4, threads: int = 2,
    ) -> None:  # fmt: skip
        self.cache, self.name, self.batch, self.device = cache, name, batch, torch.device(device)
        self.plan = Plan(cache.chunk_rows, batch_size, seed)
        self.waited = 0.0  # seconds that training stood still for data
        self._marks = Marks(cache, name)
        d_in = cache.array(name).shape[1]
        gpu = self.device.type == "cuda"
        self._slots = [torch.empty(batch_size, d_in, dtype=torch.bfloat16, pin_memory=gpu) for _ in range(depth)]
        self._sender = Sender(self._slots, self.device) if gpu else None
        self._ready = [-1] * depth  # the batch that a slot holds
        self._taken = batch - 1  # every batch up to this one may be overwritten
        self._failed: dict[int, BaseException] = {}  # by batch
        self._closed = False
        self._turn = threading.Condition()
        self._planning = threading.Lock()
        self._threads = [
            threading.Thread(target=self._read, args=(batch + n, threads), daemon=True) for n in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def _read(self, number: int, stride: int) -> None:
        depth = len(self._slots)
        try:
            while True:
                with self._turn:
                    self._turn.wait_for(lambda: self._closed or self._taken >= number - depth)  # noqa: B023
                    if self._closed:
                        return
                if self._sender:
                    self._sender.wait_until_sent(number % depth)
                self._fill(self._slots[number % depth], number)
                with self._turn:
                    self._ready[number % depth] = number
                    self._turn.notify_all()
                number += stride
        except BaseException as error:  # handed to the training thread, which raises it
            with self._turn:
                self._failed[number], self._ready[number % depth] = error, number
                self._turn.notify_all()

    def _fill(self, slot: Tensor, number: int) -> None:
        rows, at = bits_of(slot), 0
        with self._planning:  # the order of an epoch is shared
            pieces = self.plan.pieces(number)
        for chunk, start, count in pieces:
            self.cache.copy_rows(self.name, chunk, start, rows[at : at + count])
            at += count
        marked, instead = self._marks.replaced(pieces)
        if len(marked):
            rows[marked] = rows[instead]

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        number, slot = self.batch, self.batch % len(self._slots)
        started = time.perf_counter()
        with self._turn:
            self._taken = number - 1
            self._turn.notify_all()
            self._turn.wait_for(lambda: self._closed or self._ready[slot] == number)
            if self._closed:
                raise StopIteration
            if number in self._failed:
                raise self._failed[number]
            following = self._ready[(number + 1) % len(self._slots)] == number + 1 and number + 1 not in self._failed
        self.waited += time.perf_counter() - started
        self.batch += 1
        return self._sender.take(number, following) if self._sender else self._slots[slot]

    def close(self) -> None:
        with self._turn:
            self._closed = True
            self._turn.notify_all()
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Sender:
    """Host slots -> two buffers on the GPU, over a stream of their own; nothing here stops the host."""

    def __init__(self, slots: list[Tensor], device: torch.device) -> None:
        self.slots, self.stream = slots, torch.cuda.Stream(device)
        self.buffers = [torch.empty_like(slots[0], device=device) for _ in range(2)]
        self.free: list[torch.cuda.Event | None] = [None, None]  # what was computed on a buffer has come to its end
        self.sent: list[torch.cuda.Event | None] = [None] * len(slots)
        self.last = -1  # the last batch that was sent

    def take(self, number: int, following: bool) -> Tensor:
        """The buffer that holds batch `number`; batch `number + 1` is sent meanwhile when its slot is filled."""
        computing = torch.cuda.current_stream(self.buffers[0].device)
        if self.last < number:
            self._send(number)
        self.free[(number + 1) % 2] = computing.record_event()  # all work on batch number - 1 was queued before this
        if following:
            self._send(number + 1)
        computing.wait_event(self.sent[number % len(self.slots)])  # type: ignore[arg-type]
        return self.buffers[number % 2]

    def _send(self, number: int) -> None:
        slot, buffer = number % len(self.slots), number % 2
        if (event := self.free[buffer]) is not None:
            self.stream.wait_event(event)
        with torch.cuda.stream(self.stream):
            self.buffers[buffer].copy_(self.slots[slot], non_blocking=True)
        self.sent[slot], self.last = self.stream.record_event(), number

    def wait_until_sent(self, slot: int) -> None:
        """Called by the thread that wants to fill the slot again."""
        if (event := self.sent[slot]) is not None:
            event.synchronize()


class Resident:
    """The same stream as Batches, from a copy of the whole array on the device."""

    def __init__(
        self, cache: Source, name: str, batch_size: int, *, seed: int = 0, batch: int = 0, device: torch.device | str = "cpu"
    ) -> None:  # fmt: skip
        self.batch, self.plan, self._marks = batch, Plan(cache.chunk_rows, batch_size, seed), Marks(cache, name)
        self.first = np.cumsum([0, *cache.chunk_rows])
        d_in = cache.array(name).shape[1]
        self._rows = torch.empty(int(self.first[-1]), d_in, dtype=torch.bfloat16, device=device)
        started = time.perf_counter()
        for chunk, size in enumerate(cache.chunk_rows):
            rows = torch.empty(size, d_in, dtype=torch.bfloat16)
            cache.copy_rows(name, chunk, 0, bits_of(rows))
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


class Marks:
    """Marked rows get no weight: another row of their batch, the next that is not marked, stands in their place."""

    def __init__(self, cache: Source, name: str) -> None:
        self.marked, self.first = cache.marked(name), np.cumsum([0, *cache.chunk_rows])

    def replaced(self, pieces: list[Piece]) -> tuple[np.ndarray, np.ndarray]:
        """Positions in the batch that hold marked rows, and the positions of what stands in for them."""
        if not len(self.marked):
            return self.marked, self.marked
        first = np.array([self.first[p.chunk] + p.start for p in pieces])
        sizes = np.array([p.rows for p in pieces])
        rows = np.concatenate([np.arange(at, at + size) for at, size in zip(first, sizes, strict=True)])
        is_marked = np.isin(rows, self.marked)
        marked, good = np.flatnonzero(is_marked), np.flatnonzero(~is_marked)
        if not len(good):
            raise UsageError("A batch holds only rows marked by --max-norm. Harvest again with a larger --max-norm.")
        return marked, good[np.searchsorted(good, marked) % len(good)]


def open_batches(
    cache: Source, name: str, batch_size: int, *, seed: int, batch: int, device: torch.device | str
) -> Batches | Resident:
    """The stream of batches for a device: from a copy on a GPU that has room for the whole array, else read ahead."""
    if torch.device(device).type == "cuda":
        rows, d_in = cache.array(name).shape
        if 2 * sum(cache.chunk_rows) * d_in < DEVICE_SHARE * torch.cuda.mem_get_info(device)[0]:
            return Resident(cache, name, batch_size, seed=seed, batch=batch, device=device)
    return Batches(cache, name, batch_size, seed=seed, batch=batch, device=device)


def bits_of(rows: Tensor) -> np.ndarray:
    """The bits (rows, d_in) uint16 of a bfloat16 tensor on the host, sharing its memory."""
    return rows.view(torch.int16).numpy().view(np.uint16)
