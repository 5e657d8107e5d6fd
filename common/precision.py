"""The precision of matrix multiplications: float32, tf32 (float32 numbers rounded to 11 bits) or bfloat16.

Weights, moments, gradients and sums are float32 in all three precisions. With bfloat16, torch's autocast rounds the
inputs and results of multiplications.
"""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from .errors import UnavailableError, UsageError

PRECISIONS = ("float32", "tf32", "bfloat16")
TF32_CAPABILITY = (8, 0)  # of the first GPUs with tf32 multiplication (Ampere)
CPU_FLAGS = ("avx512_bf16", "amx_bf16")  # of processors that multiply in bfloat16: with AVX-512, or with tiles
CPUINFO = Path("/proc/cpuinfo")


def default_precision(device: str) -> str:
    """bfloat16 on a GPU; float32 on a CPU of any kind."""
    return "bfloat16" if device.startswith("cuda") else "float32"


def resolve_precision(precision: str | None, device: str) -> str:
    """Check a precision for a device; None means the device's default.

    Raises UsageError for an unknown precision, and UnavailableError if the device cannot compute in this precision.
    """
    if precision is None:
        return default_precision(device)
    if precision not in PRECISIONS:
        raise UsageError(f"unknown precision {precision!r}: expected float32, tf32 or bfloat16.")
    if reason := reason_against(precision, device):
        raise UnavailableError(f"--precision {precision} cannot be used: {reason}. Use --precision float32.")
    return precision


def reason_against(precision: str, device: str) -> str:
    """The reason why a device cannot compute in a precision, worded to complete a sentence; "" if it can.

    torch can multiply in bfloat16 on any processor, but without special instructions this is slower than float32.
    """
    on_cpu = torch.device(device).type == "cpu"
    if precision == "tf32" and on_cpu:
        return "the device is cpu, but only GPUs compute products in tf32"
    if precision == "tf32" and (capability := torch.cuda.get_device_capability(device)) < TF32_CAPABILITY:
        return f"it needs a GPU of compute capability 8.0, but {device} has {'.'.join(map(str, capability))}"
    if precision == "bfloat16" and on_cpu:
        found = cpu_flags()
        if found is None:
            return f"it is not known whether the processor multiplies in bfloat16, because {CPUINFO} does not exist"
        if found.isdisjoint(CPU_FLAGS):
            return f"the processor has neither {' nor '.join(CPU_FLAGS)} (according to {CPUINFO})"
    return ""


def cpu_flags() -> set[str] | None:
    """The instruction sets of the processor, under their names in Linux; None if they are not known."""
    try:
        lines = CPUINFO.read_text().splitlines()
    except OSError:
        return None
    return {flag for line in lines if line.startswith("flags") for flag in line.partition(":")[2].split()}


def recorded_precision(record: Mapping[str, Any]) -> str:
    """The precision of a run according to its run.json, which records only precisions other than float32.

    Earlier versions did not record the precision: their runs on a GPU used the GPU's default.
    """
    asked = record.get("precision") or record.get("asked", {}).get("precision")
    return asked or default_precision(record.get("device", "cpu"))


def autocast(precision: str, device: str) -> contextlib.AbstractContextManager[None]:
    """A context: if `precision` is bfloat16, float32 tensors are multiplied in bfloat16; otherwise nothing changes."""
    if precision != "bfloat16":
        return contextlib.nullcontext()
    return torch.autocast(torch.device(device).type, torch.bfloat16)


@torch.compiler.assume_constant_result  # torch.compile cannot trace code that reads torch's float32 precision
def current_precision(device: str) -> str:
    """The precision in which float32 tensors are multiplied on a device under the caller's settings."""
    if torch.is_autocast_enabled(torch.device(device).type):
        return "bfloat16"
    return "float32" if general_float32_precision() == "highest" else "tf32"


def general_float32_precision() -> str:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # it was changed for a single backend
        return "highest"


@contextlib.contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """A context in which float32 tensors are multiplied in tf32 if and only if `precision` is tf32.

    torch has one setting for the whole process, which a user may have changed; it is restored at the end.
    """
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    general = general_float32_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(general)
        for backend, value in zip(backends, before, strict=True):
            backend.fp32_precision = value
