"""Clamping equals a computation by hand, and equals the change of the reconstruction."""

import pytest
import torch

from sae.cache.hooks import Hook
from sae.evaluate.metrics.base import EvalTarget
from sae.evaluate.metrics.clamping import ClampPlan, clamp_latents
from sae.train.activation_functions import ReLU, TopK
from sae.train.sae import SAE


def test_a_clamp_by_hand():
    """BOS, latents that are silent, and the part of x that is not reconstructed stay as they are."""
    x = torch.tensor([[[1.0, 2.0, 3.0]] * 3])
    rows = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.6, 0.8]])
    f = torch.tensor([[[5.0, 5.0], [0.0, 2.0], [4.0, 0.0]]])
    made = clamp_latents(x, f, rows, torch.tensor([25.0, 100.0]))
    expected = [
        [[1, 2, 3], [1, 2 - 27 * 0.6, 3 - 27 * 0.8], [1 - 29, 2, 3]],
        [[1, 2, 3], [1, 2 - 102 * 0.6, 3 - 102 * 0.8], [1 - 104, 2, 3]],
    ]
    torch.testing.assert_close(made, torch.tensor(expected)[:, None])


@pytest.mark.parametrize("activation", [ReLU(), TopK(6)])
def test_a_clamp_is_the_change_of_the_reconstruction(activation):
    torch.manual_seed(0)
    sae = SAE(16, 40, [activation]).requires_grad_(False)
    sae.b_dec.normal_()
    x, chosen = torch.randn(2, 5, 16), [3, 17, 30, 4]
    f = sae.encode(x)
    assert 0 < int((f[..., chosen] > 0).sum()) < f[..., chosen].numel()
    moved = f.clone()
    moved[..., chosen] = torch.where(f[..., chosen] > 0, -50.0, f[..., chosen])
    expected = x + sae.decode(moved) - sae.decode(f)
    expected[:, 0] = x[:, 0]
    (made,) = clamp_latents(x, f[..., chosen], sae.W_dec[chosen], torch.tensor([50.0]))
    torch.testing.assert_close(made, expected, rtol=1e-6, atol=1e-5)


def test_an_outlier_row_is_not_clamped():
    torch.manual_seed(0)
    sae = SAE(16, 40, [ReLU()]).requires_grad_(False)
    x = torch.randn(2, 5, 16)
    x[1, 3] *= 100
    selection = (3, 17)

    def clamped(norm_limit: float | None) -> torch.Tensor:
        target = EvalTarget(sae, Hook(0), norm_limit=norm_limit)
        plan = ClampPlan(target, {(0.01, 2): selection}, sae.W_dec, torch.ones(40), False)
        return plan.clamp(x, plan.latents(x), selection, torch.tensor([50.0]))[0]

    expected = clamped(None)
    assert not torch.equal(expected[1, 3], x[1, 3])
    expected[1, 3] = x[1, 3]
    torch.testing.assert_close(clamped(50.0), expected)


def test_clamped_latents_are_in_units_of_unit_decoder_rows():
    """The latents of all selections, in ascending order, are multiplied by the norms of their decoder rows."""
    torch.manual_seed(0)
    sae = SAE(16, 3, [ReLU()]).requires_grad_(False)
    norm_F = torch.tensor([2.0, 3.0, 5.0])
    x = torch.randn(2, 5, 16)
    plan = ClampPlan(EvalTarget(sae, Hook(0)), {(0.01, 1): (2,), (0.1, 1): (0,)}, sae.W_dec, norm_F, True)
    torch.testing.assert_close(plan.latents(x), sae.encode(x)[..., [0, 2]] * torch.tensor([2.0, 5.0]))
