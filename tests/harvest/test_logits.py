"""Logits of a bfloat16 model are summed in float32, and the model's changes to them are computed in float32."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sae.evaluate.metrics.splice_losses import CountedTokens
from sae.harvest import logits
from sae.harvest.logits import unrounded_linear, unrounded_logits
from sae.harvest.model import LanguageModel, find_model, load_model

CAP = 30.0  # Gemma 2's


@pytest.fixture(scope="module")
def bfloat16_model(tiny_model: Path) -> LanguageModel:
    return load_model(*find_model(str(tiny_model)), dtype="bfloat16", device="cpu")


def exact_logits(model: LanguageModel, final_TD: Tensor) -> Tensor:
    weight_VD = model.model.get_output_embeddings().weight.double()
    return CAP * torch.tanh(final_TD.double() @ weight_VD.T / CAP)


def exact_kl(model: LanguageModel, one_TD: Tensor, other_TD: Tensor, rounded: bool = False) -> Tensor:
    logits = [exact_logits(model, final_TD) for final_TD in (one_TD, other_TD)]
    one_TV, other_TV = ((one.bfloat16().double() if rounded else one).log_softmax(-1) for one in logits)
    return (one_TV.exp() * (one_TV - other_TV)).sum(-1)


@torch.no_grad()
def test_logits_are_those_of_the_weights_and_not_rounded(bfloat16_model: LanguageModel) -> None:
    final_NSD = (4 * torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))).bfloat16()
    logits_NSV = bfloat16_model.unembed(final_NSD)
    assert logits_NSV.dtype == torch.float32 and logits_NSV.shape == (2, 3, 8192)
    expected_NSV = exact_logits(bfloat16_model, final_NSD)
    assert (logits_NSV - expected_NSV).abs().max() < 1e-5
    # the error of the logits that the model itself returns
    assert (logits_NSV.bfloat16() - expected_NSV).abs().max() > 1e-2


@torch.no_grad()
def test_a_kl_of_logits_that_differ_by_less_than_a_step_of_bfloat16_is_right(bfloat16_model: LanguageModel) -> None:
    """Two residuals differ in the last bit of a few dimensions.

    Their logits are mostly equal after rounding, or else the rounding error dominates their difference.
    """
    one_TD = (4 * torch.randn(64, 32, generator=torch.Generator().manual_seed(1))).bfloat16()
    bits_TD = one_TD.view(torch.int16).clone()
    bits_TD[:, :4] += 1
    other_TD = bits_TD.view(torch.bfloat16)
    gap_TV = (exact_logits(bfloat16_model, one_TD) - exact_logits(bfloat16_model, other_TD)).abs()
    step_TV = exact_logits(bfloat16_model, one_TD).abs() * 2**-8  # of bfloat16, at least
    assert (gap_TV < step_TV).double().mean() > 0.5
    tokens = CountedTokens(1, torch.zeros(64).long(), torch.zeros(64).long(), torch.ones(64).bool())
    _, losses = tokens.losses(bfloat16_model, [one_TD, other_TD], 24)
    expected_T = exact_kl(bfloat16_model, one_TD, other_TD)
    torch.testing.assert_close(losses.kl_T.double(), expected_T, rtol=5e-3, atol=1e-6)
    rounded_T = exact_kl(bfloat16_model, one_TD, other_TD, rounded=True)  # from logits as the model itself returns them
    assert (rounded_T - expected_T).abs().mean() > 10 * expected_T.mean() > 1e-5
    expected_ce_T = -exact_logits(bfloat16_model, other_TD).log_softmax(-1)[:, 0]
    torch.testing.assert_close(losses.ce_T.double(), expected_ce_T, rtol=1e-5, atol=1e-5)


def test_gradients_are_those_of_the_model(bfloat16_model: LanguageModel) -> None:
    """Gradients have the type of the residual, as RAVEL's masks require."""
    final_TD = torch.randn(5, 32, generator=torch.Generator().manual_seed(2)).bfloat16().requires_grad_()
    bfloat16_model.unembed(final_TD).logsumexp(-1).sum().backward()
    exact_TD = final_TD.detach().double().requires_grad_()
    exact_logits(bfloat16_model, exact_TD).logsumexp(-1).sum().backward()
    assert final_TD.grad is not None and final_TD.grad.dtype == torch.bfloat16
    torch.testing.assert_close(final_TD.grad.double(), exact_TD.grad, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("rows", [0, 7, 1 << 20])
def test_weights_in_blocks_give_the_same(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x_TD, weight_VD, bias_V = torch.randn(3, 8).bfloat16(), torch.randn(20, 8).bfloat16(), torch.randn(20).bfloat16()
    expected = x_TD.double() @ weight_VD.double().T + bias_V.double()
    monkeypatch.setattr(logits, "WEIGHTS_AT_ONCE", rows * 8)
    torch.testing.assert_close(unrounded_linear(x_TD, weight_VD, bias_V).double(), expected, rtol=1e-5, atol=1e-5)
    finer_TD = x_TD + x_TD.float() * 2**-12  # the last layer reads residuals in the model's type
    assert torch.equal(unrounded_linear(finer_TD, weight_VD, bias_V), unrounded_linear(x_TD, weight_VD, bias_V))


def test_nothing_is_left_behind_and_other_heads_stay_as_they_are(bfloat16_model: LanguageModel) -> None:
    head = bfloat16_model.model.get_output_embeddings()
    with unrounded_logits(bfloat16_model.model):
        assert "forward" in vars(head)
    assert "forward" not in vars(head)

    class Model(nn.Module):
        def __init__(self, head: nn.Module) -> None:
            super().__init__()
            self.head = head

        def get_output_embeddings(self) -> nn.Module:
            return self.head

    class Quantized(nn.Linear):
        pass

    for changed in (nn.Linear(4, 4).bfloat16(), nn.Linear(4, 4).half()):
        with unrounded_logits(Model(changed)):
            assert changed(torch.ones(1, 4)).dtype == torch.float32
    for kept in (nn.Linear(4, 4), Quantized(4, 4).bfloat16()):
        with unrounded_logits(Model(kept)):
            assert "forward" not in vars(kept)
    with unrounded_logits(nn.Identity()):
        pass
