"""An SAE is exported with the format's name for its site, and importing it again gives the same site."""

import json
from pathlib import Path
from typing import Any

import pytest

from sae.cache.hooks import SITES, Hook
from sae.common.errors import UsageError
from sae.train.formats import metadata as module
from sae.train.formats.export import export_sae
from sae.train.formats.import_ import import_sae

ACTIVATIONS = {"saelens": "jumprelu", "gemma-scope": "jumprelu", "dictionary-learning": "topk", "sparsify": "topk"}
MODULES = {
    "resid_pre": ("model.layers.3", "input"),
    "resid_post": ("model.layers.3", "output"),
    "attn_out": ("model.layers.3.self_attn", "output"),
    "attn_z": ("model.layers.3.self_attn.o_proj", "input"),
    "mlp_in": ("model.layers.3.mlp", "input"),
    "mlp_hidden": ("model.layers.3.mlp.down_proj", "input"),
    "mlp_out": ("model.layers.3.mlp", "output"),
    "mlp.gate_proj.output": ("model.layers.3.mlp.gate_proj", "output"),
    "mlp.gate_proj.input": ("model.layers.3.mlp.gate_proj", "input"),
    "model.embed_tokens.output": ("model.embed_tokens", "output"),
    "model.norm.input": ("model.norm", "input"),
}
SITES_TO_EXPORT = ["resid_mid", *MODULES]
REFUSED = {
    "saelens": {"mlp.gate_proj.input", "model.norm.input"},
    "sparsify": {site for site, (_, end) in MODULES.items() if end == "input"} - {"resid_pre"} | {"resid_mid"},
}


@pytest.fixture
def export(make_sae, tmp_path, monkeypatch):
    """Export an SAE of a site in layer 3, as if its cache had recorded the modules of a Llama."""
    monkeypatch.setattr(module, "hook_module", lambda hook, cache: MODULES.get(hook.site))

    def run(fmt: str, site: str) -> Path:
        sae = make_sae(ACTIVATIONS[fmt])
        sae.origin |= {"layer": 3, "site": site}
        return export_sae(sae, fmt, tmp_path / "out").folder

    return run


def test_no_site_is_left_out():
    assert set(SITES) <= set(SITES_TO_EXPORT)


@pytest.mark.parametrize("fmt", ACTIVATIONS)
@pytest.mark.parametrize("site", SITES_TO_EXPORT)
def test_the_site_survives_the_way_through_another_format(export, tmp_path, fmt, site):
    if site in REFUSED.get(fmt, ()):
        with pytest.raises(UsageError, match="(SAELens reads|sparsify can only record) .* Export it with"):
            export(fmt, site)
        assert not (tmp_path / "out").exists()
        return
    folder = export(fmt, site)
    origin = import_sae(folder, out=tmp_path / "runs").sae.origin
    same = Hook(2) if site == "resid_pre" else Hook(3, site)  # a block's input is the previous block's output
    assert Hook.from_record(origin) == same


def saelens_names(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / "cfg.json").read_text())
    return {name: config["metadata"].get(name) for name in ("hook_name", "model_class_name")} | {
        "reshape": config["reshape_activations"]
    }


@pytest.mark.parametrize("site", [site for site in SITES_TO_EXPORT if site not in REFUSED["saelens"]])
def test_saelens_gets_the_names_of_transformer_lens_and_for_modules_those_of_transformers(export, site):
    named = site in SITES
    assert saelens_names(export("saelens", site)) == {
        "hook_name": SITES[site].format(3) if named else MODULES[site][0],
        "model_class_name": "HookedTransformer" if named else "AutoModelForCausalLM",
        "reshape": "hook_z" if site == "attn_z" else "none",
    }


@pytest.mark.parametrize(
    ("site", "submodule", "end"),
    [
        ("resid_mid", "resid_mid_layer_3", "out"), ("attn_z", "attn_z_layer_3", "out"),
        ("mlp.gate_proj.output", "model.layers.3.mlp.gate_proj", "out"),
        ("mlp.gate_proj.input", "model.layers.3.mlp.gate_proj", "in"),
    ],
)  # fmt: skip
def test_dictionary_learning_gets_the_submodule_and_which_end_of_it(export, tmp_path, site, submodule, end):
    folder = export("dictionary-learning", site)
    config = json.loads((folder / "config.json").read_text())
    assert (config["trainer"]["submodule_name"], config["buffer"]["io"]) == (submodule, end)
    del config["about"]  # the library itself writes no `about`
    (folder / "config.json").write_text(json.dumps(config))
    assert Hook.from_record(import_sae(folder, out=tmp_path / "runs").sae.origin) == Hook(3, site)


@pytest.mark.parametrize(
    ("site", "hookpoint"),
    [
        ("resid_post", "layers.3"), ("resid_pre", "layers.2"), ("mlp_out", "layers.3.mlp"),
        ("attn_out", "layers.3.self_attn"), ("mlp.gate_proj.output", "layers.3.mlp.gate_proj"),
        ("model.embed_tokens.output", "embed_tokens"),
    ],
)  # fmt: skip
def test_sparsify_gets_the_module_whose_output_it_is(export, site, hookpoint):
    folder = export("sparsify", site)
    assert (folder / hookpoint / "sae.safetensors").exists()
    assert json.loads((folder / "config.json").read_text())["hookpoints"] == [hookpoint]
