"""Qwen-Scope: the imported SAE, and the choice of a layer in a folder that contains several."""

import numpy as np
import pytest
import torch

from sae.common.errors import DamagedError, UsageError
from sae.train.formats.base import Format
from sae.train.formats.import_ import import_sae
from sae.train.formats.qwen_scope import parse_repository
from sae.train.formats.safe_read import ForeignFolder
from sae.train.sae import load_sae

REPOSITORY = "SAE-Res-Qwen3-1.7B-Base-W32K-L0_5"


def keep_largest(x: np.ndarray, w: dict[str, torch.Tensor], k: int) -> tuple[np.ndarray, np.ndarray]:
    """A reference of the SAE in float64, one row at a time; the matrices are (d_sae, d_in) and (d_in, d_sae)."""
    W_enc, W_dec = w["W_enc"].T.double().numpy(), w["W_dec"].T.double().numpy()
    f = np.zeros((len(x), len(W_enc)))
    for row in range(len(x)):
        z = W_enc @ x[row] + w["b_enc"].double().numpy()
        for latent in np.argsort(z)[-k:]:
            f[row, latent] = max(z[latent], 0.0)
    return f, np.stack([W_dec @ f_row for f_row in f]) + w["b_dec"].double().numpy()


def test_latents_and_reconstructions_are_those_of_the_documented_formulas(layouts, tmp_path, x_RD):
    folder = layouts.qwen_scope(tmp_path / "files")
    f, x_hat = keep_largest(x_RD.double().numpy(), layouts.draw_weights(12), k=4)
    assert 3 < (f > 0).sum(1).mean() <= 4
    reference = Format.registry["qwen-scope"].reference(ForeignFolder(folder))(x_RD)
    imported = import_sae(folder, out=tmp_path / "runs")
    sae = load_sae(imported.folder)
    ours = sae.encode(x_RD), sae.decode(sae.encode(x_RD))
    for expected, exact, single in zip((f, x_hat), reference, ours, strict=True):
        assert np.abs(exact.numpy() - expected).max() < 1e-12
        assert np.abs(single.double().numpy() - expected).max() < 1e-6 * np.abs(expected).max()
    assert (sae.encode(x_RD) > 0).numpy().tolist() == (f > 0).tolist()
    origin = imported.sae.origin
    assert (origin["model"]["name"], origin["layer"], origin["site"]) == ("Qwen/Qwen3-1.7B-Base", 12, "resid_post")
    assert "prepend_bos" not in origin and origin["variant"] == "imported-topk"


def test_one_of_several_layers_is_chosen_by_its_number_or_its_file(layouts, tmp_path):
    folder = layouts.qwen_scope(tmp_path / "files", layers=(0, 3, 11))
    with pytest.raises(
        UsageError, match=r"contains the SAEs of 3 layers\. Choose one with --layer, or give its file: .*layer0"
    ):
        import_sae(folder, out=tmp_path / "runs")
    with pytest.raises(UsageError, match="has no layer4.sae.pt; it contains the layers 0, 3, 11"):
        import_sae(folder, layer=4, out=tmp_path / "runs")
    by_number = import_sae(folder, layer=3, out=tmp_path / "runs", name="number")
    by_file = import_sae(folder / "layer3.sae.pt", out=tmp_path / "runs", name="file")
    other = import_sae(folder / "layer11.sae.pt", out=tmp_path / "runs", name="other")
    assert by_number.sae.origin["layer"] == by_file.sae.origin["layer"] == 3 and other.sae.origin["layer"] == 11
    assert torch.equal(by_number.sae.W_enc, by_file.sae.W_enc) and torch.equal(
        by_file.sae.W_enc, layouts.draw_weights(3)["W_enc"]
    )
    assert torch.equal(other.sae.W_enc, layouts.draw_weights(11)["W_enc"])
    assert by_number.notes == []


def test_without_a_config_the_repository_name_says_model_and_k(layouts, tmp_path, x_RD):
    imported = import_sae(layouts.qwen_scope(tmp_path / REPOSITORY, None), out=tmp_path / "runs")
    assert imported.sae.origin["model"]["name"] == "Qwen/Qwen3-1.7B-Base"
    assert int((imported.sae.encode(x_RD) > 0).sum(1).max()) == 5
    with pytest.raises(UsageError, match="number k of active latents of .*layer12.sae.pt is not recorded"):
        import_sae(layouts.qwen_scope(tmp_path / "elsewhere", None), model="gpt2", out=tmp_path / "runs")
    assert parse_repository(("Qwen", "SAE-Res-Qwen3.5-27B-W80K-L0_100")) == ("Qwen/Qwen3.5-27B", 81920, 100)
    contradicting = import_sae(layouts.qwen_scope(tmp_path / "again" / REPOSITORY), out=tmp_path / "runs")
    assert contradicting.notes == ["config.json has k = 4, but the folder's name has k = 5; 4 is used."]


@pytest.mark.parametrize(
    ("changes", "error_type", "words"),
    [
        ({"d_model": 16}, DamagedError, "says d_model 16, but layer12.sae.pt has 8"),
        ({"d_sae": 32}, DamagedError, "says d_sae 32, but layer12.sae.pt has 16"),
        ({"k": 17}, DamagedError, "k is 17, but there are only 16 latents"),
        ({"k": 0}, DamagedError, "k is 0"),
        ({"k": True}, DamagedError, "k is True"),
        ({"hook_point": "mlp_out"}, UsageError, "hook_point 'mlp_out' is not supported, only resid_post"),
    ],
)
def test_a_config_that_contradicts_the_file_is_refused(layouts, import_fails, tmp_path, changes, error_type, words):
    import_fails(layouts.qwen_scope(tmp_path / "files", layouts.qwen_scope_config | changes), error_type, words)
