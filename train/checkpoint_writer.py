"""Write checkpoints while training continues.

The states of the runs are copied between two steps, and a thread writes the copies to disk. The thread writes one
checkpoint at a time; each checkpoint waits until the previous one is written. The process can be killed at any time:
an incomplete checkpoint has no state.json, and earlier checkpoints are removed only once the new one is complete.

On a GPU the state is copied into pinned memory. The copies are queued on the training stream, between the step that
produced the state and the next one. So the host does not wait, and no later step can change the state while it is
copied. A copy on a separate stream could overlap the next forward pass and save some milliseconds per checkpoint, but
the code that changes the state in place would have to wait for that copy. Copying within the GPU first would take GPU
memory.
"""

import contextlib
import json
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor

from ..common.errors import SaeError
from ..common.memory import out_of_memory
from .checkpoint import save_checkpoint, training_state, write_checkpoint
from .run_trainer import RunTrainer


class StateFile:
    """The contents of a state.safetensors file, in host memory. The tensors of a training state are views of them."""

    def __init__(self, state: dict[str, Tensor], pinned: bool) -> None:
        self.layout = layout_of(state)
        data = to_safetensors({name: torch.empty(like.shape, dtype=like.dtype) for name, like in state.items()})
        start = 8 + int.from_bytes(data[:8], "little")  # where the tensors start, after the header and its length
        size, header = len(data), bytearray(data[:start])
        del data
        self.bytes = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        self.bytes[:start].copy_(torch.frombuffer(header, dtype=torch.uint8))
        self.tensors: dict[str, Tensor] = {}
        for name, entry in json.loads(header[8:]).items():
            first, last = (start + offset for offset in entry["data_offsets"])
            self.tensors[name] = self.bytes[first:last].view(state[name].dtype).view(state[name].shape)

    @torch.no_grad()
    def copy(self, state: dict[str, Tensor]) -> None:
        """Copy a state, which must have this layout, into the bytes of this file. A copy from a GPU is only queued."""
        for name, tensor in self.tensors.items():
            tensor.copy_(state[name], non_blocking=True)


def layout_of(state: dict[str, Tensor]) -> dict[str, tuple[torch.dtype, torch.Size]]:
    return {name: (tensor.dtype, tensor.shape) for name, tensor in state.items()}


class CopiedRun(NamedTuple):
    """The data that the thread needs to write the checkpoint of a run."""

    folder: Path
    digest: str
    bytes: Tensor


class CheckpointWriter:
    """In a background thread, writes the checkpoints of a pass's runs, one after the other.

    If `background` is not set, or if there is no memory for the copies, `save` writes the checkpoints itself. If the
    thread fails, for example because the disk is full, the next `check`, `save` or `wait` raises its error. The
    writer is a context manager and waits for the thread on exit.
    """

    def __init__(self, device: str, background: bool = True) -> None:
        self.device, self.background = torch.device(device), background
        self._thread = ThreadPoolExecutor(1, "checkpoints")
        self._writing: Future[None] | None = None
        self._files: dict[RunTrainer, StateFile] = {}

    def save(self, trainers: Sequence[RunTrainer], step: int) -> None:
        """Save the states after `step` steps. Waits until the previously saved states are on the disk."""
        self.wait()
        copies = self._copy(trainers) if self.background else None
        if copies is None:
            for trainer in trainers:
                save_checkpoint(trainer, trainer.run.folder, step, trainer.digest)
        else:
            self._writing = self._thread.submit(write_copies, copies, step, self._mark())

    def check(self) -> None:
        """Raise the error of the thread, if it has failed. Does not wait."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Wait until everything that was saved is on the disk."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def forget(self, trainer: RunTrainer) -> None:
        """Free the memory held for a run that has ended."""
        self._files.pop(trainer, None)

    def give_up(self) -> None:
        """Wait for the thread whether or not it succeeds, and free the memory. Later checkpoints are not copied."""
        with contextlib.suppress(SaeError):
            self.wait()
        self.background = False
        self._files.clear()

    def _copy(self, trainers: Sequence[RunTrainer]) -> list[CopiedRun] | None:
        """Copies of the states, or None if there is no memory for them."""
        try:
            return [CopiedRun(t.run.folder, t.digest, self._copy_state(t)) for t in trainers]
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
        self.give_up()
        return None

    def _copy_state(self, trainer: RunTrainer) -> Tensor:
        state = training_state(trainer)
        file = self._files.get(trainer)
        if file is None or file.layout != layout_of(state):
            self._files.pop(trainer, None)
            file = self._files[trainer] = StateFile(state, pinned=self.device.type == "cuda")
        file.copy(state)
        return file.bytes

    def _mark(self) -> torch.cuda.Event | None:
        """Record an event after the queued copies, and return it. On a CPU, return None."""
        if self.device.type != "cuda":
            return None
        copied = torch.cuda.Event(blocking=True)
        copied.record(torch.cuda.current_stream(self.device))
        return copied

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(wait=True)
        if error is None:
            self.wait()


def write_copies(copies: Sequence[CopiedRun], step: int, copied: torch.cuda.Event | None) -> None:
    """Wait for the copies and write them. Runs in the thread."""
    if copied is not None:
        copied.synchronize()
    for run in copies:
        write_checkpoint(run.folder, step, run.bytes.numpy().data, run.digest)
