"""Pitfalls of sparsify's files."""

import shutil

import pytest

from sae.common.errors import UsageError
from sae.train.formats.import_ import import_sae


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"activation": "groupmax"}, "activation is 'groupmax'; only topk is supported"),
        ({"transcode": True}, "transcode is true"),
        ({"skip_connection": True}, "skip_connection is true"),
    ],
)
def test_unsupported_configs_are_rejected(export_with_config, tmp_path, changed, message):
    with pytest.raises(UsageError, match=message):
        import_sae(export_with_config("topk", "sparsify", **changed), out=tmp_path)


def test_num_latents_0_means_expansion_factor_times_d_in(export_with_config, tmp_path):
    folder = export_with_config("topk", "sparsify", num_latents=0, expansion_factor=2)
    assert import_sae(folder, out=tmp_path).sae.d_sae == 16


def test_one_of_several_saes_has_to_be_chosen(export_with_config, tmp_path):
    folder = export_with_config("topk", "sparsify")
    shutil.copytree(folder / "layers.12", folder / "layers.5")
    with pytest.raises(UsageError, match=r"contains 2 SAEs: layers.12, layers.5. Choose one: sae import .*layers.12"):
        import_sae(folder, out=tmp_path)
    assert import_sae(folder / "layers.5", out=tmp_path).sae.origin["model"]["name"] == "google/gemma-2-2b"
