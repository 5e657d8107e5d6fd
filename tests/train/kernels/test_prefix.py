"""The prefix kernels: in Triton's interpreter they agree with float64, and a step with them has the same gradients."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sae.tests.simulated_cuda.kernel_cost import of_prefixes
from sae.train.kernels.prefix_operator import compare_prefixes, prefix_gradients
from sae.train.recipe import find_recipe
from sae.train.variant import RunConfig

SHAPES = [(5, 19, 11), (1, 8, 8), (2, 9, 3), (1, 1, 1)]
OPERATORS = ("compare", compare_prefixes, 3), ("gradients", prefix_gradients, 4)


def tensors(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The arguments of `prefix_gradients`. For one token all parts of the reconstruction are zero."""
    torch.manual_seed(sum(shape))
    prefixes, tokens, width = shape
    part_GBD = torch.randn(shape).to(dtype)
    part_GBD[:, -1] = 0
    return part_GBD, torch.randn(width), torch.randn(tokens, width), torch.randn(prefixes)


def test_the_reference_by_hand() -> None:
    """One token of one dimension: x = 6, b_dec = 1, parts 2 and 4. The prefixes reconstruct 3 and 7."""
    part_GBD, bias_D, x_BD = torch.tensor([[[2.0]], [[4.0]]]), torch.tensor([1.0]), torch.tensor([[6.0]])
    recon_BD, squared_G = compare_prefixes(part_GBD, bias_D, x_BD)
    assert recon_BD.tolist() == [[7]] and squared_G.tolist() == [9, 1]
    g_GBD, g_D = prefix_gradients(part_GBD, bias_D, x_BD, torch.tensor([1.0, 10.0]))
    assert g_GBD.flatten().tolist() == [-3 + 10, 10] and g_D.tolist() == [7]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_kernels(interpreter: Any, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """The kernels agree with torch in float64, and their cost is that of `kernel_cost`."""
    given = tensors(shape, dtype)
    for name, operator, count in OPERATORS:
        found, cost = interpreter("interpreted.prefix", name=name, arguments=given[:count])
        for one, expected in zip(found, operator(*(tensor.double() for tensor in given[:count])), strict=True):
            rounded = one.dtype == torch.bfloat16
            assert rounded == (dtype == torch.bfloat16 and one.dim() == 3)
            torch.testing.assert_close(one.double(), expected, rtol=8e-3 if rounded else 1e-5, atol=1e-5)
        assert cost == of_prefixes(shape, given[0].element_size(), 8, 8, name == "gradients")


def test_numbers_that_are_not_finite(interpreter: Any) -> None:
    """As in torch, a part that is not finite reaches only the prefixes that contain it."""
    given = tensors((3, 9, 5), torch.float32)
    given[0][1, 2, 3], given[0][2, 4, 1] = math.nan, math.inf
    for name, operator, count in OPERATORS:
        found, _ = interpreter("interpreted.prefix", name=name, arguments=given[:count])
        for one, expected in zip(found, operator(*given[:count]), strict=True):
            torch.testing.assert_close(one, expected, equal_nan=True)


def test_the_operators_are_known_to_torch() -> None:
    given = tensors((3, 6, 4), torch.bfloat16)
    torch.library.opcheck(compare_prefixes, given[:3])
    torch.library.opcheck(prefix_gradients, given)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("options", [{"k": 8}, {"k": 4.5, "prefixes": 3}, {"k": 8, "prefixes": 1}])
def test_a_step_has_the_gradients_of_one_without_kernels(options: dict[str, Any], precision: str) -> None:
    """Losses and reconstruction agree too. The tolerance is relative to the largest element of each tensor."""
    results = []
    for by_kernels in (False, True):
        torch.manual_seed(0)
        variant = find_recipe("matryoshka").make(RunConfig(6, 40, 10, 32), options)
        if by_kernels:
            variant.use_kernels()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bfloat16"):
            step = variant(torch.tensor(9), torch.randn(32, 6), torch.optim.SGD(variant.parameters()))
            losses = variant.losses(step)
        assert ("squared_errors_G" in step.values) == by_kernels
        torch.stack(list(losses.values())).sum().backward()
        gradients = {name: p.grad for name, p in variant.named_parameters() if p.grad is not None}
        results.append({**gradients, **losses, "error": step.squared_error, "recon": step.recon_BD})
    assert len(results[0]) == len(results[1]) == 8
    for name, expected in results[0].items():
        atol = (1e-2 if precision == "bfloat16" else 1e-6) * float(expected.detach().abs().max())
        torch.testing.assert_close(results[1][name], expected, rtol=0, atol=atol)


def test_a_loss_on_the_reconstruction_reaches_every_section() -> None:
    """Gradients are the same if the loss also depends directly on x_hat and on the latents."""
    results = []
    for by_kernels in (False, True):
        torch.manual_seed(0)
        variant = find_recipe("matryoshka").make(RunConfig(6, 40, 10, 32), {"k": 8})
        if by_kernels:
            variant.use_kernels()
        step = variant(torch.tensor(9), torch.randn(32, 6), torch.optim.SGD(variant.parameters()))
        more = (step.recon_BD[:, 0].sum() + step.f_BF.square().sum()) / 32
        (variant.losses(step)["mse"] + more).backward()
        results.append({name: p.grad for name, p in variant.named_parameters() if p.grad is not None})
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_kernels_compile_for_a_gpu(compiler: Any, dtype: torch.dtype) -> None:
    """The kernels compile for compute capability 9.0, that of an H200, and use no stack memory."""
    stacks = compiler("compiled.compile_prefixes", counts=[1, 5, 12], dtype=dtype, capability=90)
    assert len(stacks) == 6 and not any(stacks.values())
