"""Statistics over pairs of latents: cosines computed by hand, the sample of latents, and measuring no pairs."""

import itertools
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from sae.cache.hooks import Hook
from sae.common.errors import UsageError
from sae.evaluate.compared_runs import without_weights
from sae.evaluate.metrics import latent_pairs
from sae.evaluate.metrics.base import EvalTarget
from sae.evaluate.metrics.core import Core
from sae.evaluate.metrics.core_flags import NO_PAIRS
from sae.evaluate.metrics.latent_pairs import LatentPairs, decoder_geometry, sample_latents, spearman
from sae.evaluate.reference_saes import Identity

from .test_core import D_SAE, LAYER, make_ctx, model, own_folder, ragged, random_sae, silent  # noqa: F401  (fixtures)


def pairs_of(*batches: torch.Tensor, latents: int = 100) -> LatentPairs:
    pairs = LatentPairs(latents)
    for f_TF in batches:
        pairs.add(f_TF)
        pairs.end_batch()
    return pairs


def test_correlation_leaves_dead_latents_out_and_counts_them():
    """Columns (1,1,0), (0,1,1) and (2,2,0): cosines 1/2, 1 and 1/2; the fourth latent is dead."""
    found = pairs_of(torch.tensor([[1.0, 0, 2, 0], [1, 1, 2, 0], [0, 1, 0, 0]])).correlation(None)
    assert (found["latents"], found["latents_dead"]) == (3, 1)
    assert found["mean"] == pytest.approx(2 / 3)
    assert found["sd"] == pytest.approx(math.sqrt(1 / 18))
    assert found["quantile_50"] == pytest.approx(0.5)


def test_batches_and_their_parts_are_summed():
    torch.manual_seed(0)
    f_TF = torch.randn(12, 5)
    whole, pairs = pairs_of(f_TF), LatentPairs(5)
    for batch in f_TF.split(6):
        for part in batch.split(2):
            pairs.add(part)
        pairs.end_batch()
    assert pairs.correlation(None) == pytest.approx(whole.correlation(None))


def test_few_active_latents_are_multiplied_without_the_zeros():
    """The sums are the same, whichever parts of a batch are sparse enough to be multiplied without zeros."""
    torch.manual_seed(0)
    few_TF = torch.rand(40, 300) * (torch.rand(40, 300) < 0.02)
    few_TF[3] = 0
    many_TF = torch.rand(10, 300)
    pairs = LatentPairs(200)
    for batch in ([few_TF, many_TF, few_TF.flip(0)], [many_TF], [few_TF]):
        for part_TF in batch:
            pairs.add(part_TF)
        pairs.end_batch()
    assert pairs.index_F is not None and pairs.gram_FF is not None
    paired_TF = torch.cat([few_TF, many_TF, few_TF, many_TF, few_TF])[:, pairs.index_F].double()
    torch.testing.assert_close(pairs.gram_FF.triu(), (paired_TF.T @ paired_TF).triu(), rtol=1e-5, atol=1e-6)


def test_the_rank_correlation_is_with_the_cosines_of_decoder_rows():
    """For the pairs (0, 1), (0, 2) and (1, 2), the cosines are .95, .22 and 0 between activations, and .99, .12 and .29
    between decoder rows. With the inner products of rows (.06, 1 and 14), the rank correlation would be -1."""
    pairs = pairs_of(torch.tensor([[3.0, 3.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 1.0]]))
    W_dec = torch.tensor([[0.1, 0.0], [0.6, 0.1], [10.0, 80.0]])
    assert pairs.correlation(W_dec)["spearman_decoder"] == pytest.approx(0.5)


@pytest.mark.parametrize("rows", [2, 256])
def test_a_sample_has_the_numbers_of_its_latents_alone(monkeypatch, rows):
    """The result does not depend on how many rows of the Gram matrix are computed at a time."""
    monkeypatch.setattr(latent_pairs, "GRAM_ROWS", rows)
    torch.manual_seed(0)
    f_TF, W_FD = torch.randn(50, 30).relu(), torch.randn(30, 8)
    chosen = sample_latents(30, 7, torch.device("cpu"))
    found = pairs_of(f_TF, latents=7).correlation(W_FD)
    unit_TF = torch.nn.functional.normalize(f_TF[:, chosen], dim=0)
    cosines = [abs(float(unit_TF[:, i] @ unit_TF[:, j])) for i, j in itertools.combinations(range(7), 2)]
    assert found["latents"] == 7
    assert found["mean"] == pytest.approx(sum(cosines) / 21, rel=1e-5)
    assert found == pytest.approx(pairs_of(f_TF[:, chosen]).correlation(W_FD[chosen]))
    decoder = decoder_geometry(W_FD, 7)
    assert decoder["decoder_cosine_mean"] == pytest.approx(decoder_geometry(W_FD[chosen], 30)["decoder_cosine_mean"])
    assert decoder["effective_rank"] == decoder_geometry(W_FD, 30)["effective_rank"]


def test_a_smaller_sample_is_part_of_a_larger_one():
    small, large, whole = (set(sample_latents(50, n, torch.device("cpu")).tolist()) for n in (5, 20, 90))
    assert len(small) == 5 and small < large < whole == set(range(50))


def test_pairs_that_do_not_fit_are_refused_with_the_number_that_does(monkeypatch):
    monkeypatch.setenv("SAE_MEMORY_GB", "48e-6")  # 48 kB, enough for the pairs of 31 latents
    with pytest.raises(UsageError, match=r"core.paired_latents=50: all pairs of 40 latents .* Give 31 or less"):
        pairs_of(torch.ones(1, 40), latents=50)
    assert pairs_of(torch.ones(1, 40), latents=31).correlation(None)["latents"] == 31


def test_numbers_over_pairs_are_those_of_numpy_and_scipy():
    """The latents have both signs, so some cosines are negative."""
    generator = torch.Generator().manual_seed(0)
    f_TF, W_FD = torch.randn(40, 9, generator=generator), torch.randn(9, 4, generator=generator)
    units = [torch.nn.functional.normalize(rows.double(), dim=1) for rows in (f_TF.T, W_FD)]
    cosines, decoder_cosines = (
        np.array([float(unit[i] @ unit[j]) for i, j in itertools.combinations(range(9), 2)]) for unit in units
    )
    found, decoder = pairs_of(f_TF).correlation(W_FD), decoder_geometry(W_FD, 9)
    for percent in (50, 90, 99, 99.9):
        name = f"quantile_{percent}"
        assert found[name] == pytest.approx(np.percentile(abs(cosines), percent), rel=1e-5)
        assert decoder[f"decoder_cosine_{name}"] == pytest.approx(
            np.percentile(abs(decoder_cosines), percent), rel=1e-5
        )
    assert found["spearman_decoder"] == pytest.approx(spearmanr(cosines, decoder_cosines).statistic)
    share = torch.linalg.svdvals(units[1]) / torch.linalg.svdvals(units[1]).sum()
    assert decoder["effective_rank"] == pytest.approx(float((-share * share.log()).sum().exp()), rel=1e-5)
    a, b = [1.0, 1, 2, 3, 3], [4.0, 1, 1, 2, 0]
    assert spearman(torch.tensor(a), torch.tensor(b)) == pytest.approx(spearmanr(a, b).statistic)


def test_batches_are_summed_in_float64():
    pairs = pairs_of(torch.tensor([[4096.0, 0.0]]), torch.tensor([[1.0, 1.0]]))
    assert pairs.gram_FF is not None and pairs.gram_FF[0].tolist() == [2**24 + 1, 1]


def test_the_sample_is_that_of_earlier_versions():
    """The same latents are drawn, so results of earlier versions stay valid."""
    assert sample_latents(50, 5, torch.device("cpu")).tolist() == [6, 7, 17, 39, 44]


def test_a_single_latent_has_no_pair():
    numbers = pairs_of(torch.ones(3, 4), latents=1).correlation(torch.eye(4))
    assert math.isnan(numbers.pop("mean")) and numbers == {"latents": 1, "latents_dead": 0}
    assert decoder_geometry(torch.eye(4), 1) == {"effective_rank": pytest.approx(4)}


def test_core_pairs_as_many_latents_as_it_is_told(model):  # noqa: F811
    sae, ctx = EvalTarget(random_sae("relu"), Hook(LAYER)), make_ctx(model, ragged())
    whole, some, none = (Core(paired_latents=n).measure(ctx, [sae], silent)[0] for n in (D_SAE, 12, 0))
    assert Core().measure(ctx, [sae], silent)[0] == whole
    counts = some.metrics["correlation"]["latents"] + some.metrics["correlation"]["latents_dead"]
    assert counts == 12 and some.metrics["correlation"] != whole.metrics["correlation"]
    assert "correlation" not in none.metrics and [*none.metrics["dictionary"]] == ["effective_rank"]
    assert {name: group for name, group in whole.metrics.items() if name in none.metrics and name != "dictionary"} == {
        name: group for name, group in none.metrics.items() if name != "dictionary"
    }
    assert none.flags == [*whole.flags, NO_PAIRS]
    (few,) = [flag for flag in some.flags if flag not in whole.flags]
    assert f"pairs of 12 of {D_SAE} latents (core.paired_latents)" in few and "paired" not in "".join(whole.flags)


@pytest.mark.parametrize(
    ("d_sae", "asked", "recorded"),
    [(40, 1024, {}), (40, 40, {}), (40, 12, {"paired_latents": 12}), (40, 0, {"paired_latents": 0}),
     (4096, 1024, {"paired_latents": 1024}), (4096, 2048, {}), (4096, 4096, {"paired_latents": 4096})],
)  # fmt: skip
def test_the_number_of_latents_is_a_setting_where_it_is_not_that_of_earlier_versions(model, d_sae, asked, recorded):  # noqa: F811
    """Earlier versions paired at most 2,048 latents and recorded no number. Their results stay valid if this version
    pairs the same latents."""
    core, target = Core(paired_latents=asked), EvalTarget(SimpleNamespace(d_sae=d_sae), Hook(LAYER))
    assert core.settings_of(target, [target]) == recorded
    assert core.settings_of(replace(target, sae=Identity()), [target]) == {}
    assert "paired_latents" not in core.settings(make_ctx(model, ragged()))
    assert without_weights({"weights": "a", "paired_latents": 12, "mode": "0.6.0"}) == {"mode": "0.6.0"}


def test_a_negative_number_of_latents_is_refused():
    with pytest.raises(UsageError, match="core.paired_latents=-1: give 0 or more"):
        Core(paired_latents=-1).check()
