"""Several processes of one command, started by a launcher: `torchrun --nproc_per_node N -m sae harvest ...`."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch

TIMEOUT = timedelta(days=7)  # a process that has finished waits for the others


@dataclass(frozen=True)
class ProcessGroup:
    """One of the processes that were launched together."""

    rank: int = 0
    count: int = 1
    device: str = "cpu"
    barrier: Callable[[], None] = lambda: None  # returns once every process has called it

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def rank_and_count() -> tuple[int, int]:
    """The rank of this process and how many were launched, from the environment: (0, 1) without a launcher."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def current_process_group(device: str) -> ProcessGroup:
    """The group of this process, on `device`, which `resolve_device` has made its own."""
    if rank_and_count()[1] == 1:
        return ProcessGroup(device=device)
    from accelerate import PartialState

    state = PartialState(cpu=torch.device(device).type == "cpu", timeout=TIMEOUT)
    return ProcessGroup(state.process_index, state.num_processes, device, state.wait_for_everyone)
