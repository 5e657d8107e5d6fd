"""A harvest on a GPU writes the bytes that it writes on a CPU, and queues its copies."""

from pathlib import Path

import pytest

from .gpu import SimulatedGPU


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_the_chunks_are_those_of_the_cpu_byte_for_byte(
    gpu: SimulatedGPU, tiny_model: Path, sentences: Path, tmp_path: Path, dtype: str
) -> None:
    """Both layers, 400 rows in two windows; the last pass of a window is a part of a batch."""
    found = gpu(
        "harvesting.harvest", folder=tmp_path, model=str(tiny_model), dataset=str(sentences), layers=(0, 1),
        tokens=400, context=32, window=256, held_out=0.2, dtype=dtype, batch_contexts=8,
    )  # fmt: skip
    assert found["apart"] == [] and found["chunks"] == 16 and found["passes"] == 3
    # Before a pass transformers looks at the positions of its tokens, for packed sequences.
    ours = [wait for wait in found["waits"] if "(transformers/masking_utils.py:" not in wait]
    assert ours == []
    assert found["queued"] == 4 * found["passes"]  # ids and places to the GPU, the rows of two layers back
