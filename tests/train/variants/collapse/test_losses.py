"""Paper 000: the losses by hand-worked numbers and dense references."""

from collections.abc import Callable

import pytest
import torch

from sae.train.sae import SAE
from sae.train.step import Step
from sae.train.variant import Variant
from sae.train.variants.collapse.groups import DecoderRows
from sae.train.variants.collapse.losses import BalancedLoss, ContrastLoss, DiversityLoss, ImportanceWeightedMSE
from sae.train.variants.collapse.monitors import RecentError, Sketch
from sae.train.variants.collapse.orthogonality import GroupOrthogonalityLoss


@pytest.mark.parametrize("pairs", ["exact_group", "exact", "jl"])
def test_contrast_equals_a_sum_over_pairs(pairs: str, step_of: Callable[..., Step]) -> None:
    torch.manual_seed(0)
    sae, rows, sketch = SAE(8, 12), DecoderRows(3), Sketch(8, 12, 4)
    tau = 0.2
    term = ContrastLoss(rows, lambda step: tau, 2.0, pairs != "exact_group", sketch if pairs == "jl" else None)
    step = step_of(sae, torch.randn(4, 8))
    row = sae.W_dec.detach() @ sketch.R_DS if pairs == "jl" else sae.W_dec.detach()
    values = [
        max(abs(float(torch.cosine_similarity(row[i], row[j], dim=0))) - tau, 0.0) ** 2
        for i in range(12)
        for j in range(i + 1, 12)
        if pairs != "exact_group" or i // 4 == j // 4
    ]
    assert term(step).item() == pytest.approx(sum(values) / len(values), rel=1e-5)
    assert float(step.metrics["tau"]) == pytest.approx(tau)


def test_the_threshold_falls_from_0_4_to_0_05_by_a_cosine(
    step_of: Callable[..., Step], build: Callable[..., Variant]
) -> None:
    term = build("collapse-02", steps=100).terms["contrast"]
    step = step_of(SAE(32, 64), torch.zeros(1, 32))
    assert [float(term.tau(Step(torch.tensor(i), *list(vars(step).values())[1:7]))) for i in (0, 50, 100)] == (
        pytest.approx([0.4, 0.225, 0.05])
    )


def test_diversity_is_0_for_equal_use_and_1_for_a_single_user(step_of: Callable[..., Step]) -> None:
    step = step_of(SAE(2, 4), torch.zeros(2, 2))
    for groups, f_F, expected in (
        (None, [1.0, 1.0, 1.0, 1.0], 0.0),
        (None, [0.0, 3.0, 0.0, 0.0], 1.0),
        (2, [0.0, 3.0, 1.0, 2.0], 0.0),
        (None, [1.0, 1.0, 0.0, 0.0], 0.5),
        (None, [0.0, 0.0, 0.0, 0.0], 1.0),
    ):
        step.f_BF = torch.tensor([f_F, f_F])
        assert DiversityLoss(groups)(step).item() == pytest.approx(expected, abs=1e-6)


def test_importance_weighs_a_token_by_its_error_over_the_recent_one(step_of: Callable[..., Step]) -> None:
    sae, recent = SAE(4, 4), RecentError()
    step = step_of(sae, torch.zeros(2, 4))
    step.x_BD, step.recon_BD = torch.tensor([[1.0, 0, 0, 0], [0, 3.0, 0, 0]]), torch.zeros(2, 4)  # errors 1 and 9
    assert ImportanceWeightedMSE(recent)(step).item() == pytest.approx(
        (1 / 5 * 1 + 9 / 5 * 9) / 2
    )  # their mean is all we know
    recent.after_step(step)
    recent.value.mul_(2.0)
    step.i = torch.tensor(1)
    assert ImportanceWeightedMSE(recent)(step).item() == pytest.approx((1 / 10 * 1 + 9 / 10 * 9) / 2)


def test_a_balanced_term_pulls_no_harder_than_its_share_of_the_reconstruction(step_of: Callable[..., Step]) -> None:
    torch.manual_seed(0)
    sae, rows = SAE(6, 8), DecoderRows(1)

    def lengths(strength: float) -> tuple[float, float]:
        step = step_of(sae, torch.randn(16, 6, generator=torch.Generator().manual_seed(1)))
        term = BalancedLoss(lambda step: strength, GroupOrthogonalityLoss(rows), rows, 1.0, rho=0.5)
        found = torch.autograd.grad(term(step), sae.W_dec, retain_graph=True)[0]
        return float(found.norm()), float(step.metrics["reconstruction_gradient"])

    strong, reconstruction = lengths(1e6)
    assert strong == pytest.approx(0.5 * reconstruction, rel=1e-4)
    weak, _ = lengths(1e-3)
    free = torch.autograd.grad(1e-3 * GroupOrthogonalityLoss(rows)(step_of(sae, torch.zeros(1, 6))), sae.W_dec)[0]
    assert weak == pytest.approx(float(free.norm()), rel=1e-4)
