"""Where the computing is done."""

import contextlib
import ctypes
import math
from pathlib import Path

import torch

from .errors import UnavailableError, UsageError

DTYPES = ("auto", "bfloat16", "float32")


def best_device(device: str) -> str:
    """`auto` is the GPU where there is one. OutsideError when one is asked for that is not there."""
    found = torch.cuda.device_count()
    if device == "auto":
        return "cuda" if found else "cpu"
    kind, _, number = device.partition(":")
    if kind not in ("cpu", "cuda") or not (number or "0").isdecimal():
        raise UsageError(f"--device {device} is unknown: give auto, cpu, cuda or cuda:N.")
    if kind == "cuda" and int(number or 0) >= found:
        raise UnavailableError(
            f"--device {device} was asked for, but torch sees {found or 'no'} GPU here. Use --device cpu."
        )
    return device


def best_dtype(dtype: str, device: str) -> str:
    """`auto` is bfloat16 on a GPU and float32 on a CPU."""
    if dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype} is unknown: give one of {', '.join(DTYPES)}.")
    return ("bfloat16" if device.startswith("cuda") else "float32") if dtype == "auto" else dtype


def free_memory(device: torch.device | str) -> None:
    """Give a GPU back what torch keeps for the next tensor."""
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()


def available_memory(device: str) -> float:
    """Bytes that can be had on the device; infinity where the system does not tell."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with contextlib.suppress(OSError, ValueError, IndexError):  # Linux alone has the file
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return 1024 * float(lines.get("MemAvailable", "inf kB").split()[0])
    return math.inf


def keep_freed_memory() -> None:
    """Let the C library keep what is freed, for the next tensor, where it is glibc.

    It gives tensors of some megabytes back to the system and takes them anew, each page cleared: a fifth of the time of
    a small model's pass on a CPU. What a pass needs at most stays the same.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt, trim_threshold, mmap_threshold = ctypes.CDLL(None).mallopt, -1, -3
        mallopt(mmap_threshold, 32 << 20)  # the most that it accepts
        mallopt(trim_threshold, 2**31 - 1)
