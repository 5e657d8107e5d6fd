"""Layer normalization of activations, without a gain or a shift."""

from typing import NamedTuple

from torch import Tensor

LAYER_NORM_EPS = 1e-5


class LayerNormalized(NamedTuple):
    x_BD: Tensor  # (x - mean) / (std + 1e-5)
    mean_B1: Tensor  # mean of each token over d_in
    std_B1: Tensor  # standard deviation of each token, with the divisor d_in - 1


def layer_normalize(x_BD: Tensor) -> LayerNormalized:
    """Activations (..., d_in) with mean 0 and standard deviation 1 over d_in, so that |x|^2 = d_in - 1.

    The formula, including the 1e-5 and the divisor, is the one that SAELens uses for
    `normalize_activations="layer_norm"`.
    """
    mean_B1 = x_BD.mean(-1, keepdim=True)
    centered_BD = x_BD - mean_B1
    std_B1 = centered_BD.std(-1, keepdim=True)
    return LayerNormalized(centered_BD / (std_B1 + LAYER_NORM_EPS), mean_B1, std_B1)
