"""The traps of the formats: what a file means is taken from the file, or refused, and never guessed."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sae.cache.layout import Hook
from sae.common.errors import DamagedError, UsageError
from sae.train.formats.export import export_sae
from sae.train.formats.hook_names import first_hook, hub_id, parse_gemma_scope_path, parse_hook, transformerlens_name
from sae.train.formats.import_ import import_sae
from sae.train.sae import load_sae


@pytest.fixture
def exported(make_sae, tmp_path):
    """A folder of a format, with its configuration changed and keys taken out of it."""

    def build(kind: str, to: str, *dropped: str, **changed: Any) -> Path:
        folder = export_sae(make_sae(kind, unit=True), to, tmp_path / "theirs").folder
        path = next(p for name in ("cfg.json", "about.json") for p in folder.rglob(name))
        config = json.loads(path.read_text())
        config = {name: value for name, value in (config | changed).items() if name not in dropped}
        path.write_text(json.dumps(config))
        return folder

    return build


def recorded(run: Path) -> dict[str, Any]:
    return json.loads((run / "run.json").read_text())


# --- SAELens --------------------------------------------------------------------------------------------------------


def test_b_dec_is_subtracted_where_nothing_is_said(exported, tmp_path, x_RD):
    """As SAELens does: absent means true. The same files with `false` are another SAE."""
    folder = exported("relu", "saelens", "apply_b_dec_to_input")
    made = import_sae(folder, out=tmp_path)
    assert made.sae.pre_bias
    assert any("cfg.json has no apply_b_dec_to_input" in note for note in made.notes)
    w = load_file(folder / "sae_weights.safetensors")
    f_RF = ((x_RD - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu()
    assert torch.allclose(made.sae.encode(x_RD), f_RF, atol=1e-5)
    assert not torch.allclose(made.sae.encode(x_RD), (x_RD @ w["W_enc"] + w["b_enc"]).relu(), atol=1e-2)


def test_rescaled_topk_selects_by_the_decoders_norms(exported, tmp_path, x_RD):
    folder = exported("topk", "saelens", rescale_acts_by_decoder_norm=True)
    w = load_file(folder / "sae_weights.safetensors")
    n_F = torch.linspace(0.2, 3, 16)
    w["W_dec"] *= n_F[:, None]
    save_file(w, folder / "sae_weights.safetensors")
    top = ((x_RD @ w["W_enc"] + w["b_enc"]) * n_F).topk(4)
    f_RF = torch.zeros(16, 16).scatter(1, top.indices, top.values.relu())
    assert torch.allclose(import_sae(folder, out=tmp_path).sae.encode(x_RD), f_RF, atol=1e-5)


@pytest.mark.parametrize("kind", ["relu", "topk", "jumprelu", "gated"])
def test_a_scale_in_the_files_is_folded(exported, make_sae, tmp_path, x_RD, kind):
    """x is multiplied by 4 before and divided after: f is that of 4 x, and x_hat a fourth."""
    folder = exported(kind, "saelens", normalize_activations="expected_average_only_in", norm_scaling_factor=4.0)
    made, plain = import_sae(folder, out=tmp_path), make_sae(kind, unit=True)
    assert torch.allclose(made.sae.encode(x_RD), plain.encode(4 * x_RD), rtol=1e-4, atol=1e-4)
    assert torch.allclose(made.sae.decode(made.sae.encode(x_RD)), plain.decode(plain.encode(4 * x_RD)) / 4, atol=1e-4)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"normalize_activations": "layer_norm"}, "normalize_activations layer_norm divides each token by its own standard deviation"),
        ({"normalize_activations": "constant_norm_rescale"}, "divides each token by its own norm"),
        ({"normalize_activations": "covariance_whitening"}, "whitens the input"),
        ({"normalize_activations": "expected_average_only_in"}, "but the files do not record the factor"),
        ({"architecture": "transcoder"}, "architecture 'transcoder' is not supported; supported are standard, topk, jumprelu, gated"),
        ({"architecture": "batchtopk"}, "SAELens saves as jumprelu for inference"),
        ({"finetuning_scaling_factor": True}, "finetuning_scaling_factor"),
        ({"architecture": "standard", "activation_fn_str": "tanh-relu"}, "activation_fn 'tanh-relu' contradicts architecture standard"),
        ({"architecture": "standard", "activation_fn_str": "topk"}, "activation_fn 'topk' contradicts architecture standard"),
        ({"metadata": {"model_name": "gpt2", "hook_name": "blocks.3.hook_mlp_in"}}, "The hook point 'blocks.3.hook_mlp_in' is not supported"),
        ({"metadata": {"model_name": "gpt2", "hook_name": "blocks.0.hook_resid_pre"}}, "is the embedding, before the first block"),
        ({"metadata": {}}, "do not record their model and layer. Add --model google/gemma-2-2b --layer 12"),
        ({"metadata": {"model_name": "gpt2"}}, "do not record their layer. Add --layer 12"),
    ],
)  # fmt: skip
def test_what_no_sae_of_ours_does_is_refused(exported, tmp_path, changed, sentence):
    folder = exported("relu", "saelens", **changed)
    with pytest.raises(UsageError) as error:
        import_sae(folder, out=tmp_path / "runs")
    assert sentence in str(error.value)
    assert not (tmp_path / "runs").exists()


def test_a_configuration_of_before_version_6_is_read(exported, tmp_path):
    """The model and place stood at the top, and topk was an activation of `standard`."""
    old = {"model_name": "gemma-2-2b", "hook_point": "blocks.7.hook_resid_post", "context_size": 64}
    folder = exported("topk", "saelens", "metadata", "k", architecture="standard", activation_fn_str="topk", activation_fn_kwargs={"k": 4}, normalize_activations=False, **old)  # fmt: skip
    sae = import_sae(folder, out=tmp_path).sae
    assert sae.activation[0].k == 4
    assert (sae.origin["model"]["name"], sae.origin["layer"], sae.origin["context"]) == ("google/gemma-2-2b", 7, 64)


def test_bfloat16_weights_are_read_as_they_are(exported, tmp_path):
    folder = exported("relu", "saelens")
    w = {name: t.bfloat16() for name, t in load_file(folder / "sae_weights.safetensors").items()}
    save_file(w, folder / "sae_weights.safetensors")
    assert torch.equal(import_sae(folder, out=tmp_path).sae.W_enc, w["W_enc"].float())


# --- the others -----------------------------------------------------------------------------------------------------


def test_a_negative_threshold_lets_no_negative_latent_through(exported, tmp_path, x_RD):
    folder = exported("jumprelu", "gemma-scope")
    arrays = dict(np.load(folder / "params.npz"))
    np.savez(folder / "params.npz", **{**arrays, "threshold": -arrays["threshold"]})
    f_RF = import_sae(folder, out=tmp_path).sae.encode(x_RD)
    assert torch.allclose(
        f_RF, (x_RD @ torch.tensor(arrays["W_enc"]) + torch.tensor(arrays["b_enc"])).relu(), atol=1e-5
    )


def test_lower_case_names_and_the_path_of_gemma_scope(exported, tmp_path):
    folder = exported("jumprelu", "gemma-scope")
    arrays = dict(np.load(folder / "params.npz"))
    place = tmp_path / "gemma-scope-9b-it-mlp" / "layer_20" / "width_16k" / "average_l0_82"
    place.mkdir(parents=True)
    names = {"W_enc": "w_enc", "W_dec": "w_dec"}
    np.savez_compressed(place / "params.npz", **{names.get(name, name): array for name, array in arrays.items()})
    origin = import_sae(place, out=tmp_path).sae.origin
    assert (origin["model"]["name"], origin["layer"], origin["site"]) == ("google/gemma-2-9b-it", 20, "mlp_out")
    with pytest.raises(UsageError, match="is an SAE on the embedding, scaled by sqrt"):
        shutil.copytree(place, tmp_path / "embedding" / "width_4k")
        import_sae(tmp_path / "embedding" / "width_4k", model="gpt2", layer=0, out=tmp_path)


def test_a_class_that_could_be_two_is_not_guessed(make_sae, tmp_path):
    """AutoEncoderTopK and BatchTopKSAE have the same tensors: config.json alone tells them apart."""
    folder = export_sae(make_sae("topk"), "dictionary-learning", tmp_path / "theirs").folder
    config = json.loads((folder / "config.json").read_text())
    config["trainer"]["dict_class"] = "BatchTopKSAE"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="the threshold of this BatchTopKSAE was never set"):
        import_sae(folder, out=tmp_path)
    config["trainer"]["dict_class"] = "GatedAutoEncoder"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(DamagedError, match="says 'GatedAutoEncoder', but ae.pt holds the tensors of AutoEncoderTopK or BatchTopKSAE"):  # fmt: skip
        import_sae(folder, out=tmp_path)
    (folder / "config.json").unlink()
    with pytest.raises(
        UsageError, match="can be AutoEncoderTopK or BatchTopKSAE, and there is no config.json that says which"
    ):
        import_sae(folder, out=tmp_path)


@pytest.mark.parametrize(
    ("submodule", "hook"),
    [
        ("resid_post_layer_7", Hook(7)), ("mlp_out_layer_7", Hook(7, "mlp_out")), ("attn_z_layer_7", Hook(7, "attn_z")),
        ("resid_pre_layer_7", Hook(6)), ("resid", Hook(7)), (None, Hook(7)), ("mlp_layer_7", None), ("attn", None),
    ],
)  # fmt: skip
def test_a_layer_of_dictionary_learning_is_the_residual_stream_unless_another_place_is_named(
    make_sae, tmp_path, submodule, hook
):
    folder = export_sae(make_sae("relu"), "dictionary-learning", tmp_path / "theirs").folder
    config = json.loads((folder / "config.json").read_text())
    config["trainer"] |= {"submodule_name": submodule, "layer": 7}
    del config["about"]
    (folder / "config.json").write_text(json.dumps(config))
    if hook is None:
        with pytest.raises(UsageError, match="do not record their layer"):
            import_sae(folder, out=tmp_path)
    else:
        origin = import_sae(folder, out=tmp_path).sae.origin
        assert (origin["layer"], origin["site"]) == hook


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"activation": "groupmax"}, "activation is 'groupmax'; only topk is supported"),
        ({"transcode": True}, "transcode is true"),
        ({"skip_connection": True}, "skip_connection is true"),
    ],
)
def test_what_is_no_sae_of_sparsify_is_refused(exported, tmp_path, changed, sentence):
    with pytest.raises(UsageError, match=sentence):
        import_sae(exported("topk", "sparsify", **changed), out=tmp_path)


def test_sparsify_counts_its_latents_by_the_factor_where_it_says_0(exported, tmp_path):
    folder = exported("topk", "sparsify", num_latents=0, expansion_factor=2)
    assert import_sae(folder, out=tmp_path).sae.d_sae == 16


def test_of_several_saes_one_has_to_be_named(exported, tmp_path):
    folder = exported("topk", "sparsify")
    shutil.copytree(folder / "layers.12", folder / "layers.5")
    with pytest.raises(UsageError, match=r"holds 2 SAEs: layers.12, layers.5. Choose one: sae import .*layers.12"):
        import_sae(folder, out=tmp_path)
    assert import_sae(folder / "layers.5", out=tmp_path).sae.origin["model"]["name"] == "google/gemma-2-2b"


# --- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "hook"),
    [
        ("blocks.12.hook_resid_post", Hook(12)),
        ("blocks.12.hook_resid_pre", Hook(11)),
        ("blocks.3.hook_mlp_out", Hook(3, "mlp_out")),
        ("blocks.3.attn.hook_z", Hook(3, "attn_z")),
        ("layers.12", Hook(12)),
        ("model.layers.12", Hook(12)),
        ("model.layers.12.output", Hook(12)),
        ("resid_post_layer_12", Hook(12)),
        ("saes/resid_post_layer_12/trainer_0", Hook(12)),
        ("layer_12/width_16k/average_l0_82", Hook(12)),
        ("layers.12.mlp", None),
        ("hook_embed", None),
        ("", None),
    ],
)
def test_every_scheme_of_hook_names(text, hook):
    assert parse_hook(text) == hook


def test_names_of_places_that_we_have_not_are_refused_and_unknown_words_are_not():
    assert first_hook([None, 3, "trainer_0", "resid_post_layer_4"]) == Hook(4)
    for text in ("layers.12.mlp", "blocks.2.hook_mlp_in", "model.layers.2.self_attn"):
        with pytest.raises(UsageError, match="is not supported"):
            first_hook([text])


def test_models_have_a_name_each_way():
    assert hub_id("gemma-2-2b") == "google/gemma-2-2b" and transformerlens_name("google/gemma-2-2b") == "gemma-2-2b"
    assert hub_id("pythia-70m-deduped") == "EleutherAI/pythia-70m-deduped"
    assert hub_id("gemma-2-mini") == transformerlens_name("gemma-2-mini") == "gemma-2-mini"
    assert transformerlens_name("/home/someone/models/mine") == "mine"
    assert parse_gemma_scope_path(["google", "gemma-scope-2b-pt-att", "layer_9"]) == (
        "google/gemma-2-2b",
        Hook(9, "attn_z"),
    )


# --- the run folder -------------------------------------------------------------------------------------------------


def test_the_run_folder_says_where_it_came_from(exported, tmp_path):
    made = import_sae(exported("gated", "saelens"), out=tmp_path)
    said = recorded(made.folder)
    assert said["variant"] == load_sae(made.folder).origin["variant"] == "imported-gated"
    assert said["imported_from"]["format"] == "saelens"
    assert set(said["imported_from"]["sha256"]) == {"cfg.json", "sae_weights.safetensors"}
    assert all(len(digest) == 64 for digest in said["imported_from"]["sha256"].values())
    assert said["check"]["passed"] and said["metadata"]["training_architecture"] == "gated"
    with pytest.raises(UsageError, match="already exists: run sae evaluate"):
        import_sae(tmp_path / "theirs", out=tmp_path)
    assert import_sae(tmp_path / "theirs", out=tmp_path, name="again").folder == tmp_path / "again"
    with pytest.raises(UsageError, match="Invalid --name '../elsewhere'"):
        import_sae(tmp_path / "theirs", out=tmp_path, name="../elsewhere")
    with pytest.raises(UsageError, match=r"Invalid --name 'two\\nlines'"):
        import_sae(tmp_path / "theirs", out=tmp_path, name="two\nlines")
    with pytest.raises(UsageError, match="is already a run folder of this package"):
        import_sae(made.folder, out=tmp_path)


def test_model_and_layer_can_be_given_and_a_difference_is_said(exported, tmp_path):
    made = import_sae(exported("relu", "saelens"), model="gpt2", layer=3, out=tmp_path)
    assert (made.sae.origin["model"]["name"], made.sae.origin["layer"]) == ("gpt2", 3)
    assert made.notes == ["The files say layer 12; --layer 3 overrides it.", "The files say google/gemma-2-2b; --model gpt2 overrides it."]  # fmt: skip


def test_a_cache_is_found_or_given_and_has_to_fit(make_sae, sparse_cache, tmp_path, monkeypatch):
    sae = make_sae("relu")
    with pytest.raises(UsageError, match="has rows of width 32, but the SAE has d_in 8"):
        folder = export_sae(sae, "saelens", tmp_path / "small").folder
        import_sae(folder, model="synthetic", layer=0, cache=sparse_cache.folder, out=tmp_path)
    with pytest.raises(UsageError, match="holds activations of synthetic, but the SAE is of google/gemma-2-2b"):
        import_sae(folder, layer=0, cache=sparse_cache.folder, out=tmp_path)
    from sae.train.sae import SAE

    wide = SAE(32, 64)
    wide.origin = {"model": {"name": "synthetic"}, "layer": 0}
    folder = export_sae(wide, "saelens", tmp_path / "wide").folder
    made = import_sae(folder, cache=sparse_cache.folder, out=tmp_path)
    assert made.check.description == f"from cache {sparse_cache.folder.name}"
    assert made.sae.origin["fingerprint"] == sparse_cache.fingerprint
    (tmp_path / "activations").mkdir()
    (tmp_path / "activations" / "one").symlink_to(sparse_cache.folder)
    assert import_sae(folder, out=tmp_path, name="found").cache == tmp_path / "activations" / "one"
    (tmp_path / "activations" / "two").symlink_to(sparse_cache.folder)
    two = import_sae(folder, out=tmp_path, name="two")
    assert two.cache is None and "2 caches hold layer 0 of synthetic, so none was chosen" in two.notes[0]


def test_a_folder_without_an_sae_says_what_it_looked_for(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="sae_weights.safetensors \\(saelens\\).*found nothing"):
        import_sae(tmp_path / "empty")
    with pytest.raises(UsageError, match="No such folder"):
        import_sae(tmp_path / "none")
