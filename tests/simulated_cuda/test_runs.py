"""`sae train` on the simulated GPU, with batches that are copied to it and with an array that is kept on it."""

from pathlib import Path

import pytest

from sae.cache.reader import Cache

from .gpu import SimulatedGPU

RECIPES = ("batchtopk", "frozen-decoder")


@pytest.mark.parametrize("resident", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["streamed", "resident"])
@pytest.mark.parametrize("capture", [pytest.param("off", marks=pytest.mark.slow), "auto"])
def test_runs_end_as_on_a_cpu_and_neither_steps_nor_batches_nor_checkpoints_wait(
    gpu: SimulatedGPU, tiny_cache: Cache, tmp_path: Path, resident: bool, capture: str
) -> None:
    """Copies of batches run as late as possible, so a missing wait would change the files."""
    arguments = {"folder": tmp_path, "cache": tiny_cache.folder, "recipes": RECIPES, "resident": resident}
    found = gpu("runs.train", **arguments, capture=capture)
    assert found["waits"] == found["unordered"] == []
    assert [variables.get("CUBLAS_WORKSPACE_CONFIG") for variables in found["workspace"]] == [None, ":4096:8"]
    assert found["apart"] == found["apart_resumed"] == []
    if capture == "off":
        assert (found["steps"], found["steps_resumed"]) == (12 * len(RECIPES), 6 * len(RECIPES))
    else:  # the first step is eager and the second captured; the others are launches of the graph
        assert (found["steps"], found["steps_resumed"]) == (2 * len(RECIPES), 2 * len(RECIPES))
        assert found["replays"] == 12 + 6
    assert found["queued"] >= 12 + 6 or resident  # each batch of rows
    # All runs are saved once after step 6, and each once at its end. Every tensor of a state is copied.
    assert found["saves"] == 1 + 2 * len(RECIPES) and found["queued_to_save"] >= 14
