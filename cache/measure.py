"""Norms and moments of rows, with the same bits on every device and with any number of threads.

Sums are in float64, computed by additions of whole tensors in an order that is fixed here. A library's own sum or
product would choose its own order, which would differ on a GPU.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

BLOCK_ROWS = 128  # rows that are converted to float64 at a time: as many as fit into a core's cache
FEW_COLUMNS = 64  # columns of a block are summed until this many are left; the rest is summed for all blocks at once
Run = Callable[[Callable[[Tensor], tuple[Tensor, Tensor]], Iterable[Tensor]], Iterable[tuple[Tensor, Tensor]]]


class RowStatistics(NamedTuple):
    """Statistics of the R rows of one window of an array."""

    norms: np.ndarray  # (R,) float32: L2 norms
    moments: np.ndarray  # (2, D) float64: elementwise sum and sum of squares

    @classmethod
    def of_chunks(cls, squares: Sequence[Tensor], sums: Sequence[Tensor]) -> "RowStatistics":
        """Combine the outputs of `measure`, (C, R) and (C, 2, D), for consecutive groups of chunks. The tensors must be
        on the CPU.
        """
        norms = torch.cat([part.flatten() for part in squares]).sqrt().float().numpy()
        return cls(norms, np.add.reduce(torch.cat(list(sums)).numpy()))


def measure(x_CRD: Tensor) -> tuple[Tensor, Tensor]:
    """Squared norms (C, R), and elementwise sums and sums of squares (C, 2, D), in float64, for C chunks of R rows."""
    chunks, rows, d_in = x_CRD.shape
    sums = x_CRD.new_zeros(2, chunks, min(BLOCK_ROWS, rows), d_in, dtype=torch.float64)
    buffer, narrow = torch.empty_like(sums[0]), []
    for block in x_CRD.split(BLOCK_ROWS, 1):
        values = buffer[:, : block.shape[1]].copy_(block)
        sums[0, :, : block.shape[1]].add_(values)
        values.mul_(values)
        sums[1, :, : block.shape[1]].add_(values)
        narrow.append(add_up(values, 2, FEW_COLUMNS).clone())
    squares = add_up(torch.cat(narrow, 1).movedim(2, 0).contiguous(), 0)
    return squares[0], add_up(sums, 2)[:, :, 0].movedim(0, 1)


def add_up(x: Tensor, dim: int, most: int = 1) -> Tensor:
    """Repeatedly add the second half along a dimension to the first, in place, until at most `most` entries remain."""
    while (size := x.shape[dim]) > most:
        half = size // 2
        x.narrow(dim, 0, half).add_(x.narrow(dim, size - half, half))
        x = x.narrow(dim, 0, size - half)
    return x


def measure_rows(bits_RD: np.ndarray, chunk_rows: int, run: Run = map) -> RowStatistics:
    """Measure rows of bfloat16 bits, chunk by chunk. `run` is `map` or the `map` method of a thread pool."""
    chunks = torch.from_numpy(bits_RD).view(torch.bfloat16).split(chunk_rows)
    squares, sums = zip(*run(measure, [chunk[None] for chunk in chunks]), strict=True)
    return RowStatistics.of_chunks(squares, sums)
