"""Absorption matches SAEBench 0.6.0, given SAEBench's words, rows, probe and latents (fixtures/saebench/README.md)."""

import numpy as np
import pytest
import torch

from sae.cache.context_format import ContextFormat
from sae.cache.contexts import Contexts
from sae.cache.hooks import Hook
from sae.evaluate.artifacts import ArtifactCache
from sae.evaluate.context import EvalContext
from sae.evaluate.metrics import absorption, first_letter
from sae.evaluate.metrics.absorption import Absorption, score_words
from sae.evaluate.metrics.first_letter import LETTERS, SpellingPrompts, SpellingRows, last_token_rows
from sae.evaluate.metrics.letter_probes import (
    LetterProbes,
    count_split_latents,
    f1_score,
    fit_logistic,
    train_letter_probes,
)
from sae.evaluate.metrics.unit_decoder import UnitDecoderSAE
from sae.train.sae import SAE

CPU = torch.device("cpu")
KINDS = ("relu", "topk", "jumprelu")
one_kind = pytest.mark.parametrize(
    "kind", ["relu", *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[1:])]
)


@pytest.fixture(scope="module")
def reference(saebench):
    return saebench.json("absorption/results")


@pytest.fixture(scope="module")
def words(saebench, reference) -> SpellingRows:
    """SAEBench's rows and probe. The fixture has fresh rows of true positives only; all others are zeros."""
    arrays = saebench.arrays("absorption")
    probe = LetterProbes(arrays["probe.weight"], arrays["probe.bias"])
    found = SpellingRows(
        arrays["train.activations"],
        arrays["train.labels"].long(),
        arrays["test.activations"],
        arrays["test.labels"].long(),
        torch.zeros_like(arrays["test.activations"]),
        probe,
    )
    texts = saebench.json("problem/problem")["words"]
    place = {texts[row[-1]]: n for n, row in enumerate(arrays["test.prompts"].tolist())}
    for token, x in zip(reference["relu"]["words"]["token"], arrays["fresh.activations"], strict=True):
        found.fresh_ND[place[token]] = x
    return found


class Draws:
    """A replacement for the random generator that returns given draws."""

    def __init__(self, drawn) -> None:
        self.drawn = drawn

    def sample(self, pool, count):
        return [*next(self.drawn), pool[0]][:count]


def test_prompts_and_rows_match_saebench(saebench, reference, tokenizer, tmp_path, monkeypatch):
    texts, arrays = saebench.json("problem/problem")["words"], saebench.arrays("absorption")
    piece = {
        word.text: word for word in first_letter.vocabulary_words(tokenizer, [tokenizer.convert_tokens_to_ids("\n")])
    }
    known = [piece[text] for text in texts]
    monkeypatch.setattr(first_letter, "vocabulary_words", lambda *_: known)
    made = SpellingPrompts.of(tokenizer, 0, 0, bos_id=tokenizer.bos_token_id)
    ctx = EvalContext(
        lambda: saebench.model, tokenizer, Contexts(*[np.zeros(0)] * 4), ContextFormat(2, ()), "0.6.0", {}, {},
        ArtifactCache(tmp_path),
    )  # fmt: skip
    for part in ("train", "test"):
        rows = arrays[f"{part}.prompts"].tolist()
        asked = [known[row[-1]] for row in rows]
        assert [word.letter for word in asked] == arrays[f"{part}.labels"].tolist()
        ids_NS = made.prompts(asked, known, Draws(iter([[known[i] for i in row[:-1]] for row in rows])))
        x_ND = last_token_rows(ctx, ids_NS, [Hook(0)], lambda *_: None)[Hook(0)]
        torch.testing.assert_close(x_ND, arrays[f"{part}.activations"], atol=2e-5, rtol=1e-5)
    example = reference["prompt"]
    asked = iter(example["text"].removeprefix("\n").split("\n"))
    *shown, last = [piece[line.partition(" has the")[0]] for line in asked]
    ids_NS = made.prompts([last], known, Draws(iter([shown])))
    assert [*ids_NS[0].tolist(), *made.question] == example["tokens"]
    assert len(made.question) == -example["position"] - 1


def test_the_letters_probe_finds_the_same_words(reference, words):
    for kind in KINDS:
        for letter, found in reference[kind]["letters"].items():
            assert float(words.f1_L[LETTERS.index(letter)]) == pytest.approx(found["f1_probe"], abs=1e-7)
    column = reference["relu"]["words"]
    counts = dict(zip(column["letter"], column["num_probe_true_positives"], strict=True))
    assert words.true_positive_NL.sum(0).tolist() == [counts.get(letter, 0) for letter in LETTERS]


def test_the_l1_probe_matches_saebench(saebench, reference, words):
    """In the reference all training words are one batch, so their order has no effect. The seed decides the rest."""
    latents = UnitDecoderSAE.of(saebench.saes["relu"], CPU).sparse_latents(words.train_ND)
    seeded = torch.Generator().manual_seed(42)
    found = train_letter_probes(
        latents, words.train_letter_N, batch=4096, epochs=50, weight_decay=1e-6, l1=0.01, generator=seeded
    )
    difference_LF = (found.weight_LD - saebench.arrays("absorption")["l1_probe.weight"]).abs()
    assert (difference_LF > 1e-5).sum() <= 5  # of 13,312; where a weight crosses 0, Adam amplifies rounding
    assert difference_LF.max() < 1e-3
    order_LK = found.weight_LD.sort(dim=1, descending=True).indices[:, :10].tolist()
    assert order_LK == [reference["relu"]["letters"][letter]["latents"] for letter in LETTERS]


def encode_like_saebench(sae: SAE, x_ND: torch.Tensor) -> torch.Tensor:
    """Encode with bit-identical results to SAEBench, which subtracts b_dec first.

    A difference in the last bit of a latent can change the fifth digit of a fit.
    """
    z_NF = (x_ND - sae.b_dec * sae.pre_bias) @ sae.W_enc + sae.b_enc
    f_NF = sae.activate(z_NF, x_ND)
    torch.testing.assert_close(f_NF, sae.encode(x_ND))
    return f_NF


@one_kind
def test_regressions_and_chosen_latents_match_saebench(saebench, reference, words, record_comparison, kind):
    sae = saebench.saes[kind]
    train_NF, test_NF = (encode_like_saebench(sae, x_ND).numpy() for x_ND in (words.train_ND, words.test_ND))
    fits, same = [], {"split latents": True, "F1": True}
    for letter, found in reference[kind]["letters"].items():
        at = LETTERS.index(letter)
        train_NK, test_NK = train_NF[:, found["latents"]], test_NF[:, found["latents"]]
        same["split latents"] &= count_split_latents(found["f1"], 0.03)[0] == len(found["split_features"])
        assert found["latents"][: len(found["split_features"])] == found["split_features"]
        for k in (1, 2, 3, 10):
            fit = fit_logistic(train_NK[:, :k], (words.train_letter_N == at).numpy())
            fits.append(
                (np.append(found["coef"][k - 1], found["intercept"][k - 1]), np.append(fit.coef_[0], fit.intercept_))
            )
            positive = fit.decision_function(test_NK[:, :k]) > 0
            same["F1"] &= f1_score(positive, (words.test_letter_N == at).numpy()) == found["f1"][k - 1]
    record_comparison("absorption", f"{kind}: regressions on 1, 2, 3, 10 latents", fits, same)
    assert all(same.values())
    for expected, fitted in fits:
        # With AVX2 they differ by 1.5e-6. The last bits of latents depend on the processor and can move a fit by 1e-5.
        np.testing.assert_allclose(fitted, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_every_word_s_absorption_matches_saebench(saebench, reference, words, record_comparison, kind):
    sae, columns = saebench.saes[kind], reference[kind]["words"]
    fresh_ND = saebench.arrays("absorption")["fresh.activations"]
    f_NF = sae.encode(fresh_ND)
    fractions, full = [], []
    for n, letter in enumerate(columns["letter"]):
        unit_D = torch.nn.functional.normalize(words.probe.weight_LD[LETTERS.index(letter)], dim=0)
        cosine_F = torch.nn.functional.normalize(sae.W_dec, dim=1) @ unit_D
        main = torch.tensor(columns["split_feats"][n])
        scores = score_words(f_NF[n : n + 1], fresh_ND[n : n + 1] @ unit_D, cosine_F, main, Absorption())
        fractions.append(float(scores.fraction_N))
        full.append(bool(scores.dominated_N & scores.silent_N))
    expected = columns["absorption_fraction"]
    same = {"full absorption": full == columns["is_full_absorption"]}
    record_comparison("absorption", f"{kind}: {len(full)} words", [(np.array(expected), np.array(fractions))], same)
    assert fractions == pytest.approx(expected, abs=1e-6)
    assert all(same.values())


@one_kind
def test_the_result_matches_saebench(saebench, reference, words, record_comparison, kind, monkeypatch):
    """The result is equal if the latents are ranked by SAEBench's L1 probe."""
    weight_LF = torch.zeros(26, 512)
    for letter, found in reference[kind]["letters"].items():
        weight_LF[LETTERS.index(letter), found["latents"]] = torch.arange(10.0, 0, -1)
    monkeypatch.setattr(absorption, "train_letter_probes", lambda *_, **__: LetterProbes(weight_LF, torch.zeros(26)))
    result = Absorption().result("0.6.0", saebench.saes[kind], words, CPU)
    expected = reference[kind]["eval_result_metrics"]["mean"]
    headline = "mean_absorption_fraction_score"
    names = [headline, *(expected.keys() - {headline})]
    pairs = [(expected[name], result.metrics["mean"][name]) for name in names]
    record_comparison(
        "absorption",
        f"{kind}: {headline}",
        pairs,
        {"letters": len(result.details) == len(reference[kind]["eval_result_details"])},
    )
    assert result.metrics["mean"] == pytest.approx(expected, abs=1e-6)
    assert len(result.details) == len(reference[kind]["eval_result_details"]) > 20
    for ours, other in zip(result.details, reference[kind]["eval_result_details"], strict=True):
        assert {name: ours[name] for name in other} == {
            name: pytest.approx(value, abs=1e-6) if isinstance(value, float) else value for name, value in other.items()
        }
