"""Paper 004: the L1 penalty, which falls linearly (3) and is scaled by the error (5)."""

import math

import pytest
import torch

from sae.train.recipe import find_recipe
from sae.train.sae import SAE
from sae.train.step import Step
from sae.train.variant import RunConfig
from sae.train.variants.hierarchical.penalty import AdaptivePenalty

from .steps import build, firing, rows


def test_lambda_falls_from_its_width_to_zero() -> None:
    with torch.device("meta"):
        variant = find_recipe("hierarchical-linear").make(RunConfig(2304, 2304, 4882, 2048), {})
    f_BF = torch.zeros(1, 4)
    values = [float(variant.coefficients["l1"](firing(f_BF, i))) for i in (0, 2441, 4881, 4882)]
    assert values == pytest.approx([0.0208333, 0.0104167, 0.0208333 / 4882, 0.0], abs=1e-6)


def test_lambda_is_logged_and_its_ends_are_options() -> None:
    variant = build("hierarchical-linear", l1=0.5, l1_end=0.1)
    step = firing(torch.zeros(1, 64), 500)
    assert float(variant.coefficients["l1"](step)) == pytest.approx(0.3)
    assert step.metrics["lambda"].item() == pytest.approx(0.3)


# (5)


def modulated(reading: str, error_BD: torch.Tensor, x_BD: torch.Tensor, scale: float = 1.0) -> float:
    modulate = AdaptivePenalty(lambda: torch.tensor(scale), reading, 2.5, 0.1, 2.0, 0.0)
    step = Step(torch.tensor(0), SAE(x_BD.shape[1], 1), None, x_BD, None, None, x_BD - error_BD)
    modulate.after_step(step)
    assert modulate.scalars()["alpha"] == modulate(step)
    return float(modulate(step))


@pytest.mark.parametrize(("loss", "alpha"), [(2.66, 0.9398), (4.69, 0.5330), (4668.0, 0.1), (1.0, 2.0)])
def test_alpha_by_loss(loss: float, alpha: float) -> None:
    x_BD = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    error_BD = torch.full_like(x_BD, math.sqrt(loss))
    assert modulated("mean", error_BD, x_BD) == pytest.approx(alpha, abs=5e-5)
    assert modulated("sum", error_BD / 8**0.5, x_BD) == pytest.approx(alpha, abs=5e-5)
    assert modulated("mean", error_BD / 10, x_BD / 10, scale=10.0) == pytest.approx(alpha, abs=5e-5)


def test_the_target_of_alpha_scales_with_the_variance_unless_given_or_paper_exact() -> None:
    """If the variance is a quarter, so is the error at the same explained variance. The target scales with it."""
    make, run = find_recipe("hierarchical").make, RunConfig(32, 64, 20, 64, variance=6.0)

    def target(run: RunConfig, **options: object) -> float:
        return next(m.target for m in make(run, options).mechanisms if isinstance(m, AdaptivePenalty))

    assert target(run) == pytest.approx(2.5 / 4)
    assert target(run, target=2.0) == 2.0
    assert target(run._replace(paper_exact=True)) == target(run._replace(variance=None)) == 2.5


def test_alpha_of_an_average() -> None:
    """Losses 2 and 4 with ema 0.75: 2, then 0.75 * 2 + 0.25 * 4 = 2.5."""
    modulate = AdaptivePenalty(lambda: torch.ones(()), "mean", 2.5, 0.1, 2.0, 0.75)
    x_BD = torch.zeros(2, 3)
    for i, (loss, alpha) in enumerate(((2.0, 1.25), (4.0, 1.0))):
        step = Step(torch.tensor(i), SAE(3, 1), None, x_BD, None, None, x_BD + math.sqrt(loss))
        assert float(modulate(step)) == pytest.approx(alpha)
        modulate.after_step(step)


def test_the_penalty_is_lambda_alpha_l1_without_a_gradient_through_alpha() -> None:
    variant = build("hierarchical-adaptive", recon_in_alpha="mean", target=1e-3, alpha_low=0.0)
    step = variant(torch.tensor(500), rows(0), torch.optim.AdamW(variant.parameters()))
    alpha = 1e-3 / step.error_BD.detach().square().mean()
    variant.losses(step)["l1"].backward()
    got = variant.sae.W_enc.grad.clone()
    variant.zero_grad()
    step = variant(torch.tensor(500), rows(0), torch.optim.AdamW(variant.parameters()))
    (0.5 * 32**-0.5 * alpha * step.f_BF.sum(1).mean()).backward()
    torch.testing.assert_close(got, variant.sae.W_enc.grad)
    assert variant.sae.W_dec.grad is None


def test_alpha_moves_are_counted_from_the_second_step_on_and_not_at_a_bound() -> None:
    """Losses 1, 0.5, 2.5, 5, 100 and 200 give alpha 2, 2, 1, 0.5, 0.1 and 0.1. Before the first step alpha is 1."""
    modulate = AdaptivePenalty(lambda: torch.ones(()), "mean", 2.5, 0.1, 2.0, 0.0)
    x_BD = torch.zeros(2, 3)
    counted = []
    for i, loss in enumerate((1.0, 0.5, 2.5, 5.0, 100.0, 200.0)):
        modulate.after_step(Step(torch.tensor(i), SAE(3, 1), None, x_BD, None, None, x_BD + math.sqrt(loss)))
        counted.append(int(modulate.scalars()["alpha_moves"]))
    assert counted == [0, 0, 1, 2, 3, 3]


@pytest.mark.parametrize(
    ("normalize", "units", "alpha"),
    [("unit_ms", "raw", 0.25), ("unit_ms", "input", 1.0), ("standardize", "raw", 0.4), ("standardize", "input", 1.0)],
)
def test_the_error_in_alpha_is_of_raw_activations_or_of_the_input(normalize: str, units: str, alpha: float) -> None:
    """In both dimensions the squared error of the normalized input is 1.

    The raw squared errors are 4 and 4 if `unit_ms` divides by 2, and 1 and 4 if `standardize` divides by 1 and 2.
    """
    options = {"target": 1.0, "alpha_low": 0.0, "alpha_units": units, "normalize": normalize}
    variant = find_recipe("hierarchical-adaptive").make(RunConfig(2, 4, 10, 64), options)
    variant.set_normalization(torch.zeros(2), 4.0, torch.tensor([[-1.0, -2.0], [1.0, 2.0]]))
    assert variant.scale.tolist() == (2.0 if normalize == "unit_ms" else [1.0, 2.0])
    (modulate,) = (m for m in variant.mechanisms if isinstance(m, AdaptivePenalty))
    x_BD = torch.zeros(3, 2)
    step = Step(torch.tensor(0), variant.sae, None, x_BD, None, None, x_BD - 1)
    assert float(modulate(step)) == pytest.approx(alpha)
    modulate.reading = "sum"
    assert float(modulate(step)) == pytest.approx(alpha / 2)


def test_lambda_0_by_the_width_of_the_input_of_the_dictionary_or_the_baselines_k() -> None:
    """d_in is 230 and d_sae is 460. k = 320 of 2304 becomes 32 of 230.

    In the paper, d_in and d_sae are 2304, so both give 1/48.
    """

    def first(**options: object) -> float:
        variant = build("hierarchical-linear", d_in=230, d_sae=460, **options)
        return float(variant.coefficients["l1"](firing(torch.zeros(1, 4), 0)))

    assert first() == first(lambda_by="d_in") == pytest.approx(230**-0.5)
    assert first(lambda_by="d_sae") == pytest.approx(460**-0.5)
    assert first(lambda_by="k") == pytest.approx(32**-0.5)
    assert first(l1=0.25) == 0.25


def test_the_penalty_of_step_0_counts_its_own_error() -> None:
    """The L1 loss of a built variant is lambda_0 alpha |f|_1, with alpha from the error of the same step."""
    variant = build("hierarchical-adaptive", target=1e-2, alpha_low=0.0, alpha_high=9.0, l1=0.5)
    step = variant(torch.tensor(0), rows(0), torch.optim.AdamW(variant.parameters()))
    assert (variant.sae.pre_activations(step.x_BD) < 0).any()
    expected = 0.5 * 1e-2 / step.error_BD.square().mean() * step.f_BF.sum(1).mean()
    torch.testing.assert_close(variant.losses(step)["l1"], expected)
