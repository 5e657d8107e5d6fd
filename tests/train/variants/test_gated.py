"""The gated SAE: values worked by hand, and which weights its gradients reach."""

import pytest
import torch

from sae.train.loop import Trainer
from sae.train.losses import MSE
from sae.train.recipe import find_recipe
from sae.train.sae import fold_normalization
from sae.train.variant import RunConfig
from sae.train.variants.gated import Gated, GateL1, GateMSE


@pytest.fixture
def trainer() -> Trainer:
    """Two latents along the axes. The gate of latent 0 opens more easily, and latent 1 has twice the magnitude."""
    torch.manual_seed(0)
    trainer = Trainer(find_recipe("gated").make(RunConfig(2, 2, 100, 2), {}), 100, "cpu")
    sae = trainer.variant.sae
    sae.W_enc.data, sae.W_dec.data = torch.eye(2), torch.eye(2)
    gated = sae.activation[0]
    gated.b_gate.data = torch.tensor([0.5, -1.0])
    gated.b_mag.data = torch.tensor([0.0, 0.25])
    gated.r_mag.data = torch.tensor([1.0, 2.0]).log()
    return trainer


def forward(trainer: Trainer, *rows: list[float]):
    return trainer.variant(trainer.i, torch.tensor(rows), trainer.optimizer)


def test_latents_by_hand(trainer) -> None:
    """z = x. Latent 0: gate z > -0.5, size ReLU(z). Latent 1: gate z > 1, size ReLU(2 z + 0.25)."""
    step = forward(trainer, [3.0, 2.0], [-0.25, 0.75], [-1.0, 1.5])
    assert step.f_BF.tolist() == [[3.0, 4.25], [0.0, 0.0], [0.0, 3.25]]


def test_terms_by_hand(trainer) -> None:
    step = forward(trainer, [3.0, 2.0], [-0.25, 0.75])
    gated = trainer.variant.sae.activation[0]
    # f_gate = ReLU(z + b_gate): 3.5, 1 and 0.25, 0; its errors 0.5, -1 and 0.5, -0.75
    assert GateL1(gated)(step).item() == pytest.approx((3.5 + 1.0 + 0.25) / 2)
    assert GateMSE(gated)(step).item() == pytest.approx((0.25 + 1.0 + 0.25 + 0.5625) / 2)


def test_the_gate_reconstructs_through_a_decoder_that_it_cannot_move(trainer) -> None:
    sae = trainer.variant.sae
    sae.b_dec.data = torch.tensor([0.3, -0.2])
    x_BD = torch.tensor([[3.0, 2.0], [1.0, 4.0]])
    GateMSE(sae.activation[0])(trainer.variant(trainer.i, x_BD, trainer.optimizer)).backward()
    assert sae.W_dec.grad is None
    assert sae.W_enc.grad.any() and sae.activation[0].b_gate.grad.any()
    # the gradient reaches b_dec only through the encoder's x - b_dec
    f_BF = x_BD - sae.b_dec.detach() + sae.activation[0].b_gate.detach()  # all positive here
    error_BD = x_BD - f_BF - sae.b_dec.detach()
    torch.testing.assert_close(sae.b_dec.grad, 2 * error_BD.mean(0))


def test_reconstruction_does_not_teach_the_gate(trainer) -> None:
    MSE()(forward(trainer, [3.0, 2.0], [1.0, 4.0])).backward()
    gated = trainer.variant.sae.activation[0]
    assert gated.b_gate.grad is None
    assert gated.b_mag.grad.any() and gated.r_mag.grad.any()


def test_it_is_a_jumprelu_whose_threshold_the_biases_give() -> None:
    """The gate z + b_gate > 0 is equivalent to m > b_mag - exp(r) b_gate for the magnitude m = exp(r) z + b_mag."""
    torch.manual_seed(0)
    gated = Gated(16)
    for parameter in gated.parameters():
        torch.nn.init.normal_(parameter)
    z_BF = torch.randn(256, 16)
    size_BF = gated.r_mag.exp() * z_BF + gated.b_mag
    theta_F = (gated.b_mag - gated.r_mag.exp() * gated.b_gate).clamp(min=0)
    torch.testing.assert_close(gated(z_BF), size_BF * (size_BF > theta_F))


def test_normalisation_folds_into_both_biases(trainer) -> None:
    sae, mean_D = trainer.variant.sae, torch.tensor([1.0, -2.0])
    raw, x_BD = fold_normalization(sae, 5.0, mean_D), 10 * torch.randn(64, 2)
    torch.testing.assert_close(raw.encode(x_BD), 5 * sae.encode((x_BD - mean_D) / 5), rtol=1e-4, atol=1e-4)


def test_the_encoder_has_no_third_bias() -> None:
    torch.manual_seed(0)
    trainer = Trainer(find_recipe("gated").make(RunConfig(8, 16, 20, 32), {"lr": 1e-2, "warmup": 0}), 20, "cpu")
    for _ in range(20):
        trainer.step(torch.randn(32, 8))
    sae = trainer.variant.sae
    assert not sae.b_enc.any()
    assert sae.activation[0].b_gate.any() and sae.activation[0].b_mag.any() and sae.activation[0].r_mag.any()
