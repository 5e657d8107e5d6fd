"""Pitfalls of Gemma Scope's files."""

import shutil

import numpy as np
import pytest
import torch

from sae.common.errors import UsageError
from sae.train.formats.import_ import import_sae


def test_a_negative_threshold_lets_no_negative_latent_through(export_with_config, tmp_path, x_RD):
    folder = export_with_config("jumprelu", "gemma-scope")
    arrays = dict(np.load(folder / "params.npz"))
    np.savez(folder / "params.npz", **{**arrays, "threshold": -arrays["threshold"]})
    f_RF = import_sae(folder, out=tmp_path).sae.encode(x_RD)
    assert torch.allclose(
        f_RF, (x_RD @ torch.tensor(arrays["W_enc"]) + torch.tensor(arrays["b_enc"])).relu(), atol=1e-5
    )


def test_lower_case_names_and_model_and_layer_from_the_path(export_with_config, tmp_path):
    folder = export_with_config("jumprelu", "gemma-scope")
    arrays = dict(np.load(folder / "params.npz"))
    gemma_scope = tmp_path / "gemma-scope-9b-it-mlp" / "layer_20" / "width_16k" / "average_l0_82"
    gemma_scope.mkdir(parents=True)
    names = {"W_enc": "w_enc", "W_dec": "w_dec"}
    np.savez_compressed(gemma_scope / "params.npz", **{names.get(name, name): array for name, array in arrays.items()})
    origin = import_sae(gemma_scope, out=tmp_path).sae.origin
    assert (origin["model"]["name"], origin["layer"], origin["site"]) == ("google/gemma-2-9b-it", 20, "mlp_out")
    with pytest.raises(UsageError, match="is an SAE on the embedding, scaled by sqrt"):
        shutil.copytree(gemma_scope, tmp_path / "embedding" / "width_4k")
        import_sae(tmp_path / "embedding" / "width_4k", model="gpt2", layer=0, out=tmp_path)


def test_a_transcoder_is_refused_by_the_name_of_its_repository(export_with_config, tmp_path):
    folder = tmp_path / "gemma-scope-2b-pt-transcoders" / "layer_12" / "width_16k"
    shutil.copytree(export_with_config("jumprelu", "gemma-scope"), folder)
    with pytest.raises(UsageError, match="is a transcoder, from the input of an MLP to its output"):
        import_sae(folder, model="google/gemma-2-2b", layer=12, out=tmp_path)
