"""Runs that use the kernels' operators. On a CPU, torch computes these operators."""

from pathlib import Path

import pytest

from sae.common.schemas import RUN_RECORD
from sae.tests.train.runs import make_config, train
from sae.train import run_trainer
from sae.train.config import TrainConfig
from sae.train.run import TrainProgress


def test_run_json_says_whether_kernels_are_used_and_a_resumed_run_whether_that_changed(
    sparse_cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result is bit-for-bit the same if no pre-activations are equal and the products are dense."""
    weights = {}
    for kernels in (False, True):
        if kernels:
            monkeypatch.setattr(run_trainer, "reason_against_kernels", lambda device: "")
        (topk,) = train(make_config(sparse_cache, "topk", out=tmp_path / str(kernels)))
        assert RUN_RECORD.read(topk / "run.json").get("kernels", False) == kernels
        weights[kernels] = (topk / "sae.safetensors").read_bytes()
    assert weights[False] == weights[True]

    monkeypatch.undo()
    for file in (topk / "sae.json", *(topk / "checkpoints" / "step-00000012").iterdir()):
        file.unlink()
    (topk / "checkpoints" / "step-00000012").rmdir()
    said: list[str] = []
    train(TrainConfig(resume=[topk], device="cpu"), TrainProgress(say=said.append))
    assert (
        f"{topk.name} was started with the kernels of this package and continues without them. Where pre-activations "
        "are equal, it may select other latents, and sums are rounded differently."
    ) in said
