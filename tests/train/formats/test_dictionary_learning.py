"""Pitfalls of dictionary_learning's files."""

import json

import pytest

from sae.cache.hooks import Hook
from sae.common.errors import DamagedError, UsageError
from sae.train.formats.export import export_sae
from sae.train.formats.import_ import import_sae


def test_an_ambiguous_class_is_not_guessed(make_sae, tmp_path):
    """AutoEncoderTopK and BatchTopKSAE have the same tensors; only config.json distinguishes them."""
    folder = export_sae(make_sae("topk"), "dictionary-learning", tmp_path / "foreign").folder
    config = json.loads((folder / "config.json").read_text())
    config["trainer"]["dict_class"] = "BatchTopKSAE"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="the threshold of this BatchTopKSAE was never set"):
        import_sae(folder, out=tmp_path)
    config["trainer"]["dict_class"] = "GatedAutoEncoder"
    (folder / "config.json").write_text(json.dumps(config))
    contradiction = (
        "names the class 'GatedAutoEncoder', but ae.pt contains the tensors of AutoEncoderTopK or BatchTopKSAE"
    )
    with pytest.raises(DamagedError, match=contradiction):
        import_sae(folder, out=tmp_path)
    (folder / "config.json").unlink()
    with pytest.raises(UsageError, match="can be AutoEncoderTopK or BatchTopKSAE, and no config.json names the class"):
        import_sae(folder, out=tmp_path)


@pytest.mark.parametrize(
    ("submodule", "hook"),
    [
        ("resid_post_layer_7", Hook(7)), ("mlp_out_layer_7", Hook(7, "mlp_out")), ("attn_z_layer_7", Hook(7, "attn_z")),
        ("resid_pre_layer_7", Hook(6)), ("resid", Hook(7)), (None, Hook(7)), ("mlp_layer_7", None), ("attn", None),
    ],
)  # fmt: skip
def test_a_layer_means_resid_post_unless_the_submodule_names_another_site(make_sae, tmp_path, submodule, hook):
    folder = export_sae(make_sae("relu"), "dictionary-learning", tmp_path / "foreign").folder
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
