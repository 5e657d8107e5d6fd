"""Names of devices and dtypes."""

from pathlib import Path

import pytest
import torch

from sae.common.device import resolve_device, resolve_dtype
from sae.common.errors import UnavailableError, UsageError
from sae.evaluate import run as evaluate_run
from sae.evaluate.artifacts import ArtifactCache
from sae.evaluate.plan import EvaluateConfig, EvaluatePlan
from sae.evaluate.run import run_evaluation
from sae.train import run as train_run
from sae.train.plan import TrainConfig, TrainPlan
from sae.train.run import run_training


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "mps:0", ""])
def test_an_unknown_device_raises(device: str) -> None:
    with pytest.raises(UsageError, match="unknown device .*: expected auto, cpu, cuda or cuda:N"):
        resolve_device(device)


def test_a_missing_gpu_raises() -> None:
    missing = f"cuda:{torch.cuda.device_count()}"
    with pytest.raises(UnavailableError, match=f"device {missing} is not available: torch sees"):
        resolve_device(missing)
    assert resolve_device("cpu") == "cpu"


def test_each_process_of_a_launcher_has_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """This also holds during planning: otherwise all processes would time the model on the first GPU."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert [resolve_device(d) for d in ("auto", "cuda", "cuda:1", "cpu")] == ["cuda", "cuda", "cuda:1", "cpu"]
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert [resolve_device(d) for d in ("auto", "cuda", "cuda:1", "cpu")] == ["cuda:2", "cuda:2", "cuda:1", "cpu"]
    monkeypatch.setenv("LOCAL_RANK", "4")
    with pytest.raises(UnavailableError, match="device cuda:4 is not available: torch sees 4 GPUs"):
        resolve_device("auto")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # the scheduler lets each process see only its own GPU
    assert resolve_device("auto") == "cuda"


def test_training_and_evaluation_keep_freed_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a step of `jumprelu` would take an eighth longer on a CPU."""
    kept = []
    for module in (train_run, evaluate_run):
        monkeypatch.setattr(module, "keep_freed_memory", lambda module=module: kept.append(module))
    run_training(TrainPlan(TrainConfig(), []))
    run_evaluation(EvaluatePlan(EvaluateConfig([]), [], [], ArtifactCache(Path())))
    assert kept == [train_run, evaluate_run]


def test_auto_dtype_follows_the_device() -> None:
    assert [resolve_dtype("auto", d) for d in ("cpu", "cuda:1")] == ["float32", "bfloat16"]
    assert resolve_dtype("float32", "cuda") == "float32"
    with pytest.raises(UsageError, match="unknown dtype .float99.: expected auto, bfloat16 or float32"):
        resolve_dtype("float99", "cpu")
