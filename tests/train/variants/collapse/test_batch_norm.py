"""Paper 000: batch normalisation in training and folded."""

from collections.abc import Callable

import torch

from sae.train.loop import Trainer
from sae.train.sae import fold_normalization
from sae.train.variant import Variant
from sae.train.variants.collapse.batch_norm import BatchNorm


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
