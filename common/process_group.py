"""Several processes of one command, started by a launcher: `torchrun --nproc_per_node N -m sae harvest ...`.

They exchange small objects between the stages of their work, over gloo, also where they compute on GPUs.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch

from .errors import ReportedElsewhere, SaeError, UnavailableError

TIMEOUT = timedelta(days=7)  # a process that has finished waits for the others

T = TypeVar("T")


@dataclass(frozen=True)
class ProcessGroup:
    """One of the processes that were launched together."""

    rank: int = 0
    count: int = 1
    device: str = "cpu"
    gather: Callable[[Any], list[Any]] = lambda value: [value]
    """Returns what each process gave, in the order of ranks, once every process has called it.

    Raises UnavailableError if one of them has ended.
    """

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        """Return once every process has called it."""
        self.gather(None)

    def first(self, work: Callable[[], T]) -> T:
        """Call `work` in the first process alone, and return its result in all.

        Raises SaeError in every process if `work` raised one.
        """
        return self.gather(self.everywhere(lambda: work() if self.is_first else None))[0]

    def everywhere(self, work: Callable[[], T]) -> T:
        """Call `work` in every process, and return its result once it has succeeded in all.

        Raises SaeError in every process if `work` raised one in any: its own, or ReportedElsewhere if `work` succeeded
        here, or failed with the same message in a process before this one.
        """
        error: SaeError | None = None
        try:
            result = work()
        except SaeError as raised:
            error = raised
        failures = self.gather(None if error is None else (error.exit_code, str(error)))
        if error is not None and failures[self.rank] not in failures[: self.rank]:
            raise error
        if failed := [failure for failure in failures if failure]:
            raise ReportedElsewhere(*max(failed))
        return result


def rank_and_count() -> tuple[int, int]:
    """The rank of this process and how many were launched, from the environment: (0, 1) without a launcher."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def processes_on_this_machine() -> int:
    """How many of the launched processes share the memory of this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def is_first_on_this_machine() -> bool:
    """Whether no launched process on this machine has a lower rank."""
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


def current_process_group(device: str = "cpu") -> ProcessGroup:
    """The group of this process, which computes on `device`; a GPU becomes the current one of the process."""
    if rank_and_count()[1] == 1:
        return ProcessGroup(device=device)
    from accelerate import PartialState

    state = PartialState(cpu=True, backend="gloo", timeout=TIMEOUT)
    if torch.device(device).index is not None:
        torch.cuda.set_device(device)
    return ProcessGroup(state.process_index, state.num_processes, device, gather_objects)


def gather_objects(value: Any) -> list[Any]:
    values: list[Any] = [None] * torch.distributed.get_world_size()
    try:
        torch.distributed.all_gather_object(values, value)
    except RuntimeError as error:
        raise UnavailableError(
            f"Another of the {len(values)} launched processes has ended. Everything committed is safe; run the same "
            "command again to continue."
        ) from error
    return values
