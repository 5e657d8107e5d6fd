"""Shuffled batches at the speed of a memory copy, in an order that is a pure function of the batch number.

The rows of a window were permuted when they were written. An epoch is the chunks in a seeded order, laid end to end as
one stream; the stream is cut into `lanes` equal segments; batch t is the t-th block of B/lanes rows of every lane. So a
read is contiguous and a batch still mixes rows from up to as many windows as there are lanes: per row, the expected
number of others of its own context is about B L (1/(lanes W) + 1/T) for contexts of L rows, windows of W and T rows in all.
"""

import threading
import time
from collections.abc import Iterator
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from .errors import UsageError
from .reader import Cache

LANES = 32
ALIGN = 8  # rows: lanes then start on a page, 8 x 4608 bytes being nine of them


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
        found = []
        for start in self.lane_start:
            row, left = int(start) + within * self.block, self.block
            while left:
                position = int(np.searchsorted(self._end, row, side="right"))
                chunk = int(self._order[position])
                offset = row - int(self._end[position] - self.chunk_rows[chunk])
                taken = min(left, int(self._end[position]) - row)
                found.append(Piece(chunk, offset, taken))
                row, left = row + taken, left - taken
        return found


class Batches:
    """An endless stream of (batch_size, d_in) bfloat16 tensors of one layer, starting at any batch.

    Threads read ahead into a ring of buffers; batch n always uses slot n mod depth and belongs to thread n mod threads.
    A tensor handed out is overwritten after the next call of `next`. The position is two integers: seed and `batch`.
    """

    def __init__(
        self, cache: Cache, layer: int, batch_size: int, *, seed: int = 0, batch: int = 0, device: torch.device | str = "cpu",
        depth: int = 4, threads: int = 2,
    ) -> None:  # fmt: skip
        self.cache, self.name, self.batch, self.device = cache, cache.require(layer), batch, torch.device(device)
        self.plan = Plan(cache.chunk_rows(layer), batch_size, seed)
        self.waited = 0.0  # seconds that training stood still for data
        on_gpu = self.device.type == "cuda"
        d_in = cache.array(self.name).shape[1]
        self._slots = [torch.empty(batch_size, d_in, dtype=torch.bfloat16, pin_memory=on_gpu) for _ in range(depth)]
        self._on_device = (
            [torch.empty(batch_size, d_in, dtype=torch.bfloat16, device=self.device) for _ in range(2)]
            if on_gpu
            else []
        )
        self._copied: list[torch.cuda.Event | None] = [None] * depth
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
                    while not self._closed and self._taken < number - depth:
                        self._turn.wait()
                    if self._closed:
                        return
                    copied = self._copied[number % depth]
                if copied is not None:
                    copied.synchronize()
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
        rows, at = slot.view(torch.int16).numpy().view(np.uint16), 0
        with self._planning:  # the order of an epoch is shared
            pieces = self.plan.pieces(number)
        for chunk, start, count in pieces:
            np.copyto(rows[at : at + count], self.cache.chunk(self.name, chunk)[start : start + count])
            at += count

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        slot, started = self.batch % len(self._slots), time.perf_counter()
        with self._turn:
            self._taken = self.batch - 1
            self._turn.notify_all()
            self._turn.wait_for(lambda: self._closed or self._ready[slot] == self.batch)
            if self._closed:
                raise StopIteration
            if self.batch in self._failed:
                raise self._failed[self.batch]
        self.waited += time.perf_counter() - started
        rows = self._slots[slot]
        if self._on_device:
            target = self._on_device[self.batch % 2]
            rows = target.copy_(rows, non_blocking=True)
            self._copied[slot] = torch.cuda.Event()
            self._copied[slot].record()
        self.batch += 1
        return rows

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
