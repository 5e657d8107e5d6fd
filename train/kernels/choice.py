"""Whether a device uses the kernels, and which runs do."""

from collections.abc import Iterable
from functools import cache
from importlib.util import find_spec

import torch

from ...common.errors import first_line
from ...common.packages import EXTRAS, PACKAGE, installed_version
from ..memory import BuildableRun, untrained_variant
from .division import ROOM
from .operators import largest


def describe_kernels(runs: Iterable[BuildableRun], device: str) -> str:
    """The line of a plan for a GPU that says whether runs use the kernels; "" if none of them could."""
    if not any(untrained_variant(run, "meta").chooses_largest for run in runs):
        return ""
    if reason := reason_against_kernels(device):
        return f"kernels  of torch: {reason}"
    return f"kernels  of this package choose the largest latents, by Triton {installed_version(EXTRAS['kernels'])}"


@cache
def reason_against_kernels(device: str) -> str:
    """Why a device does not use the kernels, as the end of a sentence; "" if it does.

    The first call compiles each kernel and compares its result with torch's.
    """
    if torch.device(device).type != "cuda":
        return f"the device is {device}, which has none"
    if reason := reason_against_triton():
        return reason
    try:
        for dtype in (torch.bfloat16, torch.float32):
            z_RN = torch.randn(3, 3 * ROOM + 5, generator=torch.Generator().manual_seed(0)).to(dtype)
            for rows, n, k in ((3, 100, 7), (3, z_RN.shape[1], 32), (1, z_RN.shape[1], ROOM)):
                if not torch.equal(largest(z_RN[:rows, :n].to(device), k).cpu(), largest(z_RN[:rows, :n], k)):
                    return f"they choose other latents than torch on {device}"
    except Exception as error:  # of Triton's compiler or of the driver; torch computes the same result
        return f"they do not work on {device}: {first_line(error)}"
    return ""


def reason_against_triton() -> str:
    """Why Triton is not available, as the end of a sentence; "" if it is."""
    return "" if find_spec(EXTRAS["kernels"]) else f"Triton is not installed: pip install '{PACKAGE}[kernels]'"
