"""The update of BatchTopK's threshold: the kernels, in Triton's interpreter, agree with float64 and with torch."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sae.tests.simulated_cuda.kernel_cost import of_following
from sae.train.activation_functions import BatchTopK
from sae.train.kernels.division import equal_spans
from sae.train.kernels.threshold_operator import follow_by_torch, follow_threshold
from sae.train.mechanisms import BatchTopKThreshold
from sae.train.recipe import find_recipe
from sae.train.variant import RunConfig

RATE = 0.1


def values(kind: str, count: int, dtype: torch.dtype) -> Tensor:
    """The latents of a batch: mostly positive, or never positive with the kind "none"."""
    torch.manual_seed(count)
    value_N = torch.randn(count).abs().to(dtype) + 0.5
    value_N[::5] = 0
    if kind == "ties":
        value_N = value_N.clamp(max=0.75)
    if kind == "none":
        value_N = -value_N
    if kind == "not finite":
        value_N[1::3], value_N[2::3] = math.nan, math.inf
    return value_N


def state(batches: int) -> tuple[Tensor, Tensor]:
    return torch.tensor(0.3), torch.tensor(batches)


def lowest(value_N: Tensor) -> float:
    return min((one for one in value_N.double().tolist() if 0 < one < math.inf), default=0.3)


@pytest.mark.parametrize("kind", ["random", "ties", "none", "not finite"])
@pytest.mark.parametrize("count", [1, 8, 33, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_kernels_move_the_threshold(interpreter: Any, kind: str, count: int, dtype: torch.dtype) -> None:
    """The threshold agrees with float64 and equals torch's bit for bit. The cost is that of `kernel_cost`."""
    value_N = values(kind, count, dtype)
    for batches, rate in ((0, 1.0), (7, RATE)):
        (threshold, counted), cost = interpreter("interpreted.follow", arguments=(value_N, *state(batches), RATE))
        assert float(threshold) == pytest.approx(0.3 + rate * (lowest(value_N) - 0.3), rel=1e-6)
        assert int(counted) == batches + 1
        expected, by_torch = state(batches)
        follow_by_torch(value_N, expected, by_torch, RATE)
        assert torch.equal(threshold, expected)
        assert cost == of_following(count, value_N.element_size(), equal_spans(count, 4, 8)[0])


def test_the_operator_is_known_to_torch() -> None:
    torch.library.opcheck(follow_threshold, (values("random", 30, torch.bfloat16), *state(2), RATE))


@pytest.mark.parametrize("in_parts", [False, True])
def test_a_step_moves_the_threshold_as_without_kernels(in_parts: bool) -> None:
    """This also holds if the batch is computed in parts."""
    results = []
    for by_kernels in (False, True):
        torch.manual_seed(0)
        variant = find_recipe("batchtopk").make(RunConfig(6, 40, 10, 32), {"k": 4})
        (mechanism,) = (one for one in variant.mechanisms if isinstance(one, BatchTopKThreshold))
        if by_kernels:
            variant.use_kernels()
        assert mechanism.by_kernels == by_kernels
        for _ in range(3):
            step = variant(torch.tensor(9), torch.randn(32, 6), torch.optim.SGD(variant.parameters()))
            if in_parts:
                step.statistics[mechanism] = mechanism.statistic(step)
            with torch.no_grad():
                mechanism.after_step(step)
        assert isinstance(variant.sae.activation[0], BatchTopK)
        results.append((float(variant.sae.activation[0].threshold), int(mechanism.batches)))
    assert results[0] == results[1]
    assert results[0][0] > 0 and results[0][1] == 3


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_kernels_compile_for_a_gpu(compiler: Any, dtype: torch.dtype) -> None:
    """The kernels compile for compute capability 9.0, that of an H200, and use no stack memory."""
    stacks = compiler("compiled.compile_threshold", dtype=dtype, capability=90)
    assert len(stacks) == 2 and not any(stacks.values())
