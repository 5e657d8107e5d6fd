"""The switch SAE: routing by hand, the balance loss, and folding the normalization into the router."""

import pytest
import torch

from sae.common.errors import UsageError
from sae.train.loop import Trainer
from sae.train.recipe import find_recipe
from sae.train.sae import fold_normalization
from sae.train.variant import RunConfig
from sae.train.variants.switch import LoadBalanceLoss, Switch


@pytest.fixture
def switch() -> Switch:
    """Two experts of two latents, one of which is kept. x_0 > x_1 selects expert 0; the odds for (2, 0) are e^2 : 1."""
    switch = Switch(d_in=2, experts=2, k=1)
    switch.W_router.data = torch.eye(2)
    return switch


P = torch.tensor([2.0, 0.0]).softmax(0)[0].item()


def test_latents_by_hand(switch) -> None:
    x_BD = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    z_BF = torch.tensor([[1.0, 3.0, 9.0, 9.0], [9.0, 9.0, 4.0, -1.0]])
    expected = torch.tensor([[0.0, 3 * P, 0.0, 0.0], [0.0, 0.0, 4 * P, 0.0]])
    torch.testing.assert_close(switch(z_BF, x_BD), expected)


def test_a_negative_latent_is_not_kept(switch) -> None:
    assert not switch(torch.full((1, 4), -1.0), torch.tensor([[2.0, 0.0]])).any()


def test_any_leading_shape() -> None:
    torch.manual_seed(0)
    switch, z, x = Switch(d_in=8, experts=4, k=2), torch.randn(3, 5, 16), torch.randn(3, 5, 8)
    torch.testing.assert_close(switch(z, x).flatten(0, 1), switch(z.flatten(0, 1), x.flatten(0, 1)))


def make_trainer(**options: object) -> Trainer:
    torch.manual_seed(0)
    return Trainer(find_recipe("switch").make(RunConfig(8, 32, 20, 64), {"k": 4, "experts": 4, **options}), 20, "cpu")


def test_balance_is_one_where_all_get_their_share_and_the_count_where_one_gets_all() -> None:
    trainer = make_trainer()
    switch = trainer.variant.sae.activation[0]
    switch.W_router.data = torch.eye(8)[:, :4] * 100
    balance = LoadBalanceLoss(switch)
    even = trainer.variant(trainer.i, torch.eye(8)[:4].repeat(4, 1), trainer.optimizer)
    assert balance(even).item() == pytest.approx(1.0) and even.metrics["busiest_expert"] == 0.25
    one = trainer.variant(trainer.i, torch.eye(8)[:1].repeat(16, 1), trainer.optimizer)
    assert balance(one).item() == pytest.approx(4.0) and one.metrics["busiest_expert"] == 1.0


def test_balance_by_hand_and_its_gradient_through_probabilities_alone(switch) -> None:
    trainer = Trainer(find_recipe("switch").make(RunConfig(2, 4, 20, 2), {"k": 1, "experts": 2}), 20, "cpu")
    x_BD = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 2.0], [1.0, 0.0]])
    step = trainer.variant(trainer.i, x_BD, trainer.optimizer)
    loss = LoadBalanceLoss(switch)(step)
    mean_E = (x_BD @ switch.W_router).softmax(1).mean(0)
    expected = 2 * (0.75 * mean_E[0] + 0.25 * mean_E[1])
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        torch.autograd.grad(loss, switch.W_router), torch.autograd.grad(expected, switch.W_router)
    )


def test_reconstruction_teaches_the_router() -> None:
    trainer = make_trainer()
    trainer.variant.terms["mse"](trainer.variant(trainer.i, torch.randn(64, 8), trainer.optimizer)).backward()
    assert trainer.variant.sae.activation[0].W_router.grad.any()


def test_normalisation_folds_into_the_router() -> None:
    trainer = make_trainer(lr=1e-2, warmup=0)
    for _ in range(10):
        trainer.step(torch.randn(64, 8))
    sae, mean_D, x_BD = trainer.variant.sae, torch.randn(8), 10 * torch.randn(256, 8)
    assert sae.activation[0].b_router.any()
    raw = fold_normalization(sae, 5.0, mean_D)
    torch.testing.assert_close(raw.encode(x_BD), 5 * sae.encode((x_BD - mean_D) / 5), rtol=1e-4, atol=1e-4)


def test_latents_of_one_expert_a_token() -> None:
    trainer = make_trainer()
    f_BF = trainer.variant(trainer.i, torch.randn(64, 8), trainer.optimizer).f_BF
    used_BE = (f_BF.unflatten(1, (4, 8)) != 0).any(-1)
    assert (used_BE.sum(1) == 1).all() and (f_BF != 0).sum(1).max() <= 4
    assert used_BE.any(0).sum() > 1  # tokens use different experts


def test_experts_fit_the_dictionary() -> None:
    assert make_trainer(experts=None, k=16).variant.sae.activation[0].experts == 2
    with pytest.raises(UsageError, match="32 latents cannot be divided into 3 equal experts"):
        make_trainer(experts=3)
    with pytest.raises(UsageError, match="at least k=9"):
        make_trainer(k=9)
