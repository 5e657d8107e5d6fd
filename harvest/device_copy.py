"""Copy rows of activations from the device to their places in a window."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from ..cache.loader import as_uint16


class DeviceCopy:
    """Copies rows to host memory and scatters them into a window.

    On a GPU the copy uses a separate CUDA stream and pinned memory, and the rows are scattered during the next forward
    pass. On a CPU, `send` scatters them immediately.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda_stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.pinned: dict[tuple[str, int], Tensor] = {}
        self.sent = 0  # copies so far
        self.pending: tuple[torch.cuda.Event, dict[str, Tensor], np.ndarray, Mapping[str, np.ndarray]] | None = None

    def send(self, rows: Mapping[str, Tensor], target: np.ndarray, bits: Mapping[str, np.ndarray]) -> None:
        """Copy rows[name] (n, d) bfloat16 to bits[name][target]. The copy is complete once `wait` has returned."""
        if self.cuda_stream is None:
            scatter(rows, target, bits)
            return
        self.cuda_stream.wait_stream(torch.cuda.current_stream(self.cuda_stream.device))
        with torch.cuda.stream(self.cuda_stream):
            staged = {}
            for name, x in rows.items():
                staged[name] = self._pinned(name, x).copy_(x, non_blocking=True)
                x.record_stream(self.cuda_stream)  # the memory of x is not reused before the copy has read x
        self.wait()
        self.pending = (self.cuda_stream.record_event(), staged, target, bits)
        self.sent += 1

    def _pinned(self, name: str, like: Tensor) -> Tensor:
        """One of two pinned buffers that take turns: the other may still hold the previous pass's rows."""
        key = (name, self.sent % 2)
        if key not in self.pinned or len(self.pinned[key]) < len(like):
            self.pinned[key] = torch.empty(like.shape, dtype=like.dtype, pin_memory=True)
        return self.pinned[key][: len(like)]

    def wait(self) -> None:
        """Wait for the pending copy and scatter its rows."""
        if self.pending is not None:
            event, staged, target, bits = self.pending
            event.synchronize()
            scatter(staged, target, bits)
            self.pending = None

    def drop(self) -> None:
        """Discard the pending copy; its window is computed again."""
        self.pending = None


def scatter(rows: Mapping[str, Tensor], target: np.ndarray, bits: Mapping[str, np.ndarray]) -> None:
    """bits[name][target] = rows[name], as bits of bfloat16."""
    for name, x in rows.items():
        bits[name][target] = as_uint16(x)
