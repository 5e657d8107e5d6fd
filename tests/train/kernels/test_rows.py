"""Sums of rows by token and by latent: the kernels, in Triton's interpreter, agree with the references in float64."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sae.tests.simulated_cuda.kernel_cost import of_decode, of_sums
from sae.train import sparse_ops
from sae.train.activation_functions import BatchTopK, TopK
from sae.train.kernels.division import MOST_ROWS, TILE, row_tile
from sae.train.kernels.operators import decode_by_bags, decode_rows, sum_by_bags, sum_rows
from sae.train.sae import SAE
from sae.train.variant import Step

TOLERANCE = {"rtol": 1e-5, "atol": 2e-5}


def tensors(counts: list[int], n: int, width: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The arguments of `decode_rows`: token i has counts[i] of the n latents, and rows have `width` elements."""
    torch.manual_seed(n + width)
    count_B = torch.tensor(counts)
    return {
        "value_N": torch.randn(sum(counts)),
        "row_FD": torch.randn(n, width).to(dtype),
        "latent_N": torch.cat([torch.randperm(n)[:count] for count in counts]),
        "token_start_B": count_B.cumsum(0) - count_B,
        "bias_D": torch.randn(width),
        "x_BD": torch.randn(len(counts), width),
    }


def in_double(given: dict[str, Tensor]) -> list[Tensor]:
    return [tensor.double() if tensor.is_floating_point() else tensor for tensor in given.values()]


def in_float64(given: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return decode_by_bags(*in_double(given))


def test_the_reference_by_hand() -> None:
    """Token 0 is 2 times row 0 plus 3 times row 1; token 1 has no latents. W_dec is the identity, b_dec is (0, 1)."""
    found = decode_rows(
        torch.tensor([2.0, 3.0]), torch.eye(2), torch.tensor([0, 1]), torch.tensor([0, 2]), torch.tensor([0.0, 1.0]),
        torch.tensor([[1.0, 1.0], [0.0, 4.0]]),
    )  # fmt: skip
    assert [tensor.tolist() for tensor in found] == [[[2, 4], [0, 1]], 1 + 9 + 9, [1, 3]]


def check_kernel(interpreter: Any, counts: list[int], n: int, width: int, tile: Any, dtype: torch.dtype) -> None:
    """The kernel agrees with the reference in float64, and its cost is that of `kernel_cost`."""
    given = tensors(counts, n, width, dtype)
    found, cost = interpreter("interpreted.decode", arguments=given, tile=tile)
    for one, expected in zip(found, in_float64(given), strict=True):
        torch.testing.assert_close(one.double(), expected, **TOLERANCE)
    assert cost == of_decode(counts, width, given["row_FD"].element_size(), tile)


@pytest.mark.parametrize(
    ("counts", "n", "width", "tile", "dtype"),
    [
        ([3, 3], 9, 7, (4, 4), torch.bfloat16),  # not multiples of the tile
        ([0, 1, 9, 4, 0], 10, 9, (4, 8), torch.float32),  # no latents, one latent, and more than fit a tile
        ([1, 1], 1, 4, (4, 4), torch.float32),
        ([12], 12, 8, (4, 8), torch.bfloat16),  # all latents
    ],
)
def test_the_kernel(interpreter: Any, counts: list[int], n: int, width: int, tile: Any, dtype: torch.dtype) -> None:
    check_kernel(interpreter, counts, n, width, tile, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("tile", [(2, 16), (8, 8), (16, 32)])
def test_the_kernel_for_every_shape(interpreter: Any, tile: Any, dtype: torch.dtype) -> None:
    for counts, n, width in (([40, 0, 17, 1], 40, 33), ([5] * 7, 30, 16), ([0, 0], 3, 5)):
        check_kernel(interpreter, counts, n, width, tile, dtype)


def test_numbers_that_are_not_finite_stay_with_their_token(interpreter: Any) -> None:
    """As in the reference, NaN and infinity reach only their token. Equal rows have equal slopes.

    Masked elements of a tile contribute nothing.
    """
    given = tensors([2, 3, 6], 8, 6)
    given["row_FD"][5] = given["row_FD"][6]
    given["latent_N"] = torch.tensor([1, 2, 0, 3, 4, 2, 3, 4, 5, 6, 7])
    given["value_N"][0], given["row_FD"][0, 3] = math.nan, math.inf
    found, _ = interpreter("interpreted.decode", arguments=given, tile=(4, 4))
    recon_BD, squared, slope_N = in_float64(given)
    torch.testing.assert_close(found[0].double(), recon_BD, equal_nan=True, **TOLERANCE)
    torch.testing.assert_close(found[2].double(), slope_N, equal_nan=True, **TOLERANCE)
    assert found[1].isnan() and squared.isnan() and found[2][5:].isfinite().all() and found[2][8] == found[2][9]


def test_no_tokens(interpreter: Any) -> None:
    given = tensors([1], 4, 4) | {"value_N": torch.empty(0), "latent_N": torch.empty(0, dtype=torch.int64)}
    given |= {"token_start_B": torch.empty(0, dtype=torch.int64), "x_BD": torch.empty(0, 4)}
    (recon_BD, squared, slope_N), cost = interpreter("interpreted.decode", arguments=given)
    assert recon_BD.shape == (0, 4) and squared == 0 and slope_N.shape == (0,) and cost == (0, 0)


def stretches(counts: list[int], tokens: int, width: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """The arguments of `sum_rows`: sum i has counts[i] terms, rows of random tokens with random weights."""
    torch.manual_seed(width)
    count_F = torch.tensor(counts)
    return {
        "index_N": torch.randint(0, tokens, (sum(counts),)),
        "row_RD": torch.randn(tokens, width).to(dtype),
        "start_F": count_F.cumsum(0) - count_F,
        "weight_N": torch.randn(sum(counts)),
    }


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_kernel_that_sums_rows(interpreter: Any, dtype: torch.dtype, transposed: bool) -> None:
    """Sums of no row, of one row and of more rows than fit a tile, whose size divides none. One weight is NaN."""
    counts, tokens, width = [0, 1, 9, 2, 0, 0, 5], 6, 11
    given = stretches(counts, tokens, width, dtype)
    given["weight_N"][-1] = math.nan
    found, cost = interpreter("interpreted.sum_rows", arguments=given, transposed=transposed, tile=(4, 4, 8))
    expected = sum_by_bags(*in_double(given), transposed)
    assert found.shape == ((width, 7) if transposed else (7, width)) and int(found.isnan().sum()) == width
    torch.testing.assert_close(found.double(), expected, equal_nan=True, **TOLERANCE)
    assert cost == of_sums(counts, width, given["row_RD"].element_size(), 8)


def test_no_rows_to_sum(interpreter: Any) -> None:
    found, _ = interpreter("interpreted.sum_rows", arguments=stretches([0, 0], 3, 5, torch.float32), transposed=True)
    assert torch.equal(found, torch.zeros(5, 2))


def test_a_program_has_room_for_a_quarter_more_latents_than_the_mean() -> None:
    for latents in (0, 0.5, 13, 32, 100, 204, 5000):
        rows, columns = row_tile(latents)
        assert rows * columns == TILE and rows.bit_count() == 1
        assert rows == MOST_ROWS or 1.25 * latents <= rows


def test_the_operators_are_known_to_torch() -> None:
    for counts in ([3, 0, 2], [1]):
        torch.library.opcheck(decode_rows, tuple(tensors(counts, 5, 4).values()))
        for transposed in (False, True):
            torch.library.opcheck(sum_rows, (*stretches(counts, 5, 4, torch.bfloat16).values(), transposed))


@pytest.mark.parametrize("activation", [TopK(3), BatchTopK(2.5), BatchTopK(0.5)], ids=["topk", "batchtopk", "few"])
@pytest.mark.parametrize("other_loss", [False, True])
def test_a_step_has_the_gradients_of_one_without_kernels(activation: Any, other_loss: bool, monkeypatch: Any) -> None:
    """The loss is the squared error, with or without another loss on the reconstruction."""
    monkeypatch.setattr(sparse_ops, "SPARSE_FROM", {"cpu": {"float32": 1}})
    gradients = []
    for by_kernels in (False, True):
        torch.manual_seed(0)
        sae = SAE(6, 40, [activation]).double()
        for parameter in sae.parameters():
            torch.nn.init.normal_(parameter)
        monkeypatch.setattr(activation, "by_kernels", by_kernels)
        x_BD = torch.randn(32, 6, dtype=torch.float64)
        done = sae.run(x_BD)
        assert (done.squared_error is not None) == by_kernels
        step = Step(torch.tensor(0), sae, torch.optim.SGD(sae.parameters()), x_BD, done.pre_BF, None, done.recon_BD)
        step.squared_error = done.squared_error
        (step.squared_error / 32 + other_loss * (done.recon_BD**3).sum()).backward()
        gradients.append({name: p.grad for name, p in sae.named_parameters()})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_kernels_compile_for_a_gpu(compiler: Any, dtype: torch.dtype) -> None:
    """For compute capability 9.0: few, medium and many latents per token, and sums in both layouts.

    The kernels use no stack memory.
    """
    stacks = compiler("compiled.compile_rows", counts=[8, 100, 320], dtype=dtype, capability=90)
    assert len(stacks) == 5 and not any(stacks.values())
