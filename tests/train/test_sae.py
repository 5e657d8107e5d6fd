"""The SAE: its identities and gradients, folding, and loading, including damaged files."""

import math
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sae.common.errors import DamagedError, UsageError
from sae.common.schemas import SAE_RECORD
from sae.train.activation_functions import BatchTopK, ReLU, TopK
from sae.train.sae import SAE, fold_normalization, load_sae, save_sae

from ..run_records import change_record


def random_sae(d_in: int = 6, d_sae: int = 10, activation=(), **options) -> SAE:
    """An SAE in float64 with biases that are not zero."""
    torch.manual_seed(0)
    sae = SAE(d_in, d_sae, activation, **options).double()
    with torch.no_grad():
        sae.b_enc.normal_()
        sae.b_dec.normal_()
        sae.W_enc.normal_()
    return sae


def test_the_bias_goes_first() -> None:
    """x W + (b_enc - b_dec W) = (x - b_dec) W + b_enc."""
    sae, x_BD = random_sae(), torch.randn(5, 6, dtype=torch.float64)
    torch.testing.assert_close(sae.pre_activations(x_BD), (x_BD - sae.b_dec) @ sae.W_enc + sae.b_enc)


def test_without_pre_bias_the_encoder_sees_x() -> None:
    sae, x_BD = random_sae(pre_bias=False), torch.randn(5, 6, dtype=torch.float64)
    torch.testing.assert_close(sae.pre_activations(x_BD), x_BD @ sae.W_enc + sae.b_enc)


@pytest.mark.parametrize("activation", [ReLU(), TopK(3), BatchTopK(2.5)], ids=lambda a: a.name)
def test_gradients_are_those_of_the_plain_form_and_of_the_closed_form(activation) -> None:
    """With g = 2(x_hat - x)/B and d_pre = g W_dec^T on the kept latents:

    dW_dec = f^T g, db_dec = sum g - (sum d_pre) W_enc^T, dW_enc = (x - b_dec)^T d_pre, db_enc = sum d_pre.
    """
    sae, x_BD = random_sae(activation=[activation]), torch.randn(32, 6, dtype=torch.float64)
    f_BF = sae.encode(x_BD)
    x_hat_BD = sae.decode(f_BF)
    (x_hat_BD - x_BD).square().sum(-1).mean().backward()
    with torch.no_grad():
        g_BD = 2 * (x_hat_BD - x_BD) / len(x_BD)
        d_pre_BF = g_BD @ sae.W_dec.T * (f_BF > 0)
        expected = {
            "W_dec": f_BF.T @ g_BD,
            "b_dec": g_BD.sum(0) - d_pre_BF.sum(0) @ sae.W_enc.T,
            "W_enc": (x_BD - sae.b_dec).T @ d_pre_BF,
            "b_enc": d_pre_BF.sum(0),
        }
    for name, gradient in expected.items():
        torch.testing.assert_close(getattr(sae, name).grad, gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("pre_bias", [True, False])
def test_folding_scales_biases_and_thresholds_and_keeps_the_weights(pre_bias: bool) -> None:
    activation = BatchTopK(2)
    activation.threshold.fill_(0.7)
    sae, mean_D = random_sae(activation=[activation], pre_bias=pre_bias).eval(), torch.randn(6, dtype=torch.float64)
    raw, x_BD = fold_normalization(sae, 5.0, mean_D), 20 * torch.randn(50, 6, dtype=torch.float64)
    assert float(raw.activation[0].threshold) == pytest.approx(3.5)
    assert float(activation.threshold) == pytest.approx(0.7)  # the trained one is unchanged
    assert torch.equal(raw.W_enc, sae.W_enc) and torch.equal(raw.W_dec, sae.W_dec)
    f_BF = sae.encode((x_BD - mean_D) / 5)
    torch.testing.assert_close(raw.encode(x_BD), 5 * f_BF)
    torch.testing.assert_close(raw.decode(raw.encode(x_BD)), 5 * sae.decode(f_BF) + mean_D)


class Products(TorchDispatchMode):
    """Counts matrix products of at least `size` multiplications."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.count = size, 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm):
            left, right = arguments[-2:]
            self.count += left.shape[-2] * left.shape[-1] * right.shape[-1] >= self.size
        return function(*arguments, **(keywords or {}))


def test_a_dense_step_makes_five_matrix_products(make_trainer, batches) -> None:
    training = make_trainer("relu")
    with Products(64 * 32 * 512) as products:
        training.step(batches[0])
    assert products.count == 5


def saved(folder: Path, activation=()) -> SAE:
    sae = SAE(6, 10, activation)
    save_sae(sae, folder, {"layer": 3})
    return sae


def describe(folder: Path, **changes: object) -> None:
    """Change entries of sae.json deliberately."""
    change_record(SAE_RECORD, folder / "sae.json", changes)


def test_rows_of_any_dtype_are_encoded_and_other_widths_rejected() -> None:
    sae, x = SAE(8, 16, [TopK(2)]), torch.randn(3, 8).bfloat16()
    assert torch.equal(sae.encode(x), sae.encode(x.float()))
    assert torch.equal(sae.encode(x.double()), sae.encode(x.float()))
    with pytest.raises(UsageError, match=r"shape \(..., 8\), where 8 is its d_in, and got \(3, 7\)"):
        sae.encode(x[:, :7])
    with pytest.raises(UsageError, match=r"where 16 is its d_sae, and got \(3, 8\)"):
        sae.decode(x)


def test_a_folder_without_an_sae_is_rejected_with_the_command_that_makes_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no trained SAE.*Train one with `sae train`\.$"):
        load_sae(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(UsageError, match=r"no trained SAE.*sae train --resume"):
        load_sae(tmp_path)


def test_an_unknown_activation_is_named_with_the_known_ones(tmp_path: Path) -> None:
    saved(tmp_path)
    describe(tmp_path, activation=[{"name": "swish"}])
    with pytest.raises(UsageError, match=r"unknown activation 'swish'; this version has .*batchtopk.*relu.*topk"):
        load_sae(tmp_path)


def test_a_newer_format_is_rejected(tmp_path: Path) -> None:
    saved(tmp_path)
    describe(tmp_path, format=99)
    with pytest.raises(UsageError, match="format 99, but this version reads 1 and 2. Upgrade"):
        load_sae(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"d_in": 7},
        {"d_sae": 10**9},
        {"activation": [{"name": "topk", "kay": 3}]},
        {"activation": [{"name": "batchtopk", "k": 3}]},
    ],
    ids=["d_in", "d_sae", "option", "buffer"],
)
def test_an_sae_json_of_other_weights_is_damage(tmp_path: Path, changes: dict[str, object]) -> None:
    saved(tmp_path)
    describe(tmp_path, **changes)
    with pytest.raises(DamagedError, match=r"sae\.safetensors"):
        load_sae(tmp_path)


def test_a_truncated_sae_json_is_damage(tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / "sae.json").write_text((tmp_path / "sae.json").read_text()[:40])
    with pytest.raises(DamagedError, match=r"sae\.json cannot be read"):
        load_sae(tmp_path)


def test_truncated_or_missing_weights_are_damage(tmp_path: Path) -> None:
    saved(tmp_path)
    weights = tmp_path / "sae.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(DamagedError, match="does not hold the SAE that sae.json describes"):
        load_sae(tmp_path)
    weights.unlink()
    with pytest.raises(DamagedError, match="does not hold the SAE that sae.json describes"):
        load_sae(tmp_path)


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    sae = SAE(4, 8)
    sae.b_enc.data[3] = math.nan
    save_sae(sae, tmp_path, {})
    with pytest.raises(DamagedError, match="b_enc has values that are not finite"):
        load_sae(tmp_path)


def test_one_flipped_bit_of_the_weights_is_found(tmp_path: Path) -> None:
    saved(tmp_path)
    weights = tmp_path / "sae.safetensors"
    data = bytearray(weights.read_bytes())
    data[-40] ^= 0x40
    weights.write_bytes(data)
    with pytest.raises(DamagedError, match="does not have the checksum that sae.json records.*sae train"):
        load_sae(tmp_path)
