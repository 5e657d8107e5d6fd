"""Names of devices and dtypes."""

import pytest
import torch

from sae.common.device import resolve_device, resolve_dtype
from sae.common.errors import UnavailableError, UsageError


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "mps:0", ""])
def test_an_unknown_device_raises(device: str) -> None:
    with pytest.raises(UsageError, match="unknown device .*: expected auto, cpu, cuda or cuda:N"):
        resolve_device(device)


def test_a_missing_gpu_raises() -> None:
    missing = f"cuda:{torch.cuda.device_count()}"
    with pytest.raises(UnavailableError, match=f"device {missing} is not available: torch sees"):
        resolve_device(missing)
    assert resolve_device("cpu") == "cpu"


def test_auto_dtype_follows_the_device() -> None:
    assert [resolve_dtype("auto", d) for d in ("cpu", "cuda:1")] == ["float32", "bfloat16"]
    assert resolve_dtype("float32", "cuda") == "float32"
    with pytest.raises(UsageError, match="unknown dtype .float99.: expected auto, bfloat16 or float32"):
        resolve_dtype("float99", "cpu")
