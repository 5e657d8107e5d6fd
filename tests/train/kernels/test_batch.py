"""Kernels that pass over a batch agree with float64 in Triton's interpreter, and do not change a step's gradients."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sae.tests.simulated_cuda import kernel_cost
from sae.train import dense_ops
from sae.train.kernels.batch_operators import (
    compare,
    compare_backward,
    compare_by_torch,
    normalize_batch,
    normalize_by_torch,
)
from sae.train.recipe import find_recipe
from sae.train.variant import RunConfig, Variant

SHAPES = [(19, 11), (8, 8), (1, 3), (65, 5)]
TILE = 4, 8
DTYPES = [torch.bfloat16, torch.float32]


def batch_of(tokens: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Rows with a mean far from zero, the mean of normalization, and b_dec. Some rows and one column are zero."""
    generator = torch.Generator().manual_seed(tokens)
    mean_D, b_D = (torch.randn(width, generator=generator) for _ in range(2))
    x_BD = 30 + torch.randn(tokens, width, generator=generator)
    x_BD[5::7], x_BD[:, 2] = 0, 0
    return x_BD.to(dtype), mean_D, b_D


def close(found: Tensor, expected: Tensor, rtol: float = 1e-5) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=rtol, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scales", [False, True])
@pytest.mark.parametrize("subtracts", [False, True])
def test_normalizing(
    interpreter: Any, shape: tuple[int, int], dtype: torch.dtype, scales: bool, subtracts: bool
) -> None:
    """Both batches equal torch's bit for bit, the variance agrees with float64, and `kernel_cost` gives the cost."""
    x_BD, mean_D, b_D = batch_of(*shape, dtype)
    scale = torch.linspace(0.3, 7, shape[1]) if scales else torch.tensor(3.7)
    given = x_BD, mean_D, scale, b_D if subtracts else None, dtype
    (normalized_BD, centered_BD, variance), cost = interpreter(
        "interpreted.batch", name="normalize", arguments=given, tile=TILE
    )
    expected = normalize_by_torch(*given)
    assert torch.equal(normalized_BD, expected[0]) and torch.equal(centered_BD, expected[1])
    assert centered_BD.dtype == dtype
    close(variance, (normalized_BD.double() - normalized_BD.double().mean(0)).square().sum())
    assert cost == kernel_cost.of_normalizing(*shape, (x_BD.element_size(), dtype.itemsize), subtracts, TILE)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_comparing(interpreter: Any, shape: tuple[int, int], dtype: torch.dtype) -> None:
    product_BD, b_D, _ = batch_of(*shape, dtype)
    x_BD = batch_of(*shape, torch.float32)[0].flip(0)
    given = product_BD, b_D, x_BD
    (error_BD, squared_error), cost = interpreter("interpreted.batch", name="compare", arguments=given, tile=TILE)
    assert torch.equal(error_BD, compare_by_torch(*given)[0])
    close(squared_error, compare_by_torch(*(one.double() for one in given))[1])
    assert cost == kernel_cost.of_comparing(*shape, product_BD.element_size(), TILE)

    given_back = error_BD, torch.tensor(0.3), dtype
    (g_BD, g_D), cost = interpreter("interpreted.batch", name="compare_backward", arguments=given_back, tile=TILE)
    assert torch.equal(g_BD, (error_BD * -0.6).to(dtype))
    close(g_D, (error_BD.double() * -0.6).sum(0))
    assert cost == kernel_cost.of_comparing_backward(*shape, dtype.itemsize, TILE)


def test_numbers_that_are_not_finite(interpreter: Any) -> None:
    """NaN and infinity spread to the same elements as with torch's operations."""
    x_BD, mean_D, b_D = batch_of(9, 5, torch.float32)
    x_BD[3, 1], x_BD[7] = math.inf, math.nan
    given = x_BD, mean_D, torch.tensor(2.0), b_D, torch.bfloat16
    found, _ = interpreter("interpreted.batch", name="normalize", arguments=given, tile=TILE)
    for one, expected in zip(found, normalize_by_torch(*given), strict=True):
        close(one, expected)
    compared = b_D.expand(9, 5).bfloat16(), b_D, x_BD
    found, _ = interpreter("interpreted.batch", name="compare", arguments=compared, tile=TILE)
    assert found[1].isnan()
    close(found[0], compare_by_torch(*compared)[0])
    back = found[0], torch.tensor(1.0), torch.bfloat16
    (g_BD, g_D), _ = interpreter("interpreted.batch", name="compare_backward", arguments=back, tile=TILE)
    assert g_BD.isfinite().sum() == 9 * 5 - 6 and g_D.isfinite().sum() == 0


@pytest.mark.slow
def test_the_operators_are_known_to_torch() -> None:
    x_BD, mean_D, b_D = batch_of(6, 4, torch.bfloat16)
    for scale, bias_D, dtype in ((torch.tensor(2.0), b_D, torch.bfloat16), (b_D, None, torch.float32)):
        torch.library.opcheck(normalize_batch, (x_BD, mean_D, scale, bias_D, dtype))
        torch.library.opcheck(normalize_batch, (x_BD.float(), mean_D, scale, bias_D, dtype))
        torch.library.opcheck(compare, (x_BD, b_D, x_BD.float()))
        torch.library.opcheck(compare_backward, (x_BD.float(), torch.tensor(2.0), dtype))


@pytest.mark.parametrize("losses", ["square", "error", "both"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradients_of_an_error_are_those_of_autograd(losses: str, dtype: torch.dtype) -> None:
    found = []
    for with_operator in (False, True):
        product_BD, b_D, _ = batch_of(6, 4, dtype)
        x_BD = batch_of(6, 4, torch.float32)[0].flip(0)
        product_BD, b_D = product_BD.requires_grad_(), b_D.requires_grad_()
        if with_operator:
            error_BD, squared_error = dense_ops.reconstruction_error(product_BD, b_D, x_BD)
        else:
            error_BD = x_BD - (product_BD + b_D)
            squared_error = error_BD.square().sum()
        loss = 0.7 * squared_error * (losses != "error") + (error_BD**3).sum() * (losses != "square")
        found.append((loss.detach(), *torch.autograd.grad(loss, (product_BD, b_D))))
    torch.testing.assert_close(found[1], found[0], rtol=8e-3 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


def make(recipe: str, by_kernels: bool, options: dict[str, Any]) -> Variant:
    torch.manual_seed(0)
    variant = find_recipe(recipe).make(RunConfig(6, 40, 10, 32), options)
    variant.set_normalization(torch.linspace(-1, 1, 6), 9.0, torch.randn(50, 6))
    if by_kernels:
        variant.use_kernels()
    return variant


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        ("relu", {}), ("topk", {"k": 4}), ("jumprelu", {}), ("gated", {}), ("matryoshka", {}),
        ("relu", {"normalize": "layer_norm"}), ("relu", {"normalize": "standardize", "pre_bias": False}),
    ],
)  # fmt: skip
def test_a_step_has_the_values_and_gradients_of_one_without_kernels(recipe: str, options: dict[str, Any]) -> None:
    found = []
    for by_kernels in (False, True):
        variant = make(recipe, by_kernels, options)
        variant.dead.index_A, variant.dead.real_A = torch.arange(8), torch.ones(8)
        step = variant(torch.tensor(9), torch.randn(32, 6).bfloat16(), torch.optim.SGD(variant.parameters()))
        assert variant.uses_kernels == by_kernels
        torch.stack(list(variant.losses(step).values())).sum().backward()
        values = {name: getattr(step, name).detach() for name in ("recon_BD", "error_BD", "squared_error", "variance")}
        found.append(values | {name: p.grad for name, p in variant.named_parameters() if p.grad is not None})
        torch.testing.assert_close(variant.sae(step.x_BD).recon_BD.detach().float(), values["recon_BD"])
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernels_compile_for_a_gpu(compiler: Any, dtype: torch.dtype) -> None:
    """The kernels compile for compute capability 9.0, that of an H200, and use no stack memory."""
    stacks = compiler("compiled.compile_batch", dtype=dtype, capability=90)
    names = {"normalize_tile", "combine_tiles", "compare_tile", "scale_tile"}
    assert {name.split()[0] for name in stacks} == names and not any(stacks.values())
