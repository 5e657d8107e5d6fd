"""Absorption: planted rates are found exactly, a clean dictionary absorbs nothing, and results equal plain loops."""

import dataclasses
import math
import random

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from sae.cache.hooks import Hook
from sae.common.errors import SaeError, UsageError
from sae.evaluate.metrics.absorption import (
    Absorption,
    AbsorptionScores,
    ScoredLetter,
    rate_entry,
    score_letter,
    score_words,
)
from sae.evaluate.metrics.base import EvalTarget, MetricResult
from sae.evaluate.metrics.first_letter import LETTERS, SpellingRows
from sae.evaluate.metrics.letter_probes import (
    DenseRows,
    FeatureSplit,
    LetterProbes,
    seeded_generator,
    train_letter_probes,
)
from sae.evaluate.reference_saes import Identity
from sae.train.activation_functions import ReLU, TopK
from sae.train.sae import SAE

from .planted_letters import PLANTED, TEST, planted

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


def silent(done, total, note=""):
    pass


# --- planted ----------------------------------------------------------------------------------------------------------


def letter_of(result: MetricResult, letter: str) -> dict:
    return next(entry for entry in result.details if entry["first_letter"] == letter)


def test_planted_absorption_is_found_at_its_rate():
    rates = {"c": 1, "m": 2, "q": 2}
    words, sae = planted(rates)
    result = PLANTED.result("0.6.0", sae, words, CPU)
    assert len(result.details) == 26
    for entry in result.details:
        hits = rates.get(entry["first_letter"], 0)
        assert entry["num_full_absorption"] == hits
        assert entry["full_absorption_rate"] == entry["mean_absorption_fraction"] == hits / TEST
        assert entry["num_probe_true_positives"] == TEST
        assert entry["num_split_features"] == 1
        assert entry["main_latents"] == [LETTERS.index(entry["first_letter"])]
    values = [rates.get(letter, 0) / TEST for letter in LETTERS]
    mean = result.metrics["mean"]
    assert mean["mean_full_absorption_score"] == pytest.approx(5 / TEST / 26)
    assert mean["mean_absorption_fraction_score"] == pytest.approx(5 / TEST / 26)
    assert mean["std_dev_full_absorption_score"] == pytest.approx(np.std(values, ddof=1))
    assert mean["mean_num_split_features"] == 1
    assert mean["std_dev_num_split_features"] == 0
    low, high = result.intervals["mean"]["mean_full_absorption_score"]
    assert 0 < low < 5 / TEST / 26 < high
    assert not result.flags
    old = PLANTED.result("2024-12", sae, words, CPU)
    assert {entry["first_letter"]: entry["absorption_rate"] for entry in old.details if entry["num_candidates"]} == {
        letter: hits / TEST for letter, hits in rates.items()
    }
    assert old.metrics["mean"] == {"mean_absorption_score": 5 / TEST / 3, "mean_num_split_features": 1}
    assert "Only 3 of 26 letters have a word that the k-sparse probe misses" in old.flags[0]


@pytest.mark.slow
def test_a_latent_that_takes_part_of_the_letter_absorbs_that_part():
    words, sae = planted({"c": 2}, share=0.45)
    result = PLANTED.result("0.6.0", sae, words, CPU)
    assert letter_of(result, "c")["mean_absorption_fraction"] == pytest.approx(0.45 * 2 / TEST)
    assert result.metrics["mean"]["mean_full_absorption_score"] == 0
    words, sae = planted({"c": 2}, share=0.35)  # a share below 0.4 of the projection does not count
    assert PLANTED.result("0.6.0", sae, words, CPU).metrics["mean"]["mean_absorption_fraction_score"] == 0


@pytest.mark.slow
def test_a_clean_dictionary_absorbs_nothing():
    words, sae = planted({})
    result = PLANTED.result("0.6.0", sae, words, CPU)
    assert result.metrics["mean"] == {
        "mean_absorption_fraction_score": 0,
        "std_dev_absorption_fraction_score": 0,
        "mean_full_absorption_score": 0,
        "std_dev_full_absorption_score": 0,
        "mean_num_split_features": 1,
        "std_dev_num_split_features": 0,
    }
    assert result.metrics["k_sparse"]["mean_f1_1"] == 1
    old = PLANTED.result("2024-12", sae, words, CPU)
    assert old.metrics["mean"] == {"mean_absorption_score": None, "mean_num_split_features": None}
    assert "No letter has a word that the k-sparse probe misses" in old.flags[0]


def test_a_planted_split_is_two_latents():
    words, sae = planted({}, split="dt")
    result = PLANTED.result("0.6.0", sae, words, CPU)
    for entry in result.details:
        assert entry["num_split_features"] == (2 if entry["first_letter"] in "dt" else 1)
    entry = letter_of(result, "d")
    assert entry["f1_k_sparse"] == pytest.approx([2 / 3, 1, 1])
    assert result.metrics["mean"]["mean_num_split_features"] == pytest.approx(28 / 26)
    assert result.metrics["mean"]["mean_absorption_fraction_score"] == 0


@pytest.mark.slow
def test_norms_of_decoder_rows_do_not_count():
    words, sae = planted({"c": 2, "f": 1})
    plain = PLANTED.result("0.6.0", sae, words, CPU)
    factor = torch.tensor(random.Random(0).choices([0.25, 0.5, 2.0, 4.0], k=sae.d_sae))
    sae.W_enc.mul_(factor)
    sae.b_enc.mul_(factor)
    sae.W_dec.div_(factor[:, None])
    scaled = PLANTED.result("0.6.0", sae, words, CPU)
    assert scaled.metrics == plain.metrics
    assert scaled.details == plain.details
    assert "norms were folded" in scaled.flags[0]


def test_degenerate_saes_get_a_flag_or_a_sentence():
    words, sae = planted({"c": 2})
    with pytest.raises(SaeError, match="Identity has no W_dec"):
        PLANTED.result("0.6.0", Identity(), words, CPU)
    dead = SAE(sae.d_in, 12).requires_grad_(False)
    dead.b_enc.fill_(-1e3)
    result = PLANTED.result("0.6.0", dead, words, CPU)
    assert result.metrics["mean"]["mean_full_absorption_score"] == 0
    assert result.metrics["mean"]["mean_num_split_features"] == 1
    assert any("No latent fires on any word" in flag for flag in result.flags)
    hasty = dataclasses.replace(PLANTED, k_sparse_probe_batch_size=4096).result("0.6.0", sae, words, CPU)
    assert "made only 20 steps" in hasty.flags[0]
    sae.b_enc[:3] = -1e3  # the latents of a, b and c
    sae.W_dec[5] = 0  # the direction of f
    result = PLANTED.result("0.6.0", sae, words, CPU)
    assert any("do not spell 4 of 26 letters (F1 below 0.5: a, b, c, f)" in flag for flag in result.flags)
    assert all(math.isfinite(value) for value in result.metrics["mean"].values())


def test_letters_that_the_model_does_not_spell_do_not_count():
    words, sae = planted({"c": 2})
    weight = words.probe.weight_LD.clone()
    weight[3:] = 0
    deaf = dataclasses.replace(words, probe=LetterProbes(weight, words.probe.bias_L))
    result = PLANTED.result("0.6.0", sae, deaf, CPU)
    assert [entry["first_letter"] for entry in result.details] == ["a", "b", "c"]
    assert result.metrics["mean"]["mean_full_absorption_score"] == pytest.approx(2 / TEST / 3)
    assert "Only 3 letters are scored. SAEBench needs at least 20 for a number." in result.flags
    weight[:] = 0
    with pytest.raises(SaeError, match=r"no letter's probe has an F1 above 0\.6: the best has 0\.00"):
        PLANTED.result("0.6.0", sae, deaf, CPU)


# --- against plain loops ----------------------------------------------------------------------------------------------


def word_by_hand(f: np.ndarray, a: np.ndarray, probe: np.ndarray, W_dec: np.ndarray, main: list[int]):
    """The definitions of evaluation.md 3.5 for one word.

    Returns the absorption fraction, whether the top latent fulfills its criteria, and whether the main latents are
    silent.
    """
    u = probe / np.linalg.norm(probe)
    c = [float(d @ u / np.linalg.norm(d)) for d in W_dec]
    p = [float(f[i]) * c[i] for i in range(len(f))]
    along = float(a @ u)
    from_main = sum(p[i] for i in main)
    absorbers = sorted((p[i] for i in range(len(f)) if i not in main and c[i] >= 0.1 and p[i] > 0), reverse=True)
    total = sum(absorbers[:3])
    if from_main >= along or total / along < 0.4:
        fraction = 0.0
    elif from_main <= 0:
        fraction = 1.0
    else:
        y = min(total, along - from_main)
        fraction = min(1.0, max(0.0, y / (y + from_main)))
    top = max(range(len(f)), key=lambda i: p[i])
    dominated = c[top] >= 0.025 and along >= 0 and p[top] / along >= 0.4
    return fraction, dominated, all(f[i] < 1e-8 for i in main)


def test_scores_are_those_of_a_loop_over_words_and_latents():
    draw = np.random.default_rng(0)
    kinds = set()
    for _ in range(20):
        W_dec = draw.normal(size=(30, 8))
        W_dec /= np.linalg.norm(W_dec, axis=1, keepdims=True)
        f = draw.exponential(size=(40, 30)) * (draw.random((40, 30)) < 0.15)
        a = f @ W_dec + draw.normal(size=(40, 8)) * 0.3
        probe, main = draw.normal(size=8), draw.choice(30, 3, replace=False).tolist()
        u = torch.from_numpy(probe / np.linalg.norm(probe))
        found = score_words(
            torch.from_numpy(f), torch.from_numpy(a) @ u, torch.from_numpy(W_dec) @ u, torch.tensor(main), Absorption()
        )
        for n in range(40):
            fraction, dominated, quiet = word_by_hand(f[n], a[n], probe, W_dec, main)
            assert float(found.fraction_N[n]) == pytest.approx(fraction, abs=1e-9)
            assert (bool(found.dominated_N[n]), bool(found.silent_N[n])) == (dominated, quiet)
            assert float(found.main_sum_N[n]) == pytest.approx(f[n][main].sum())
            kinds.add((fraction in (0.0, 1.0), dominated, quiet))
    assert len(kinds) >= 6


def test_a_negative_latent_takes_nothing_from_what_others_absorb():
    """Four latents point along the probe, and the projection is 5: the main latent has 1, another absorbs 3, and two
    are negative."""
    scores = score_words(
        torch.tensor([[1.0, -2.0, 3.0, -1.0]]), torch.tensor([5.0]), torch.ones(4), torch.tensor([0]), Absorption()
    )
    assert scores.fraction_N.tolist() == [0.75]  # 3 / (3 + 1)


def noisy() -> tuple[SpellingRows, SAE]:
    """Planted words with noise, and a TopK SAE with the latents of their letters and 40 random ones."""
    words, sae = planted({"b": 2, "g": 2, "s": 1}, split="kp")
    torch.manual_seed(0)
    train, test, fresh = (x + 0.05 * torch.randn_like(x) for x in (words.train_ND, words.test_ND, words.fresh_ND))
    other = SAE(sae.d_in, sae.d_sae + 40, [ReLU(), TopK(6)]).requires_grad_(False)
    other.W_enc[:, : sae.d_sae], other.b_enc[: sae.d_sae], other.W_dec[: sae.d_sae] = sae.W_enc, sae.b_enc, sae.W_dec
    return dataclasses.replace(words, train_ND=train, test_ND=test, fresh_ND=fresh), other


@pytest.fixture(scope="module")
def by_hand() -> list[tuple]:
    """The numbers of each letter of `noisy`, computed by plain loops."""
    words, sae = noisy()
    probe = train_letter_probes(
        DenseRows(sae.encode(words.train_ND)), words.train_letter_N, batch=52, epochs=10, weight_decay=1e-6, l1=0.1,
        generator=seeded_generator(42, "k-sparse"),
    )  # fmt: skip
    train, test, fresh = (sae.encode(x).numpy() for x in (words.train_ND, words.test_ND, words.fresh_ND))
    weight, bias = words.probe.weight_LD.numpy(), words.probe.bias_L.numpy()
    rows = []
    for letter in range(26):
        order = np.argsort(-probe.weight_LD[letter].numpy(), kind="stable")
        target, answer = (words.train_letter_N == letter).numpy(), (words.test_letter_N == letter).numpy()
        scores, f1s = [], []
        for k in range(1, 11):
            fit = LogisticRegression(C=1.0, max_iter=500, class_weight="balanced", solver="lbfgs")
            fit.fit(train[:, order[:k]], target)
            scores.append(test[:, order[:k]] @ fit.coef_[0] + fit.intercept_[0])
            hits = int(((scores[-1] > 0) & answer).sum())
            f1s.append(2 * hits / ((scores[-1] > 0).sum() + answer.sum()) if hits else 0.0)
        before, k = -100.0, 0
        while k < 10 and f1s[k] > before + 0.03:
            before, k = f1s[k], k + 1
        main = order[:k].tolist()
        fractions, full, candidates, old = [], [], 0, []
        for n in range(len(test)):
            logit = words.test_ND[n].numpy() @ weight[letter] + bias[letter]
            if not (answer[n] and logit > 0):
                continue
            fraction, dominated, quiet = word_by_hand(
                fresh[n], words.fresh_ND[n].numpy(), weight[letter], sae.W_dec.numpy(), main
            )
            candidate = scores[k - 1][n] <= 0 and fresh[n][main].sum() < 1e-8
            candidates += candidate
            old.append(candidate and dominated)
            fractions.append(fraction)
            full.append(dominated and quiet)
        rows.append((k, main, np.mean(fractions), np.mean(full), np.mean(old), candidates))
    return rows


@pytest.mark.parametrize("mode", ["0.6.0", "2024-12"])
def test_a_result_is_that_of_plain_loops(mode, by_hand):
    words, sae = noisy()
    rows = by_hand
    result = dataclasses.replace(PLANTED, k_sparse_probe_num_epochs=10).result(mode, sae, words, CPU)
    for entry, (k, main, fraction, full, old, candidates) in zip(result.details, rows, strict=True):
        assert (entry["num_split_features"], entry["main_latents"]) == (k, main)
        if mode == "0.6.0":
            assert entry["mean_absorption_fraction"] == pytest.approx(fraction, abs=1e-6)
            assert entry["full_absorption_rate"] == full
        else:
            assert (entry["absorption_rate"], entry["num_candidates"]) == (old, candidates)
    mean = result.metrics["mean"]
    if mode == "0.6.0":
        assert mean["mean_absorption_fraction_score"] == pytest.approx(np.mean([row[2] for row in rows]), abs=1e-6)
        assert mean["mean_full_absorption_score"] == pytest.approx(np.mean([row[3] for row in rows]))
        assert 0 < mean["mean_full_absorption_score"] < mean["mean_absorption_fraction_score"]
    else:
        counted = [row for row in rows if row[5]]
        assert 0 < len(counted) < 26
        assert mean["mean_absorption_score"] == pytest.approx(np.mean([row[4] for row in counted]))
        assert mean["mean_num_split_features"] == pytest.approx(np.mean([row[0] for row in counted]))


def test_a_letter_s_rate_has_wilson_s_interval():
    share = rate_entry("r", "n", torch.tensor([1.0] * 3 + [0.0] * 17))
    assert (share["r"], share["n"]) == (0.15, 3)
    assert share["r_interval"] == pytest.approx([0.0524, 0.3604], abs=1e-4)  # Wilson, 3 of 20


def test_in_mode_2024_12_a_candidate_is_missed_by_the_regression_too():
    """The main latents are silent on three words. The regression finds one of these by its intercept, so two words are
    candidates. One of the two is dominated by another latent."""
    silent_N = torch.tensor([True, True, True, False])
    scores = AbsorptionScores(
        torch.zeros(4), torch.tensor([True, True, False, True]), silent_N, torch.tensor([0.0, 0.0, 0.0, 2.0])
    )
    missed_N = torch.tensor([True, False, True, True])
    split = FeatureSplit(1, [0.9], np.array([True]))
    letter = score_letter("2024-12", 2, 0.8, split, torch.tensor([5]), scores, missed_N)
    assert letter.entry["num_candidates"] == 2
    assert letter.scores["absorption_score"].tolist() == [1, 0, 0, 0]


def test_the_f1_of_a_split_is_that_of_its_size():
    assert ScoredLetter({"f1_k_sparse": [0.5, 0.8, 0.7, 0.6], "num_split_features": 2}, {}).split_f1 == 0.8


# --- the whole --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_order_of_saes_and_their_company_change_nothing(ctx):
    metric = Absorption(words=260, min_GT_probe_f1=0.0, min_feats_for_eval=0)
    torch.manual_seed(0)
    saes = [SAE(32, 50, [ReLU()]).requires_grad_(False), SAE(32, 64, [TopK(4)]).requires_grad_(False)]
    targets = [EvalTarget(saes[0], Hook(1)), EvalTarget(Identity(), Hook(1)), EvalTarget(saes[1], Hook(0))]
    first = metric.measure(ctx, targets, silent)
    again = metric.measure(ctx, targets[::-1], silent)[::-1]
    alone = metric.measure(ctx, targets[:1], silent)
    assert isinstance(first[1], SaeError)
    assert (first[0], first[2]) == (again[0], again[2])
    assert first[0] == alone[0]
    (at_input,) = metric.measure(ctx, [EvalTarget(saes[1], Hook(1, "resid_pre"))], silent)
    assert at_input == first[2]  # the input of block 1 is the output of block 0
    assert first[0].n["words_train"] == 208
    assert first[0].n["words_test"] == 52
    with pytest.raises(UsageError, match=r"absorption\.max_k_value is 0; give 1 or more"):
        Absorption(max_k_value=0).measure(ctx, targets, silent)


def test_a_model_that_does_not_spell_gets_a_sentence_for_each_sae(ctx):
    targets = [EvalTarget(SAE(32, 50, [ReLU()]).requires_grad_(False), Hook(layer)) for layer in (0, 1)]
    for outcome in Absorption(words=260, min_GT_probe_f1=0.99).measure(ctx, targets, silent):
        assert isinstance(outcome, SaeError)
        assert "Absorption needs letters that a probe can read" in str(outcome)
