"""Memory is planned for a GPU: a step is traced there, as it is computed there."""

import pytest

from .gpu import SimulatedGPU


@pytest.mark.parametrize("recipe", ["relu", "batchtopk"])
def test_a_step_is_traced_on_a_gpu(gpu: SimulatedGPU, recipe: str) -> None:
    """The state is that of a CPU; a step has other temporaries (autocast, dense products); batches are two."""
    planned = gpu("planning.memory", recipe=recipe)
    (state, step, host, _, _, _), (gpu_state, gpu_step, gpu_host, _, most, batches) = planned["cpu"], planned["cuda"]
    assert gpu_state == state and gpu_host == host
    assert 0.5 * step < gpu_step < 2.5 * step and gpu_step != step
    assert most == gpu_step and batches == 2 * 2 * 256 * 64 + (96 << 20)
