"""Where the computing is done."""

import torch

from .errors import OutsideError


def best_device(device: str) -> str:
    """`auto` is the GPU where there is one. OutsideError when one is asked for that is not there."""
    available = torch.cuda.is_available()
    if device.startswith("cuda") and not available:
        raise OutsideError(f"--device {device} was asked for, but torch sees no GPU here. Use --device cpu.")
    return ("cuda" if available else "cpu") if device == "auto" else device


def best_dtype(dtype: str, device: str) -> str:
    """`auto` is bfloat16 on a GPU and float32 on a CPU."""
    return ("bfloat16" if device.startswith("cuda") else "float32") if dtype == "auto" else dtype
