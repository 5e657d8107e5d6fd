"""Paper 000 part by part: hand-worked numbers, dense references, and what each run adds to the one before."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sae.common.errors import UsageError
from sae.train.loop import Trainer
from sae.train.recipe import RECIPES, find_recipe
from sae.train.sae import SAE, fold_normalization
from sae.train.step import Step
from sae.train.variant import RunConfig, Variant
from sae.train.variants.collapse.batch_norm import BatchNorm
from sae.train.variants.collapse.groups import DecoderRows, GroupLearningRate, GroupUtilization, WinnerTakeAll
from sae.train.variants.collapse.l1_controller import DynamicL1
from sae.train.variants.collapse.losses import BalancedLoss, ContrastLoss, DiversityLoss, ImportanceWeightedMSE
from sae.train.variants.collapse.monitors import RecentError, Sketch, UtilizationEMA
from sae.train.variants.collapse.orthogonality import (
    GramSchmidt,
    GramSchmidtLatents,
    GroupOrthogonalityLoss,
    HardOrthogonality,
    gram_schmidt,
    gram_schmidt_matrix,
)

RUNS = ["collapse-baseline", *[f"collapse-{number:02d}" for number in range(1, 11)]]


def step_of(sae: SAE, x_BD: Tensor, i: int = 0) -> Step:
    optimizer = torch.optim.AdamW(sae.parameters(), lr=0.01)
    return Step(torch.tensor(i), sae, optimizer, x_BD, *sae(x_BD))


def build(name: str, d_in: int = 32, d_sae: int = 64, steps: int = 20, **options: object) -> Variant:
    torch.manual_seed(0)
    return find_recipe(name).make(RunConfig(d_in, d_sae, steps, 64), options)


def trained(variant: Variant, steps: int) -> Trainer:
    trainer = Trainer(variant, steps, "cpu")
    generator = torch.Generator().manual_seed(1)
    for number in range(steps):
        trainer.run_periodic(number, trainer.step(torch.randn(64, variant.sae.d_in, generator=generator)))
    return trainer


def by_hand(rows_MD: Tensor) -> Tensor:
    """(3) as written, one row after the other, each minus its projections on those before."""
    done: list[Tensor] = []
    for row in rows_MD:
        for earlier in done:
            row = row - (row @ earlier) / (earlier @ earlier) * earlier
        done.append(row)
    return torch.stack(done)


# Gram-Schmidt


def test_modified_gram_schmidt_is_q_times_the_diagonal_of_r() -> None:
    rows_GMD = torch.randn(2, 5, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([by_hand(rows) for rows in rows_GMD])
    unit_GMD = gram_schmidt(rows_GMD)
    length_GM1 = (unit_GMD * rows_GMD).sum(-1, keepdim=True)  # diag(R), made positive
    torch.testing.assert_close(unit_GMD * length_GM1, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gram_schmidt_matrix(rows_GMD @ rows_GMD.mT) @ rows_GMD, expected, rtol=1e-4, atol=1e-5)


def test_orthogonality_is_exact_to_1e_5_in_single_precision() -> None:
    rows_GMD = torch.randn(16, 24, 64, generator=torch.Generator().manual_seed(0))
    rows_GMD[0, 1] = rows_GMD[0, 0]  # even of two equal rows
    unit_GMD = gram_schmidt(rows_GMD)
    assert (unit_GMD @ unit_GMD.mT - torch.eye(24)).abs().max() < 1e-5


@pytest.mark.parametrize("order", ["index", "utilisation"])
def test_the_first_in_order_keeps_its_direction(order: str) -> None:
    torch.manual_seed(0)
    sae, rows, utilisation = SAE(12, 8), DecoderRows(2), UtilizationEMA(8)
    step = step_of(sae, torch.zeros(4, 12))
    step.f_BF = torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0]).expand(4, 8)
    utilisation.after_step(step)
    part = GramSchmidt(sae, rows, utilisation, order, "straight_through")
    shown_FD, free_FD = part.orthogonalize(rows.free_FD), rows.free_FD
    kept = [i for i in range(8) if torch.allclose(shown_FD[i], free_FD[i], atol=1e-6)]
    assert kept == ([0, 4] if order == "index" else [2, 5])


def test_gradient_through_is_that_of_the_orthogonalised_decoder() -> None:
    """The difference of a loss of W_dec along free rows, by the mechanism and by a small step, on the unit sphere."""
    torch.manual_seed(0)
    sae, rows = SAE(10, 6).double(), DecoderRows(2)
    part = GramSchmidt(sae, rows, UtilizationEMA(6), "index", "through").double()
    step, target_FD = step_of(sae, torch.randn(5, 10).double()), torch.randn(6, 10).double()
    sae.W_dec.grad = target_FD.clone()  # of the loss <W_dec, target>
    with torch.no_grad():
        part.after_backward(step)
    assert not sae.W_dec.grad.any()
    along_FD = torch.randn(6, 10).double()
    along_FD -= (along_FD * rows.free_FD.detach()).sum(1, keepdim=True) * rows.free_FD.detach()
    with torch.no_grad():
        up, down = (((part.orthogonalize(rows.free_FD + s * along_FD)) * target_FD).sum() for s in (1e-5, -1e-5))
    assert float((rows.free_FD.grad * along_FD).sum()) == pytest.approx(float(up - down) / 2e-5, rel=1e-6)


@pytest.mark.parametrize("options", [{}, {"gs_gradient": "through"}, {"gs_order": "utilisation"}])
@pytest.mark.parametrize("name", ["collapse-06", "collapse-08"])
def test_the_decoder_is_orthogonal_and_made_of_free_rows(name: str, options: dict) -> None:
    variant = build(name, **options)
    before = variant.sae.W_dec.detach().clone()
    sae = trained(variant, 20).variant.sae
    groups = 16 if name == "collapse-08" else 2  # 64 rows of width 32 fit into no fewer
    rows_GMD = sae.W_dec.detach().unflatten(0, (groups, -1))
    assert (rows_GMD @ rows_GMD.mT - torch.eye(64 // groups)).abs().max() < 1e-5
    assert (sae.W_dec - before).abs().max() > 1e-3
    part = next(m for m in variant.mechanisms if isinstance(m, GramSchmidt))
    free_GMD = part.rows.free_FD.detach().unflatten(0, (groups, -1))
    assert (free_GMD @ free_GMD.mT - torch.eye(64 // groups)).abs().max() > 1e-4  # they are not orthogonal themselves


def test_latents_over_the_batch_are_orthogonal_in_training_and_untouched_afterwards() -> None:
    f_BF = torch.rand(40, 12, generator=torch.Generator().manual_seed(0))
    f_BF[:, 3] = 0.0  # a silent latent
    link = GramSchmidtLatents(groups=2)
    out_BF = link(f_BF)
    for columns in (slice(0, 6), slice(6, 12)):
        gram = out_BF[:, columns].T @ out_BF[:, columns]
        assert (gram - gram.diagonal().diag()).abs().max() < 1e-3 * gram.max()
    torch.testing.assert_close(out_BF[:, [0, 6]], f_BF[:, [0, 6]])
    assert not out_BF[:, 3].any()
    assert torch.equal(link.eval()(f_BF), f_BF)


def test_in_the_sketch_rows_are_orthogonal_as_the_sketch_sees_them() -> None:
    variant = build("collapse-07", gs_axis="jl", jl_dim=8, groups=16)
    trained(variant, 3)
    sketch = next(m for m in variant.mechanisms if isinstance(m, Sketch))
    short_GMS = (variant.sae.W_dec.detach() @ sketch.R_DS).unflatten(0, (16, -1))
    unit_GMS = torch.nn.functional.normalize(short_GMS, dim=-1)
    assert (unit_GMS @ unit_GMS.mT - torch.eye(4)).abs().max() < 1e-3


# The terms


@pytest.mark.parametrize("pairs", ["exact_group", "exact", "jl"])
def test_contrast_equals_a_sum_over_pairs(pairs: str) -> None:
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


def test_the_threshold_falls_from_0_4_to_0_05_by_a_cosine() -> None:
    term = build("collapse-02", steps=100).terms["contrast"]
    step = step_of(SAE(32, 64), torch.zeros(1, 32))
    assert [float(term.tau(Step(torch.tensor(i), *list(vars(step).values())[1:7]))) for i in (0, 50, 100)] == (
        pytest.approx([0.4, 0.225, 0.05])
    )


def test_the_projection_has_orthonormal_columns_at_most_as_many_as_dimensions() -> None:
    for sketch, shape in ((Sketch(300, 40), (300, 128)), (Sketch(32, 64), (32, 32)), (Sketch(32, 64, 8), (32, 8))):
        assert sketch.R_DS.shape == shape
        assert (sketch.R_DS.T @ sketch.R_DS - torch.eye(shape[1])).abs().max() < 1e-5
    assert Sketch(32, 64, 16, "activations").R_DS.shape == (64, 16)


def test_the_monitor_is_exact_where_the_projection_is_a_rotation() -> None:
    torch.manual_seed(0)
    sae, sketch = SAE(8, 12), Sketch(8, 12)
    sketch.every_n_steps(step_of(sae, torch.randn(4, 8)))
    off = (sae.W_dec @ sae.W_dec.T).abs().fill_diagonal_(0).detach()
    assert float(sketch.max_cosine) == pytest.approx(float(off.max()), rel=1e-4)
    assert float(sketch.mean_cosine) == pytest.approx(float(off.sum()) / (12 * 11), rel=1e-4)
    kept = Sketch(8, 12, 12, "activations")
    kept.every_n_steps(step_of(sae, torch.randn(4, 8)))
    assert float(kept.length) == pytest.approx(1.0, rel=1e-5)


def test_orthogonality_by_hand() -> None:
    sae = SAE(2, 4)
    sae.W_dec.data = torch.tensor([[1.0, 0.0], [0.6, 0.8], [1.0, 0.0], [0.0, 1.0]])
    step = step_of(sae, torch.zeros(1, 2))
    assert GroupOrthogonalityLoss(DecoderRows(2))(step).item() == pytest.approx((2 * 0.36 / 4 + 0) / 2)


def test_diversity_is_0_for_equal_use_and_1_for_a_single_user() -> None:
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


# The controller of lambda


@pytest.mark.parametrize("firing, at_start, at_end", [(8, 1.0, 0.5), (0, 0.02, 0.01)])
def test_lambda_stays_in_its_moving_bounds(firing: int, at_start: float, at_end: float) -> None:
    control = DynamicL1(0.04, steps=1000, target=2.0, kappa=1.0)
    step = step_of(SAE(4, 8), torch.zeros(3, 4))
    step.f_BF = (torch.arange(8) < firing).float().expand(3, 8)
    for i in (0, 1, 2, 3, 4, 5, 500, 1000):  # either bound is reached within the first few
        step.i = torch.tensor(i)
        value = float(control.coefficient(step))
        assert 0.02 - 0.00001 * i - 1e-7 <= value <= 1.0 - 0.0005 * i + 1e-7
        assert i != 5 or value == pytest.approx(at_start, abs=0.003)
        control.after_step(step)
    assert float(control.coefficient(step)) == pytest.approx(at_end)


def test_lambda_follows_the_controller_and_is_constant_without_one() -> None:
    step = step_of(SAE(4, 8), torch.zeros(3, 4))
    step.f_BF = (torch.arange(8) < 6).float().expand(3, 8)
    followed, literal = DynamicL1(0.04, 1000, 4.0), DynamicL1(0.04, 1000, 4.0, "none")
    for control in (followed, literal):
        control.after_step(step)
    assert float(followed.coefficient(step)) == pytest.approx(0.04 * math.exp(0.01 * (6 / 4 - 1)))
    assert float(literal.coefficient(step)) == pytest.approx(0.04)
    shrinking = DynamicL1(0.04, 1000, 4.0, "recon_ratio", beta=0.5)
    for i, error in enumerate((2.0, 1.0)):  # of one of four dimensions, the others are right
        moved = Step(torch.tensor(i), step.sae, step.optimizer, error**0.5 * torch.eye(4)[:1], step.pre_BF, step.f_BF,
                     torch.zeros(1, 4))  # fmt: skip
        shrinking.after_step(moved)
    assert float(shrinking.value) == pytest.approx(0.04 * 0.75)


# Groups


def rates(mode: str, u_G: list[float]) -> tuple[GroupLearningRate, UtilizationEMA]:
    utilisation = UtilizationEMA(4 * len(u_G))
    utilisation.rate_F.copy_(0.1 * torch.tensor(u_G).repeat_interleave(4))
    utilisation.gathered.fill_(0.1)  # as after the first step
    return GroupLearningRate(DecoderRows(len(u_G)), GroupUtilization(utilisation, len(u_G)), mode), utilisation


def test_utilisation_is_right_from_the_first_batch_on() -> None:
    utilisation, step = UtilizationEMA(2), step_of(SAE(4, 2), torch.zeros(2, 4))
    for f_BF, expected in (
        ([[1.0, 0.0], [2.0, 0.0]], [1.0, 0.0]),
        ([[0.0, 1.0], [0.0, 1.0]], [0.09 / 0.19, 0.1 / 0.19]),
    ):
        step.f_BF = torch.tensor(f_BF)
        utilisation.after_step(step)
        torch.testing.assert_close(utilisation.u_F, torch.tensor(expected))


def test_group_rates_by_hand() -> None:
    u_G = [0.0, 0.1, 0.2, 0.3]
    softmax = torch.tensor(u_G).softmax(0)
    torch.testing.assert_close(rates("softmax", u_G)[0].rate_G, softmax)
    torch.testing.assert_close(rates("softmax_mean1", u_G)[0].rate_G, 4 * softmax)
    busy, idle = rates("softmax_temp", u_G)[0].rate_G, rates("inverse", u_G)[0].rate_G
    torch.testing.assert_close(busy, idle.flip(0))
    assert busy[3] > 3 * busy[1]
    for mode in ("softmax_mean1", "softmax_temp", "inverse"):
        assert float(rates(mode, u_G)[0].rate_G.mean()) == pytest.approx(1.0)
    largest = GroupUtilization(rates("softmax", u_G)[1], 2, "max")
    torch.testing.assert_close(largest.u_G, torch.tensor([0.1, 0.3]))


def test_a_group_rate_scales_the_update_and_not_the_gradient() -> None:
    """Adam's first update is lr times the gradient's sign, however long the gradient is."""
    torch.manual_seed(0)
    sae, (part, _) = SAE(4, 8), rates("softmax", [0.0, 2.0])
    step = step_of(sae, torch.randn(5, 4))
    old = {name: weight.detach().clone() for name, weight in sae.named_parameters()}
    for weight in sae.parameters():
        weight.grad = torch.ones_like(weight)
    part.after_backward(step)
    step.optimizer.param_groups[0]["weight_decay"] = 0.0
    step.optimizer.step()
    part.after_step(step)
    assert all((weight.grad == 1).all() for weight in sae.parameters())
    share_F = torch.tensor([0.0, 2.0]).softmax(0).repeat_interleave(4)
    torch.testing.assert_close(
        old["W_dec"] - sae.W_dec.data, 0.01 * share_F[:, None].expand(8, 4), rtol=1e-4, atol=1e-7
    )
    torch.testing.assert_close(old["W_enc"] - sae.W_enc.data, 0.01 * share_F.expand(4, 8), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(old["b_enc"] - sae.b_enc.data, 0.01 * share_F)
    torch.testing.assert_close(old["b_dec"] - sae.b_dec.data, torch.full((4,), 0.01))


def test_neighbours_inhibit_and_the_best_of_each_group_remain() -> None:
    def link(**options: object) -> WinnerTakeAll:
        made = WinnerTakeAll(6, groups=2, winners=2, gamma=0.5, neighbours=1, **options)
        made.near_FN.copy_(torch.tensor([[1.0], [0.0], [0.0], [4.0], [5.0], [3.0]]))
        made.closeness_FN.copy_(torch.tensor([[0.5], [1.0], [0.0], [1.0], [0.0], [1.0]]))
        return made

    f_BF = torch.tensor([[4.0, 3.0, 2.0, 1.0, 6.0, 0.0]])
    # 4 - 0.25 * 3 = 3.25, 3 - 0.5 * 4 = 1, 2 - 0 = 2; and 1 - 0.5 * 6 < 0, 6 - 0, 0 - 0.5 * 1 < 0
    assert link()(f_BF).tolist() == [[3.25, 0.0, 2.0, 0.0, 6.0, 0.0]]
    assert link(inhibition="off")(f_BF).tolist() == [[4.0, 3.0, 0.0, 1.0, 6.0, 0.0]]
    expected = [[16 / 4.75, 0.0, 2.0, 1 / 4, 6.0, 0.0]]  # and 9 / 5 is the third of its group
    torch.testing.assert_close(link(inhibition="divisive")(f_BF), torch.tensor(expected))
    for inhibition in ("subtractive", "divisive"):
        torch.testing.assert_close(link(inhibition=inhibition)(7 * f_BF), 7 * link(inhibition=inhibition)(f_BF))


def test_neighbours_are_the_nearest_of_the_group_and_follow_the_encoder() -> None:
    variant = build("collapse-09", neighbours=2)
    trainer = trained(variant, 5)
    link, sae = variant.sae.activation[-1], variant.sae
    part = next(m for m in variant.mechanisms if m.every == 100)
    part.every_n_steps(trainer.step(torch.randn(64, 32)))
    unit_FD = torch.nn.functional.normalize(sae.W_enc.detach().T, dim=1)
    for i in (0, 5, 63):
        group = [j for j in range(i // 4 * 4, i // 4 * 4 + 4) if j != i]
        cosine = {j: float(unit_FD[i] @ unit_FD[j]) for j in group}
        best = sorted(group, key=lambda j: -cosine[j])[:2]
        assert link.near_FN[i].tolist() == best
        assert link.closeness_FN[i].tolist() == pytest.approx([max(cosine[j], 0.0) for j in best], abs=1e-6)


@pytest.mark.parametrize("every", [1, 5])
def test_hard_orthogonality_leaves_orthonormal_rows_in_each_group(every: int) -> None:
    variant = build("collapse-10", gs_axis="activation_batch", hard_every=every)
    trainer = Trainer(variant, 10, "cpu")
    for number in range(10):
        trainer.step(torch.randn(64, 32))
        rows_GMD = variant.sae.W_dec.detach().unflatten(0, (16, 4))
        error = float((rows_GMD @ rows_GMD.mT - torch.eye(4)).abs().max())
        assert (error < 1e-5) == ((number + 1) % every == 0), f"after step {number}"


def test_hard_orthogonality_is_the_nearest_orthonormal_matrix() -> None:
    torch.manual_seed(0)
    sae = SAE(9, 4)
    rows_FD = sae.W_dec.data = gram_schmidt(torch.randn(1, 4, 9))[0] + 0.05 * torch.randn(4, 9)
    u, _, vh = torch.linalg.svd(rows_FD, full_matrices=False)
    HardOrthogonality(DecoderRows(1)).after_step(step_of(sae, torch.zeros(1, 9)))
    torch.testing.assert_close(sae.W_dec.data, u @ vh, rtol=1e-4, atol=1e-5)


# The options that the implementation "uses for stability"


def test_batch_norm_uses_the_batch_in_training_and_folds_like_any_link() -> None:
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


def test_importance_weighs_a_token_by_its_error_over_the_recent_one() -> None:
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


def test_a_balanced_term_pulls_no_harder_than_its_share_of_the_reconstruction() -> None:
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


# The runs


def parts(variant: Variant) -> list[str]:
    chain = [*variant.terms.values(), *variant.mechanisms, *variant.sae.activation]
    return sorted(type(part).__name__ for part in chain)


def test_each_run_adds_its_parts_to_the_run_before() -> None:
    own = [
        ["Sketch", "UtilizationEMA"],
        ["ContrastLoss"],
        ["DynamicL1"],
        ["DiversityLoss"],
        ["GroupOrthogonalityLoss"],
        ["GramSchmidt"],
        ["GroupUtilization"],
        ["GroupLearningRate"],
        ["Neighbours", "WinnerTakeAll"],
        ["HardOrthogonality"],
    ]
    expected = ["DeadLatents", "L1", "MSE", "ReLU", "UnitNormDecoder"]
    assert parts(build(RUNS[0])) == expected
    for name, added in zip(RUNS[1:], own, strict=True):
        expected = sorted([*expected, *added])
        assert parts(build(name)) == expected
        assert RECIPES[name].options.items() > RECIPES[RUNS[RUNS.index(name) - 1]].options.items()


READINGS: list[tuple[str, dict]] = [
    ("collapse-10", {}),
    (
        "collapse-10",
        {"gs_axis": "activation_batch", "group_lr": "softmax", "l1_controller": "none", "contrast_cos": "jl"},
    ),
    ("collapse-10", {"batch_norm": "pre", "importance": "loss_ema", "gradient_balance": 1.0, "wta_scope": "global"}),
    ("collapse-10", {"gs_gradient": "through", "gs_order": "utilisation", "jl_on": "encoder", "contrast_cos": "jl"}),
    (
        "collapse-10",
        {"units": "as_printed", "l1_controller": "recon_ratio", "inhibition": "divisive", "near": "decoder"},
    ),
    ("collapse-09", {"units": "evidence", "loss_units": "raw", "jl_on": "activations", "contrast_cos": "exact"}),
    ("collapse-08", {"gs_axis": "jl", "jl_dim": 8, "group_stat": "max", "group_lr": "inverse", "pre_bias": True}),
]


@pytest.mark.parametrize("d_sae", [32, 64])
@pytest.mark.parametrize("name, options", [*[(name, {}) for name in RUNS[:-1]], *READINGS])
def test_every_option_trains_and_keeps_unit_rows(name: str, options: dict, d_sae: int) -> None:
    trainer = trained(build(name, d_sae=d_sae, **options), 5)
    metrics = trainer.pop_metrics()
    assert int(trainer.failed_at) == -1
    assert all(math.isfinite(value) for value in metrics.values())
    assert (trainer.variant.sae.W_dec.norm(dim=1) - 1).abs().max() < 1e-6


@pytest.mark.parametrize("name, options", READINGS)
def test_no_option_reads_back_to_the_host(name: str, options: dict) -> None:
    with FakeTensorMode():
        trainer = Trainer(build(name, **options), 20, "cpu")
        for _ in range(2):
            trainer.step(torch.randn(64, 32))


def test_each_part_logs_its_numbers() -> None:
    metrics = trained(build("collapse-10"), 5).pop_metrics()
    assert {"utilisation", "tau", "alpha", "beta", "lambda", "group_utilisation_max", "group_rate_min",
            "sketch_mean_cosine", "neighbour_cosine"} <= metrics.keys()  # fmt: skip


def test_the_paper_budget_stays_inside_its_warm_up() -> None:
    how = find_recipe("collapse-10").make(RunConfig(32, 64, 800, 125), {"budget": "paper"}).optimization
    assert float(how.lr_at(torch.tensor(399), 800)) == pytest.approx(3e-4 * 400 / 1000)
    assert float(how.lr_at(torch.tensor(799), 800)) == pytest.approx(3e-4 * 800 / 1000)
    with pytest.raises(UsageError, match="10,000,000 tokens, 4882 steps of 2048"):
        find_recipe("collapse-04").make(RunConfig(32, 64, 800, 2048), {"budget": "matched"})


REFUSED: list[tuple[Callable[[], object], str]] = [
    (lambda: build("collapse-07", groups=24), "64 cannot be divided into 24 equal groups"),
    (lambda: build("collapse-07", d_sae=16), "16 cannot be divided into 16 equal groups of two"),
    (lambda: build("collapse-07", d_in=16, groups=2), "give --set groups=4"),
    (lambda: build("collapse-10", d_in=8, groups=4, gs_axis="activation_batch"), "Hard orthogonality needs groups"),
    (lambda: build("collapse-07", gs_axis="jl", jl_dim=2), "groups of at most jl_dim = 2"),
    (lambda: build("collapse-02", contrast_cos="jl", jl_on="activations"), "give jl_on=decoder or encoder"),
    (lambda: build("collapse-03", l0=65), "invalid l0=65"),
    (lambda: build("collapse-08", group_lr="fast"), "group_lr=fast is unknown: softmax_mean1"),
    (lambda: build("collapse-08", gamma=0.1), "collapse-08 has no option gamma"),
    (lambda: build("collapse-09", wta_share=0.0), "invalid wta_share=0: expected a share of the latents"),
    (lambda: build("collapse-10", hard_every=0), "invalid hard_every=0: expected a positive number of steps"),
    (lambda: build("collapse-01", jl_dim=0), "invalid jl_dim=0: expected a positive number"),
]


@pytest.mark.parametrize("ask, sentence", REFUSED)
def test_invalid_options_raise_a_usage_error(ask: Callable[[], object], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        ask()
