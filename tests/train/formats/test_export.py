"""Exports: what they contain, what is rejected, and that a failed export leaves no files."""

import json
import os
import stat
from dataclasses import replace

import pytest
import torch

from sae.common.errors import SaeError, UsageError
from sae.train import variants  # noqa: F401  (registers the activations)
from sae.train.formats import gemma_scope
from sae.train.formats.base import Format
from sae.train.formats.export import export_sae, new_folder
from sae.train.formats.import_ import import_sae
from sae.train.formats.safe_read import ForeignFolder
from sae.train.sae import load_sae

FORMATS_OF = {
    "relu": {"saelens", "gemma-scope", "dictionary-learning"},
    "jumprelu": {"saelens", "gemma-scope", "dictionary-learning"},
    "gated": {"saelens", "gemma-scope", "dictionary-learning"},
    "topk": {"saelens", "dictionary-learning", "sparsify"},
}
SUPPORTED = [(activation, to) for activation, formats in FORMATS_OF.items() for to in sorted(formats)]
UNSUPPORTED = [
    (activation, to) for activation, formats in FORMATS_OF.items() for to in sorted(set(Format.exported()) - formats)
]


@pytest.mark.parametrize("pre_bias", [True, False])
@pytest.mark.parametrize(("activation", "to"), SUPPORTED)
def test_export_then_import_gives_the_same_sae_with_unit_rows(
    encode_decode, make_sae, x_RD, tmp_path, activation, to, pre_bias
):
    sae = make_sae(activation, pre_bias=pre_bias)
    exported = export_sae(sae, to, tmp_path / "out")
    back = load_sae(import_sae(exported.folder, out=tmp_path / "runs").folder)
    f_RF, recon_RD = encode_decode(sae, x_RD)
    f2_RF, recon2_RD = encode_decode(back, x_RD)
    # Normalizing the decoder rows multiplies each latent by the norm of its row.
    n_F = 1 if activation == "topk" else sae.W_dec.norm(dim=1)
    assert torch.equal(f_RF > 0, f2_RF > 0)
    assert torch.allclose(f_RF * n_F, f2_RF, rtol=1e-5, atol=1e-6)
    assert torch.allclose(recon_RD, recon2_RD, rtol=1e-5, atol=1e-5)
    if activation != "topk":
        assert torch.allclose(back.W_dec.norm(dim=1), torch.ones(16, dtype=torch.float64), atol=1e-6)


@pytest.mark.parametrize(("activation", "to"), UNSUPPORTED)
def test_an_unsupported_activation_is_rejected_naming_formats_that_support_it(make_sae, tmp_path, activation, to):
    with pytest.raises(UsageError) as error:
        export_sae(make_sae(activation), to, tmp_path / "out")
    assert all(able in str(error.value) for able in FORMATS_OF[activation])
    assert f"cannot store a {activation} SAE" in str(error.value)
    assert not list(tmp_path.iterdir())


def test_rescale_acts_by_decoder_norm_is_set_for_a_topk_with_unit_rows(make_sae, tmp_path):
    for unit in (True, False):
        exported = export_sae(make_sae("topk", unit=unit), "saelens", tmp_path / str(unit))
        assert json.loads((exported.folder / "cfg.json").read_text())["rescale_acts_by_decoder_norm"] is unit
        assert bool(exported.notes) is not unit


def test_a_failed_verification_leaves_nothing_behind(make_sae, tmp_path, monkeypatch):
    write = gemma_scope.GemmaScope.write

    def write_wrong_threshold(self, canonical, folder, metadata):
        assert canonical.threshold is not None
        write(self, replace(canonical, threshold=canonical.threshold * 2), folder, metadata)

    monkeypatch.setattr(gemma_scope.GemmaScope, "write", write_wrong_threshold)
    with pytest.raises(
        SaeError, match="failed verification, and no files were kept: .* latents in .* are active in the SAE or the"
    ):
        export_sae(make_sae("jumprelu"), "gemma-scope", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_folder_has_to_be_empty_and_its_files_are_readable_by_others(make_sae, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="full is not empty; nothing was written"):
        export_sae(make_sae("relu"), "saelens", tmp_path / "full")
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["thesis.txt"]
    (tmp_path / "empty").mkdir()
    before = os.umask(0o022)
    try:
        exported = export_sae(make_sae("relu"), "saelens", tmp_path / "empty")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in exported.files} == {0o644}


def test_an_unknown_format_suggests_one(make_sae, tmp_path):
    with pytest.raises(UsageError, match="--to saelense is not a known format; did you mean saelens"):
        export_sae(make_sae("relu"), "saelense", tmp_path / "out")


def test_an_imported_run_can_be_exported_again(make_sae, tmp_path):
    first = export_sae(make_sae("gated"), "dictionary-learning", tmp_path / "a")
    run = import_sae(first.folder, out=tmp_path / "runs").folder
    again = export_sae(run, "dictionary-learning", tmp_path / "b")
    one, two = (torch.load(m.folder / "ae.pt", weights_only=True) for m in (first, again))
    assert all(torch.allclose(one[name], two[name], atol=1e-6) for name in one)
    assert Format.registry["dictionary-learning"].matches(ForeignFolder(again.folder))


def test_of_two_exports_to_one_folder_one_wins_and_the_other_says_so(make_sae, tmp_path):
    """Both exports start before either ends. Only the folder of the one that ends first remains."""
    (tmp_path / "out").mkdir()
    with (
        pytest.raises(UsageError, match="out was meanwhile written by another process"),
        new_folder(tmp_path / "out") as a,
    ):
        (a / "second").touch()
        with new_folder(tmp_path / "out") as b:
            (b / "first").touch()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["first"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
