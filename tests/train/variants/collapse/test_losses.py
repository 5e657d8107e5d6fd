"""Paper 000: the losses by hand-worked numbers and dense references."""

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F

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
    assert int(step.metrics["pairs_over_tau"]) == sum(value > 0 for value in values)


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
    )  # the first recent error is the mean of the batch, 5
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


@pytest.mark.parametrize("across_groups", [False, True])
def test_contrast_and_orthogonality_on_activations_are_of_latents_over_the_batch(
    across_groups: bool, step_of: Callable[..., Step]
) -> None:
    torch.manual_seed(0)
    sae, rows = SAE(8, 12), DecoderRows(3)
    sae.W_dec.data *= 3.0  # no effect: decoder rows are not compared
    step = step_of(sae, torch.randn(6, 8))
    step.pre_BF, f_BF = torch.randn(6, 12), torch.rand(6, 12)
    f_BF[:, 5] = 0.0  # a silent latent
    step.f_BF = f_BF.requires_grad_()
    cosine_FF = F.cosine_similarity(f_BF.detach().T[:, None], f_BF.detach().T[None], dim=2)
    cosine = {(i, j): float(cosine_FF[i, j]) for i in range(12) for j in range(12)}
    pairs = [(i, j) for i in range(12) for j in range(i + 1, 12) if across_groups or i // 4 == j // 4]
    contrast = ContrastLoss(rows, lambda step: 0.7, 1.0, across_groups, on="activations")(step)
    excess = [max(cosine[pair] - 0.7, 0.0) for pair in pairs]
    assert contrast.item() == pytest.approx(sum(excess) / len(pairs), rel=1e-5)
    assert int(step.metrics["pairs_over_tau"]) == sum(one > 0 for one in excess) > 0
    within = [cosine[i, j] ** 2 for i, j in cosine if i != j and i // 4 == j // 4]
    orthogonality = GroupOrthogonalityLoss(rows, "activations")(step)
    assert orthogonality.item() == pytest.approx(sum(within) / (3 * 16), rel=1e-5)
    for loss in (contrast, orthogonality):
        assert torch.autograd.grad(loss, f_BF, retain_graph=True)[0].abs().sum() > 0
        assert torch.autograd.grad(loss, sae.W_dec, allow_unused=True, retain_graph=True)[0] is None


@pytest.mark.parametrize("name, option", [("contrast", "contrast_on"), ("orthogonality", "orth_on")])
def test_what_a_built_loss_compares_is_an_option(name: str, option: str, build: Callable[..., Variant]) -> None:
    for on, moved in (("decoder", "W_dec"), ("activations", "W_enc")):
        variant = build("collapse-05", tau_max=0.0, tau_min=0.0, **{option: on})
        step = variant(torch.tensor(5), torch.randn(64, 32), torch.optim.SGD(variant.parameters()))
        weights = {"W_dec": variant.sae.W_dec, "W_enc": variant.sae.W_enc}
        found = torch.autograd.grad(variant.terms[name](step), list(weights.values()), allow_unused=True)
        gradients = dict(zip(weights, found, strict=True))
        assert [one for one, gradient in gradients.items() if gradient is not None] == [moved]


def test_the_weights_of_tokens_have_no_gradient(step_of: Callable[..., Step]) -> None:
    sae, recent = SAE(2, 2), RecentError()
    step = step_of(sae, torch.zeros(2, 2))
    recent.value.fill_(4.0)
    step.i, step.x_BD = torch.tensor(1), torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    step.recon_BD = torch.zeros(2, 2, requires_grad=True)
    (gradient_BD,) = torch.autograd.grad(ImportanceWeightedMSE(recent)(step), step.recon_BD)
    # -2 e w / 2 with w = 1/4 and 9/4. If the gradient went through w too, it would be twice as large.
    torch.testing.assert_close(gradient_BD, torch.tensor([[-0.25, 0.0], [0.0, -6.75]]))


def test_balanced_losses_are_counted_where_they_are_scaled_down(step_of: Callable[..., Step]) -> None:
    torch.manual_seed(0)
    sae, rows = SAE(6, 8), DecoderRows(1)
    step = step_of(sae, torch.randn(16, 6))
    for strength, count in ((1e6, 1), (1e-6, 1), (1e6, 2)):
        BalancedLoss(lambda step, s=strength: s, GroupOrthogonalityLoss(rows), rows, 1.0, rho=0.5)(step)
        assert int(step.metrics["losses_balanced"]) == count


def test_balance_counts_the_weight_of_the_reconstruction(step_of: Callable[..., Step]) -> None:
    """If the loss averages the error over d_in, the limit is relative to the gradient of that average."""
    torch.manual_seed(0)
    sae, rows, norms = SAE(6, 8), DecoderRows(1), []
    for weight in (1.0, 1 / 6):
        step = step_of(sae, torch.randn(16, 6, generator=torch.Generator().manual_seed(1)))
        BalancedLoss(lambda step: 1.0, GroupOrthogonalityLoss(rows), rows, weight, rho=0.5)(step)
        norms.append(float(step.metrics["reconstruction_gradient"]))
        weights = [sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec]
        error = weight * step_of(sae, step.x_BD).error_BD.square().sum(1).mean()
        expected = torch.stack([g.norm() for g in torch.autograd.grad(error, weights)]).norm()
        assert norms[-1] == pytest.approx(float(expected), rel=1e-5)
    assert norms[0] == pytest.approx(6 * norms[1], rel=1e-5)


@pytest.mark.parametrize("steps, option, full_at", [(40, None, 4), (40, 7, 7), (20_000, None, 1000)])
def test_strengths_of_a_built_run_grow_over_their_warm_up(
    steps: int, option: int | None, full_at: int, build: Callable[..., Variant]
) -> None:
    given = {} if option is None else {"alpha_warmup": option}
    variant = build("collapse-05", 4, 8, steps, loss_units="raw", **given)
    optimizer = torch.optim.SGD(variant.parameters())
    for name, strength in (("contrast", 0.1), ("diversity", 0.01), ("orthogonality", 0.01)):
        for i in (0, full_at - 2, full_at - 1, full_at):
            step = variant(torch.tensor(i), torch.ones(2, 4), optimizer)
            share = min(1.0, (i + 1) / full_at)
            assert float(variant.coefficients[name](step)) == pytest.approx(strength * share)


@pytest.mark.parametrize("units, weight", [("field", 1.0), ("as_printed", 1.0), ("evidence", 1 / 4)])
def test_strengths_are_shares_of_the_input_s_variance_and_not_of_its_size(
    units: str, weight: float, build: Callable[..., Variant]
) -> None:
    """The rows are at a distance of 3 from their mean, which itself is far from zero."""
    variant = build("collapse-02", 4, 8, alpha_warmup=0, units=units)
    x_BD = 100.0 + torch.tensor([[3.0, 0, 0, 0], [-3.0, 0, 0, 0]])
    step = variant(torch.tensor(5), x_BD, torch.optim.SGD(variant.parameters()))
    assert float(variant.coefficients["contrast"](step)) == pytest.approx(0.1 * weight * 9.0, rel=1e-4)
    assert float(step.metrics["alpha"]) == pytest.approx(0.1)


def test_diversity_is_of_latents_until_a_run_has_groups(build: Callable[..., Variant]) -> None:
    assert build("collapse-04").terms["diversity"].groups is None
    assert build("collapse-06").terms["diversity"].groups is None
    assert build("collapse-07", groups=8).terms["diversity"].groups == 8


def test_diversity_has_the_gradient_of_the_entropy(step_of: Callable[..., Step]) -> None:
    """By hand: the loss is 1 - H / log 2; latents have the shares 3/4 and 1/4 of a total of 8 over two tokens."""
    step = step_of(SAE(2, 2), torch.zeros(2, 2))
    step.f_BF = torch.tensor([[2.0, 1.0], [4.0, 1.0]], requires_grad=True)
    (gradient_BF,) = torch.autograd.grad(DiversityLoss(None)(step), step.f_BF)
    # dH/dS_1 = -log(p_1/p_2) p_2 / S, dH/dS_2 = log(p_1/p_2) p_1 / S, with means S_1 = 3, S_2 = 1, S = 4
    slope = torch.tensor(3.0).log() / torch.tensor(2.0).log() / 4 / 2  # over two tokens
    torch.testing.assert_close(gradient_BF, torch.tensor([[0.25, -0.75]]).expand(2, 2) * slope)
