"""An export says what the SAE does, or is not made."""

import json
import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sae.cache.layout import Hook
from sae.common.errors import SaeError, UsageError
from sae.train import variants  # noqa: F401  (registers the activations)
from sae.train.activations import Activation, BatchTopK, ReLU, TopK
from sae.train.formats import gemma_scope
from sae.train.formats.base import Format
from sae.train.formats.canonical import CanonicalSAE, from_canonical, to_canonical
from sae.train.formats.export import export_sae
from sae.train.formats.import_ import import_sae
from sae.train.formats.metadata import module_path
from sae.train.formats.safe_read import ForeignFolder
from sae.train.formats.verify import Check, SampleRows, compare, synthetic_rows
from sae.train.sae import SAE, fold_normalization, load_sae, save_sae
from sae.train.variants.collapse.batch_norm import BatchNorm
from sae.train.variants.collapse.groups import WinnerTakeAll
from sae.train.variants.gated import Gated
from sae.train.variants.progressive import EnabledLatents, SoftCompetition
from sae.train.variants.switch import Switch

HOLDS = {
    "relu": {"saelens", "gemma-scope", "dictionary-learning"},
    "jumprelu": {"saelens", "gemma-scope", "dictionary-learning"},
    "gated": {"saelens", "gemma-scope", "dictionary-learning"},
    "topk": {"saelens", "dictionary-learning", "sparsify"},
}
PAIRS = [(kind, to) for kind, formats in HOLDS.items() for to in sorted(formats)]
MISSING = [(kind, to) for kind, formats in HOLDS.items() for to in sorted(set(Format.registry) - formats)]


def coded(sae: SAE, x_RD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    wide = sae.double()
    with torch.no_grad():
        f_RF = wide.encode(x_RD.double())
        return f_RF, wide.decode(f_RF)


# --- what is written ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pre_bias", [True, False])
@pytest.mark.parametrize(("kind", "to"), PAIRS)
def test_there_and_back_is_the_same_sae_with_unit_rows(make_sae, x_RD, tmp_path, kind, to, pre_bias):
    sae = make_sae(kind, pre_bias=pre_bias)
    made = export_sae(sae, to, tmp_path / "out")
    back = load_sae(import_sae(made.folder, out=tmp_path / "runs").folder)
    f_RF, recon_RD = coded(sae, x_RD)
    f2_RF, recon2_RD = coded(back, x_RD)
    # Unit rows make a latent as much larger as its row was longer.
    n_F = 1 if kind == "topk" else sae.W_dec.norm(dim=1)
    assert torch.equal(f_RF > 0, f2_RF > 0)
    assert torch.allclose(f_RF * n_F, f2_RF, rtol=1e-5, atol=1e-6)
    assert torch.allclose(recon_RD, recon2_RD, rtol=1e-5, atol=1e-5)
    if kind != "topk":
        assert torch.allclose(back.W_dec.norm(dim=1), torch.ones(16, dtype=torch.float64), atol=1e-6)


@pytest.mark.parametrize(("kind", "to"), MISSING)
def test_what_a_format_cannot_hold_is_refused_with_those_that_can(make_sae, tmp_path, kind, to):
    with pytest.raises(UsageError) as error:
        export_sae(make_sae(kind), to, tmp_path / "out")
    assert all(able in str(error.value) for able in HOLDS[kind])
    assert f"cannot store a {kind} SAE" in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_gate_is_a_jump_where_both_paths_share_the_encoder():
    """By hand: z = 2 + b_gate, f = ReLU(e^r 2 + b_mag) from x = 2; it opens at x = 1, where e^r x + b_mag = 7."""
    one = torch.ones(1, 1, dtype=torch.float64)
    r_mag = torch.log(torch.tensor([4.0], dtype=torch.float64))
    gated = CanonicalSAE(one, -one[0], one, 0 * one[0], "gated", r_mag=r_mag, b_mag=3 * one[0])
    jump = gated.convert_to(("jumprelu",))
    assert jump is not None and jump.threshold is not None
    assert (float(jump.W_enc), float(jump.b_enc), float(jump.threshold)) == pytest.approx((4, 3, 7))


def test_a_topk_with_unit_rows_says_so_to_saelens_and_one_without_does_not(make_sae, tmp_path):
    for unit in (True, False):
        made = export_sae(make_sae("topk", unit=unit), "saelens", tmp_path / str(unit))
        assert json.loads((made.folder / "cfg.json").read_text())["rescale_acts_by_decoder_norm"] is unit
        assert bool(made.notes) is not unit


def test_batchtopk_is_a_jump_at_its_threshold_and_batch_norm_and_switched_off_latents_fold(make_sae, x_RD, tmp_path):
    batch = BatchTopK(4)
    batch.threshold.fill_(0.7)
    norm = BatchNorm(16)
    norm.mean_F.copy_(torch.linspace(-1, 1, 16))
    norm.variance_F.copy_(torch.linspace(0.5, 2, 16))
    norm.gain_F.data.copy_(torch.linspace(-1, 2, 16))
    norm.shift_F.data.copy_(torch.linspace(1, -1, 16))
    some = EnabledLatents(16)
    some.on_F[::3] = 0
    for chain in ([batch], [norm, ReLU()], [some, ReLU()], [some, TopK(8)]):
        sae = make_sae("relu")
        sae.activation = torch.nn.Sequential(*chain)
        plain = to_canonical(sae.eval())
        f_RF, recon_RD = coded(sae, x_RD)
        f2_RF, recon2_RD = coded(from_canonical(plain), x_RD)
        assert 0 < (f_RF > 0).double().mean() < 0.9
        assert torch.equal(f_RF > 0, f2_RF > 0)
        assert torch.allclose(recon_RD.float(), recon2_RD.float(), rtol=1e-4, atol=1e-5)


def test_every_activation_is_folded_or_refused_by_its_name(make_sae):
    builds = {
        "relu": ReLU(), "topk": TopK(2), "batchtopk": BatchTopK(2), "gated": Gated(16), "enabled": EnabledLatents(16),
        "batch_norm": BatchNorm(16), "winner_take_all": WinnerTakeAll(16, 4, 1), "competition": SoftCompetition(0.1),
        "switch": Switch(8, 4, 2), "jumprelu": Activation.registry["jumprelu"](16, 0.1),
        "gram_schmidt_latents": Activation.registry["gram_schmidt_latents"](4),
    }  # fmt: skip
    assert set(builds) == set(Activation.registry)
    coupled = set()
    for name, link in builds.items():
        sae = make_sae("relu")
        sae.activation = torch.nn.Sequential(link, ReLU())
        try:
            to_canonical(sae)
        except UsageError as error:
            assert name in str(error)
            coupled.add(name)
    # A topk and a gate are whole: the relu behind them changes nothing.
    assert coupled == {"winner_take_all", "competition", "switch"}


def test_negative_thresholds_are_refused(make_sae, tmp_path):
    sae = make_sae("jumprelu")
    sae.activation[0].threshold.data[3] = -0.5
    with pytest.raises(UsageError, match="1 thresholds of this jumprelu are negative"):
        export_sae(sae, "saelens", tmp_path / "out")


# --- the check ------------------------------------------------------------------------------------------------------


def test_a_wrong_export_is_refused_and_leaves_nothing(make_sae, tmp_path, monkeypatch):
    whole = gemma_scope.GemmaScope.write

    def unfolded(self, plain, folder, about):
        assert plain.threshold is not None
        whole(self, CanonicalSAE(plain.W_enc, plain.b_enc, plain.W_dec, plain.b_dec, "jumprelu", threshold=plain.threshold * 2), folder, about)  # fmt: skip

    monkeypatch.setattr(gemma_scope.GemmaScope, "write", unfolded)
    with pytest.raises(
        SaeError, match="failed verification, and no files were kept: .* latents are active on one side only"
    ):
        export_sae(make_sae("jumprelu"), "gemma-scope", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_error_over_1e_5_is_refused_and_a_rounding_is_not(make_sae, x_RD):
    sae = make_sae("relu")
    plain, (f_RF, recon_RD) = to_canonical(sae), coded(make_sae("relu"), x_RD)
    rows = SampleRows(x_RD, "these")
    off = lambda by: compare(sae, plain, lambda x: (f_RF, recon_RD * (1 + by)), rows)  # noqa: E731
    assert off(9e-6).passed and not off(1.1e-5).passed
    assert off(9e-6).reconstruction_error == pytest.approx(9e-6, rel=1e-3)


def test_a_row_at_a_threshold_is_counted_and_said_and_one_away_from_it_is_refused(make_sae, x_RD):
    sae = make_sae("jumprelu", pre_bias=False, unit=True)
    z_RF = x_RD.double() @ sae.W_enc.double() + sae.b_enc.double()
    row, latent, other = int(z_RF[:, 5].argmax()), 5, 6
    sae.activation[0].threshold.data[latent] = float(z_RF[row, latent].float())  # as near as float32 comes to it
    plain = to_canonical(sae)
    f_RF, recon_RD = coded(sae, x_RD)

    def with_other(row: int, latent: int):
        other_RF = f_RF.clone()
        other_RF[row, latent] = 0 if f_RF[row, latent] > 0 else 1
        return compare(sae, plain, lambda x: (other_RF, recon_RD), SampleRows(x_RD, "these"))

    near = with_other(row, latent)
    assert (near.passed, near.ambiguous_rows, near.mismatches) == (True, 1, 0)
    assert "active sets equal except in 1 rows, within float32 rounding of a threshold" in str(near)
    far = with_other(row, other)
    assert (far.passed, far.ambiguous_rows, far.mismatches) == (False, 0, 1)


def test_the_last_of_a_topk_is_in_doubt_only_when_the_next_is_as_large(make_sae, x_RD):
    plain = to_canonical(make_sae("topk", unit=True))
    assert not plain.is_ambiguous(x_RD.double()).any()
    tied = CanonicalSAE(plain.W_enc[:, [0] * 16], plain.b_enc[[0] * 16], plain.W_dec, plain.b_dec, "topk", k=4)
    z_R = (x_RD.double() @ tied.W_enc + tied.b_enc)[:, 0]
    assert torch.equal(tied.is_ambiguous(x_RD.double()).all(1), z_R > 0)


def test_rows_are_the_caches_own_and_otherwise_synthetic_and_it_says_so(make_sae, sparse_cache, tmp_path):
    sae = SAE(32, 64)
    hook = {"layer": 0, "site": "resid_post", "model": {"name": "synthetic"}}
    save_sae(
        sae, tmp_path / "run", {**hook, "cache": str(sparse_cache.folder), "fingerprint": sparse_cache.fingerprint}
    )
    made = export_sae(tmp_path / "run", "saelens")
    assert (made.check.rows, made.check.description) == (4096, f"from cache {sparse_cache.folder.name}")
    assert made.folder == tmp_path / "run" / "exports" / "saelens"
    save_sae(sae, tmp_path / "lost", {**hook, "cache": "/nowhere", "fingerprint": "0"})
    lost = export_sae(tmp_path / "lost", "saelens")
    assert lost.check.description.startswith(
        "synthetic, since no cache was found: b_dec plus 8 decoder rows, half of them"
    )
    assert lost.check.l0 > 10


@pytest.mark.parametrize("size", [1e-3, 1, 1e3])
@pytest.mark.parametrize("kind", ["relu", "jumprelu", "gated"])
def test_synthetic_rows_see_every_threshold_and_bias_whatever_their_size(make_sae, kind, size):
    """The same SAE with one bias or threshold moved, each latent in turn."""
    sae = fold_normalization(make_sae(kind, unit=True), size, torch.zeros(8))
    plain = to_canonical(sae)
    rows = synthetic_rows(plain)
    name = {"relu": "b_enc", "jumprelu": "threshold", "gated": "b_enc"}[kind]
    gate_F = torch.ones(16) if kind != "gated" else plain.convert_to(("jumprelu",)).threshold
    for latent in gate_F.nonzero().flatten().tolist():  # behind a gate that is always open its bias does nothing
        moved_F = getattr(plain, name).clone()
        moved_F[latent] += 0.3 * size
        other = from_canonical(replace(plain, **{name: moved_F})).double()
        check = compare(sae, plain, lambda x, o=other: (o.encode(x), o.decode(o.encode(x))), rows)
        assert not check.passed, (latent, check)


def test_synthetic_rows_of_an_encoder_without_a_bias_are_not_all_b_dec():
    """b_enc and b_dec W_enc cancel but for a rounding, which is no length that a row could have."""
    torch.manual_seed(0)
    sae = SAE(16, 32).eval().requires_grad_(False)
    sae.b_dec.normal_()
    plain = to_canonical(sae)
    rows = synthetic_rows(plain)
    assert ((rows.x_RD - sae.b_dec).norm(dim=1) > 0.1 * sae.b_dec.norm()).float().mean() > 0.9
    other = from_canonical(replace(plain, b_enc=plain.b_enc + 1e-3)).double()
    assert not compare(sae, plain, lambda x: (other.encode(x), other.decode(other.encode(x))), rows).passed


def test_a_check_that_could_compare_no_row_is_none():
    assert not Check(4, "these", 1.0, 0, 4, 0.0, 0.0).passed
    assert "none of the 4 rows (these) can be compared" in str(Check(4, "these", 1.0, 0, 4, 0.0, 0.0))
    assert Check(4, "these", 1.0, 0, 3, 0.0, 0.0).passed


# --- approximations -------------------------------------------------------------------------------------------------


def coupled_run(folder: Path, cache, link: Activation) -> Path:
    torch.manual_seed(0)
    origin = {"model": {"name": "synthetic"}, "layer": 0, "site": "resid_post"}
    sae = SAE(32, 64, [ReLU(), link], pre_bias=False)
    save_sae(sae, folder, {**origin, "cache": str(cache.folder), "fingerprint": cache.fingerprint})
    return folder


def test_coupled_latents_are_refused_by_name_and_approximated_when_asked(sparse_cache, tmp_path):
    run = coupled_run(tmp_path / "run", sparse_cache, WinnerTakeAll(64, 8, 2, inhibition="off"))
    with pytest.raises(UsageError, match="'winner_take_all' makes the latents of a token depend on each other"):
        export_sae(run, "saelens", tmp_path / "refused")
    made = export_sae(run, "saelens", tmp_path / "out", approximate="topk")
    record = json.loads((made.folder / "cfg.json").read_text())["metadata"]["approximation"]
    assert record["as"] == "topk" and record["of"] == "relu+winner_take_all"
    assert record["l0_approximated"] == pytest.approx(record["l0"], abs=0.51)
    assert record["relative_error_of_x_hat"] > 0
    assert made.notes[0].startswith("relu+winner_take_all as topk, k ")
    with pytest.raises(UsageError, match="gemma-scope cannot store a topk SAE either, only jumprelu"):
        export_sae(run, "gemma-scope", tmp_path / "no", approximate="topk")
    with pytest.raises(UsageError, match="--approximate sparse is unknown; expected one of topk, jumprelu, relu"):
        export_sae(run, "saelens", tmp_path / "no", approximate="sparse")


def test_a_threshold_in_place_of_k_leaves_as_many_latents(sparse_cache, tmp_path):
    run = coupled_run(tmp_path / "run", sparse_cache, WinnerTakeAll(64, 1, 4, inhibition="off"))
    made = export_sae(run, "gemma-scope", tmp_path / "out", approximate="jumprelu")
    record = json.loads((made.folder / "about.json").read_text())["approximation"]
    assert record["l0_approximated"] == pytest.approx(record["l0"], rel=1e-3)


def test_an_approximation_without_rows_to_measure_it_on_is_refused(make_sae, tmp_path):
    with pytest.raises(UsageError, match="measured on cached activations, but the cache of this SAE is gone"):
        export_sae(make_sae("topk"), "gemma-scope", tmp_path / "out", approximate="jumprelu")


def test_an_exact_export_does_not_need_to_be_approximate(make_sae, tmp_path):
    made = export_sae(make_sae("topk"), "saelens", tmp_path / "out", approximate="relu")
    assert any("saelens stores this topk SAE exactly; --approximate was ignored" in note for note in made.notes)
    assert "approximation" not in made.metadata


# --- files ----------------------------------------------------------------------------------------------------------


def test_metadata_has_what_consumers_ask_for(make_sae, tmp_path):
    made = export_sae(make_sae("jumprelu"), "saelens", tmp_path / "out")
    config = json.loads((made.folder / "cfg.json").read_text())
    assert {k: config[k] for k in ("architecture", "d_in", "d_sae", "dtype", "apply_b_dec_to_input", "normalize_activations")} == {
        "architecture": "jumprelu", "d_in": 8, "d_sae": 16, "dtype": "float32", "apply_b_dec_to_input": False, "normalize_activations": "none",
    }  # fmt: skip
    said = config["metadata"]
    assert said["sae_lens_version"].split(".")[0] == "6"
    assert {k: said[k] for k in ("model_name", "hook_name", "hook_layer", "hf_hook_name", "context_size", "prepend_bos")} == {
        "model_name": "gemma-2-2b", "hook_name": "blocks.12.hook_resid_post", "hook_layer": 12, "hf_hook_name": "model.layers.12",
        "context_size": 128, "prepend_bos": True,
    }  # fmt: skip
    assert said["training_architecture"] == "jumprelu" and said["created_by"].startswith("sae-pipeline ")
    shapes = {name: tuple(t.shape) for name, t in load_file(made.folder / "sae_weights.safetensors").items()}
    assert shapes == {"W_enc": (8, 16), "W_dec": (16, 8), "b_enc": (16,), "b_dec": (8,), "threshold": (16,)}


def test_the_block_has_the_name_that_the_harvest_noted(sparse_cache, tmp_path):
    assert module_path(Hook(1), None) == "model.layers.1"
    assert module_path(Hook(1), sparse_cache) == "model.layers.1"  # it noted none
    noted = sparse_cache.folder / "harvest.json"
    before = noted.read_bytes() if noted.exists() else None
    noted.write_text(json.dumps({"modules": {"layer_01": "transformer.h.1, hidden_states[2]"}}))
    try:
        assert module_path(Hook(1), sparse_cache) == "transformer.h.1"
    finally:
        noted.unlink() if before is None else noted.write_bytes(before)


def test_a_folder_that_holds_something_is_refused_and_others_can_read_the_files(make_sae, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="full is not empty; nothing was written"):
        export_sae(make_sae("relu"), "saelens", tmp_path / "full")
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["thesis.txt"]
    (tmp_path / "empty").mkdir()
    before = os.umask(0o022)
    try:
        made = export_sae(make_sae("relu"), "saelens", tmp_path / "empty")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in made.files} == {0o644}


def test_an_unknown_format_suggests_one(make_sae, tmp_path):
    with pytest.raises(UsageError, match="--to saelense is not a known format; did you mean saelens"):
        export_sae(make_sae("relu"), "saelense", tmp_path / "out")


def test_what_was_imported_can_be_exported_again(make_sae, tmp_path):
    first = export_sae(make_sae("gated"), "dictionary-learning", tmp_path / "a")
    run = import_sae(first.folder, out=tmp_path / "runs").folder
    again = export_sae(run, "dictionary-learning", tmp_path / "b")
    one, two = (torch.load(m.folder / "ae.pt", weights_only=True) for m in (first, again))
    assert all(torch.allclose(one[name], two[name], atol=1e-6) for name in one)
    assert Format.registry["dictionary-learning"].matches(ForeignFolder(again.folder))
