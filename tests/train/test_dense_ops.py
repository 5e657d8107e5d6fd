"""The products of a dense step, and what is fused into their passes, equal autograd on the same formulas."""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sae.train import dense_ops, sparse_ops
from sae.train.activation_functions import BatchTopK, KeepTopK, ReLU, TopK
from sae.train.losses import L1
from sae.train.mechanisms import ActivityEMA
from sae.train.memory import LiveBytes
from sae.train.recipe import find_recipe
from sae.train.sae import SAE
from sae.train.step import Step
from sae.train.variant import RunConfig

D_IN, D_SAE, BATCH = 6, 40, 32


def sae_and_rows(pre_bias: bool = True, *activation) -> tuple[SAE, Tensor]:
    torch.manual_seed(0)
    sae = SAE(D_IN, D_SAE, activation, pre_bias=pre_bias).double()
    for parameter in sae.parameters():
        torch.nn.init.normal_(parameter)
    return sae, torch.randn(BATCH, D_IN, dtype=torch.float64)


def plain(sae: SAE, x_BD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pre-activations, latents and reconstruction by the formulas of train/sae.py."""
    pre_BF = (x_BD - sae.b_dec if sae.pre_bias else x_BD) @ sae.W_enc + sae.b_enc
    return pre_BF, pre_BF.relu(), pre_BF.relu() @ sae.W_dec + sae.b_dec


def gradients(sae: SAE, loss: Tensor) -> dict[str, Tensor | None]:
    sae.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in sae.named_parameters()}


LOSSES = {
    "both": lambda f, recon: recon.square().sum() + 0.3 * dense_ops.total(f) + f[0].square().sum(),
    "penalty": lambda f, recon: recon.square().sum() + 0.3 * dense_ops.total(f),
    "reconstruction": lambda f, recon: recon.square().sum(),
    "latents": lambda f, recon: f.square().sum() + 0.3 * dense_ops.total(f),
}


@pytest.mark.parametrize("pre_bias", [True, False])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_relu_step_has_the_latents_and_gradients_of_its_formula(loss: str, pre_bias: bool) -> None:
    sae, x_BD = sae_and_rows(pre_bias)
    _, f_BF, recon_BD, *_ = sae.run(x_BD)
    _, expected_f_BF, expected_recon_BD = plain(sae, x_BD)
    torch.testing.assert_close(f_BF, expected_f_BF)
    torch.testing.assert_close(recon_BD, expected_recon_BD)
    got = gradients(sae, LOSSES[loss](f_BF, recon_BD))
    expected = gradients(sae, LOSSES[loss](expected_f_BF, expected_recon_BD))
    for name, gradient in expected.items():
        assert (gradient is None) == (got[name] is None), name
        if gradient is not None:
            assert gradient.any()
            torch.testing.assert_close(got[name], gradient, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("activation", [TopK(8), BatchTopK(8.5)], ids=["topk", "batchtopk"])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_step_that_selects_latents_has_the_gradients_of_its_formula(loss: str, activation: KeepTopK) -> None:
    """Few pre-activations are positive, so that some of the selected ones become 0 and get no gradient."""
    sae, x_BD = sae_and_rows(True, activation)
    sae.b_enc.data -= 6
    _, f_BF, recon_BD, kept, _, selected_N, *_ = sae.run(x_BD)
    expected_BF = activation(sae.pre_activations(x_BD))
    expected_BD = expected_BF @ sae.W_dec + sae.b_dec
    assert kept is None and torch.equal(f_BF, expected_BF) and torch.equal(recon_BD, expected_BD)
    assert (selected_N == 0).any() and torch.equal(selected_N[selected_N > 0].sort()[0], f_BF[f_BF > 0].sort()[0])
    got, expected = (gradients(sae, LOSSES[loss](*made)) for made in ((f_BF, recon_BD), (expected_BF, expected_BD)))
    assert any(gradient is not None for gradient in expected.values())
    for name, gradient in expected.items():
        assert (gradient is None) == (got[name] is None), name
        if gradient is not None:
            torch.testing.assert_close(got[name], gradient, msg=lambda m, n=name: f"{n}: {m}")


def test_latents_overwrite_their_pre_activations() -> None:
    sae, x_BD = sae_and_rows()
    with LiveBytes() as live:
        f_BF, _ = dense_ops.encode_relu_decode(x_BD, sae.W_enc, sae.b_enc, sae.b_dec, sae.W_dec)
    assert f_BF.nbytes < live.peak < 2 * f_BF.nbytes


@pytest.mark.parametrize("pre_bias", [True, False])
def test_pre_activations_have_the_gradients_of_their_formula(pre_bias: bool) -> None:
    sae, x_BD = sae_and_rows(pre_bias)
    pre_BF = sae.pre_activations(x_BD)
    torch.testing.assert_close(pre_BF, plain(sae, x_BD)[0])
    got, expected = gradients(sae, pre_BF.sin().sum()), gradients(sae, plain(sae, x_BD)[0].sin().sum())
    for name in ("W_enc", "b_enc", "b_dec") if pre_bias else ("W_enc", "b_enc"):
        torch.testing.assert_close(got[name], expected[name])


def test_a_trained_sae_sums_as_every_version_did() -> None:
    """Pre-activations equal those of earlier evaluations bit for bit: the product, plus the bias less b_dec W_enc."""
    sae, x_BD = sae_and_rows()
    sae.float().eval()
    rows_BD = x_BD.float()
    assert torch.equal(sae.pre_activations(rows_BD), rows_BD @ sae.W_enc + (sae.b_enc - sae.b_dec @ sae.W_enc))
    assert not torch.equal(sae.pre_activations(rows_BD), sae.train().pre_activations(rows_BD))


@pytest.mark.parametrize("activation", [[], [TopK(30)]], ids=["relu", "topk"])
def test_rows_that_ask_for_a_gradient_get_it_in_training_too(activation) -> None:
    sae, x_BD = sae_and_rows(True, *activation)
    found = []
    for training in (True, False):
        rows_BD = x_BD.clone().requires_grad_()
        out = sae.train(training)(rows_BD)
        found.append(torch.autograd.grad(out.recon_BD.square().sum(), rows_BD)[0])
    assert found[0].any()
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("frozen", ["W_enc", "W_dec"])
def test_frozen_weights_get_no_gradient_and_cost_no_product(frozen: str) -> None:
    operations = []
    for freeze in (False, True):
        sae, x_BD = sae_and_rows()
        getattr(sae, frozen).requires_grad_(not freeze)
        loss = LOSSES["both"](*sae.run(x_BD)[1:3])
        with FlopCounterMode(display=False) as counter:
            got = gradients(sae, loss)
        operations.append(counter.get_total_flops())
    assert [name for name, gradient in got.items() if gradient is None] == [frozen]
    assert operations[0] - operations[1] == 2 * BATCH * D_IN * D_SAE


def test_a_loss_on_the_latents_alone_costs_one_product() -> None:
    """The product is the gradient of W_enc. No gradient of zeros passes through the decoder."""
    sae, x_BD = sae_and_rows()
    loss = LOSSES["latents"](*sae.run(x_BD)[1:3])
    with FlopCounterMode(display=False) as counter:
        gradients(sae, loss)
    assert counter.get_total_flops() == 2 * BATCH * D_IN * D_SAE


def test_latents_in_bfloat16_and_gradients_in_float32() -> None:
    sae, x_BD = sae_and_rows()
    sae.float()
    for activation in ([], [BatchTopK(30)]):
        sae = SAE(D_IN, D_SAE, activation)
        with torch.autocast("cpu", torch.bfloat16):
            out = sae.run(x_BD.float())
            loss = out.recon_BD.float().square().sum() + dense_ops.total(out.f_BF)
        assert out.f_BF.dtype == torch.bfloat16 and loss.dtype == torch.float32
        assert {gradient.dtype for gradient in gradients(sae, loss).values()} == {torch.float32}


def test_the_total_is_summed_in_float32() -> None:
    f_BF = torch.ones(300, 300, dtype=torch.bfloat16, requires_grad=True)
    total = dense_ops.total(f_BF)
    assert total.dtype == torch.float32 and float(total.detach()) == 90_000  # bfloat16 would make it 90112
    assert dense_ops.total(f_BF.double()).dtype == torch.float64
    (gradient,) = torch.autograd.grad(3 * total, f_BF)
    assert gradient.stride() == (0, 0) and gradient.dtype == torch.bfloat16 and (gradient == 3).all()


def test_the_gradient_of_a_bias_is_summed_in_float32() -> None:
    ones = torch.ones(257, 3, dtype=torch.bfloat16)
    b_D_, w_DF_, b_F_ = dense_ops.encoder_gradients(ones[:, :2], torch.ones(2, 3), ones, True, None)
    assert b_F_.tolist() == [257.0] * 3 and b_D_.tolist() == [-771.0] * 2 and w_DF_ is None  # bfloat16 has 256 or 258


def test_the_squared_error_and_its_gradient() -> None:
    recon_BD = torch.tensor([[1.0, 2.0], [0.0, 3.0]], requires_grad=True)
    error = dense_ops.squared_error(recon_BD, torch.tensor([[0.0, 4.0], [0.0, 0.0]]))
    assert float(error) == 1 + 4 + 9
    (0.5 * error).backward()
    assert recon_BD.grad.tolist() == [[1.0, -2.0], [0.0, 3.0]]


def test_the_squared_error_is_one_whether_errors_are_read_first_or_not(monkeypatch) -> None:
    steps = [step_of("relu", monkeypatch) for _ in range(2)]
    expected = float((steps[0].x_BD - steps[0].recon_BD.detach()).square().sum())
    assert steps[0].error_BD.shape == (BATCH, D_IN)
    assert [float(step.squared_error.detach()) for step in steps] == pytest.approx([expected] * 2) and expected > 1


# --- what a step holds ------------------------------------------------------------------------------------------------


def step_of(recipe: str, monkeypatch, **options) -> Step:
    monkeypatch.setattr(sparse_ops, "SPARSE_FROM", {"cpu": {"float32": 1}})
    torch.manual_seed(0)
    variant = find_recipe(recipe).make(RunConfig(D_IN, D_SAE, 10, BATCH), options)
    return variant(torch.tensor(0), torch.randn(BATCH, D_IN), torch.optim.AdamW(variant.parameters()))


def test_counts_are_those_of_the_latents_and_need_no_dense_ones(monkeypatch) -> None:
    for recipe, options in (("relu", {}), ("topk", {"k": 30}), ("batchtopk", {"k": 2.5}), ("jumprelu", {})):
        step = step_of(recipe, monkeypatch, **options)
        counts_F, l0, fired_F = step.counts_F, step.l0, step.fired_F
        size = float(L1()(step).detach())
        assert (step.kept is not None) == (step.computed_f_BF is None) == ("topk" in recipe)
        active_BF = step.f_BF != 0
        assert size == pytest.approx(float(step.f_BF.sum()) / BATCH)
        assert torch.equal(counts_F, active_BF.sum(0).float()) and torch.equal(fired_F, active_BF.any(0))
        assert torch.equal(ActivityEMA(D_SAE).statistic(step), active_BF.float().mean(0))
        assert float(l0) == pytest.approx(float(active_BF.float().sum(1).mean())) and 0 < counts_F.min() + l0


def test_counts_follow_new_latents(monkeypatch) -> None:
    step = step_of("relu", monkeypatch)
    assert step.l0 > 1 and step.fired_F.sum() > 1
    step.f_BF = torch.eye(BATCH, D_SAE)
    assert float(step.l0) == 1 and step.fired_F.sum() == BATCH


def test_dense_latents_have_their_gradient_whoever_reads_them_first(monkeypatch) -> None:
    step = step_of("topk", monkeypatch, k=3)
    with torch.no_grad():
        assert step.f_BF.any()
    step.f_BF.sum().backward()
    assert step.sae.W_enc.grad.any()


def test_relu_keeps_no_pre_activations_and_says_what_to_do(monkeypatch) -> None:
    step = step_of("relu", monkeypatch)
    with pytest.raises(AttributeError, match="step.sae.pre_activations"):
        step.pre_BF  # noqa: B018
    torch.testing.assert_close(step.sae.pre_activations(step.x_BD).relu(), step.f_BF)


def test_batchtopk_chooses_the_largest_of_the_batch_by_groups() -> None:
    """The values are those of one `topk` of the batch, with ascending indices. Groups of 8 are used where they pay."""
    torch.manual_seed(0)
    for k, d_sae in ((2.5, 64), (2.5, 63), (30.0, 64)):
        z_BF = torch.randn(BATCH, d_sae)
        index_N = BatchTopK(k).select(z_BF)
        expected = z_BF.flatten().topk(int(k * BATCH)).values
        assert torch.equal(z_BF.flatten()[index_N].sort(descending=True).values, expected)
        assert (index_N.diff() > 0).all()


def test_an_sae_in_training_takes_rows_of_any_shape() -> None:
    """A new SAE is in training mode. Only inputs of shape (B, d_in) use the products of a training step."""
    torch.manual_seed(0)
    x_NSD = torch.randn(3, 5, 8)
    for activation in (ReLU(), TopK(2)):
        sae = SAE(8, 16, [activation])
        torch.nn.init.normal_(sae.b_dec)
        out, rows = sae(x_NSD), sae(x_NSD.flatten(0, 1))
        for of_shape, of_rows in zip((*out[:3], sae.encode(x_NSD)), (*rows[:3], rows.f_BF), strict=True):
            torch.testing.assert_close(of_shape.flatten(0, 1), of_rows)
