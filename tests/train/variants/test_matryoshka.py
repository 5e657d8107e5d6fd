"""Nested reconstructions: by hand, against autograd over each prefix, and equal to BatchTopK for one prefix."""

import pytest
import torch

from sae.common.errors import UsageError
from sae.train import sparse_ops
from sae.train.loop import Trainer
from sae.train.recipe import find_recipe
from sae.train.step import Step
from sae.train.variant import RunConfig
from sae.train.variants.matryoshka import NestedMSE


def built(name: str, **options: object) -> Trainer:
    torch.manual_seed(0)
    return Trainer(find_recipe(name).make(RunConfig(8, 16, 20, 32), {"k": 3, **options}), 20, "cpu")


def test_one_prefix_is_batchtopk_bit_for_bit() -> None:
    nested, plain = built("matryoshka", prefixes=1), built("batchtopk")
    rows = [torch.randn(32, 8) for _ in range(10)]
    for x_BD in rows:
        nested.step(x_BD)
        plain.step(x_BD)
    left, right = nested.variant.state_dict(), plain.variant.state_dict()
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def test_prefixes_halve() -> None:
    assert built("matryoshka").variant.terms["mse"].sizes == [1, 1, 2, 4, 8]  # prefixes end at 1, 2, 4, 8, 16


def test_by_hand() -> None:
    trainer = Trainer(find_recipe("matryoshka").make(RunConfig(2, 2, 20, 1), {"k": 2, "prefixes": 2}), 20, "cpu")
    sae = trainer.variant.sae
    sae.W_enc.data, sae.W_dec.data, sae.b_dec.data = torch.eye(2), torch.eye(2), torch.tensor([0.0, 0.5])
    step = trainer.variant(trainer.i, torch.tensor([[3.0, 1.5]]), trainer.optimizer)
    # f = (3, 1): the first prefix leaves the error (0, 1), and the second leaves no error
    assert trainer.variant.terms["mse"](step).item() == pytest.approx((1.0 + 0.0) / 2)


@pytest.mark.parametrize("by_rows", [True, False])
def test_the_gradient_is_that_of_the_losses_of_each_prefix(by_rows, monkeypatch) -> None:
    monkeypatch.setattr(sparse_ops, "SPARSE_FROM", {"cpu": {"float32": 1}} if by_rows else {})
    trainer = built("matryoshka")
    sae = trainer.variant.sae.double()
    torch.nn.init.normal_(sae.b_dec)
    x_BD, ends, weights = torch.randn(32, 8, dtype=torch.float64), [1, 2, 4, 8, 16], [sae.W_enc, sae.W_dec, sae.b_dec]

    def step() -> Step:
        return Step(trainer.i, sae, trainer.optimizer, x_BD, *sae(x_BD))

    nested = torch.autograd.grad(NestedMSE(ends)(step()), weights)
    f_BF = sae(x_BD).f_BF
    losses = [(x_BD - f_BF[:, :n] @ sae.W_dec[:n] - sae.b_dec).square().sum(1).mean() for n in ends]
    torch.testing.assert_close(nested, torch.autograd.grad(sum(losses) / 5, weights), rtol=1e-10, atol=1e-12)


def test_a_row_learns_from_the_residuals_of_the_prefixes_that_hold_it() -> None:
    """dL/dW_i = -(2/(B G)) f_i^T sum_{g: n_g >= i} (x - x_hat_g), written without autograd."""
    trainer, x_BD, ends = built("matryoshka"), torch.randn(32, 8), [1, 2, 4, 8, 16]
    sae = trainer.variant.sae
    step = trainer.variant(trainer.i, x_BD, trainer.optimizer)
    (gradient_FD,) = torch.autograd.grad(NestedMSE(ends)(step), sae.W_dec)
    f_BF = step.f_BF.detach()
    residuals = [x_BD - f_BF[:, :n] @ sae.W_dec[:n].detach() - sae.b_dec.detach() for n in ends]
    for i in range(16):
        held = sum(residual for n, residual in zip(ends, residuals, strict=True) if n > i)
        torch.testing.assert_close(gradient_FD[i], -2 / (32 * 5) * f_BF[:, i] @ held, rtol=1e-4, atol=1e-6)


def test_one_choice_serves_every_prefix() -> None:
    trainer = built("matryoshka")
    step = trainer.variant(trainer.i, torch.randn(32, 8), trainer.optimizer)
    assert (step.f_BF != 0).sum() == 3 * 32


@pytest.mark.parametrize("prefixes", [0, 6])
def test_prefixes_of_no_latents_are_refused(prefixes) -> None:
    with pytest.raises(UsageError, match="allow 1 to 5 prefixes"):
        built("matryoshka", prefixes=prefixes)
