"""Paper 000: Gram-Schmidt computes (3) as written, and rows stay orthonormal."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sae.train.loop import Trainer
from sae.train.sae import SAE
from sae.train.step import Step
from sae.train.variant import Variant
from sae.train.variants.collapse.groups import DecoderRows
from sae.train.variants.collapse.monitors import Sketch, UtilizationEMA
from sae.train.variants.collapse.orthogonality import (
    GramSchmidt,
    GramSchmidtLatents,
    GroupOrthogonalityLoss,
    HardOrthogonality,
    gram_schmidt,
    gram_schmidt_by_products,
    gram_schmidt_matrix,
)


def by_hand(rows_MD: Tensor) -> Tensor:
    """(3) as written: for one row after another, subtract its projections onto the earlier rows."""
    done: list[Tensor] = []
    for row in rows_MD:
        for earlier in done:
            row = row - (row @ earlier) / (earlier @ earlier) * earlier
        done.append(row)
    return torch.stack(done)


def test_modified_gram_schmidt_is_q_times_the_diagonal_of_r() -> None:
    rows_GMD = torch.randn(2, 5, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([by_hand(rows) for rows in rows_GMD])
    unit_GMD = gram_schmidt(rows_GMD)
    length_GM1 = (unit_GMD * rows_GMD).sum(-1, keepdim=True)  # diag(R), made positive
    torch.testing.assert_close(unit_GMD * length_GM1, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gram_schmidt_matrix(rows_GMD @ rows_GMD.mT) @ rows_GMD, expected, rtol=1e-4, atol=1e-5)


def test_orthogonality_is_exact_to_1e_5_in_single_precision() -> None:
    rows_GMD = torch.randn(16, 24, 64, generator=torch.Generator().manual_seed(0))
    rows_GMD[0, 1] = rows_GMD[0, 0]  # two equal rows
    unit_GMD = gram_schmidt(rows_GMD)
    assert (unit_GMD @ unit_GMD.mT - torch.eye(24)).abs().max() < 1e-5


@pytest.mark.parametrize("order", ["index", "utilisation"])
def test_the_first_in_order_keeps_its_direction(order: str, step_of: Callable[..., Step]) -> None:
    torch.manual_seed(0)
    sae, rows, utilisation = SAE(12, 8), DecoderRows(2), UtilizationEMA(8)
    step = step_of(sae, torch.zeros(4, 12))
    step.f_BF = torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0]).expand(4, 8)
    utilisation.after_step(step)
    part = GramSchmidt(sae, rows, utilisation, order, "straight_through")
    shown_FD, free_FD = part.orthogonalize(rows.free_FD), rows.free_FD
    kept = [i for i in range(8) if torch.allclose(shown_FD[i], free_FD[i], atol=1e-6)]
    assert kept == ([0, 4] if order == "index" else [2, 5])


def test_gradient_through_is_that_of_the_orthogonalised_decoder(step_of: Callable[..., Step]) -> None:
    """The gradient of a loss of W_dec with respect to the free rows equals a finite difference along their tangent."""
    torch.manual_seed(0)
    sae, rows = SAE(10, 6).double(), DecoderRows(2)
    part = GramSchmidt(sae, rows, UtilizationEMA(6), "index", "through").double()
    step, target_FD = step_of(sae, torch.randn(5, 10).double()), torch.randn(6, 10).double()
    sae.W_dec.grad = target_FD.clone()  # the gradient of the loss <W_dec, target>
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
def test_the_decoder_is_orthogonal_and_made_of_free_rows(
    name: str, options: dict, build: Callable[..., Variant], trained: Callable[..., Trainer]
) -> None:
    variant = build(name, **options)
    before = variant.sae.W_dec.detach().clone()
    sae = trained(variant, 20).variant.sae
    groups = 16 if name == "collapse-08" else 2  # at most 32 rows of width 32 can be orthogonal
    rows_GMD = sae.W_dec.detach().unflatten(0, (groups, -1))
    assert (rows_GMD @ rows_GMD.mT - torch.eye(64 // groups)).abs().max() < 1e-5
    assert (sae.W_dec - before).abs().max() > 1e-3
    part = next(m for m in variant.mechanisms if isinstance(m, GramSchmidt))
    free_GMD = part.rows.free_FD.detach().unflatten(0, (groups, -1))
    assert (free_GMD @ free_GMD.mT - torch.eye(64 // groups)).abs().max() > 1e-4  # free rows are not orthogonal


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


def test_in_the_sketch_rows_are_orthogonal_as_the_sketch_sees_them(
    build: Callable[..., Variant], trained: Callable[..., Trainer]
) -> None:
    variant = build("collapse-07", gs_axis="jl", jl_dim=8, groups=16)
    trained(variant, 3)
    sketch = next(m for m in variant.mechanisms if isinstance(m, Sketch))
    short_GMS = (variant.sae.W_dec.detach() @ sketch.R_DS).unflatten(0, (16, -1))
    unit_GMS = torch.nn.functional.normalize(short_GMS, dim=-1)
    assert (unit_GMS @ unit_GMS.mT - torch.eye(4)).abs().max() < 1e-3


def test_orthogonality_by_hand(step_of: Callable[..., Step]) -> None:
    sae = SAE(2, 4)
    sae.W_dec.data = torch.tensor([[1.0, 0.0], [0.6, 0.8], [1.0, 0.0], [0.0, 1.0]])
    step = step_of(sae, torch.zeros(1, 2))
    assert GroupOrthogonalityLoss(DecoderRows(2))(step).item() == pytest.approx((2 * 0.36 / 4 + 0) / 2)


@pytest.mark.parametrize("every", [1, 5])
def test_hard_orthogonality_leaves_orthonormal_rows_in_each_group(every: int, build: Callable[..., Variant]) -> None:
    variant = build("collapse-10", gs_axis="activation_batch", hard_every=every)
    trainer = Trainer(variant, 10, "cpu")
    for number in range(10):
        trainer.step(torch.randn(64, 32))
        rows_GMD = variant.sae.W_dec.detach().unflatten(0, (16, 4))
        error = float((rows_GMD @ rows_GMD.mT - torch.eye(4)).abs().max())
        assert (error < 1e-5) == ((number + 1) % every == 0), f"after step {number}"


def test_hard_orthogonality_is_the_nearest_orthonormal_matrix(step_of: Callable[..., Step]) -> None:
    torch.manual_seed(0)
    sae = SAE(9, 4)
    rows_FD = sae.W_dec.data = gram_schmidt(torch.randn(1, 4, 9))[0] + 0.05 * torch.randn(4, 9)
    u, _, vh = torch.linalg.svd(rows_FD, full_matrices=False)
    HardOrthogonality(DecoderRows(1)).after_step(step_of(sae, torch.zeros(1, 9)))
    torch.testing.assert_close(sae.W_dec.data, u @ vh, rtol=1e-4, atol=1e-5)


def test_straight_through_by_hand(step_of: Callable[..., Step]) -> None:
    """A free row gets the gradient of its row of W_dec, minus the components along that row and along the free row."""
    sae, rows = SAE(2, 2), DecoderRows(1)
    part, step = GramSchmidt(sae, rows, UtilizationEMA(2), "index", "straight_through"), None
    sae.W_dec.data = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    rows.free_FD.data = torch.tensor([[0.6, 0.8], [0.0, 1.0]])
    step = step_of(sae, torch.zeros(1, 2))
    sae.W_dec.grad = torch.tensor([[3.0, 5.0], [2.0, 7.0]])
    rows.free_FD.grad = torch.tensor([[1.0, 2.0], [0.0, 0.0]])  # the gradient of a loss on the free rows
    with torch.no_grad():
        part.after_backward(step)
    # (3, 5) without the part along (1, 0), plus (1, 2), is (1, 7), and (1, 7) less 6.2 (0.6, 0.8) is this:
    torch.testing.assert_close(rows.free_FD.grad, torch.tensor([[-2.72, 2.04], [2.0, 0.0]]))
    torch.testing.assert_close((rows.free_FD.grad * rows.free_FD).sum(1), torch.zeros(2), rtol=0, atol=1e-6)
    assert not sae.W_dec.grad.any()


@pytest.mark.parametrize("gradient", ["straight_through", "through"])
def test_in_a_run_no_gradient_lies_along_a_free_row(gradient: str, build: Callable[..., Variant]) -> None:
    variant = build("collapse-06", gs_gradient=gradient, alpha_warmup=0, beta_orth=1.0)
    part = next(m for m in variant.mechanisms if isinstance(m, GramSchmidt))
    trainer, seen = Trainer(variant, 20, "cpu"), []
    after_step = part.after_step

    def looking(step: Step) -> None:
        seen.append((part.rows.free_FD.grad.clone(), part.rows.free_FD.detach().clone()))
        after_step(step)

    part.after_step = looking  # type: ignore[method-assign]
    old = [part.rows.free_FD.detach().clone()]
    for _ in range(3):
        trainer.step(torch.randn(64, 32))
        old.append(part.rows.free_FD.detach().clone())
    for (grad_FD, _), free_FD in zip(seen, old, strict=False):
        assert grad_FD.norm() > 1e-3
        assert (grad_FD * free_FD).sum(1).abs().max() < 1e-5 * grad_FD.norm()


@pytest.mark.parametrize("gradient", ["straight_through", "through"])
def test_gradient_of_orthogonalised_latents(gradient: str) -> None:
    """With "through", the gradient is autograd's for the sequential form of (3).

    With "straight_through", the matrix that (3) applies is treated as a constant.
    """
    torch.manual_seed(0)
    f_BF, weight_BF = torch.rand(9, 4, requires_grad=True), torch.randn(9, 4)
    out_BF = GramSchmidtLatents(1, gradient)(f_BF)
    (found_BF,) = torch.autograd.grad((out_BF * weight_BF).sum(), f_BF)
    if gradient == "through":
        (expected_BF,) = torch.autograd.grad((by_hand(f_BF.T).T * weight_BF).sum(), f_BF)
    else:
        rows_MB = f_BF.detach().T
        T_MM = torch.linalg.lstsq(rows_MB.T, by_hand(rows_MB).T).solution.T
        expected_BF = weight_BF @ T_MM
    torch.testing.assert_close(found_BF, expected_BF, rtol=2e-3, atol=2e-3)


def test_a_group_that_is_silent_in_a_batch_stays_so() -> None:
    """A silent group's Gram matrix is zero. Its factorization does not fail, and all gradients are finite."""
    f_BF = torch.cat([torch.rand(8, 3, generator=torch.Generator().manual_seed(0)), torch.zeros(8, 3)], 1)
    f_BF.requires_grad_()
    out_BF = GramSchmidtLatents(2, "through")(f_BF)
    out_BF.square().sum().backward()
    assert out_BF.isfinite().all() and out_BF[:, :3].any() and not out_BF[:, 3:].any()
    assert f_BF.grad.isfinite().all()


def test_orthogonalised_latents_are_counted_if_they_moved() -> None:
    f_BF = torch.zeros(6, 6)
    f_BF[0, 0] = f_BF[1, 1] = f_BF[2, 2] = 3.0  # orthogonal
    f_BF[3, 3] = f_BF[3, 4] = 2.0  # equal latents; latent 5 never fires
    link = GramSchmidtLatents(groups=1)
    link(f_BF)
    assert int(link.counts["orthogonalized"]) == 1
    apart = GramSchmidtLatents(groups=3)
    apart(f_BF)  # the two equal latents are in different groups
    assert int(apart.counts["orthogonalized"]) == 0


def test_rows_that_gram_schmidt_moved_are_counted_in_each_step(step_of: Callable[..., Step]) -> None:
    sae, rows = SAE(4, 4), DecoderRows(2)
    part = GramSchmidt(sae, rows, UtilizationEMA(4), "index", "straight_through")
    step = step_of(sae, torch.zeros(1, 4))
    rows.free_FD.data = 5 * torch.eye(4)
    rows.free_FD.data[3] = torch.tensor([0.0, 0.0, 1.0, 1.0])
    for count in (1, 2):
        part.after_step(step)
        assert int(part.scalars()["orthogonalized"]) == count
    torch.testing.assert_close(sae.W_dec.data, torch.eye(4))
    rows.free_FD.data = torch.eye(4)
    part.after_step(step)
    assert int(part.scalars()["orthogonalized"]) == 2


def test_rows_that_hard_orthogonality_moved_are_counted_in_its_steps(step_of: Callable[..., Step]) -> None:
    sae = SAE(4, 4)
    part, step = HardOrthogonality(DecoderRows(2), steps=2), step_of(sae, torch.zeros(1, 4))
    for i, count in ((0, 0), (1, 2), (2, 2), (3, 4)):
        sae.W_dec.data = torch.eye(4)
        sae.W_dec.data[3, 2] = 0.1  # not orthogonal to row 2
        step.i = torch.tensor(i)
        part.after_step(step)
        assert int(part.scalars()["rows_projected"]) == count
    part.after_step(step)
    assert int(part.scalars()["rows_projected"]) == 4  # the rows are already orthonormal


def test_orthogonality_has_the_gradient_of_its_formula(step_of: Callable[..., Step]) -> None:
    sae = SAE(2, 2)
    sae.W_dec.data = torch.tensor([[2.0, 0.0], [1.0, 1.0]])
    step = step_of(sae, torch.zeros(1, 2))
    (gradient_FD,) = torch.autograd.grad(GroupOrthogonalityLoss(DecoderRows(1))(step), sae.W_dec)
    # 4 (D D^T - I) D / M^2 with D D^T - I = [[3, 2], [2, 1]]
    torch.testing.assert_close(gradient_FD, torch.tensor([[8.0, 2.0], [5.0, 1.0]]))


def test_losses_of_a_run_with_gram_schmidt_are_of_the_free_rows(step_of: Callable[..., Step]) -> None:
    sae, rows = SAE(2, 2), DecoderRows(1)
    sae.W_dec.data = torch.eye(2)
    rows.free_FD = nn.Parameter(torch.tensor([[1.0, 0.0], [0.6, 0.8]]))
    loss = GroupOrthogonalityLoss(rows)(step_of(sae, torch.zeros(1, 2)))
    assert loss.item() == pytest.approx(2 * 0.36 / 4)


@pytest.mark.parametrize("condition", [1.5, 10.0, 300.0])
def test_gram_schmidt_by_products_is_that_by_a_qr(condition: float) -> None:
    """Unit rows of two groups agree to float32 rounding times `condition`, the condition number of their matrix."""
    torch.manual_seed(0)
    left_GMM, right_GMM = (torch.linalg.qr(torch.randn(2, 12, 12, dtype=torch.float64)).Q for _ in range(2))
    rows_GMD = (left_GMM * torch.logspace(0, -math.log10(condition), 12, dtype=torch.float64)) @ right_GMM
    rows_GMD = torch.nn.functional.normalize(rows_GMD, dim=-1)
    found = gram_schmidt_by_products(rows_GMD.float())
    torch.testing.assert_close(found.double(), gram_schmidt(rows_GMD), rtol=0, atol=3e-7 * condition)
    products = found @ found.mT - torch.eye(12)
    assert products.abs().max() < 2e-6


def test_a_group_of_dependent_rows_is_nan_and_not_rows_that_are_not_orthogonal() -> None:
    """One group has almost rank 8, so its Cholesky factorization fails in float32. The other group is not affected."""
    torch.manual_seed(0)
    dependent_MD = torch.randn(144, 8) @ torch.randn(8, 200) + 1e-3 * torch.randn(144, 200)
    rows_GMD = torch.nn.functional.normalize(torch.stack([dependent_MD, torch.randn(144, 200)]), dim=-1)
    found = gram_schmidt_by_products(rows_GMD)
    assert found[0].isnan().all()
    torch.testing.assert_close(found[1], gram_schmidt_by_products(rows_GMD[1:])[0])
