"""Several processes that harvest one cache: `accelerate launch --num_processes N -m sae harvest ...`."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch

PATIENCE = timedelta(days=7)  # a process that is done waits for the others


@dataclass(frozen=True)
class ProcessGroup:
    """This process among those that were launched together."""

    index: int = 0
    count: int = 1
    device: str = "cpu"
    meet: Callable[[], None] = lambda: None  # waits until all are here

    @property
    def first(self) -> bool:
        return self.index == 0


def current_process_group(device: str) -> ProcessGroup:
    """The team of this process; each has a GPU of its own where `device` is a GPU without a number."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ProcessGroup(device=device)
    from accelerate import PartialState

    state = PartialState(cpu=torch.device(device).type == "cpu", timeout=PATIENCE)
    own = str(state.device) if device == "cuda" else device
    return ProcessGroup(state.process_index, state.num_processes, own, state.wait_for_everyone)
