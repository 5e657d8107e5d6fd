"""`--approximate`: exports of SAEs that no format can store exactly, and the recorded approximation error."""

import json
from pathlib import Path

import pytest
import torch

from sae.cache.reader import Cache
from sae.common.errors import UsageError
from sae.train.activation_functions import Activation, ReLU
from sae.train.formats.export import export_sae
from sae.train.sae import SAE, save_sae
from sae.train.variants.collapse.groups import WinnerTakeAll


def make_coupled_run(folder: Path, cache: Cache, link: Activation) -> Path:
    torch.manual_seed(0)
    origin = {"model": {"name": "synthetic"}, "layer": 0, "site": "resid_post"}
    sae = SAE(32, 64, [ReLU(), link], pre_bias=False)
    save_sae(sae, folder, {**origin, "cache": str(cache.folder), "fingerprint": cache.fingerprint})
    return folder


def test_coupled_latents_are_rejected_by_name_or_approximated(sparse_cache, tmp_path):
    run = make_coupled_run(tmp_path / "run", sparse_cache, WinnerTakeAll(64, 8, 2, inhibition="off"))
    with pytest.raises(UsageError, match="'winner_take_all' makes the latents of a token depend on each other"):
        export_sae(run, "saelens", tmp_path / "refused")
    exported = export_sae(run, "saelens", tmp_path / "out", approximate="topk")
    record = json.loads((exported.folder / "cfg.json").read_text())["metadata"]["approximation"]
    assert record["as"] == "topk" and record["of"] == "relu+winner_take_all"
    assert record["l0_approximated"] == pytest.approx(record["l0"], abs=0.51)
    assert record["relative_error_of_x_hat"] > 0
    assert exported.notes[0].startswith("relu+winner_take_all as topk, k ")
    with pytest.raises(UsageError, match="gemma-scope cannot store a topk SAE either, only jumprelu"):
        export_sae(run, "gemma-scope", tmp_path / "no", approximate="topk")
    with pytest.raises(UsageError, match="--approximate sparse is unknown: expected one of topk, jumprelu, relu"):
        export_sae(run, "saelens", tmp_path / "no", approximate="sparse")


def test_an_approximating_threshold_keeps_the_l0(sparse_cache, tmp_path):
    run = make_coupled_run(tmp_path / "run", sparse_cache, WinnerTakeAll(64, 1, 4, inhibition="off"))
    exported = export_sae(run, "gemma-scope", tmp_path / "out", approximate="jumprelu")
    record = json.loads((exported.folder / "about.json").read_text())["approximation"]
    assert record["l0_approximated"] == pytest.approx(record["l0"], rel=1e-3)


def test_an_approximation_needs_cached_rows(make_sae, tmp_path):
    with pytest.raises(UsageError, match="measured on cached activations, but the cache of this SAE is missing"):
        export_sae(make_sae("topk"), "gemma-scope", tmp_path / "out", approximate="jumprelu")


def test_approximate_is_ignored_if_the_format_can_store_the_sae(make_sae, tmp_path):
    exported = export_sae(make_sae("topk"), "saelens", tmp_path / "out", approximate="relu")
    assert any("saelens stores this topk SAE exactly; --approximate was ignored" in note for note in exported.notes)
    assert "approximation" not in exported.metadata
