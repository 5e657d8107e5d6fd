"""The gated SAE's kernels agree with float64 in Triton's interpreter, and a step with them has the same gradients."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sae.tests.simulated_cuda.kernel_cost import of_gate
from sae.train.kernels.gate_operator import gate_gradients, gate_latents
from sae.train.recipe import find_recipe
from sae.train.variant import RunConfig

SHAPES = [(19, 11), (8, 8), (1, 1)]


def tensors(tokens: int, latents: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The arguments of `gate_gradients`. Some gates are exactly at their threshold and therefore closed."""
    torch.manual_seed(tokens)
    scale_F, gate_F, mag_F = torch.rand(latents), torch.rand(latents).to(dtype).float(), torch.randn(latents)
    z_BF, of_f_BF, of_gate_BF = (torch.randn(tokens, latents).to(dtype) for _ in range(3))
    z_BF[::3] = -gate_F.to(dtype)
    z_BF[1:2] = 0
    return z_BF, scale_F, gate_F, mag_F, of_f_BF, of_gate_BF, torch.tensor(0.25)


def in_float64(given: tuple[Tensor, ...]) -> list[Tensor]:
    return [tensor.double() for tensor in given]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_kernels(interpreter: Any, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """The kernels agree with torch in float64, and their cost is that of `kernel_cost`."""
    given = tensors(*shape, dtype)
    size, rtol = given[0].element_size(), 8e-3 if dtype == torch.bfloat16 else 1e-5
    for name, operator, count, passes, sums, scalars in (
        ("latents", gate_latents, 4, 3, 2, 0), ("gradients", gate_gradients, 7, 4, 3, 1),
    ):  # fmt: skip
        found, cost = interpreter("interpreted.gate", name=name, arguments=given[:count])
        for one, expected in zip(found, operator(*in_float64(given[:count])), strict=True):
            by_token = expected.dim() > 1
            torch.testing.assert_close(one.double(), expected, rtol=rtol if by_token else 1e-5, atol=1e-5)
            assert one.dtype == (dtype if by_token else torch.float32)
        assert cost == of_gate(*shape, passes * size, sums, scalars, 8, 8)


def test_numbers_that_are_not_finite(interpreter: Any) -> None:
    """NaN and infinity reach the same latents, gradients and sums as in torch."""
    given = tensors(9, 6, torch.float32)
    for position, (argument, value) in enumerate(
        ((0, math.nan), (0, math.inf), (0, -math.inf), (4, math.nan), (5, math.inf))
    ):
        given[argument][position + 1, position] = value
    for name, operator, count in (("latents", gate_latents, 4), ("gradients", gate_gradients, 7)):
        found, _ = interpreter("interpreted.gate", name=name, arguments=given[:count])
        for one, expected in zip(found, operator(*given[:count]), strict=True):
            torch.testing.assert_close(one, expected, equal_nan=True)


def test_the_operators_are_known_to_torch() -> None:
    given = tensors(6, 4, torch.bfloat16)
    torch.library.opcheck(gate_latents, given[:4])
    torch.library.opcheck(gate_gradients, given)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_step_has_the_gradients_of_one_without_kernels(precision: str) -> None:
    """Losses, counts and reconstruction agree too. The tolerance is relative to the largest element of each tensor."""
    results = []
    for by_kernels in (False, True):
        torch.manual_seed(0)
        variant = find_recipe("gated").make(RunConfig(6, 40, 10, 32), {"l1_warmup": 0})
        with torch.no_grad():
            for parameter in variant.sae.activation[0].parameters():
                parameter.normal_(0, 0.3)
        if by_kernels:
            variant.use_kernels()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bfloat16"):
            step = variant(torch.tensor(9), torch.randn(32, 6), torch.optim.SGD(variant.parameters()))
            losses = variant.losses(step)
        assert ("gate_sum" in step.values) == by_kernels
        torch.stack(list(losses.values())).sum().backward()
        gradients = {name: p.grad for name, p in variant.named_parameters() if p.grad is not None}
        results.append({**gradients, **losses, "counts": step.counts_F, "recon": step.recon_BD})
    assert len(results[0]) == len(results[1]) == 11
    for name, expected in results[0].items():
        atol = (1e-2 if precision == "bfloat16" else 1e-6) * float(expected.detach().abs().max())
        torch.testing.assert_close(results[1][name], expected, rtol=0, atol=atol)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_kernels_compile_for_a_gpu(compiler: Any, dtype: torch.dtype) -> None:
    """The kernels compile for compute capability 9.0, that of an H200, and use no stack memory."""
    stacks = compiler("compiled.compile_gate", dtype=dtype, capability=90)
    assert len(stacks) == 2 and not any(stacks.values())
