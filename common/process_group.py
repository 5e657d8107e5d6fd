"""Several processes of one command, started by a launcher: `torchrun --nproc_per_node N -m sae harvest ...`.

The processes exchange small objects between the stages of their work, over gloo, even if they compute on GPUs.
"""

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch

from .errors import Interrupted, ReportedElsewhere, SaeError, UnavailableError, UsageError
from .heartbeat import AGAIN, START, Heartbeat

TIMEOUT = timedelta(days=7)  # a process that has finished waits for the others

MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
LAUNCH = (
    "Use `torchrun --nproc_per_node 2 -m sae ...`, or `accelerate launch --multi_gpu --num_processes 2 -m sae ...`, "
    "which starts them on CPUs too."
)

T = TypeVar("T")


@dataclass(frozen=True)
class ProcessGroup:
    """One of the processes that were launched together."""

    rank: int = 0
    count: int = 1
    device: str = "cpu"
    gather: Callable[[Any], list[Any]] = lambda value: [value]
    """Returns the values of all processes, in the order of ranks, once every process has called it.

    Raises UnavailableError, naming the process, if one of them has ended.
    """

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        """Return once every process has called this method."""
        self.gather(None)

    def first(self, work: Callable[[], T]) -> T:
        """Call `work` in the first process alone, and return its result in all processes.

        Raises SaeError in every process if `work` raised an SaeError.
        """
        return self.gather(self.everywhere(lambda: work() if self.is_first else None))[0]

    def everywhere(self, work: Callable[[], T]) -> T:
        """Call `work` in every process, and return its result once it has succeeded in all processes.

        If `work` raised an SaeError in any process, every process raises one. A process in which `work` failed raises
        its own error, unless a process of lower rank failed with the same message. In all other cases a process raises
        ReportedElsewhere. Interrupted is raised at once: a process that has to stop does not wait for others.
        """
        error: SaeError | None = None
        try:
            result = work()
        except Interrupted:
            raise
        except SaeError as raised:
            error = raised
        failures = self.gather(None if error is None else (error.exit_code, str(error)))
        if error is not None and failures[self.rank] not in failures[: self.rank]:
            raise error
        if failed := [failure for failure in failures if failure]:
            raise ReportedElsewhere(*max(failed))
        return result


def rank_and_count() -> tuple[int, int]:
    """The rank of this process and the number of launched processes, from the environment: (0, 1) without a launcher.

    Raises UsageError if a launcher that was asked for several processes started only one, or started several that do
    not know about each other.
    """
    if "WORLD_SIZE" not in os.environ:
        # accelerate sets the address of the first process if it was asked for several processes.
        if os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" and "MASTER_ADDR" in os.environ:
            raise UsageError(f"`accelerate launch --cpu` starts one process, whatever --num_processes says. {LAUNCH}")
        sizes = {name: int(os.environ[name]) for name in MPI_SIZES if os.environ.get(name, "").isdecimal()}
        if several := next((name for name, size in sizes.items() if size > 1), None):
            raise UsageError(f"{sizes[several]} processes were started ({several}) without WORLD_SIZE. {LAUNCH}")
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def processes_on_this_machine() -> int:
    """The number of launched processes that share the memory of this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def with_launcher(command: str) -> str:
    """The command line that starts `command` in as many processes as now: with torchrun in front, if torchrun launched
    the processes and all run on this machine; otherwise with a note in words at the end.

    If there is only one process, `command` itself.
    """
    count = rank_and_count()[1]
    if count == 1:
        return command
    if "TORCHELASTIC_RUN_ID" in os.environ and processes_on_this_machine() == count:
        return f"torchrun --standalone --nproc_per_node {count} -m {command}"
    return f"{command}     (with the same launcher, in {count} processes)"


def is_first_on_this_machine() -> bool:
    """Whether this process has the lowest rank of all launched processes on this machine; true without a launcher."""
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


def current_process_group(device: str = "cpu") -> ProcessGroup:
    """The group of this process, which computes on `device`. A GPU becomes the current device of the process.

    Raises UnavailableError if some processes have not started after several minutes.
    """
    if rank_and_count()[1] == 1:
        return ProcessGroup(device=device)
    heartbeat = join()
    if torch.device(device).index is not None:
        torch.cuda.set_device(device)

    def gather(value: Any) -> list[Any]:
        heartbeat.meet()
        return gather_objects(value)

    return ProcessGroup(heartbeat.rank, heartbeat.count, device, gather)


@functools.cache
def join() -> Heartbeat:
    """Join the process group of this launch; later calls do nothing."""
    from accelerate import PartialState
    from torch.distributed.rendezvous import rendezvous

    try:
        store, rank, count = next(iter(rendezvous("env://", timeout=timedelta(seconds=START))))
    except RuntimeError as error:
        raise UnavailableError(
            f"Rank 0 cannot be reached at {os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')} (MASTER_ADDR "
            "and MASTER_PORT): start every process with the same launcher."
        ) from error
    heartbeat = Heartbeat(store, rank, count)
    heartbeat.meet()
    prefix = torch.distributed.PrefixStore("sae/gloo", store)
    torch.distributed.init_process_group("gloo", store=prefix, rank=rank, world_size=count, timeout=TIMEOUT)
    PartialState(cpu=True, backend="gloo")  # makes the group known to accelerate, because other code may use accelerate
    return heartbeat


def gather_objects(value: Any) -> list[Any]:
    values: list[Any] = [None] * torch.distributed.get_world_size()
    try:
        torch.distributed.all_gather_object(values, value)
    except RuntimeError as error:
        raise UnavailableError(f"Another of the {len(values)} launched processes has ended. {AGAIN}") from error
    return values
