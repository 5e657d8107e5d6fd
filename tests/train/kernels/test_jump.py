"""JumpReLU's kernels: in Triton's interpreter they agree with float64, and a step with them has the same gradients."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sae.tests.simulated_cuda.kernel_cost import of_jump
from sae.train.kernels.operators import jump_counts, jump_gradients
from sae.train.recipe import find_recipe
from sae.train.variant import RunConfig

EPS = 0.5
SHAPES = [(19, 11), (8, 8), (1, 1)]


def tensors(tokens: int, latents: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """z, theta and the gradient of the latents. Some z equal theta: these are near theta, but do not fire."""
    torch.manual_seed(tokens)
    theta_F = torch.rand(latents).to(dtype).float()
    z_BF, g_BF = torch.randn(tokens, latents).to(dtype), torch.randn(tokens, latents).to(dtype)
    z_BF[::3] = theta_F.to(dtype)
    return z_BF, theta_F, g_BF


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_kernels(interpreter: Any, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """The kernels agree with torch in float64, and their cost is that of `kernel_cost`."""
    z_BF, theta_F, g_BF = tensors(*shape, dtype)
    found, cost = interpreter("interpreted.jump", name="counts", arguments=(z_BF, theta_F, EPS))
    assert all(map(torch.equal, found, jump_counts(z_BF, theta_F, EPS)))
    assert cost == of_jump(*shape, z_BF.element_size(), 2, 8)
    for to_input in (False, True):
        found, cost = interpreter("interpreted.jump", name="gradients", arguments=(z_BF, theta_F, g_BF, EPS, to_input))
        expected = jump_gradients(z_BF.double(), theta_F.double(), g_BF.double(), EPS, to_input)
        tolerance = {"rtol": 8e-3 if dtype == torch.bfloat16 else 1e-5, "atol": 1e-5}
        torch.testing.assert_close(found[0].double(), expected[0], **tolerance)
        torch.testing.assert_close(found[1].double(), expected[1], rtol=1e-5, atol=1e-5)
        assert found[0].dtype == dtype and cost == of_jump(*shape, 3 * z_BF.element_size(), 1, 8)


def test_numbers_that_are_not_finite(interpreter: Any) -> None:
    """As in torch, a NaN in z is neither above nor near theta, and a NaN in the gradient reaches only its latent."""
    z_BF, theta_F, g_BF = tensors(9, 5, torch.float32)
    z_BF[1, 0], z_BF[2, 1], g_BF[4, 2], g_BF[5, 3] = math.nan, math.inf, math.nan, math.inf
    found, _ = interpreter("interpreted.jump", name="gradients", arguments=(z_BF, theta_F, g_BF, EPS, False))
    for one, expected in zip(found, jump_gradients(z_BF, theta_F, g_BF, EPS, False), strict=True):
        torch.testing.assert_close(one, expected, equal_nan=True)
    found, _ = interpreter("interpreted.jump", name="counts", arguments=(z_BF, theta_F, EPS))
    assert all(map(torch.equal, found, jump_counts(z_BF, theta_F, EPS)))


def test_the_operators_are_known_to_torch() -> None:
    z_BF, theta_F, g_BF = tensors(6, 4, torch.bfloat16)
    torch.library.opcheck(jump_counts, (z_BF, theta_F, EPS))
    for to_input in (False, True):
        torch.library.opcheck(jump_gradients, (z_BF, theta_F, g_BF, EPS, to_input))


@pytest.mark.parametrize(
    ("recipe", "options"), [("jumprelu", {}), ("jumprelu-step", {}), ("jumprelu-tanh", {"ste_to_input": True})]
)
def test_a_step_has_the_gradients_of_one_without_kernels(recipe: str, options: dict[str, Any]) -> None:
    gradients = []
    for by_kernels in (False, True):
        torch.manual_seed(0)
        variant = find_recipe(recipe).make(RunConfig(6, 40, 10, 32), {"bandwidth": 0.5, "threshold": 0.3} | options)
        if by_kernels:
            variant.use_kernels()
        assert variant.uses_kernels == by_kernels
        step = variant(torch.tensor(9), torch.randn(32, 6), torch.optim.SGD(variant.parameters()))
        torch.stack(list(variant.losses(step).values())).sum().backward()
        gradients.append({name: p.grad for name, p in variant.named_parameters() if p.grad is not None})
    assert any("threshold" in name and gradient.any() for name, gradient in gradients[0].items())
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_kernels_compile_for_a_gpu(compiler: Any, dtype: torch.dtype) -> None:
    """The kernels compile for compute capability 9.0, that of an H200, and use no stack memory."""
    stacks = compiler("compiled.compile_jump", dtype=dtype, capability=90)
    assert len(stacks) == 3 and not any(stacks.values())
