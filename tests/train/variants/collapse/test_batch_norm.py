"""Paper 000: batch normalisation in training and folded."""

from collections.abc import Callable

import pytest
import torch

from sae.train.loop import Trainer
from sae.train.sae import SAE, fold_normalization
from sae.train.step import Step
from sae.train.variant import Variant
from sae.train.variants.collapse.batch_norm import BatchNorm, RunningStatistics


def test_batch_norm_uses_the_batch_in_training_and_folds_like_any_link(
    build: Callable[..., Variant], trained: Callable[..., Trainer]
) -> None:
    variant = build("collapse-04", batch_norm="pre")
    variant.set_normalization(torch.zeros(32), 25.0)
    trained(variant, 20)
    sae, norm = variant.sae, variant.sae.activation[0]
    assert isinstance(norm, BatchNorm)
    z_BF = norm(torch.randn(500, 64) * 3 + 1)
    torch.testing.assert_close(z_BF.mean(0), norm.shift_F, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(z_BF.std(0, correction=0), norm.gain_F.abs(), rtol=1e-3, atol=1e-5)
    raw, x_BD = fold_normalization(sae, 5.0, torch.zeros(32)), torch.randn(7, 32)
    torch.testing.assert_close(raw.encode(x_BD), 5 * sae.eval().encode(x_BD / 5), rtol=1e-4, atol=1e-5)


def test_the_first_batch_sets_the_running_statistics_and_later_ones_move_them_by_a_tenth(
    step_of: Callable[..., Step],
) -> None:
    norm = BatchNorm(2)
    part, step = RunningStatistics(norm), step_of(SAE(3, 2), torch.zeros(2, 3))
    step.pre_BF, step.f_BF = torch.tensor([[1.0, -4.0], [3.0, -2.0]]), torch.zeros(2, 2)
    part.after_step(step)  # means 2 and -3; the variances, divided by the number of tokens, are 1
    assert (norm.mean_F.tolist(), norm.variance_F.tolist()) == ([2.0, -3.0], [1.0, 1.0])
    step.i, step.pre_BF = torch.tensor(1), torch.tensor([[10.0, -3.0], [14.0, -3.0]])  # means 12, -3; variances 4, 0
    part.after_step(step)
    torch.testing.assert_close(norm.mean_F, torch.tensor([3.0, -3.0]))
    torch.testing.assert_close(norm.variance_F, torch.tensor([1.3, 0.9]))


def test_a_forward_pass_leaves_running_statistics_alone_and_afterwards_they_are_used() -> None:
    norm = BatchNorm(1)
    norm(torch.tensor([[5.0], [9.0]]))
    assert (norm.mean_F.item(), norm.variance_F.item()) == (0.0, 1.0)
    norm.mean_F.fill_(7.0)
    norm.variance_F.fill_(4.0)
    norm.gain_F.data.fill_(3.0)
    norm.shift_F.data.fill_(0.5)
    assert norm.eval()(torch.tensor([[11.0]])).item() == pytest.approx(3 * (11 - 7) / 2 + 0.5)


@pytest.mark.parametrize("units, gain", [("field", 32**-0.5), ("as_printed", 1.0), ("evidence", 1.0)])
def test_the_first_gain_keeps_the_scale_of_normalized_inputs(
    units: str, gain: float, build: Callable[..., Variant]
) -> None:
    norm = build("collapse-01", batch_norm="pre", units=units).sae.activation[0]
    torch.testing.assert_close(norm.gain_F.data, torch.full((64,), gain))


def test_in_training_deviations_are_divided_by_the_tokens_and_a_rescaled_norm_keeps_its_share_of_eps() -> None:
    norm = BatchNorm(1)
    torch.testing.assert_close(norm(torch.tensor([[1.0], [3.0]])), torch.tensor([[-1.0], [1.0]]))
    with torch.no_grad():
        norm.rescale_(3.0)
    assert norm.eps.item() == pytest.approx(9e-8) and norm.variance_F.item() == pytest.approx(9.0)
