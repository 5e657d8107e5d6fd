"""Conversion of an activation chain to the canonical form and back."""

import pytest
import torch

from sae.common.errors import UsageError
from sae.train.activation_functions import Activation, BatchTopK, ReLU, TopK
from sae.train.formats.canonical import CanonicalSAE, from_canonical, to_canonical
from sae.train.formats.export import export_sae
from sae.train.variants.collapse.batch_norm import BatchNorm
from sae.train.variants.collapse.groups import WinnerTakeAll
from sae.train.variants.gated import Gated
from sae.train.variants.progressive.competition import SoftCompetition
from sae.train.variants.progressive.growth import EnabledLatents
from sae.train.variants.switch import Switch


def test_a_gated_sae_converts_to_a_jumprelu():
    """z = x - 1 and f = ReLU(4 x + 3): the gate opens at x = 1, where 4 x + 3 is 7."""
    one = torch.ones(1, 1, dtype=torch.float64)
    r_mag = torch.log(torch.tensor([4.0], dtype=torch.float64))
    gated = CanonicalSAE(one, -one[0], one, 0 * one[0], "gated", r_mag=r_mag, b_mag=3 * one[0])
    jumprelu = gated.convert_to(("jumprelu",))
    assert jumprelu is not None and jumprelu.threshold is not None
    assert (float(jumprelu.W_enc), float(jumprelu.b_enc), float(jumprelu.threshold)) == pytest.approx((4, 3, 7))


def test_batchtopk_batch_norm_and_disabled_latents_are_folded(encode_decode, make_sae, x_RD, tmp_path):
    batchtopk = BatchTopK(4)
    batchtopk.threshold.fill_(0.7)
    norm = BatchNorm(16)
    norm.mean_F.copy_(torch.linspace(-1, 1, 16))
    norm.variance_F.copy_(torch.linspace(0.5, 2, 16))
    norm.gain_F.data.copy_(torch.linspace(-1, 2, 16))
    norm.shift_F.data.copy_(torch.linspace(1, -1, 16))
    enabled = EnabledLatents(16)
    enabled.on_F[::3] = 0
    for chain in ([batchtopk], [norm, ReLU()], [enabled, ReLU()], [enabled, TopK(8)]):
        sae = make_sae("relu")
        sae.activation = torch.nn.Sequential(*chain)
        canonical = to_canonical(sae.eval())
        f_RF, recon_RD = encode_decode(sae, x_RD)
        f2_RF, recon2_RD = encode_decode(from_canonical(canonical), x_RD)
        assert 0 < (f_RF > 0).double().mean() < 0.9
        assert torch.equal(f_RF > 0, f2_RF > 0)
        assert torch.allclose(recon_RD.float(), recon2_RD.float(), rtol=1e-4, atol=1e-5)


def test_every_activation_is_folded_or_rejected_by_name(make_sae):
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
    # A ReLU after a topk or a gate has no effect.
    assert coupled == {"winner_take_all", "competition", "switch"}


def test_negative_thresholds_are_rejected(make_sae, tmp_path):
    sae = make_sae("jumprelu")
    sae.activation[0].threshold.data[3] = -0.5
    with pytest.raises(UsageError, match="1 thresholds of this jumprelu are negative"):
        export_sae(sae, "saelens", tmp_path / "out")


def test_a_topk_is_ambiguous_only_where_latents_tie_at_the_cutoff(make_sae, x_RD):
    canonical = to_canonical(make_sae("topk", unit=True))
    assert not canonical.is_ambiguous(x_RD.double()).any()
    tied = CanonicalSAE(
        canonical.W_enc[:, [0] * 16], canonical.b_enc[[0] * 16], canonical.W_dec, canonical.b_dec, "topk", k=4
    )
    z_R = (x_RD.double() @ tied.W_enc + tied.b_enc)[:, 0]
    assert torch.equal(tied.is_ambiguous(x_RD.double()).all(1), z_R > 0)
