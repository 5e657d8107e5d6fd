"""Measure free memory, and handle out-of-memory errors."""

import contextlib
import gc
import math
import os
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch

from .device import empty_gpu_cache
from .errors import UsageError
from .process_group import processes_on_this_machine

LIMIT = "SAE_MEMORY_GB"  # environment variable: the most memory, in GB, that a plan may count on
PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
# Messages from torch's CPU allocator, from cuBLAS, and from CUDA when it pins host memory.
SAID_BY = ("can't allocate memory", "ALLOC_FAILED", "CUDA error: out of memory")


def available_memory(device: str) -> float:
    """Bytes of memory available on the device; infinity if the system does not report it (for a CPU, only Linux does).

    On a GPU, this is the free memory that CUDA reports. On a CPU, it is the smaller of two numbers: the system's free
    memory, and the memory that the limits of the process's control groups still allow. The smaller number is divided by
    the number of processes that a launcher started on this machine. Memory that caches files counts as free.
    $SAE_MEMORY_GB limits the result on GPUs and CPUs.

    Raises UsageError if $SAE_MEMORY_GB is not a positive number.
    """
    if torch.device(device).type == "cuda":
        return min(float(torch.cuda.mem_get_info(device)[0]), memory_limit())
    return min(min(free_in_system(), free_in_control_groups()) / processes_on_this_machine(), memory_limit())


def memory_limit() -> float:
    """The bytes that $SAE_MEMORY_GB allows; infinity if it is not set."""
    text = os.environ.get(LIMIT)
    if text is None:
        return math.inf
    try:
        limit = float(text)
    except ValueError:
        limit = math.nan
    if not limit > 0:
        raise UsageError(f"{LIMIT}={text} is not a positive number of GB.")
    return 1e9 * limit


def free_in_system() -> float:
    """MemAvailable from /proc/meminfo in bytes; infinity if there is no such entry."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = dict(line.split(":", 1) for line in (PROC / "meminfo").read_text().splitlines())
        return 1024 * float(lines.get("MemAvailable", "inf kB").split()[0])
    return math.inf


def free_in_control_groups() -> float:
    """The bytes that the tightest limit of this process's control groups still allows; infinity if none has a limit.

    A group is limited by every group above it. Both versions of control groups are read.
    """
    return min((group_free(folder, v2) for folder, v2 in control_groups()), default=math.inf)


def control_groups() -> Iterator[tuple[Path, bool]]:
    """Each control group that may limit this process's memory: its folder, and whether the group is of version 2."""
    with contextlib.suppress(OSError, ValueError):
        for line in (PROC / "self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            root = CGROUPS / "memory" if controllers else CGROUPS
            folder = root / path.strip("/")
            # In a container, `path` may be the path on the host. Then `folder` does not exist: the container sees only
            # the root of the hierarchy.
            for place in [folder, *folder.parents] if folder.is_dir() else [root]:
                yield place, not controllers
                if place == root:
                    break


def group_free(folder: Path, v2: bool) -> float:
    """The unused part of a control group's limit, in bytes; infinity if the group has no limit."""
    limit, used, cached = (
        ("memory.max", "memory.current", "inactive_file")
        if v2
        else ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    )
    with contextlib.suppress(OSError, ValueError):  # "max", or a group without a memory controller
        most, now = int((folder / limit).read_text()), int((folder / used).read_text())
        stat = dict(line.split(" ", 1) for line in (folder / "memory.stat").read_text().splitlines())
        return float(max(0, most - now + int(stat.get(cached, 0))))
    return math.inf


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the device or the host has run out of memory."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in SAID_BY)


def release(error: BaseException, device: torch.device | str) -> None:
    """Free the memory held by the frames of an error, and return the allocator's cache to the GPU.

    An error keeps its frames alive, and the frames keep alive the tensors that filled the memory.
    """
    seen: BaseException | None = error
    while seen is not None:
        traceback.clear_frames(seen.__traceback__)
        seen = seen.__cause__ or seen.__context__
    gc.collect()
    empty_gpu_cache(device)
