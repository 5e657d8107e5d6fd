"""Decide whether a device uses the kernels, and which runs use them."""

import itertools
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional as F

from ...common.errors import first_line
from ...common.packages import EXTRAS, PACKAGE
from .batch_operators import compare, compare_backward, compare_by_torch, normalize_batch, normalize_by_torch
from .division import PROGRAMS, ROOM, THRESHOLD_CHUNK
from .gate_operator import gate_gradients, gate_latents
from .operators import decode_by_bags, decode_rows, jump_counts, jump_gradients, largest, sum_by_bags, sum_rows
from .pair_operator import count_pairs
from .prefix_operator import compare_prefixes, prefix_gradients
from .threshold_operator import follow_threshold
from .update_layout import CHUNK
from .update_operator import update


@cache
def reason_against_kernels(device: str) -> str:
    """Why a device does not use the kernels, as the end of a sentence; "" if it uses them.

    The first call compiles each kernel and compares its result with that of torch.
    """
    if torch.device(device).type != "cuda":
        return f"the device is {device}, which has none"
    if reason := reason_against_triton():
        return reason
    try:
        for dtype in (torch.bfloat16, torch.float32):
            z_RN = torch.randn(3, 3 * ROOM + 5, generator=torch.Generator().manual_seed(0)).to(dtype)
            for rows, n, k in ((3, 100, 7), (3, z_RN.shape[1], 32), (1, z_RN.shape[1], ROOM)):
                if not torch.equal(largest(z_RN[:rows, :n].to(device), k).cpu(), largest(z_RN[:rows, :n], k)):
                    return f"they select other latents than torch on {device}"
            if not updates_agree(dtype, device):
                return f"they update weights differently from torch on {device}"
            for counts in ((0, 3, 300, 40), (20, 20)):
                if not decodes_as_torch(counts, dtype, device):
                    return f"they decode latents to other values than torch on {device}"
            if not normalizes_as_torch(dtype, device):
                return f"they normalize batches differently from torch on {device}"
            if not compares_as_torch(dtype, device):
                return f"they compute other reconstruction errors than torch on {device}"
            if not jumps_as_torch(dtype, device):
                return f"they compute other gradients of JumpReLU than torch on {device}"
            if not gates_as_torch(dtype, device):
                return f"they compute other latents of gated SAEs than torch on {device}"
            if not all(prefixes_as_torch(count, dtype, device) for count in (1, 5)):
                return f"they compute other errors of prefixes than torch on {device}"
            if not follows_as_torch(dtype, device):
                return f"they set other thresholds of BatchTopK than torch on {device}"
        if not pairs_as_torch(device):
            return f"they count other pairs than torch on {device}"
    except Exception as error:  # from Triton's compiler or the driver; torch computes the same result
        return f"they do not work on {device}: {first_line(error)}"
    return ""


def updates_agree(dtype: torch.dtype, device: str) -> bool:
    """Whether, for gradients of this dtype, the kernels update weights as torch does, up to rounding."""
    generator = torch.Generator().manual_seed(0)
    number, place = torch.ones(()), torch.zeros((), dtype=torch.int64)
    weight = F.normalize(torch.randn(5, 2 * CHUNK + 3, generator=generator), dim=1)
    gradient, moment = torch.randn_like(weight).to(dtype), torch.rand(weight.shape, generator=generator)
    for is_unit, coupled, beta1 in itertools.product((True, False), (True, False), (0.9, 0.0)):
        given = [[weight], [gradient], [moment], [moment], [0 * number], [weight.bfloat16()]]
        scalars = number, place, place - 1, 0.01 * number.view(1), torch.tensor([[0.1, 0.03]])
        results = []
        for where in ("cpu", device):
            tensors = [[tensor.to(where, copy=True) for tensor in tensors] for tensors in given]
            update(
                *tensors, [is_unit], [0.1], *(scalar.to(where, copy=True) for scalar in scalars), 1.0, beta1, 0.999,
                1e-8, coupled,
            )  # fmt: skip
            if not beta1:
                tensors[2][0].zero_()  # kernels do not write it
            results.append([tensors[n][0].cpu().float() for n in (0, 2, 3, 5)])
        if not all(
            torch.allclose(one, other, rtol=tolerance, atol=tolerance)
            for one, other, tolerance in zip(*results, (1e-5, 1e-5, 1e-5, 0.01), strict=True)
        ):
            return False
    return True


def reason_against_triton() -> str:
    """Why Triton is not available, as the end of a sentence; "" if it is."""
    return "" if find_spec(EXTRAS["kernels"]) else f"Triton is not installed: pip install '{PACKAGE}[kernels]'"


def in_float64(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [tensor.double() if tensor.is_floating_point() else tensor for tensor in tensors]


def decodes_as_torch(counts: Sequence[int], dtype: torch.dtype, device: str) -> bool:
    """Whether the kernels decode tokens and sum rows as a CPU does in float64, up to rounding.

    Token i has `counts[i]` latents.
    """
    generator, n, width = torch.Generator().manual_seed(0), 400, 70
    count_B, latent_N = torch.tensor(counts), torch.cat([torch.arange(count) for count in counts])
    value_N, row_FD, bias_D, x_BD = (
        torch.randn(*shape, generator=generator)
        for shape in ((len(latent_N),), (n, width), (width,), (len(counts), width))
    )
    tensors = value_N, row_FD.to(dtype), latent_N, count_B.cumsum(0) - count_B, bias_D, x_BD
    expected = [*decode_by_bags(*in_float64(tensors))]
    found = [*decode_rows(*(tensor.to(device) for tensor in tensors))]
    sums = latent_N % len(counts), x_BD.to(dtype), torch.arange(0, len(latent_N), 7), value_N
    for transposed in (False, True):
        index_N, row_RD, start_F, weight_N = in_float64(sums)
        expected.append(sum_by_bags(index_N, row_RD, start_F, weight_N, transposed))
        found.append(sum_rows(*(tensor.to(device) for tensor in sums), transposed))
    return all(torch.allclose(a.cpu().double(), b, rtol=1e-4, atol=1e-3) for a, b in zip(found, expected, strict=True))


def normalizes_as_torch(dtype: torch.dtype, device: str) -> bool:
    """Whether the kernels normalize and center a batch of this dtype as a CPU does, up to rounding."""
    generator, width = torch.Generator().manual_seed(0), 150
    x_BD, mean_D, b_D = (torch.randn(*shape, generator=generator) for shape in ((70, width), (width,), (width,)))
    for scale, bias_D in ((torch.tensor(1.7), b_D), (torch.rand(width, generator=generator) + 0.5, None)):
        given = 5 + x_BD.to(dtype), mean_D, scale, bias_D
        found = normalize_batch(*(one if one is None else one.to(device) for one in given), dtype)
        if not near(found, normalize_by_torch(*given, dtype), 1e-2 if dtype == torch.bfloat16 else 1e-4):
            return False
    return True


def compares_as_torch(dtype: torch.dtype, device: str) -> bool:
    """Whether errors of reconstructions, and their gradients, equal those computed in float64, up to rounding."""
    generator, shape = torch.Generator().manual_seed(0), (70, 150)
    product_BD, x_BD = (torch.randn(*shape, generator=generator) for _ in range(2))
    given = product_BD.to(dtype), torch.randn(shape[1], generator=generator), x_BD
    expected = compare_by_torch(*in_float64(given))
    found = compare(*(tensor.to(device) for tensor in given))
    of_product_BD = -0.6 * expected[0]
    found += compare_backward(found[0], torch.tensor(0.3, device=device), dtype)
    return near(found, (*expected, of_product_BD, of_product_BD.sum(0)), 1e-2 if dtype == torch.bfloat16 else 1e-4)


def jumps_as_torch(dtype: torch.dtype, device: str) -> bool:
    """Whether JumpReLU's gradients and counts on a device equal those computed in float64 on a CPU, up to rounding."""
    generator, shape, eps = torch.Generator().manual_seed(0), (600, 70), 0.5
    z_BF, g_BF = (torch.randn(*shape, generator=generator).to(dtype) for _ in range(2))
    theta_F = torch.rand(shape[1], generator=generator)
    found, expected = list(jump_counts(z_BF.to(device), theta_F.to(device), eps)), list(jump_counts(z_BF, theta_F, eps))
    for to_input in (False, True):
        found += jump_gradients(z_BF.to(device), theta_F.to(device), g_BF.to(device), eps, to_input)
        expected += jump_gradients(z_BF.double(), theta_F.double(), g_BF.double(), eps, to_input)
    return near(found, expected, 1e-2 if dtype == torch.bfloat16 else 1e-4)


def gates_as_torch(dtype: torch.dtype, device: str) -> bool:
    """Whether a gated SAE's latents and gradients on a device equal those in float64 on a CPU, up to rounding."""
    generator, shape = torch.Generator().manual_seed(0), (600, 70)
    z_BF, *of_BF = (torch.randn(*shape, generator=generator).to(dtype) for _ in range(3))
    parameters = [torch.rand(shape[1], generator=generator) for _ in range(3)]
    given = z_BF, *parameters, *of_BF, torch.tensor(0.5)
    found, expected = [], []
    for count, operator in ((4, gate_latents), (7, gate_gradients)):
        found += operator(*(tensor.to(device) for tensor in given[:count]))
        expected += operator(*in_float64(given[:count]))
    return near(found, expected, 1e-2 if dtype == torch.bfloat16 else 1e-4)


def prefixes_as_torch(count: int, dtype: torch.dtype, device: str) -> bool:
    """Whether the errors of `count` prefixes, and their gradients, equal those in float64 on a CPU, up to rounding."""
    generator, tokens, width = torch.Generator().manual_seed(0), 300, 70
    part_GBD = torch.randn(count, tokens, width, generator=generator).to(dtype)
    bias_D, x_BD, weight_G = (
        torch.randn(*shape, generator=generator) for shape in ((width,), (tokens, width), (count,))
    )
    given = part_GBD, bias_D, x_BD, weight_G
    found, expected = [], []
    for number, operator in ((3, compare_prefixes), (4, prefix_gradients)):
        found += operator(*(tensor.to(device) for tensor in given[:number]))
        expected += operator(*in_float64(given[:number]))
    return near(found, expected, 1e-2 if dtype == torch.bfloat16 else 1e-4)


def pairs_as_torch(device: str) -> bool:
    """Whether the kernels and torch give the same counts for pairs that fire together."""
    generator = torch.Generator().manual_seed(0)
    word_FW = torch.randint(-(2**63), 2**63 - 1, (50, 70), generator=generator)
    first_P, second_P = (torch.randint(50, (100,), generator=generator) for _ in range(2))
    given = word_FW, first_P, second_P
    return torch.equal(count_pairs(*(tensor.to(device) for tensor in given)).cpu(), count_pairs(*given))


def follows_as_torch(dtype: torch.dtype, device: str) -> bool:
    """Whether the threshold and the number of batches are the same on a device as on a CPU after three batches."""
    results = []
    for where in ("cpu", device):
        generator = torch.Generator().manual_seed(0)
        threshold, batches = torch.zeros((), device=where), torch.zeros((), dtype=torch.int64, device=where)
        for factor in (1, 3, -1):
            value_N = factor * (1 + torch.rand(3 * PROGRAMS * THRESHOLD_CHUNK // 2, generator=generator)).to(dtype)
            follow_threshold(value_N.to(where), threshold, batches, 0.1)
        results.append((threshold, batches))
    return near(results[1], (one.double() for one in results[0]), 1e-5)


def near(found: Iterable[Tensor], expected: Iterable[Tensor], rtol: float) -> bool:
    """Whether the tensors found equal the expected ones, up to rounding."""
    return all(
        torch.allclose(a.cpu().double(), b.double(), rtol=rtol, atol=1e-3) for a, b in zip(found, expected, strict=True)
    )
