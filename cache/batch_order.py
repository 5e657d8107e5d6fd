"""The order of rows in training: which rows form batch number t, as a pure function of t.

The rows of each window were permuted when they were written. An epoch takes the chunks in a seeded order, lays them end
to end, and cuts this sequence into `lanes` equal segments, the lanes. Batch t consists of the t-th block of each lane;
a block has batch_size/lanes rows. So each read is contiguous, and a batch still mixes rows from up to `lanes` windows.
Let a context have L rows, a window W, a batch B and the whole cache T. A row then shares its context with about
B L (1/(lanes W) + 1/T) other rows of its batch on average.
"""

from typing import NamedTuple

import numpy as np

from ..common.errors import UsageError

MAX_LANES = 32
ALIGN = 8  # lanes start at multiples of 8 rows: at d_in 2304 (4608 bytes a row), 8 rows fill nine memory pages


class Span(NamedTuple):
    """Consecutive rows of a chunk, starting at row `start`."""

    chunk: int
    start: int
    rows: int


def lane_count(batch_size: int) -> int:
    """The number of lanes: the largest divisor of the batch size that is at most 32."""
    return next(n for n in range(min(MAX_LANES, batch_size), 0, -1) if batch_size % n == 0)


class BatchOrder:
    """The order of the rows: maps a batch number to the rows of that batch.

    The order depends only on the sizes of the chunks, the batch size and the seed, so the batch number is the only
    state that a resumed run needs. Each row occurs at most once per epoch; the rows left over at the end of the lanes
    are dropped.

    Raises UsageError if there are fewer rows than one batch.
    """

    def __init__(self, chunk_rows: list[int], batch_size: int, seed: int) -> None:
        self.chunk_rows, self.batch_size, self.seed = np.asarray(chunk_rows, np.int64), batch_size, seed
        self.lanes = lane_count(batch_size)
        self.block_rows = batch_size // self.lanes
        rows = int(self.chunk_rows.sum())
        align = ALIGN if rows >= 64 * batch_size else 1
        segment = rows // self.lanes // align * align
        self.batches_per_epoch = segment // self.block_rows
        if not self.batches_per_epoch:
            raise UsageError(
                f"The cache has {rows:,} rows, fewer than one batch of {batch_size:,}. "
                "Harvest more tokens or use a smaller --batch-size."
            )
        self.lane_start = np.arange(self.lanes) * segment
        self._shuffled = -1, np.empty(0, np.int64), np.empty(0, np.int64)

    def _shuffle(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The order of the chunks in an epoch, and the number of rows up to the end of each chunk. Thread-safe."""
        number, order, end = self._shuffled
        if number != epoch:
            rng = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
            order = rng.permutation(len(self.chunk_rows))
            end = np.cumsum(self.chunk_rows[order])
            self._shuffled = epoch, order, end
        return order, end

    def spans(self, batch: int) -> list[Span]:
        """The rows of a batch, in order."""
        epoch, index_in_epoch = divmod(batch, self.batches_per_epoch)
        order, end = self._shuffle(epoch)
        first = self.lane_start + index_in_epoch * self.block_rows  # first row of each lane's block, in epoch order
        position = np.searchsorted(end, first, side="right")  # position in `order` of the chunk where the block begins
        chunk = order[position]
        remaining = end[position] - first  # rows of that chunk after the beginning of the block
        start = self.chunk_rows[chunk] - remaining
        spans = []
        lanes = (array.tolist() for array in (position, chunk, start, remaining))
        for at, index, offset, left in zip(*lanes, strict=True):
            rows = min(self.block_rows, left)
            spans.append(Span(index, offset, rows))
            while rows < self.block_rows:  # the block continues in the next chunk of the epoch's order
                at += 1
                index = int(order[at])
                more = min(self.block_rows - rows, int(self.chunk_rows[index]))
                spans.append(Span(index, 0, more))
                rows += more
        return spans

    def uses(self, batches: range) -> np.ndarray:
        """For each chunk, the batches that contain its rows: (n, 3) int64 with the columns chunk, first batch, last
        batch.

        Every batch between the first and the last one contains rows of the chunk too. Batches outside the given range
        are left out. The result has one entry for each chunk, epoch and lane in which the chunk is read.
        """
        stretches = [np.empty((0, 3), np.int64)]
        per_epoch = self.batches_per_epoch
        for epoch in range(batches.start // per_epoch, -(-batches.stop // per_epoch)):
            order, ends = self._shuffle(epoch)
            starts = ends - self.chunk_rows[order]
            for lane in self.lane_start:
                stop = lane + per_epoch * self.block_rows
                inside = np.flatnonzero((ends > lane) & (starts < stop) & (ends > starts))
                first = (np.maximum(starts[inside], lane) - lane) // self.block_rows
                last = (np.minimum(ends[inside], stop) - 1 - lane) // self.block_rows
                stretches.append(np.stack([order[inside], first, last], 1) + [0, epoch * per_epoch, epoch * per_epoch])
        uses = np.concatenate(stretches)
        uses = uses[(uses[:, 2] >= batches.start) & (uses[:, 1] < batches.stop)]
        uses[:, 1:] = uses[:, 1:].clip(batches.start, batches.stop - 1)
        return uses
