"""Names of models and hook points in other libraries."""

import pytest

from sae.cache.hooks import SITES, Hook
from sae.common.errors import UsageError
from sae.train.formats.hook_names import first_hook, hub_id, parse_gemma_scope_path, parse_hook, transformerlens_name


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
        ("blocks.0.hook_resid_pre", Hook(0, "resid_pre")),
        ("blocks.3.hook_resid_mid", Hook(3, "resid_mid")),
        ("blocks.3.hook_attn_out", Hook(3, "attn_out")),
        ("blocks.3.mlp.hook_in", Hook(3, "mlp_in")),
        ("blocks.3.mlp.hook_post", Hook(3, "mlp_hidden")),
        ("resid_mid_layer_3/trainer_1", Hook(3, "resid_mid")),
        ("transformer.h.3", Hook(3)),
        ("gpt_neox.layers.3.output", Hook(3)),
        ("model.language_model.layers.3", Hook(3)),
        ("layers.12.mlp", Hook(12, "mlp.output")),
        ("h.3.mlp.c_proj", Hook(3, "mlp.c_proj.output")),
        ("model.layers.12.mlp.gate_proj.input", Hook(12, "mlp.gate_proj.input")),
        ("model.embed_tokens.output", Hook(0, "model.embed_tokens.output")),
        ("blocks.3.hook_mlp_in", None),  # TransformerLens' name of the MLP's input before the norm
        ("hook_embed", None),
        ("", None),
    ],
)
def test_every_scheme_of_hook_names(text, hook):
    assert parse_hook(text) == hook


def test_unsupported_hook_points_are_rejected_and_other_words_skipped():
    assert first_hook([None, 3, "trainer_0", "resid_post_layer_4"]) == Hook(4)
    for text in ("blocks.2.hook_mlp_in", "blocks.2.attn.hook_q"):
        with pytest.raises(UsageError, match="is not supported"):
            first_hook([text])


@pytest.mark.parametrize(
    "hook", [Hook(7, site) for site in SITES] + [Hook(7, "mlp.up_proj.input"), Hook(7, "mlp.output")]
)
def test_our_own_name_of_a_hook_means_that_hook(hook):
    assert parse_hook(hook.name) == (Hook(6) if hook.site == "resid_pre" else hook)


def test_model_names_are_translated_both_ways():
    assert hub_id("gemma-2-2b") == "google/gemma-2-2b" and transformerlens_name("google/gemma-2-2b") == "gemma-2-2b"
    assert hub_id("pythia-70m-deduped") == "EleutherAI/pythia-70m-deduped"
    assert hub_id("gemma-2-mini") == transformerlens_name("gemma-2-mini") == "gemma-2-mini"
    assert transformerlens_name("mine-1a2b3c4d") == "mine-1a2b3c4d"
    assert parse_gemma_scope_path(["google", "gemma-scope-2b-pt-att", "layer_9"]) == (
        "google/gemma-2-2b",
        Hook(9, "attn_z"),
    )
