"""Activation functions: selections by hand and against a sort."""

import math

import pytest
import torch

from sae.train import activation_functions
from sae.train.activation_functions import (
    SAMPLE_EVERY,
    BatchTopK,
    TopK,
    largest_by_sample,
    largest_indices,
)


def test_topk_keeps_the_two_largest() -> None:
    f_BF = TopK(2)(torch.tensor([[1.0, 4.0, 2.0, 3.0], [-1.0, -4.0, 5.0, -3.0], [-1.0, -2.0, -3.0, -4.0]]))
    assert f_BF.tolist() == [[0, 4, 0, 3], [0, 0, 5, 0], [0, 0, 0, 0]]  # fewer than k if fewer are positive


def test_topk_keeps_k_of_equals() -> None:
    f_BF = TopK(2)(torch.ones(3, 5))
    assert (f_BF > 0).sum(1).tolist() == [2, 2, 2]


@pytest.mark.parametrize("k", [1, 4, 8, 12, 20])  # there are 16 groups
@pytest.mark.parametrize("rows", [torch.randn, torch.ones], ids=["of all sizes", "of equals"])
def test_topk_by_groups_of_latents_keeps_what_a_sort_keeps(k: int, rows) -> None:
    torch.manual_seed(0)
    z_BF = rows(50, 128)
    z_BF[0, ::9] = math.inf
    f_BF = TopK(k)(z_BF)
    expected_BK = z_BF.sort(descending=True).values[:, :k].relu()
    assert torch.equal(f_BF.sort(descending=True).values[:, :k], expected_BK)
    assert torch.equal(f_BF[f_BF > 0], z_BF[f_BF > 0]) and (f_BF > 0).sum() == (expected_BK > 0).sum()


@pytest.mark.parametrize(("k", "batch"), [(3, 33), (2.5, 7), (0.4, 6), (10, 4)])
def test_batchtopk_is_a_sort(k: float, batch: int) -> None:
    """The floor(B k) largest latents of the batch, those that are positive."""
    torch.manual_seed(0)
    z_BF = torch.randn(batch, 10)
    kept = sorted([v for v in z_BF.flatten().tolist() if v > 0], reverse=True)[: math.floor(k * batch)]
    expected_BF = torch.where(z_BF >= kept[-1], z_BF, 0.0)
    assert torch.equal(BatchTopK(k)(z_BF), expected_BF)


@pytest.mark.parametrize("count", [1, 40, 900, 3000])
def test_the_largest_of_a_batch_by_a_sample_are_those_of_a_sort(count: int) -> None:
    """The result is that of a sort, whatever the sample holds. If the sample gives no bound, all latents are sorted."""
    torch.manual_seed(0)
    gaussian = torch.randn(20_000)
    in_sample, outside = torch.zeros(20_000), torch.randn(20_000)
    in_sample[::SAMPLE_EVERY] = 9.0  # the bound is too high
    outside[::SAMPLE_EVERY] = -9.0  # the bound is as low as it can be
    for z_N in (gaussian, gaussian.mul(2).round(), in_sample, outside, torch.full((20_000,), 0.5)):
        found_N = largest_indices(z_N, count)
        assert torch.equal(found_N, found_N.unique()) and len(found_N) == count
        assert torch.equal(z_N[found_N].sort().values, z_N.sort().values[-count:])
    by_sample = largest_by_sample(gaussian, count)
    assert by_sample is not None and torch.equal(by_sample, largest_indices(gaussian, count))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(activation_functions, "topk_indices", pytest.fail)
        assert torch.equal(largest_indices(gaussian, count), by_sample)  # no sort of all
    assert (largest_by_sample(in_sample, count) is None) == (count > 328)  # 328 of them are 9.0
    broken = gaussian.clone()
    broken[77] = math.nan  # the sample does not contain it, but a step has to see it
    assert largest_indices(broken, count).eq(77).any()


def test_batchtopk_afterwards_keeps_what_exceeds_the_threshold() -> None:
    activation = BatchTopK(1).eval()
    activation.threshold.fill_(2.0)
    assert activation(torch.tensor([[1.0, 3.0, 2.0, 2.5]])).tolist() == [[0, 3, 0, 2.5]]
    assert activation(torch.tensor([[-1.0, 0.5], [2.5, 9.0]])).tolist() == [[0, 0], [2.5, 9]]


@pytest.mark.parametrize(("now", "kept"), [(5.0, 20), (3.6, 14), (2.0, 8), (0.3, 1), (0.1, 1)])
def test_the_cut_of_parts_under_an_annealed_k_is_the_rank_that_the_whole_batch_keeps(now: float, kept: int) -> None:
    """However four tokens are divided, `floor(now * tokens)` latents are kept, but at least the largest one."""
    torch.manual_seed(0)
    activation, z_BF = BatchTopK(2), torch.rand(4, 10)  # all positive, and no two are equal
    activation.max_k, activation.now = 5.0, torch.tensor(now)
    whole_BF = activation(z_BF)
    for sizes in ([4], [1, 3], [1, 1, 1, 1]):
        activation.set_cut(z_BF.split(sizes), 4)
        assert activation.cut == z_BF.flatten().sort(descending=True).values[kept - 1]
        in_parts_BF = torch.cat([activation(part) for part in z_BF.split(sizes)])
        assert int((in_parts_BF > 0).sum()) == kept
        assert torch.equal(in_parts_BF, whole_BF) or now * 4 < 1  # then the whole batch keeps none
        activation.cut = None


@pytest.mark.parametrize(("k", "kept"), [(2.0, 8), (2.6, 10), (0.3, 1)])
def test_the_cut_of_parts_is_the_rank_that_the_whole_batch_keeps(k: float, kept: int) -> None:
    torch.manual_seed(0)
    activation, z_BF = BatchTopK(k), torch.rand(4, 10)
    whole_BF = activation(z_BF)
    activation.set_cut(z_BF.split([1, 3]), 4)
    assert activation.cut == z_BF.flatten().sort(descending=True).values[kept - 1]
    assert torch.equal(torch.cat([activation(part) for part in z_BF.split([1, 3])]), whole_BF)
