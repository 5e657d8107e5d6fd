"""Rows on their way from the device to their places in a window."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from ..cache.loader import as_uint16


class DeviceCopy:
    """On a GPU rows travel over a stream of their own into pinned memory, and are placed while the next pass computes.

    On a CPU they are placed at once.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.pinned: dict[tuple[str, int], Tensor] = {}
        self.passes = 0
        self.under_way: tuple[torch.cuda.Event, dict[str, Tensor], np.ndarray, Mapping[str, np.ndarray]] | None = None

    def send(self, rows: Mapping[str, Tensor], target: np.ndarray, bits: Mapping[str, np.ndarray]) -> None:
        """Bring rows[name] (n, d) bfloat16 to bits[name][target]; they are there when `arrive` returns."""
        if self.stream is None:
            place(rows, target, bits)
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            staged = {}
            for name, taken in rows.items():
                staged[name] = self._slot(name, taken).copy_(taken, non_blocking=True)
                taken.record_stream(self.stream)  # its memory is not used again before it was read
        self.arrive()
        self.under_way = (self.stream.record_event(), staged, target, bits)
        self.passes += 1

    def _slot(self, name: str, like: Tensor) -> Tensor:
        """Pinned memory, of two that take turns: what the pass before sent may still wait to be placed."""
        key = (name, self.passes % 2)
        if key not in self.pinned or len(self.pinned[key]) < len(like):
            self.pinned[key] = torch.empty(like.shape, dtype=like.dtype, pin_memory=True)
        return self.pinned[key][: len(like)]

    def arrive(self) -> None:
        """Place what is under way."""
        if self.under_way is not None:
            event, staged, target, bits = self.under_way
            event.synchronize()
            place(staged, target, bits)
            self.under_way = None

    def drop(self) -> None:
        """Forget what is under way: its window is computed anew."""
        self.under_way = None


def place(rows: Mapping[str, Tensor], target: np.ndarray, bits: Mapping[str, np.ndarray]) -> None:
    for name, taken in rows.items():
        bits[name][target] = as_uint16(taken)


def out_of_memory(error: Exception) -> bool:
    """Whether an error means that the device, or the host, has no memory left."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        told in str(error) for told in ("can't allocate memory", "ALLOC_FAILED")
    )
