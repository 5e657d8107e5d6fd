"""Loss terms that several recipes use, against their equations."""

import pytest
import torch

from sae.train.activation_functions import Activation, TopK, activation_chain
from sae.train.losses import L1, MSE, AuxK, MultiTopK
from sae.train.mechanisms import DeadLatents
from sae.train.sae import SAE
from sae.train.step import Step


def step_of(sae: SAE, x_BD: torch.Tensor, i: int = 0, optimizer=None) -> Step:
    """The step of an SAE on a batch."""
    pre_BF, f_BF, recon_BD, _ = sae(x_BD)
    return Step(torch.tensor(i), sae, optimizer, x_BD, pre_BF, f_BF, recon_BD)


def step_with(x_BD=((0.0,),), f_BF=((0.0,),), recon_BD=((0.0,),), i: int = 0) -> Step:
    """A step with the given tensors.

    Pre-activations differ from latents, so that a test notices if they are confused.
    """
    latents_BF, sae = torch.tensor(f_BF), SAE(len(x_BD[0]), len(f_BF[0]))
    return Step(torch.tensor(i), sae, None, torch.tensor(x_BD), latents_BF - 0.7, latents_BF, torch.tensor(recon_BD))


def test_mse_sums_over_dimensions_and_averages_over_tokens() -> None:
    step = step_with(x_BD=((1.0, 2.0), (3.0, 4.0)), recon_BD=((1.0, 0.0), (0.0, 0.0)))
    assert float(MSE()(step)) == (4 + 9 + 16) / 2


def test_l1_sums_over_latents_and_averages_over_tokens() -> None:
    step = step_with(x_BD=((0.0,), (0.0,)), f_BF=((1.0, 2.0, 0.0), (0.0, 0.0, 4.0)))
    assert float(L1()(step)) == 3.5


def test_l1_of_latents_that_can_be_negative_is_of_their_sizes() -> None:
    """Batch normalization and Gram-Schmidt can make latents negative."""
    step = step_with(x_BD=((0.0,), (0.0,)), f_BF=((1.0, -2.0, 0.0), (0.0, 0.0, -4.0)))
    step.sae.activation = activation_chain([Signed()])
    step.f_BF.requires_grad_()
    loss = L1()(step)
    loss.backward()
    assert loss.item() == 3.5 and step.f_BF.grad.tolist() == [[0.5, -0.5, 0], [0, 0, -0.5]]


class Signed(Activation):
    """The identity as an activation: its latents can be negative."""

    def forward(self, z_BF: torch.Tensor) -> torch.Tensor:
        return z_BF


def dead_set(d_sae: int, dead: list[int]) -> DeadLatents:
    mechanism = DeadLatents(d_sae, after_tokens=1)
    mechanism.since_F[dead] = 1
    mechanism.every_n_steps(None)
    return mechanism


def aux_reference(step: Step, dead: list[int], k_aux: int) -> torch.Tensor:
    """AuxK over the whole width with a mask: slow and obviously right."""
    sae, mask_F = step.sae, torch.zeros(step.sae.d_sae, dtype=torch.bool)
    mask_F[dead] = True
    z_BF = torch.where(mask_F, step.pre_BF.relu(), 0.0)
    kth_B1 = z_BF.sort(dim=1, descending=True).values[:, min(k_aux, len(dead)) - 1 :][:, :1]
    e_hat_BD = torch.where(z_BF >= kth_B1, z_BF, 0.0) @ sae.W_dec  # no b_dec
    e_BD = (step.x_BD - step.recon_BD).detach()
    variance = (e_BD - e_BD.mean(0)).square().sum(1).mean()
    return min(1.0, len(dead) / k_aux) * (e_BD - e_hat_BD).square().sum(1).mean() / variance


def aux_sae(pre_bias: bool = True) -> tuple[SAE, torch.Tensor]:
    torch.manual_seed(0)
    sae = SAE(8, 100, pre_bias=pre_bias)
    with torch.no_grad():
        sae.b_dec.normal_()
        sae.b_enc.normal_(0.5, 0.1)
    return sae, torch.randn(16, 8)


@pytest.mark.parametrize("pre_bias", [True, False])
@pytest.mark.parametrize("dead", [[7], [3, 50, 99], list(range(20, 90)), list(range(100))], ids=len)
def test_auxk_on_the_gathered_dead_is_the_masked_one(dead: list[int], pre_bias: bool) -> None:
    """The value and every gradient agree. Padding (one dead latent is padded to 64) adds nothing."""
    sae, x_BD = aux_sae(pre_bias)
    gradients = []
    for loss in (AuxK(dead_set(100, dead), k_aux=4), lambda step: aux_reference(step, dead, k_aux=4)):
        sae.zero_grad()
        value = loss(step_of(sae, x_BD))
        value.backward()
        gradients.append([value.detach(), *[p.grad.clone() if p.grad is not None else None for p in sae.parameters()]])
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)
    assert gradients[0][2][:, dead].abs().sum(0).gt(0).any()  # the dead latents' columns of W_enc get a gradient
    alive = [n for n in range(100) if n not in dead]
    assert not gradients[0][2][:, alive].any()


def test_auxk_is_zero_without_dead_latents_and_without_a_residual_to_explain() -> None:
    sae, x_BD = aux_sae()
    assert float(AuxK(dead_set(100, []), 4)(step_of(sae, x_BD))) == 0
    value = AuxK(dead_set(100, [1, 2]), 4)(step_of(sae, x_BD[:1]))  # one token: its residual has no variance
    value.backward()
    assert value.item() == 0 and all(p.grad is None or torch.isfinite(p.grad).all() for p in sae.parameters())


def test_multi_topk_is_the_error_with_more_latents_and_teaches_encoder_and_decoder() -> None:
    """x = (3, 2, 1) has orthonormal latents.

    The squared error is 0 with three latents kept, 1^2 with two, and 2^2 + 1^2 with one, which is the SAE's own.
    """
    sae = SAE(3, 3, [TopK(1)], pre_bias=False)
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(3))
        sae.W_dec.copy_(torch.eye(3))
    step = step_of(sae, torch.tensor([[3.0, 2.0, 1.0]]))
    assert [float(term(step).detach()) for term in (MSE(), MultiTopK(2), MultiTopK(3))] == [5.0, 1.0, 0.0]
    MultiTopK(2)(step).backward()
    # The error is e = (0, 0, 1). The gradient of row i of W_dec is -2 f_i e if latent i is kept, and 0 otherwise.
    # Latents whose rows are orthogonal to e get 0.
    assert sae.W_dec.grad.tolist() == [[0, 0, -6], [0, 0, -4], [0, 0, 0]]
    with torch.no_grad():
        sae.W_dec[1] = torch.tensor([0.0, 1.0, 1.0])
    sae.zero_grad()
    MultiTopK(2)(step_of(sae, torch.tensor([[3.0, 2.0, 1.0]]))).backward()
    # x_hat = (3, 2, 2), e = (0, 0, -1): d f_2 = 2 (x_hat - x) . W_dec,2 = 2, though TopK(1) keeps only f_1
    assert sae.W_enc.grad.tolist() == [[0, 6, 0], [0, 4, 0], [0, 2, 0]]


def test_the_options_of_topk_are_its_terms(make_variant) -> None:
    variant = make_variant("topk", k=4, multi=0.125, k_anneal_steps=10)
    assert variant.coefficients["multi"](None) == 0.125 and variant.terms["multi"].activation.k == 16
    assert float(variant.sae.activation[0].now) == 32  # d_in
    assert make_variant("topk", k=200, multi=0.125).terms["multi"].activation.k == 512  # d_sae
    assert "multi" not in make_variant("topk").terms and make_variant("topk").sae.activation[0].now is None
