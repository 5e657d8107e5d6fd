"""Matchings and correlations of latents equal those of brute force and numpy."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix

from sae.evaluate.metrics import latent_matching as matching
from sae.evaluate.metrics.latent_correlation import Latents, sparse
from sae.evaluate.metrics.random_dictionaries import (
    gaussian_rows,
    random_latents,
    second_moment,
    shuffle_rows,
    strongest,
)


def blocks_of(similarity_FG: torch.Tensor):
    return lambda rows: similarity_FG[rows]


@pytest.mark.parametrize("match", [matching.match_all_pairs, matching.match_candidates])
def test_the_sum_is_the_largest_of_all_permutations_and_signs_are_kept(match, monkeypatch):
    monkeypatch.setattr(matching, "BLOCK", 4)
    for seed in range(5):
        similarity_FG = torch.randn(6, 6, generator=torch.Generator().manual_seed(seed)).clamp(-1, 1)
        found = match(blocks_of(similarity_FG), 6)
        best = max(sum(abs(float(similarity_FG[i, p[i]])) for i in range(6)) for p in itertools.permutations(range(6)))
        assert found.total == pytest.approx(best, abs=1e-6)
        assert sorted(found.partner_F) == list(range(6))
        assert found.similarity_F == pytest.approx(similarity_FG[range(6), found.partner_F].numpy(), abs=1e-6)
        back = found.inverse(6)
        assert all(back.partner_F[found.partner_F[i]] == i for i in range(6)) and back.total == pytest.approx(best)
        assert back.similarity_F[found.partner_F] == pytest.approx(found.similarity_F)


@pytest.mark.parametrize("exact", [6, 5])
def test_with_signs_the_sum_of_the_similarities_themselves_is_the_largest(exact):
    for seed in range(5):
        similarity_FG = torch.randn(6, 6, generator=torch.Generator().manual_seed(seed)).clamp(-1, 1)
        found = matching.match_latents(blocks_of(similarity_FG), 6, exact, signed=True)
        # with candidates, a latent is not matched at a negative similarity
        gain_FG = similarity_FG if exact == 6 else similarity_FG.clamp_min(0)
        best = max(sum(float(gain_FG[i, p[i]]) for i in range(6)) for p in itertools.permutations(range(6)))
        assert found.similarity_F.clip(None if exact == 6 else 0).sum() == pytest.approx(best, abs=1e-6)
        partners = found.partner_F[found.partner_F >= 0]
        assert len(set(partners)) == len(partners) and (exact < 6 or len(partners) == 6)


def test_candidates_are_a_lower_bound_and_a_latent_without_one_has_no_partner(monkeypatch):
    monkeypatch.setattr(matching, "CANDIDATES", 1)
    similarity_FG = torch.tensor([[0.9, -0.8, 0.1], [0.7, 0.1, 0.2], [0.0, 0.3, -0.6]])
    found = matching.match_candidates(blocks_of(similarity_FG), 3)  # latent 0 is the only candidate of both 0 and 1
    assert found.partner_F.tolist() == [0, -1, 2]
    assert found.similarity_F == pytest.approx([0.9, 0, -0.6])
    assert found.inverse(3).partner_F.tolist() == [0, -1, 2]
    assert matching.match_all_pairs(blocks_of(similarity_FG), 3).partner_F.tolist() == [1, 0, 2]
    opposite_FG = torch.tensor([[0.5, -0.9], [-0.8, 0.3]])
    assert matching.match_candidates(blocks_of(opposite_FG), 2, signed=True).partner_F.tolist() == [0, 1]
    assert matching.match_candidates(blocks_of(opposite_FG), 2).partner_F.tolist() == [1, 0]


def test_more_than_the_exact_latents_are_matched_by_candidates(monkeypatch):
    monkeypatch.setattr(matching, "match_candidates", lambda similarity, latents, signed: "candidates")
    monkeypatch.setattr(matching, "match_all_pairs", lambda similarity, latents, signed: "all")
    assert [matching.match_latents(blocks_of(torch.eye(3)), 3, exact) for exact in (2, 3)] == ["candidates", "all"]


def test_64_candidates_are_as_good_as_all_pairs_on_random_directions():
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.nn.functional.normalize(torch.randn(600, 24, generator=generator)) for _ in range(2))
    every, some = (
        match(blocks_of(one @ other.T), 600).total for match in (matching.match_all_pairs, matching.match_candidates)
    )
    assert every - 600e-4 < some <= every + 1e-9


def test_correlations_are_pearson_s_and_0_for_what_does_not_vary():
    rng = np.random.default_rng(0)
    one, other = (np.maximum(rng.normal(size=(50, 7)) - 0.5, 0) for _ in range(2))
    one[:, 2], one[:, 3], other[:, 1] = 0, 1.7, 1e-3  # dead, and constant
    one[:, 6] = 1000 + 1e-2 * rng.normal(size=50)  # hardly varies
    latents, others = Latents.of(csr_matrix(one)), Latents.of(csr_matrix(other))
    assert latents.varies_F.tolist() == [True, True, False, False, True, True, True]
    assert latents.active_F.tolist() == (one != 0).sum(0).tolist()
    found = latents.correlation(others)(slice(0, 7)).numpy()
    with np.errstate(invalid="ignore"):
        expected = np.nan_to_num(np.corrcoef(one.T, other.T)[:7, 7:])
    expected[:, 1] = expected[[2, 3]] = 0
    assert found == pytest.approx(expected, abs=1e-6)
    assert latents.correlation(others)(slice(2, 5)).numpy() == pytest.approx(expected[2:5], abs=1e-6)


def test_random_latents_fire_as_often_as_those_that_they_stand_for(monkeypatch):
    monkeypatch.setattr("sae.evaluate.metrics.random_dictionaries.LATENTS_PER_BLOCK", 3)
    generator = torch.Generator().manual_seed(0)
    x_TD = 5 + torch.randn(40, 6, generator=generator)
    direction_FD = torch.randn(8, 6, generator=generator)
    active_F = np.array([0, 3, 39, 40, 1, 20, 0, 7])
    latents = random_latents(direction_FD, (x_TD - x_TD.mean(0)).T, active_F)
    assert latents.active_F.tolist() == np.minimum(active_F, 39).tolist()  # the smallest value is the threshold
    projection_TF = (x_TD - x_TD.mean(0)) @ direction_FD.T
    dense_TF = torch.from_numpy(latents.f_TF.toarray())
    for i in (1, 5):
        strongest = projection_TF[:, i].argsort(descending=True)[: active_F[i]]
        assert set(dense_TF[:, i].nonzero().ravel().tolist()) == set(strongest.tolist())
        difference = projection_TF[strongest, i] - dense_TF[strongest, i]
        assert float(difference.max() - difference.min()) == pytest.approx(0, abs=1e-5)


@settings(max_examples=30)
@given(st.integers(1, 250), st.sampled_from([1, 3, 1000]), st.sampled_from(["drawn", "ascending", "sampled last"]))
def test_the_strongest_values_are_those_of_a_sort(size, levels, order):
    """This also holds if the sample, every 16th value, has only the largest values, and if many values are equal."""
    value = (np.random.RandomState(size).randint(levels, size=size) * 0.37).astype(np.float32)
    if order != "drawn":
        value.sort()
    if order == "sampled last":
        value = value[np.argsort(np.arange(size) % 16 == 0, kind="stable").argsort(kind="stable")]
    for count in range(size):
        places, above = strongest(value, count)
        threshold = np.sort(value)[::-1][count]
        assert places.tolist() == np.flatnonzero(value > threshold).tolist()
        assert above.tolist() == (value[places] - threshold).tolist()


def test_latents_are_kept_as_scipy_keeps_them():
    f_TF = torch.randn(9, 5, generator=torch.Generator().manual_seed(0)).relu()
    f_TF[4], f_TF[2, 3], f_TF[0, 0] = 0, -0.0, -2
    for dense_TF in (f_TF, f_TF[:0], f_TF[4:5], f_TF.T):
        found, expected = sparse(dense_TF), csr_matrix(dense_TF.numpy()).astype(np.float64)
        assert found.shape == expected.shape and found.dtype == np.float64
        for part in ("data", "indices", "indptr"):
            np.testing.assert_array_equal(getattr(found, part), getattr(expected, part))


def test_a_shuffled_decoder_has_the_entries_of_each_row_in_another_order():
    W_dec_FD = torch.randn(5, 30, generator=torch.Generator().manual_seed(0))
    one, again, other = (shuffle_rows(W_dec_FD, seed) for seed in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert torch.equal(one.sort(1).values, W_dec_FD.sort(1).values)
    cosines = torch.nn.functional.cosine_similarity(one, W_dec_FD)
    assert float(cosines.abs().max()) < 0.8 and not math.isclose(float(cosines[0]), float(cosines[1]))


def test_gaussian_rows_have_the_length_and_the_second_moment_that_is_asked_for():
    generator = torch.Generator().manual_seed(0)
    root_DD = torch.randn(8, 8, generator=generator) * torch.tensor([4.0, 2, 1, 1, 1, 0.5, 0.5, 0.1])
    drawn_FD = torch.nn.functional.normalize(torch.randn(4000, 8, generator=generator) @ root_DD.T, dim=1)
    moment_DD = second_moment(drawn_FD)
    assert moment_DD.trace() == pytest.approx(1, abs=1e-5)
    rows_FD = gaussian_rows(moment_DD, 4000, seed=1)
    assert rows_FD.norm(dim=1).numpy() == pytest.approx(np.ones(4000), abs=1e-5)
    assert second_moment(rows_FD).numpy() == pytest.approx(moment_DD.numpy(), abs=0.02)
    axis_DD = torch.linalg.eigh(moment_DD)[1]  # along each axis, the distribution is that of the original rows
    drawn, found = (torch.matmul(rows, axis_DD).square().sort(0).values for rows in (drawn_FD, rows_FD))
    assert (drawn - found).abs().mean(0).max() < 0.01
    assert not torch.equal(rows_FD, gaussian_rows(moment_DD, 4000, seed=2))


def test_gaussian_rows_of_a_subspace_stay_in_it():
    direction_FD = torch.nn.functional.normalize(torch.randn(3, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    rows_FD = gaussian_rows(second_moment(direction_FD), 50, seed=0)
    assert torch.linalg.matrix_rank(rows_FD, atol=1e-2) == 3
    assert torch.linalg.matrix_rank(torch.cat([rows_FD, direction_FD]), atol=1e-2) == 3
