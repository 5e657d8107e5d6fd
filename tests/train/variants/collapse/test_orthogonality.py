"""Paper 000: Gram-Schmidt against (3) as written, and rows that stay orthonormal."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

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
    gram_schmidt_matrix,
)


def by_hand(rows_MD: Tensor) -> Tensor:
    """(3) as written, one row after the other, each minus its projections on those before."""
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
    rows_GMD[0, 1] = rows_GMD[0, 0]  # even of two equal rows
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
def test_the_decoder_is_orthogonal_and_made_of_free_rows(
    name: str, options: dict, build: Callable[..., Variant], trained: Callable[..., Trainer]
) -> None:
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
