"""Paper 000: the projection and the average of utilization."""

from collections.abc import Callable

import pytest
import torch

from sae.train.sae import SAE
from sae.train.step import Step
from sae.train.variants.collapse.monitors import Sketch, UtilizationEMA


def test_the_projection_has_orthonormal_columns_at_most_as_many_as_dimensions() -> None:
    for sketch, shape in ((Sketch(300, 40), (300, 128)), (Sketch(32, 64), (32, 32)), (Sketch(32, 64, 8), (32, 8))):
        assert sketch.R_DS.shape == shape
        assert (sketch.R_DS.T @ sketch.R_DS - torch.eye(shape[1])).abs().max() < 1e-5
    assert Sketch(32, 64, 16, "activations").R_DS.shape == (64, 16)


def test_the_monitor_is_exact_where_the_projection_is_a_rotation(step_of: Callable[..., Step]) -> None:
    torch.manual_seed(0)
    sae, sketch = SAE(8, 12), Sketch(8, 12)
    sketch.every_n_steps(step_of(sae, torch.randn(4, 8)))
    off = (sae.W_dec @ sae.W_dec.T).abs().fill_diagonal_(0).detach()
    assert float(sketch.max_cosine) == pytest.approx(float(off.max()), rel=1e-4)
    assert float(sketch.mean_cosine) == pytest.approx(float(off.sum()) / (12 * 11), rel=1e-4)
    kept = Sketch(8, 12, 12, "activations")
    kept.every_n_steps(step_of(sae, torch.randn(4, 8)))
    assert float(kept.length) == pytest.approx(1.0, rel=1e-5)


def test_utilisation_is_right_from_the_first_batch_on(step_of: Callable[..., Step]) -> None:
    utilisation, step = UtilizationEMA(2), step_of(SAE(4, 2), torch.zeros(2, 4))
    for f_BF, expected in (
        ([[1.0, 0.0], [2.0, 0.0]], [1.0, 0.0]),
        ([[0.0, 1.0], [0.0, 1.0]], [0.09 / 0.19, 0.1 / 0.19]),
    ):
        step.f_BF = torch.tensor(f_BF)
        utilisation.after_step(step)
        torch.testing.assert_close(utilisation.u_F, torch.tensor(expected))
