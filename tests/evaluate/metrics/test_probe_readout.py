"""The linear read-out equals ablation by decoding, and the effects of latents equal their definition."""

import pytest
import torch
from torch.nn.functional import pad

from sae.common.errors import UsageError
from sae.evaluate.metrics.batched_probes import LinearProbes
from sae.evaluate.metrics.pooled_activations import PooledLatents, TextRows, pool_latents
from sae.evaluate.metrics.probe_readout import ProbeReadout, affine_decoder, mean_latent_differences, strongest_latents
from sae.evaluate.metrics.probes import ProbeTask
from sae.evaluate.reference_saes import Identity, Zero
from sae.train.activation_functions import BatchTopK, ReLU, TopK
from sae.train.sae import SAE

CPU = torch.device("cpu")
D_IN, D_SAE, CONTEXT = 12, 30, 9
COUNTS = (3, 8, 1, 5)


def random_sae(kind: str, dtype: torch.dtype = torch.float32) -> SAE:
    """An SAE of which some latents fire on a zero row."""
    torch.manual_seed(1)
    sae = SAE(D_IN, D_SAE, {"relu": [ReLU()], "topk": [TopK(6)], "threshold": [BatchTopK(6)]}[kind])
    sae.b_dec.data.normal_()
    sae.b_enc.data.normal_(mean=0.2)
    sae.W_dec.data *= torch.rand(D_SAE, 1) + 0.5
    if kind == "threshold":
        sae.activation[0].threshold.fill_(0.4)
    return sae.eval().requires_grad_(False).to(dtype)


def random_rows(dtype: torch.dtype = torch.float32) -> TextRows:
    return TextRows(
        torch.randn(sum(COUNTS), D_IN, generator=torch.Generator().manual_seed(2), dtype=dtype), torch.tensor(COUNTS)
    )


def padded(rows: TextRows) -> torch.Tensor:
    """The rows as (N, CONTEXT, D), with zeros at BOS and after the end."""
    parts = rows.x_TD.split(rows.count_N.tolist())
    return torch.stack([pad(part, (0, 0, 1, CONTEXT - 1 - len(part))) for part in parts])


def random_probes(dtype: torch.dtype) -> LinearProbes:
    generator = torch.Generator().manual_seed(3)
    return LinearProbes(*(torch.randn(shape, generator=generator, dtype=dtype) for shape in ((3, D_IN), (3,))))


def ablated_by_hand(sae: SAE, rows: TextRows, probes: LinearProbes, latents: torch.Tensor) -> torch.Tensor:
    x = padded(rows)
    f = sae.encode(x)
    without = f.clone()
    without[..., latents] = 0
    changed = x - sae.decode(f) + sae.decode(without)
    return probes.logits(changed.sum(1) / rows.count_N[:, None])


def pooled_in(sae: SAE, rows: TextRows) -> PooledLatents:
    """Like `pool_latents`, but in the dtype of the rows."""
    f = [sae.encode(part).sum(0) for part in rows.x_TD.split(rows.count_N.tolist())]
    return PooledLatents(torch.stack(f), rows.count_N, sae.encode(torch.zeros(1, D_IN, dtype=rows.x_TD.dtype))[0])


@pytest.mark.parametrize("kind", ["relu", "topk", "threshold"])
def test_the_read_out_is_ablation_with_all_that_leaks_from_padding(kind):
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        sae, rows, probes = random_sae(kind, dtype), random_rows(dtype), random_probes(dtype)
        pooled = pool_latents(sae, rows, CPU) if dtype is torch.float32 else pooled_in(sae, rows)
        mean_ND = torch.stack([part.mean(0) for part in rows.x_TD.split(rows.count_N.tolist())])
        readout = ProbeReadout.of(probes, mean_ND, pooled, sae.W_dec, CONTEXT)
        for latents in (
            torch.tensor([], dtype=torch.int64),
            torch.tensor([4]),
            torch.tensor([9, 2, 17, 20]),
            torch.arange(D_SAE),
        ):
            expected = ablated_by_hand(sae, rows, probes, latents)
            scale = float(expected.abs().max())
            torch.testing.assert_close(readout.ablate(latents), expected, rtol=0, atol=tolerance * scale)
        tight = ProbeReadout.of(probes, mean_ND, pooled, sae.W_dec, max(COUNTS))
        assert (tight.ablate(torch.arange(D_SAE)) - expected).abs().max() > 0.01 * scale  # padding has an effect


def test_the_norms_of_decoder_rows_change_nothing():
    sae, rows, probes = random_sae("relu"), random_rows(), random_probes(torch.float32)
    other = random_sae("relu")
    factor_F = torch.rand(D_SAE) + 0.5
    other.W_dec.data /= factor_F[:, None]
    other.W_enc.data *= factor_F
    other.b_enc.data *= factor_F
    task = ProbeTask(torch.tensor([0, 1, 2, 3]), torch.tensor([1.0, 0, 0, 1]))
    found = []
    for one in (sae, other):
        pooled = pool_latents(one, rows, CPU)
        readout = ProbeReadout.of(probes, rows.mean_ND(), pooled, one.W_dec, CONTEXT)
        effect_F = mean_latent_differences(pooled, [task])[0] * readout.align_FP[:, 1]
        found.append((effect_F, readout.ablate(strongest_latents(effect_F, 5))))
    torch.testing.assert_close(found[0], found[1])


def test_difference_of_means():
    pooled = PooledLatents(
        torch.tensor([[2.0, 0], [3, 6], [4, 4], [0, 8]]), torch.tensor([1, 3, 2, 4]), torch.tensor([9.0, 9])
    )
    tasks = [
        ProbeTask(torch.tensor([3, 0, 1]), torch.tensor([0.0, 1, 1])),
        ProbeTask(torch.tensor([2, 0, 3]), torch.tensor([1.0, 0, 0])),
    ]
    torch.testing.assert_close(
        mean_latent_differences(pooled, tasks), torch.tensor([[1.5 - 0, 1 - 2], [2.0 - 1, 2 - 1]])
    )


def test_the_strongest_latents_have_an_effect_or_stand_before_those_that_harm():
    effect_F = torch.tensor([0.0, -0.5, 0.2, 0.0, 0.7, -0.1])
    assert strongest_latents(effect_F, 1).tolist() == [4]
    assert strongest_latents(effect_F, 2).tolist() == [4, 2]
    assert set(strongest_latents(effect_F, 3).tolist()) in ({4, 2, 0}, {4, 2, 3})
    for count in (4, 5, 6):  # four effects are nonzero, two of them negative
        assert set(strongest_latents(effect_F, count).tolist()) == {4, 2, 0, 3}
    assert strongest_latents(torch.zeros(4), 2).tolist() == []


def test_a_decoder_that_is_given_or_found():
    sae = random_sae("relu")
    assert torch.equal(affine_decoder(sae, D_IN, CPU), sae.W_dec)

    class Bare:
        encode, decode = sae.encode, sae.decode

    torch.testing.assert_close(affine_decoder(Bare(), D_IN, CPU), sae.W_dec.data, rtol=1e-5, atol=1e-5)
    for reference in (Identity(), Zero()):
        assert torch.equal(affine_decoder(reference, D_IN, CPU), torch.eye(D_IN))


def test_a_decoder_that_is_not_affine_is_refused():
    sae = random_sae("relu")

    class Squares:
        encode, W_dec = sae.encode, sae.W_dec

        def decode(self, f):
            return f**2 @ sae.W_dec

    with pytest.raises(UsageError, match="affine decoder"):
        affine_decoder(Squares(), D_IN, CPU)
