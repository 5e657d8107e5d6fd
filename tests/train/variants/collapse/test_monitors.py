"""Paper 000: the monitors: the random projection, moving averages, and totals."""

from collections.abc import Callable

import pytest
import torch

from sae.train.sae import SAE
from sae.train.step import Step
from sae.train.variants.collapse.monitors import RecentError, Sketch, Totals, UtilizationEMA


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


def test_the_monitor_leaves_out_each_row_s_angle_with_itself_in_a_wide_dictionary(
    step_of: Callable[..., Step],
) -> None:
    """The dictionary has more rows than are compared at once.

    At first, 1,028 rows are equal, and the other two are orthogonal to them and to each other.
    """
    sae, sketch = SAE(3, 1030), Sketch(3, 1030)
    sae.W_dec.data = torch.zeros(1030, 3)
    sae.W_dec.data[:, 0] = 1.0
    sae.W_dec.data[-2] = torch.tensor([0.0, 1.0, 0.0])
    sae.W_dec.data[-1] = torch.tensor([0.0, 0.0, -2.0])
    sketch.every_n_steps(step_of(sae, torch.zeros(1, 3)))
    assert float(sketch.mean_cosine) == pytest.approx(1028 * 1027 / (1030 * 1029), rel=1e-5)
    sae.W_dec.data[:-2] = torch.tensor([1.0, 1.0, 0.0])
    sae.W_dec.data[:1027] = torch.tensor([1.0, 0.0, 0.0])
    sae.W_dec.data[1:1027] = 0.0  # four rows are nonzero: row 0, one on the diagonal and the last two
    sketch.every_n_steps(step_of(sae, torch.zeros(1, 3)))
    assert float(sketch.max_cosine) == pytest.approx(0.5**0.5, rel=1e-5)
    sae.W_dec.data[1] = torch.tensor([1.0, 0.1, 0.0])  # the nearest pair, 0 and 1, is in one block
    sketch.every_n_steps(step_of(sae, torch.zeros(1, 3)))
    assert float(sketch.max_cosine) == pytest.approx(1.01**-0.5, rel=1e-5)


def test_the_length_of_projected_latents_is_scaled_by_the_dimensions_lost(step_of: Callable[..., Step]) -> None:
    torch.manual_seed(0)
    sae, sketch = SAE(4, 16), Sketch(4, 16, 4, "activations")
    step = step_of(sae, torch.randn(3, 4))
    step.pre_BF, step.f_BF = torch.full((3, 16), -5.0), torch.rand(3, 16)
    sketch.every_n_steps(step)
    projected_BS = step.f_BF @ sketch.R_DS  # a quarter of the dimensions has half of the length, on average
    expected = 2 * (projected_BS.norm(dim=1) / step.f_BF.norm(dim=1)).mean()
    assert float(sketch.length) == pytest.approx(float(expected), rel=1e-5)


def test_utilisation_forgets_at_the_decay_that_is_asked_for(step_of: Callable[..., Step]) -> None:
    utilisation, step = UtilizationEMA(1, beta=0.5), step_of(SAE(4, 1), torch.zeros(2, 4))
    for f, expected in ((1.0, 1.0), (0.0, 1 / 3), (0.0, 1 / 7)):  # 1/2 of 1; 1/4 of 3/4; 1/8 of 7/8
        step.f_BF = torch.full((2, 1), f)
        utilisation.after_step(step)
        assert float(utilisation.u_F) == pytest.approx(expected)


def test_the_recent_error_starts_at_the_first_and_moves_by_a_tenth(step_of: Callable[..., Step]) -> None:
    recent, step = RecentError(), step_of(SAE(2, 2), torch.zeros(2, 2))
    for i, (error, expected) in enumerate(((5.0, 5.0), (15.0, 6.0), (6.0, 6.0))):
        moved = Step(torch.tensor(i), step.sae, step.optimizer, torch.tensor([[0, (2 * error) ** 0.5], [0, 0]]),
                     step.pre_BF, step.f_BF, torch.zeros(2, 2))  # fmt: skip
        recent.after_step(moved)
        assert float(recent.value) == pytest.approx(expected)


def test_totals_add_up_what_is_counted_in_each_step(step_of: Callable[..., Step]) -> None:
    part, step = Totals(["one", "two"], lambda step: step.metrics), step_of(SAE(2, 2), torch.zeros(1, 2))
    for one in (3, 0, 4):
        step.metrics.update(one=torch.tensor(one), two=torch.tensor(1), other=torch.tensor(9))
        part.after_step(step)
    assert {name: int(value) for name, value in part.scalars().items()} == {"one": 7, "two": 3}
    assert {name: t.dtype for name, t in part.named_buffers()} == dict.fromkeys(("acted_one", "acted_two"), torch.int64)
