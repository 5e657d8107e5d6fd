"""The metadata that an export writes."""

import json
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file

from sae.cache.hooks import Hook
from sae.common.cache_schemas import HARVEST_RECORD
from sae.train.formats.export import export_sae
from sae.train.formats.metadata import context_beginning, hook_module

REQUEST = {"model": "m", "dataset": "d", "tokens": 100, "context": 8, "held_out": None, "window": 64}  # of a harvest


def test_metadata_has_the_keys_that_saelens_consumers_read(make_sae, tmp_path):
    exported = export_sae(make_sae("jumprelu"), "saelens", tmp_path / "out")
    config = json.loads((exported.folder / "cfg.json").read_text())
    expected_config = {
        "architecture": "jumprelu",
        "d_in": 8,
        "d_sae": 16,
        "dtype": "float32",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
    }
    assert {key: config[key] for key in expected_config} == expected_config
    metadata = config["metadata"]
    assert metadata["sae_lens_version"].split(".")[0] == "6"
    expected_metadata = {
        "model_name": "gemma-2-2b",
        "hook_name": "blocks.12.hook_resid_post",
        "hook_layer": 12,
        "hf_hook_name": "model.layers.12",
        "context_size": 128,
        "prepend_bos": True,
        "training_architecture": "jumprelu",
    }
    assert {key: metadata[key] for key in expected_metadata} == expected_metadata
    assert metadata["created_by"].startswith("sae-pipeline ")
    shapes = {name: tuple(t.shape) for name, t in load_file(exported.folder / "sae_weights.safetensors").items()}
    assert shapes == {"W_enc": (8, 16), "W_dec": (16, 8), "b_enc": (16,), "b_dec": (8,), "threshold": (16,)}


def test_the_module_path_is_the_one_that_the_harvest_recorded(sparse_cache, tmp_path):
    assert hook_module(Hook(1), None) == ("model.layers.1", "output")
    assert hook_module(Hook(1), sparse_cache) == ("model.layers.1", "output")  # no modules recorded
    assert hook_module(Hook(1, "mlp.up_proj.input"), None) == ("model.layers.1.mlp.up_proj", "input")
    assert hook_module(Hook(1, "mlp_out"), None) is None
    record = sparse_cache.folder / "harvest.json"
    before = record.read_bytes() if record.exists() else None
    modules = {
        "layer_01": "transformer.h.1, hidden_states[2]",
        "layer_01.attn_z": "the input of transformer.h.1.c_proj",
    }
    HARVEST_RECORD.write(record, REQUEST | {"modules": modules})
    try:
        assert hook_module(Hook(1), sparse_cache) == ("transformer.h.1", "output")
        assert hook_module(Hook(1, "attn_z"), sparse_cache) == ("transformer.h.1.c_proj", "input")
    finally:
        record.unlink() if before is None else record.write_bytes(before)


@pytest.mark.parametrize(
    ("origin", "identity", "expected"),
    [
        ({}, {"bos": None}, {"prepend_bos": False}),
        ({}, {"bos": 5}, {"prepend_bos": True, "bos_token_id": 5, "bos_token": "<five>"}),
        ({"bos": 5}, None, {"prepend_bos": True, "bos_token_id": 5}),
        ({"bos": None}, None, {"prepend_bos": False}),
        ({}, {}, {"prepend_bos": True}),  # recorded by an older version, which always prepended BOS
        # What another library's files say takes precedence over the cache that the SAE was verified on.
        ({"format": "saelens", "prepend_bos": False}, {"bos": 5}, {"prepend_bos": False}),
        ({"format": "saelens", "bos_token": "<s>"}, {"bos": None}, {"prepend_bos": True, "bos_token": "<s>"}),
    ],
)
def test_an_export_says_what_contexts_began_with(tmp_path, origin, identity, expected):
    HARVEST_RECORD.write(tmp_path / "harvest.json", REQUEST | {"bos_token": "<five>"})
    cache = None if identity is None else SimpleNamespace(identity=identity, folder=tmp_path)
    assert context_beginning(origin, cache) == expected
