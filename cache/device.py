"""Where the computing is done."""

import torch

from .errors import OutsideError, UsageError

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
        raise OutsideError(
            f"--device {device} was asked for, but torch sees {found or 'no'} GPU here. Use --device cpu."
        )
    return device


def best_dtype(dtype: str, device: str) -> str:
    """`auto` is bfloat16 on a GPU and float32 on a CPU."""
    if dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype} is unknown: give one of {', '.join(DTYPES)}.")
    return ("bfloat16" if device.startswith("cuda") else "float32") if dtype == "auto" else dtype
