"""Counts of how often pairs of latents fire together: the kernel, in Triton's interpreter, and the operator."""

from typing import Any

import pytest
import torch
from torch import Tensor

from sae.tests.simulated_cuda.kernel_cost import of_pairs
from sae.train.kernels.pair_operator import count_pairs
from sae.train.variants.competition.pairs import pack_tokens


def tensors(pairs: int, latents: int, tokens: int) -> tuple[tuple[Tensor, ...], Tensor]:
    """The arguments of `count_pairs`, and the expected counts. One latent always fires, one never does."""
    torch.manual_seed(pairs)
    fires_BF = torch.rand(tokens, latents) < 0.4
    fires_BF[:, 0], fires_BF[:, -1] = True, False
    first_P, second_P = torch.randint(latents, (2, pairs))
    expected_P = (fires_BF[:, first_P] & fires_BF[:, second_P]).sum(0)
    return (pack_tokens(fires_BF), first_P, second_P), expected_P


@pytest.mark.parametrize(("pairs", "latents", "tokens"), [(9, 5, 200), (8, 3, 256), (1, 2, 1), (0, 2, 64)])
def test_the_kernel_counts_the_tokens_on_which_both_fire(
    interpreter: Any, pairs: int, latents: int, tokens: int
) -> None:
    """The operator and the kernel give the expected counts, and the kernel's cost is that of `kernel_cost`."""
    given, expected_P = tensors(pairs, latents, tokens)
    assert torch.equal(count_pairs(*given), expected_P)
    found, cost = interpreter("interpreted.pairs", arguments=given)
    assert torch.equal(found, expected_P)
    assert cost == (of_pairs(pairs, -(-tokens // 64)) if pairs else (0, 0))


def test_the_operator_is_known_to_torch() -> None:
    torch.library.opcheck(count_pairs, tensors(6, 4, 100)[0])


@pytest.mark.slow
def test_the_kernel_compiles_for_a_gpu(compiler: Any) -> None:
    """The kernel compiles for compute capability 9.0, that of an H200, and uses no stack memory."""
    stacks = compiler("compiled.compile_pairs", capability=90)
    assert len(stacks) == 1 and not any(stacks.values())
