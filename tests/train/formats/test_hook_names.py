"""Names of models and hook points in other libraries."""

import pytest

from sae.cache.layout import Hook
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
        ("layers.12.mlp", None),
        ("hook_embed", None),
        ("", None),
    ],
)
def test_every_scheme_of_hook_names(text, hook):
    assert parse_hook(text) == hook


def test_unsupported_hook_points_are_rejected_and_other_words_skipped():
    assert first_hook([None, 3, "trainer_0", "resid_post_layer_4"]) == Hook(4)
    for text in ("layers.12.mlp", "blocks.2.hook_mlp_in", "model.layers.2.self_attn"):
        with pytest.raises(UsageError, match="is not supported"):
            first_hook([text])


def test_model_names_are_translated_both_ways():
    assert hub_id("gemma-2-2b") == "google/gemma-2-2b" and transformerlens_name("google/gemma-2-2b") == "gemma-2-2b"
    assert hub_id("pythia-70m-deduped") == "EleutherAI/pythia-70m-deduped"
    assert hub_id("gemma-2-mini") == transformerlens_name("gemma-2-mini") == "gemma-2-mini"
    assert transformerlens_name("mine-1a2b3c4d") == "mine-1a2b3c4d"
    assert parse_gemma_scope_path(["google", "gemma-scope-2b-pt-att", "layer_9"]) == (
        "google/gemma-2-2b",
        Hook(9, "attn_z"),
    )
