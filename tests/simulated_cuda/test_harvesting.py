"""A harvest on a GPU writes the bytes that it writes on a CPU, and queues its copies."""

from pathlib import Path

import pytest

from .gpu import SimulatedGPU

SLOW = [("float32", "memory that ends"), ("float32", "Ctrl-C"), ("float32", "no pinned memory"), ("bfloat16", "")]


@pytest.mark.parametrize(
    "dtype, case",
    [("float32", ""), ("float32", "little memory"), *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)],
)
def test_the_chunks_are_those_of_the_cpu_byte_for_byte(
    gpu: SimulatedGPU, tiny_model: Path, sentences: Path, tmp_path: Path, dtype: str, case: str
) -> None:
    """Both layers have 400 rows in two windows. The last pass of a window is smaller than a batch."""
    found = gpu(
        "harvesting.harvest", folder=tmp_path, model=str(tiny_model), dataset=str(sentences), layers=(0, 1),
        tokens=400, context=32, window=256, held_out=0.2, dtype=dtype, batch_contexts=8, case=case,
    )  # fmt: skip
    assert found["apart"] == [] and found["chunks"] == 16
    of_passes, of_windows = found["queued"]
    window, *said = found["said"]
    if case == "little memory":
        # Each pass copies token ids and positions to the GPU, and the rows of two layers back.
        assert found["waits"] == [] and of_passes == of_windows == 4 * 3
        assert window.startswith("window   0.0 MB in host memory: it is larger than 50% of the ")
    else:
        assert window.startswith("window   0.0 MB in the memory of cuda")
    if case == "":
        # A pass copies token ids and positions. A window copies, for each layer, its rows, and norms and moments of its
        # one chunk.
        assert found["waits"] == [] and found["passes"] == 3 and of_passes == 2 * 3
        assert of_windows == of_passes + 2 * 2 * 3
    if case == "memory that ends":
        assert found["waits"] == [] and said == ["cuda:0 is out of memory: windows are kept in host memory."]
    if case == "Ctrl-C":
        assert any("of the 256 rows of window 0 are already computed" in sentence for sentence in said)
    if case == "no pinned memory":
        assert len(found["waits"]) == 2  # one for each window; they have 256 and 144 rows
