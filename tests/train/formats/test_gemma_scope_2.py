"""Gemma Scope 2: the imported SAE, its model and hook point, and the other objects in its repositories."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sae.cache.hooks import Hook
from sae.common.errors import UsageError
from sae.train.formats.base import Format
from sae.train.formats.gemma_scope_2 import hook_of_path, model_of_path, parse_gemma_3
from sae.train.formats.import_ import import_sae
from sae.train.formats.safe_read import ForeignFolder
from sae.train.sae import load_sae

D, F = 8, 16


def jump_relu(x: np.ndarray, w: dict[str, torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """A reference of the SAE in float64, one row at a time."""
    W_enc, b_enc, W_dec, b_dec, threshold = (
        w[name].double().numpy() for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
    )
    f = np.zeros((len(x), F))
    for row in range(len(x)):
        for latent in range(F):
            z = sum(x[row, d] * W_enc[d, latent] for d in range(D)) + b_enc[latent]
            f[row, latent] = z if z > max(threshold[latent], 0.0) else 0.0
    return f, f @ W_dec + b_dec


def test_latents_and_reconstructions_are_those_of_the_documented_formulas(layouts, tmp_path, x_RD):
    w = layouts.draw_weights()
    w["threshold"][3] = -0.5  # acts as a threshold of 0, because a ReLU is applied too
    folder = layouts.gemma_scope_2(tmp_path / "files", threshold=w["threshold"])
    f, x_hat = jump_relu(x_RD.double().numpy(), w)
    assert 0.05 < (f > 0).mean() < 0.95
    reference = Format.registry["gemma-scope-2"].reference(ForeignFolder(folder))(x_RD)
    imported = load_sae(import_sae(folder, out=tmp_path / "runs").folder)
    ours = imported.encode(x_RD), imported.decode(imported.encode(x_RD))
    for expected, exact, single in zip((f, x_hat), reference, ours, strict=True):
        assert np.abs(exact.numpy() - expected).max() < 1e-12
        assert np.abs(single.double().numpy() - expected).max() < 1e-6 * np.abs(expected).max()
    assert (imported.encode(x_RD) > 0).numpy().tolist() == (f > 0).tolist()


@pytest.mark.parametrize(
    ("module", "hook"),
    [
        ("model.layers.12.output", Hook(12)),
        ("model.language_model.layers.7.output", Hook(7)),
        ("model.layers.5.self_attn.o_proj.input", Hook(5, "attn_z")),
        ("model.layers.5.post_feedforward_layernorm.output", Hook(5, "mlp_out")),
    ],
)
def test_model_and_hook_point_come_from_the_config(layouts, tmp_path, module, hook):
    config = layouts.gemma_scope_2_config | {"hf_hook_point_in": module, "hf_hook_point_out": module}
    imported = import_sae(layouts.gemma_scope_2(tmp_path / "files", config), out=tmp_path / "runs")
    origin = imported.sae.origin
    assert (origin["model"]["name"], origin["layer"], origin["site"]) == ("google/gemma-3-1b-pt", *hook)
    assert imported.format == "gemma-scope-2" and "prepend_bos" not in origin


@pytest.mark.parametrize(
    ("path", "model", "hook"),
    [
        ("gemma-scope-2-1b-pt/resid_post/layer_13_width_16k_l0_big", "google/gemma-3-1b-pt", Hook(13)),
        ("gemma-scope-2-270m-pt/mlp_out_all/layer_3_width_262k_l0_small", "google/gemma-3-270m", Hook(3, "mlp_out")),
        ("gemma-scope-2-27b-it/attn_out/layer_40_width_16k_l0_small", "google/gemma-3-27b-it", Hook(40, "attn_z")),
    ],
)
def test_without_a_config_the_path_says_the_same(layouts, tmp_path, path, model, hook):
    origin = import_sae(layouts.gemma_scope_2(tmp_path / path, None), out=tmp_path / "runs").sae.origin
    assert (origin["model"]["name"], origin["layer"], origin["site"]) == (model, *hook)
    assert model_of_path(("gemma-scope-2b-pt-res", "layer_12")) is None
    assert hook_of_path(("transcoder", "layer_12_width_16k_l0_big")) is None


def test_names_of_models():
    assert parse_gemma_3("gemma-v3-4b-it") == parse_gemma_3("google/gemma-3-4b-it") == "google/gemma-3-4b-it"
    assert parse_gemma_3("google/gemma-3-270m-pt") == "google/gemma-3-270m"
    assert parse_gemma_3("google/gemma-3-270m-it") == "google/gemma-3-270m-it"
    assert parse_gemma_3("someone/other") == "someone/other" and parse_gemma_3(3) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"type": "transcoder"}, "is a transcoder, which predicts the activations at one place"),
        ({"type": "clt"}, "is a cross-layer transcoder"),
        ({"type": "crosscoder", "hf_hook_point_in": "model.layers.{5,9,12,15}.output"}, "is a crosscoder"),
        ({"type": "mystery"}, "is a 'mystery'"),
        ({"affine_connection": True}, "is a transcoder with an affine skip connection"),
        ({"hf_hook_point_out": "model.layers.13.output"}, "is a transcoder"),
        ({"architecture": "topk"}, "architecture 'topk' is not supported, only jump_relu"),
        ({"hf_hook_point_in": "model.norm.output", "hf_hook_point_out": "model.norm.output"}, "is not supported"),
    ],
)
def test_what_is_no_sae_is_refused_by_name(layouts, import_fails, tmp_path, changes, words):
    import_fails(layouts.gemma_scope_2(tmp_path / "files", layouts.gemma_scope_2_config | changes), UsageError, words)


def test_without_a_config_path_tensors_and_file_names_give_away_what_is_no_sae(layouts, import_fails, tmp_path):
    folder = layouts.gemma_scope_2(tmp_path / "transcoder_all" / "layer_3_width_16k_l0_small", None)
    import_fails(folder, UsageError, "is a transcoder")
    skip = {"affine_skip_connection": torch.eye(D)}
    folder = layouts.gemma_scope_2(tmp_path / "resid_post" / "layer_3_width_16k_l0_small", None, **skip)
    import_fails(folder, UsageError, "is a transcoder with an affine skip connection")
    (folder / "params.safetensors").rename(folder / "params_layer_0.safetensors")
    import_fails(folder, UsageError, "is a crosscoder")


def test_another_width_in_the_config_is_noted(layouts, tmp_path):
    imported = import_sae(
        layouts.gemma_scope_2(tmp_path / "files", layouts.gemma_scope_2_config | {"width": 16384}), out=tmp_path
    )
    assert imported.notes == ["config.json says width 16384, but there are 16 latents."]


def test_half_precision_files_are_read_exactly(layouts, tmp_path, x_RD):
    folder = layouts.gemma_scope_2(tmp_path / "files")
    tensors = {name: t.bfloat16() for name, t in load_file(folder / "params.safetensors").items()}
    save_file(tensors, folder / "params.safetensors")
    sae = import_sae(folder, out=tmp_path / "runs").sae
    assert torch.equal(sae.W_enc, tensors["w_enc"].float()) and torch.equal(sae.b_dec, tensors["b_dec"].float())
