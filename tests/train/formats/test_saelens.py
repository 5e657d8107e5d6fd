"""Pitfalls of SAELens' files."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae.common.errors import DamagedError, UsageError
from sae.train.formats.import_ import import_sae


def test_b_dec_is_subtracted_by_default(export_with_config, tmp_path, x_RD):
    """A missing `apply_b_dec_to_input` means true, as in SAELens. With false, the latents would be different."""
    folder = export_with_config("relu", "saelens", "apply_b_dec_to_input")
    imported = import_sae(folder, out=tmp_path)
    assert imported.sae.pre_bias
    assert any("cfg.json has no apply_b_dec_to_input" in note for note in imported.notes)
    w = load_file(folder / "sae_weights.safetensors")
    f_RF = ((x_RD - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu()
    assert torch.allclose(imported.sae.encode(x_RD), f_RF, atol=1e-5)
    assert not torch.allclose(imported.sae.encode(x_RD), (x_RD @ w["W_enc"] + w["b_enc"]).relu(), atol=1e-2)


def test_a_rescaled_topk_selects_by_decoder_norms(export_with_config, tmp_path, x_RD):
    folder = export_with_config("topk", "saelens", rescale_acts_by_decoder_norm=True)
    w = load_file(folder / "sae_weights.safetensors")
    n_F = torch.linspace(0.2, 3, 16)
    w["W_dec"] *= n_F[:, None]
    save_file(w, folder / "sae_weights.safetensors")
    top = ((x_RD @ w["W_enc"] + w["b_enc"]) * n_F).topk(4)
    f_RF = torch.zeros(16, 16).scatter(1, top.indices, top.values.relu())
    assert torch.allclose(import_sae(folder, out=tmp_path).sae.encode(x_RD), f_RF, atol=1e-5)


def test_a_rescaled_topk_with_a_zero_row_is_damaged(export_with_config, tmp_path):
    folder = export_with_config("topk", "saelens", rescale_acts_by_decoder_norm=True)
    w = load_file(folder / "sae_weights.safetensors")
    w["W_dec"][[3, 7]] = 0
    save_file(w, folder / "sae_weights.safetensors")
    with pytest.raises(DamagedError, match="divides by the norms of W_dec's rows, but 2 of them are zero"):
        import_sae(folder, out=tmp_path)


@pytest.mark.parametrize("activation", ["relu", "topk", "jumprelu", "gated"])
def test_a_scaling_factor_is_folded(export_with_config, make_sae, tmp_path, x_RD, activation):
    """x is multiplied by 4 before encoding and x_hat is divided by 4, so f is that of the unscaled SAE on 4 x."""
    folder = export_with_config(
        activation, "saelens", normalize_activations="expected_average_only_in", norm_scaling_factor=4.0
    )
    imported, unscaled = import_sae(folder, out=tmp_path), make_sae(activation, unit=True)
    assert torch.allclose(imported.sae.encode(x_RD), unscaled.encode(4 * x_RD), rtol=1e-4, atol=1e-4)
    assert torch.allclose(
        imported.sae.decode(imported.sae.encode(x_RD)), unscaled.decode(unscaled.encode(4 * x_RD)) / 4, atol=1e-4
    )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"normalize_activations": "constant_norm_rescale"}, "divides each token by its own norm"),
        ({"normalize_activations": "covariance_whitening"}, "whitens the input"),
        ({"normalize_activations": "expected_average_only_in"}, "but the files do not record the factor"),
        (
            {"architecture": "transcoder"},
            "architecture 'transcoder' is not supported; supported are standard, topk, jumprelu, gated",
        ),
        ({"architecture": "batchtopk"}, "SAELens saves as jumprelu for inference"),
        ({"finetuning_scaling_factor": True}, "finetuning_scaling_factor"),
        ({"activation_fn_str": "tanh-relu"}, "activation_fn 'tanh-relu' contradicts architecture standard"),
        ({"activation_fn_str": "topk"}, "activation_fn 'topk' contradicts architecture standard"),
        (
            {"metadata": {"model_name": "gpt2", "hook_name": "blocks.3.hook_mlp_in"}},
            "The hook point 'blocks.3.hook_mlp_in' is not supported",
        ),
        ({"metadata": {}}, "do not record their model and layer. Add --model google/gemma-2-2b --layer 12"),
        ({"metadata": {"model_name": "gpt2"}}, "do not record their layer. Add --layer 12"),
    ],
)
def test_unsupported_configs_are_rejected(export_with_config, tmp_path, changed, message):
    folder = export_with_config("relu", "saelens", **changed)
    with pytest.raises(UsageError) as error:
        import_sae(folder, out=tmp_path / "runs")
    assert message in str(error.value)
    assert not (tmp_path / "runs").exists()


def test_a_config_from_before_version_6_is_read(export_with_config, tmp_path):
    """Before version 6, model and hook point were top-level keys, and topk was an activation of `standard`."""
    old = {"model_name": "gemma-2-2b", "hook_point": "blocks.7.hook_resid_post", "context_size": 64}
    topk = {"architecture": "standard", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 4}}
    folder = export_with_config("topk", "saelens", "metadata", "k", normalize_activations=False, **topk, **old)
    sae = import_sae(folder, out=tmp_path).sae
    assert sae.activation[0].k == 4
    assert (sae.origin["model"]["name"], sae.origin["layer"], sae.origin["context"]) == ("google/gemma-2-2b", 7, 64)


def test_bfloat16_weights_are_read_exactly(export_with_config, tmp_path):
    folder = export_with_config("relu", "saelens")
    w = {name: t.bfloat16() for name, t in load_file(folder / "sae_weights.safetensors").items()}
    save_file(w, folder / "sae_weights.safetensors")
    assert torch.equal(import_sae(folder, out=tmp_path).sae.W_enc, w["W_enc"].float())
