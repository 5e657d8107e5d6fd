"""A window of rows in GPU memory: rows are placed and measured there, and leave in one asynchronous copy."""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from ..cache.loader import as_uint16
from ..cache.measure import RowStatistics, measure
from ..common.device import copy_to_device
from ..common.memory import out_of_memory

SHARE = 0.5  # the largest share of the free memory that a window may take; forward passes need the rest


def fits_on_gpu(window_bytes: int, free: float) -> bool:
    """Whether a window may be kept on a GPU that has `free` bytes left after the weights are loaded."""
    return window_bytes <= SHARE * free


def host_memory(rows: int, widths: Mapping[str, int], *, pinned: bool) -> dict[str, Tensor]:
    """Allocate host memory for a window: array name -> (rows, d) bfloat16.

    With `pinned` the memory is pinned if the system allows that. The arrays share one block, because torch rounds the
    size of each pinned block to a power of two.
    """
    size = rows * sum(widths.values())
    memory = None
    if pinned:
        try:
            memory = torch.empty(size, dtype=torch.bfloat16, pin_memory=True)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
    if memory is None:
        memory = torch.empty(size, dtype=torch.bfloat16)
    parts = memory.split([rows * width for width in widths.values()])
    return {name: part.view(rows, width) for (name, width), part in zip(widths.items(), parts, strict=True)}


class DeviceWindow:
    """GPU memory for one window at a time.

    A full window is copied on a separate CUDA stream, so the next forward passes overlap with the copy. Only the GPU
    waits: it places the first rows of the next window once the copy has read the full window.
    """

    def __init__(self, device: torch.device, rows: int) -> None:
        self.device, self.rows = device, rows
        self.stream = torch.cuda.Stream(device)
        self.copied: torch.cuda.Event | None = None
        self.x: dict[str, Tensor] = {}  # array name -> (rows, d) bfloat16

    def begin(self, widths: Mapping[str, int]) -> None:
        """Allocate memory for these arrays."""
        for name, width in widths.items():
            if name not in self.x:
                self.x[name] = torch.empty(self.rows, width, dtype=torch.bfloat16, device=self.device)

    def place(self, rows: Mapping[str, Tensor], target: Tensor) -> None:
        """Write rows[name] (n, d) bfloat16 to the positions `target` (n,); all tensors are on the GPU."""
        self._wait_for_copy()
        for name, x in rows.items():
            self.x[name].index_copy_(0, target, x)

    def restore(self, bits: Mapping[str, np.ndarray], target: np.ndarray) -> None:
        """Copy the rows at these positions of a window in host memory to the same positions on the GPU."""
        there = copy_to_device(torch.from_numpy(target), self.device)
        rows = {name: torch.from_numpy(x[target]).view(torch.bfloat16) for name, x in bits.items()}
        self.place({name: copy_to_device(x, self.device) for name, x in rows.items()}, there)

    def fetch(self, bits: Mapping[str, np.ndarray], target: np.ndarray) -> None:
        """Copy the rows at these positions into a window in host memory. The host waits for the copy."""
        there = copy_to_device(torch.from_numpy(target), self.device)
        for name in bits:
            bits[name][target] = as_uint16(self.x[name][there].cpu())

    def send(self, memory: Mapping[str, Tensor], rows: int, chunk_rows: int) -> Callable[[], dict[str, RowStatistics]]:
        """Queue the computation of the statistics of the first `rows` rows, and the copy of these rows to `memory`.

        The returned function waits for the computation and the copy, and returns the statistics of each array.
        """
        measured = {name: measure_chunks(self.x[name][:rows], chunk_rows) for name in memory}
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            for name, target in memory.items():
                target[:rows].copy_(self.x[name][:rows], non_blocking=True)
            arrived = {name: [self._to_host(part) for part in parts] for name, parts in measured.items()}
            copied = self.copied = torch.cuda.Event(blocking=True)
            copied.record(self.stream)

        def wait() -> dict[str, RowStatistics]:
            copied.synchronize()
            return {name: RowStatistics.of_chunks(parts[::2], parts[1::2]) for name, parts in arrived.items()}

        return wait

    def drop(self) -> None:
        """Free the memory once the last window has been copied to the host."""
        self._wait_for_copy()
        self.x.clear()

    def _to_host(self, x: Tensor) -> Tensor:
        target = torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
        x.record_stream(self.stream)  # the memory of x is not reused before x has been copied
        return target

    def _wait_for_copy(self) -> None:
        """Let the GPU finish reading the last window before the next window replaces it."""
        if self.copied is not None:
            torch.cuda.current_stream(self.device).wait_event(self.copied)
            self.copied = None


def measure_chunks(x_RD: Tensor, chunk_rows: int) -> list[Tensor]:
    """Squared norms and sums of the chunks of a window, as `measure` returns them: the full chunks, then the last
    chunk.
    """
    whole = len(x_RD) // chunk_rows * chunk_rows
    parts = [x_RD[:whole].view(-1, chunk_rows, x_RD.shape[1])] if whole else []
    if whole < len(x_RD):
        parts.append(x_RD[None, whole:])
    return [result for part in parts for result in measure(part)]
