"""`sae evaluate` on the simulated GPU, which has the arithmetic of the CPU, gives the numbers of the CPU."""

from pathlib import Path

import pytest
import torch

from sae.cache.reader import Cache
from sae.train.activation_functions import ReLU, TopK
from sae.train.sae import SAE, save_sae

from .gpu import SimulatedGPU

ONCE = ("train/sae.py:", "(transformers/")  # loading the SAEs and the model


@pytest.fixture
def runs(tiny_cache: Cache, tmp_path: Path) -> list[Path]:
    """Two untrained SAEs of layer 1."""
    folders = []
    for name, activation in (("relu", ReLU()), ("topk", TopK(8))):
        torch.manual_seed(0)
        origin = {
            "model": tiny_cache.identity["model"], "layer": 1, "cache": str(tiny_cache.folder),
            "fingerprint": tiny_cache.fingerprint,
        }  # fmt: skip
        save_sae(SAE(32, 64, [activation]), tmp_path / "given" / name, origin)
        folders.append(tmp_path / "given" / name)
    return folders


@pytest.mark.slow
def test_core_has_the_numbers_of_the_cpu_and_copies_no_pageable_memory(
    gpu: SimulatedGPU, runs: list[Path], tmp_path: Path
) -> None:
    """Results and references are equal bit for bit. `core` reads nothing but its sums and masks from the GPU."""
    found = gpu("evaluating.measure", folder=tmp_path, runs=runs, suite="core", tokens=400)
    assert found["apart"] == {} and found["errors"] == {} and found["numbers"] >= 90
    copied = [wait for wait in found["waits"] if "pageable" in wait and not any(part in wait for part in ONCE)]
    assert copied == []


def test_core_of_a_model_in_bfloat16_has_logits_in_float32(gpu: SimulatedGPU, runs: list[Path], tmp_path: Path) -> None:
    """Both devices compute the last product with float32 sums: a GPU with torch.mm, a CPU with float32 weights."""
    found = gpu("evaluating.measure", folder=tmp_path, runs=runs[:1], suite="core", tokens=60, dtype="bfloat16")
    assert found["errors"] == {}
    assert {name: apart for name, apart in found["apart"].items() if apart > 1e-4} == {}
