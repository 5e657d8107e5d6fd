"""Statistics of small batches equal values computed by hand, and intervals agree with the bootstrap."""

import math

import pytest
import torch

from sae.cache.hooks import Hook
from sae.evaluate.metrics import sae_statistics
from sae.evaluate.metrics.base import EvalTarget
from sae.evaluate.metrics.sae_statistics import SAEStatistics, largest_other_cosine, ratio_interval, splice
from sae.evaluate.reference_saes import Identity


class Scripted:
    """An SAE that encodes and decodes every batch to the same tensors."""

    def __init__(self, f, recon):
        self.f, self.recon = f, recon

    def encode(self, x):
        return self.f

    def decode(self, f):
        return self.recon


def statistics_of(x: torch.Tensor, f: torch.Tensor, recon: torch.Tensor) -> SAEStatistics:
    """The statistics of one context with the rows x (T, D), latents f and reconstruction recon."""
    stats = SAEStatistics()
    counted = torch.ones(1, len(x), dtype=torch.bool)
    patched = splice(EvalTarget(Scripted(f, recon), Hook(0)), x[None], counted, [(stats, counted)])
    assert torch.equal(patched, recon[None])
    return stats


def test_one_token_has_no_variance_and_no_next_token():
    x = torch.tensor([[3.0, 4.0]])
    stats = statistics_of(x, x, x)
    assert math.isnan(stats.scalars("0.6.0")["reconstruction_quality"]["fve"])
    assert stats.scalars("0.6.0")["shrinkage"]["l2_norm_in"] == 5


def test_the_wrong_explained_variance_is_wrong_as_documented():
    """For two dimensions with mean 10 and little noise, 1 - R/(S - (S/D)^2) is far from the true value of 0.75."""
    x = torch.tensor([[9.0, 10.0], [11.0, 10.0]])
    recon = torch.tensor([[9.5, 10.0], [10.5, 10.0]])
    stats = statistics_of(x, x, recon)
    quality = stats.scalars("0.6.0")["reconstruction_quality"]
    s = (81 + 100 + 121 + 100) / 2  # E|x|^2 = 201
    assert quality["fve"] == pytest.approx(0.75)
    assert quality["explained_variance"] == pytest.approx(1 - 0.25 / (s - (s / 2) ** 2))
    assert quality["explained_variance_legacy"] == pytest.approx(0.75)
    assert quality["mse"] == pytest.approx(0.25 / 2)
    assert quality["mse_elementwise"] == pytest.approx(0.25 / 2)


def test_l1_is_a_signed_sum_and_density_counts_positive_latents_only():
    x = torch.ones(2, 3)
    stats = statistics_of(x, torch.tensor([[1.0, -3.0, 0.0], [2.0, 0.0, 0.0]]), x)
    variance = (0.25 + 2.25 + 0) / 3
    assert stats.scalars("0.6.0")["sparsity"] == {"l0": 1.5, "l1": 0.0, "activation_variance": pytest.approx(variance)}
    assert stats.density().tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("block", [1, 3, 100])
def test_largest_other_cosine_is_brute_force(block):
    torch.manual_seed(0)
    rows = torch.randn(7, 5)
    cosine = torch.nn.functional.cosine_similarity(rows[:, None], rows[None], dim=-1)
    expected = [max(cosine[i, j] for j in range(7) if j != i) for i in range(7)]
    assert largest_other_cosine(rows, block).tolist() == pytest.approx([float(e) for e in expected], abs=1e-6)


def test_an_interval_is_that_of_a_mean_over_contexts_and_of_a_share():
    torch.manual_seed(0)
    part, one = torch.randn(400, dtype=torch.float64), torch.ones(400, dtype=torch.float64)
    low, high = ratio_interval((part, one))
    assert (low + high) / 2 == pytest.approx(float(part.mean()))
    assert (high - low) / 2 == pytest.approx(1.96 * float(part.std()) / 20)
    whole = torch.rand(400, dtype=torch.float64) + 0.5
    low, high = ratio_interval((part * whole, whole))
    drawn = torch.randint(400, (4000, 400))
    ratios = (part * whole)[drawn].sum(1) / whole[drawn].sum(1)
    assert (high - low) / 2 == pytest.approx(1.96 * float(ratios.std()), rel=0.05)  # the bootstrap agrees
    assert all(math.isnan(end) for end in ratio_interval((part[:1], one[:1])))


class NoisyIdentity(Identity):
    """An identity with noise that records the squared error of each token."""

    def __init__(self) -> None:
        self.errors: list[float] = []

    def decode(self, f: torch.Tensor) -> torch.Tensor:
        noise = 0.45 * torch.randn_like(f)
        self.errors += noise.square().sum(-1).tolist()
        return f + noise


def test_the_interval_of_fve_is_about_the_mean_of_all():
    """The interval agrees with the bootstrap over contexts, even if the first batch has another mean than the rest."""
    torch.manual_seed(0)
    x_BNSD = torch.randn(40, 8, 6, 4) + 0.6 * torch.randn(40, 8, 1, 4)
    x_BNSD[0] += 2
    noisy = NoisyIdentity()
    stats, counted = SAEStatistics(), torch.ones(8, 6, dtype=torch.bool)
    for x_NSD in x_BNSD:
        splice(EvalTarget(noisy, Hook(0)), x_NSD, counted, [(stats, counted)])
    fve = stats.scalars("0.6.0")["reconstruction_quality"]["fve"]
    low, high = stats.fve_interval(ratio_interval(stats.ratios()["reconstruction_quality"]["fve"]), fve)
    x_TD, error_C = x_BNSD.flatten(0, 1), torch.tensor(noisy.errors).view(320, 6).sum(1)
    draws = []
    for _ in range(500):
        some = torch.randint(320, (320,))
        drawn_TD = x_TD[some].flatten(0, 1)
        draws.append(1 - error_C[some].sum() / (drawn_TD - drawn_TD.mean(0)).square().sum())
    assert (low + high) / 2 == pytest.approx(fve)
    assert (high - low) / 2 == pytest.approx(1.96 * float(torch.stack(draws).std()), rel=0.2)


def test_correlations_are_of_the_first_tokens(monkeypatch):
    """With a limit of two tokens, only the first batch counts. In the second, the latents never fire together, which
    would lower the correlation."""
    monkeypatch.setattr(sae_statistics, "PAIRED_TOKENS", 2)
    stats, x = SAEStatistics(paired_latents=2), torch.ones(2, 2)
    counted = torch.ones(1, 2, dtype=torch.bool)
    for f in (torch.tensor([[1.0, 1.0], [2.0, 0.0]]), torch.tensor([[9.0, 0.0], [0.0, 9.0]])):
        splice(EvalTarget(Scripted(f, x), Hook(0)), x[None], counted, [(stats, counted)])
    assert stats.pairs
    assert stats.pairs.correlation(None)["mean"] == pytest.approx(1 / 5**0.5)
    assert stats.tokens == 4


def test_latents_in_bfloat16_are_counted_in_float32():
    """In bfloat16, the sum of 601 ones would be 600."""
    stats = statistics_of(torch.ones(2, 3), torch.ones(2, 601).bfloat16(), torch.ones(2, 3))
    assert stats.scalars("0.6.0")["sparsity"] == {"l0": 601, "l1": 601, "activation_variance": 0}


def test_a_batch_without_a_row_has_contexts_without_a_token():
    """Contexts keep their index among all contexts, by which they are assigned to documents."""
    stats, x = SAEStatistics(), torch.ones(2, 3)
    counted = torch.ones(1, 2, dtype=torch.bool)
    for rows in (counted, ~counted, counted):
        splice(EvalTarget(Scripted(x, x), Hook(0)), x[None], counted, [(stats, rows)])
    assert stats.ratios()["sparsity"]["l0"][1].tolist() == [2, 0, 2] and stats.tokens == 4


def test_a_reconstruction_with_one_nan_is_not_finite():
    x = torch.ones(2, 3)
    stats, counted, recon = SAEStatistics(), torch.ones(1, 2, dtype=torch.bool), x.clone()
    recon[1, 0] = torch.nan
    splice(EvalTarget(Scripted(x, recon), Hook(0)), x[None], counted, [(stats, counted)])
    assert stats.sums["not_finite"] == 1
