"""Verification: which differences count as equal, and whether the rows it uses reveal a difference."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from sae.common.errors import DamagedError
from sae.train.formats.canonical import from_canonical, to_canonical
from sae.train.formats.export import export_sae
from sae.train.formats.import_ import import_sae
from sae.train.formats.verify import Check, SampleRows, compare, synthetic_rows
from sae.train.sae import SAE, fold_normalization, save_sae


def test_a_relative_error_above_1e_5_fails(encode_decode, make_sae, x_RD):
    sae = make_sae("relu")
    canonical, (f_RF, recon_RD) = to_canonical(sae), encode_decode(make_sae("relu"), x_RD)
    rows = SampleRows(x_RD, "these")

    def compare_with_error(error: float) -> Check:
        return compare(sae, canonical, lambda x: (f_RF, recon_RD * (1 + error)), rows)

    assert compare_with_error(9e-6).passed and not compare_with_error(1.1e-5).passed
    assert compare_with_error(9e-6).reconstruction_error == pytest.approx(9e-6, rel=1e-3)


def test_a_latent_at_its_threshold_is_ambiguous_and_one_away_from_it_a_mismatch(encode_decode, make_sae, x_RD):
    sae = make_sae("jumprelu", pre_bias=False, unit=True)
    z_RF = x_RD.double() @ sae.W_enc.double() + sae.b_enc.double()
    row, latent, other = int(z_RF[:, 5].argmax()), 5, 6
    sae.activation[0].threshold.data[latent] = float(z_RF[row, latent].float())  # as close as float32 allows
    canonical = to_canonical(sae)
    f_RF, recon_RD = encode_decode(sae, x_RD)

    def compare_with_flipped(row: int, latent: int) -> Check:
        other_RF = f_RF.clone()
        other_RF[row, latent] = 0 if f_RF[row, latent] > 0 else 1
        return compare(sae, canonical, lambda x: (other_RF, recon_RD), SampleRows(x_RD, "these"))

    near = compare_with_flipped(row, latent)
    assert (near.passed, near.ambiguous_rows, near.mismatches) == (True, 1, 0)
    assert "active sets equal except in 1 rows, within float32 rounding of a threshold" in str(near)
    far = compare_with_flipped(row, other)
    assert (far.passed, far.ambiguous_rows, far.mismatches) == (False, 0, 1)


def test_a_check_without_comparable_rows_fails():
    assert not Check(4, "these", 1.0, 0, 4, 0.0, 0.0).passed
    assert "none of the 4 rows (these) can be compared" in str(Check(4, "these", 1.0, 0, 4, 0.0, 0.0))
    assert Check(4, "these", 1.0, 0, 3, 0.0, 0.0).passed


def test_rows_come_from_the_runs_cache_or_are_synthetic(make_sae, sparse_cache, tmp_path):
    sae = SAE(32, 64)
    hook = {"layer": 0, "site": "resid_post", "model": {"name": "synthetic"}}
    save_sae(
        sae, tmp_path / "run", {**hook, "cache": str(sparse_cache.folder), "fingerprint": sparse_cache.fingerprint}
    )
    exported = export_sae(tmp_path / "run", "saelens")
    assert (exported.check.rows, exported.check.description) == (4096, f"from cache {sparse_cache.folder.name}")
    assert exported.folder == tmp_path / "run" / "exports" / "saelens"
    save_sae(sae, tmp_path / "lost", {**hook, "cache": "/nowhere", "fingerprint": "0"})
    lost = export_sae(tmp_path / "lost", "saelens")
    assert lost.check.description.startswith("synthetic, without a cache: b_dec plus 8 decoder rows, half of them")
    assert lost.check.l0 > 10


@pytest.mark.parametrize("size", [1e-3, 1, 1e3])
@pytest.mark.parametrize("activation", ["relu", "jumprelu", "gated"])
def test_synthetic_rows_detect_a_change_of_any_threshold_or_bias(make_sae, activation, size):
    """The check fails against a copy of the SAE whose bias (jumprelu: threshold) of any one latent is changed."""
    sae = fold_normalization(make_sae(activation, unit=True), size, torch.zeros(8))
    canonical = to_canonical(sae)
    rows = synthetic_rows(canonical)
    name = {"relu": "b_enc", "jumprelu": "threshold", "gated": "b_enc"}[activation]
    gate_F = torch.ones(16) if activation != "gated" else canonical.convert_to(("jumprelu",)).threshold
    for latent in gate_F.nonzero().flatten().tolist():  # skips gates that are always open: their bias has no effect
        moved_F = getattr(canonical, name).clone()
        moved_F[latent] += 0.3 * size
        other = from_canonical(replace(canonical, **{name: moved_F})).double()
        check = compare(sae, canonical, lambda x, o=other: (o.encode(x), o.decode(o.encode(x))), rows)
        assert not check.passed, (latent, check)


def test_synthetic_rows_of_an_encoder_without_a_bias_are_not_all_b_dec():
    """b_enc and b_dec W_enc cancel up to rounding, and the rounding error is not used as the scale of the rows."""
    torch.manual_seed(0)
    sae = SAE(16, 32).eval().requires_grad_(False)
    sae.b_dec.normal_()
    canonical = to_canonical(sae)
    rows = synthetic_rows(canonical)
    assert ((rows.x_RD - sae.b_dec).norm(dim=1) > 0.1 * sae.b_dec.norm()).float().mean() > 0.9
    other = from_canonical(replace(canonical, b_enc=canonical.b_enc + 1e-3)).double()
    assert not compare(sae, canonical, lambda x: (other.encode(x), other.decode(other.encode(x))), rows).passed


@pytest.mark.parametrize("transposed", [(), ("W_enc",), ("W_dec",), ("W_enc", "W_dec")])
def test_a_transposed_square_matrix_is_seen_by_the_reconstruction(sparse_cache, tmp_path, transposed):
    """Latent i reads axis i + 1 with a weight that grows with i, so neither matrix equals its transpose."""
    width = sparse_cache.array("layer_00").shape[1]
    W_enc = torch.roll(torch.diag(torch.linspace(0.5, 2, width)), 1, dims=1)
    tensors = {"W_enc": W_enc, "W_dec": W_enc.inverse().contiguous(), "b_enc": torch.full((width,), 50.0)}
    tensors["b_dec"] = -tensors["b_enc"] @ tensors["W_dec"]
    tensors |= {name: tensors[name].T.contiguous() for name in transposed}
    folder = tmp_path / "square"
    folder.mkdir()
    save_file(tensors, folder / "sae_weights.safetensors")
    config = {"architecture": "standard", "d_in": width, "d_sae": width, "apply_b_dec_to_input": False}
    config |= {"model_name": "synthetic", "hook_name": "blocks.0.hook_resid_post"}
    (folder / "cfg.json").write_text(json.dumps(config))
    without = import_sae(folder, out=tmp_path / "runs", name="without")
    assert without.notes == [
        f"d_in and d_sae are both {width}: the shapes do not show whether a matrix is transposed, and there is no "
        "cache on which the reconstruction could show it."
    ]
    if not transposed:
        assert import_sae(folder, cache=sparse_cache.folder, out=tmp_path / "runs", name="with").notes == []
        return
    words = f"{' and '.join(transposed)} seems to be transposed"
    with pytest.raises(DamagedError, match=words):
        import_sae(folder, cache=sparse_cache.folder, out=tmp_path / "runs", name="with")
    assert not (tmp_path / "runs" / "with").exists()
