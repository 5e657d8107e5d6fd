"""Autointerp: the tokens on which latents fire, the parsing of answers, and scores with scripted judges."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sae.cache.hooks import Hook
from sae.common.errors import UsageError
from sae.evaluate.inputs import make_context
from sae.evaluate.metrics import latent_firings as module
from sae.evaluate.metrics.activation_examples import LatentExamples, TokenText, select_examples
from sae.evaluate.metrics.autointerp import Autointerp
from sae.evaluate.metrics.base import EvalTarget
from sae.evaluate.metrics.explanation_scores import (
    JudgedLatent,
    detection_accuracy,
    explain_prompt,
    judge_latents,
    parse_explanation,
    parse_predictions,
    score_prompt,
)
from sae.evaluate.metrics.latent_firings import collect_firings
from sae.evaluate.metrics.llm_judge import KeptAnswers
from sae.evaluate.metrics.packing import firing_frequencies, pack_contexts
from sae.evaluate.metrics.registry import METRICS, SUITES, metrics_of_suite
from sae.evaluate.reference_saes import Identity
from sae.harvest.model import find_model, load_tokenizer
from sae.train.activation_functions import ReLU
from sae.train.sae import SAE

CONTEXT = 40


def silent(done, total, note=""):
    pass


@pytest.fixture(scope="module")
def ctx(tiny_cache):
    return make_context(tiny_cache)


def sae_of(seed: int) -> SAE:
    torch.manual_seed(seed)
    sae = SAE(32, 16, [ReLU()])
    sae.b_enc.data[0] = -1e3  # never fires
    return sae.eval().requires_grad_(False)


def test_firings_are_the_dense_activations_however_many_passes(ctx, monkeypatch):
    packed = pack_contexts(ctx, 32).first(23)
    rows = packed.ids
    monkeypatch.setattr("sae.evaluate.metrics.packing.TOKENS_PER_FORWARD", 5 * 32)  # several batches per pass
    assert len(rows) == 23
    targets = [EvalTarget(sae_of(0), Hook(0)), EvalTarget(sae_of(1), Hook(1))]
    frequencies = firing_frequencies(ctx.model, packed, targets, silent)
    shares = [frequency.share_F for frequency in frequencies]
    drawn = [[1, 5, 9], [2, 3]]
    passes = []
    capture = ctx.model.capture_hooks
    monkeypatch.setattr(ctx.model, "capture_hooks", lambda ids, hooks: passes.append(hooks) or capture(ids, hooks))
    expected = {}
    for number, target in enumerate(targets):
        f = target.sae.encode(capture(rows, [target.hook])[target.hook])
        f[torch.isin(rows, torch.tensor(ctx.special_ids))] = 0
        kept = ~torch.isin(rows, torch.tensor(ctx.special_ids))
        assert shares[number][0] == 0
        torch.testing.assert_close(torch.from_numpy(shares[number]), (f[kept] > 0).double().mean(0))
        expected |= {(number, latent): f[..., latent].flatten() for latent in drawn[number]}
    once = 0
    for most in (10**9, 1):
        monkeypatch.setattr(module, "MAX_FIRINGS", most)
        passes.clear()
        firings = collect_firings(ctx, packed, targets, drawn, shares, silent)
        found = {(n, latent): (p, v) for n, latent, p, v in firings}
        assert found.keys() == expected.keys()
        once = once or len(passes)
        assert len(passes) == (once if most > 1 else 5 * once) > 0
        for key, (place, value) in found.items():
            dense = np.zeros(rows.numel(), np.float32)
            dense[place] = value
            torch.testing.assert_close(torch.from_numpy(dense), expected[key].clamp(min=0), rtol=1e-4, atol=1e-4)
            assert (np.diff(place) > 0).all()


@pytest.fixture(scope="module")
def words(tiny_model) -> TokenText:
    return TokenText(load_tokenizer(find_model(str(tiny_model))[0]))


@pytest.mark.parametrize(
    ("answer", "predicted"),
    [
        ("2, 9,13", [2, 9, 13]), ("None", []), ("none.", []), (" 7 ", [7]), ("[3, 3, 1]", [1, 3]), ("", None),
        ("0", None), ("15", None), ("2 and 3", None), ("Passages 2, 3", None), ("1,,2", None), ("-1", None),
        ("9" * 8000, None), ("1, " + "0" * 8000, None), ("٣, ৩", [3]), ("²", None),
    ],
)  # fmt: skip
def test_predictions_are_numbers_or_none(answer, predicted):
    assert parse_predictions(answer, 14) == predicted


@pytest.mark.parametrize(
    ("answer", "explanation"),
    [
        ("This latent activates on words for water.", "words for water."),
        ("Well.\nThis neuron Activates on commas\nbecause", "commas"),
        ("commas", "commas"),
        ("This latent activates on", ""),
        ("", ""),
    ],
)
def test_an_explanation_is_what_it_activates_on(answer, explanation):
    assert parse_explanation(answer) == explanation


def test_a_score_is_the_share_that_is_right():
    assert detection_accuracy([1, 2, 3, 4], [1, 2, 3, 4], 14) == 1
    assert detection_accuracy([], [1, 2, 3, 4], 14) == pytest.approx(10 / 14)
    assert detection_accuracy([1, 5], [1, 2, 3, 4], 14) == pytest.approx(10 / 14)
    assert detection_accuracy(range(1, 15), [1, 2, 3, 4], 14) == pytest.approx(4 / 14)


@dataclass
class Scripted:
    """A judge that answers the first prompt with an explanation and the second with `predict`, or with the entry of
    `predict` for the prompt's text."""

    predict: dict[str, str] | str
    asked: list = field(default_factory=list)

    def answer_all(self, questions, keep):
        for index, messages in enumerate(questions):
            self.asked.append(messages)
            text = messages[1]["content"]
            if not text.startswith("The latent activates on "):
                keep(index, "This latent activates on something.")
            else:
                keep(index, self.predict if isinstance(self.predict, str) else self.predict[text])


def judged(judge: Scripted, found: dict[int, LatentExamples], words: TokenText, folder: Path) -> dict:
    """The entries of the latents, judged with SAEBench's score."""
    latents = {latent: JudgedLatent(examples) for latent, examples in found.items()}
    kept = KeptAnswers(judge, folder / f"{id(judge)}.jsonl")
    return judge_latents(kept, latents, words, ("saebench",), silent)


def latents_of(words: TokenText) -> dict[int, LatentExamples]:
    rng = np.random.default_rng(0)
    ids = rng.integers(300, 1500, (30, CONTEXT))  # none of these tokens contains "<<"
    examples = {}
    for latent in (4, 9, 11):
        place = np.sort(rng.choice(ids.size, 300, replace=False))
        examples[latent] = select_examples(place, rng.uniform(1, 9, 300).astype(np.float32), ids, rng)
    return examples


def test_a_perfect_judge_has_one_and_one_that_says_none_has_ten_of_fourteen(words, tmp_path):
    found = latents_of(words)
    truth = {
        score_prompt(own, words, "something.")[1]["content"]: ", ".join(map(str, own.firing)) for own in found.values()
    }
    metric = Autointerp(latents=3, tokens=1200)
    rows = torch.zeros(30, CONTEXT, dtype=torch.int64)
    for predict, score in ((truth, 1.0), ("None", 10 / 14), (", ".join(map(str, range(1, 15))), 4 / 14)):
        judge = Scripted(predict)
        entries = judged(judge, found, words, tmp_path)
        assert [entry["score"] for entry in entries.values()] == pytest.approx([score] * 3)
        assert entries["4"]["explanation"] == "something." and len(judge.asked) == 6
        result = metric.result(entries, 3, rows, judge)
        assert result.metrics["autointerp"] == pytest.approx({"autointerp_score": score, "autointerp_std_dev": 0})
        assert result.n["scored"] == 3
        own = explain_prompt(found[4], words)[1]["content"]
        assert (
            own.count("<<") >= 15
            and own.count("\n") == 14
            and "<<" not in score_prompt(found[4], words, "x")[1]["content"]
        )


def test_means_intervals_and_what_is_left_out(words, tmp_path):
    found = latents_of(words)
    answers = iter(["None", "None", "perhaps 3"])
    truth = {score_prompt(own, words, "something.")[1]["content"]: next(answers) for own in found.values()}
    truth[score_prompt(found[4], words, "something.")[1]["content"]] = ", ".join(map(str, found[4].firing))
    judge = Scripted(truth)
    result = Autointerp(latents=5, tokens=1200).result(
        judged(judge, found, words, tmp_path), 4, torch.zeros(30, CONTEXT), judge
    )
    mean, deviation = (1 + 10 / 14) / 2, (4 / 14) / 2**0.5
    assert result.metrics["autointerp"] == pytest.approx({"autointerp_score": mean, "autointerp_std_dev": deviation})
    half = 1.959964 * deviation / 2**0.5
    assert result.intervals["autointerp"]["autointerp_score"] == pytest.approx([mean - half, mean + half])
    assert result.n == {"latents": 4, "with_passages": 3, "tokens": 1200, "scored": 2}
    assert [flag.split(",")[0] for flag in result.flags] == [
        "Only 4 latents fire on more than 15 tokens",
        "1 latents have too few separate passages and are left out.",
        "1 latents are left out",
    ]
    nobody = Scripted("?")
    result = Autointerp(latents=3).result(judged(nobody, found, words, tmp_path), 3, torch.zeros(1, 1), nobody)
    assert result.metrics == {"autointerp": {"autointerp_score": None, "autointerp_std_dev": None}}


def test_it_is_in_no_suite_unless_an_option_is_set():
    assert all("autointerp" not in names for names in SUITES.values()) and "autointerp" in METRICS
    assert [metric.name for metric in metrics_of_suite("quick", ["autointerp.endpoint=http://x"])][-1] == "autointerp"
    assert "autointerp" not in [metric.name for metric in metrics_of_suite("full")]
    with pytest.raises(UsageError, match="with a metric of this suite"):
        metrics_of_suite("core", ["autointerp.endpoint=http://x"])


def test_settings_are_those_of_earlier_results_unless_other_scores_are_asked_for(ctx):
    def settings(**options):
        return Autointerp(**options).settings(ctx)

    earlier = {"endpoint", "judge_model", "key_variable", "latents", "tokens", "context", "dead_latent_threshold"}
    assert settings().keys() == earlier | {"definition"} | ctx.settings.keys() | ctx.text_identity.keys()
    assert settings(price_in=3.0, price_out=1.0) == settings()
    assert settings(scores=("fuzzing",)) != settings()
    assert settings(scores=("fuzzing", "saebench")) == settings(scores=("saebench", "fuzzing", "fuzzing"))


def test_latents_fire_at_the_site_that_an_sae_reads(ctx):
    rows, drawn = pack_contexts(ctx, 32), [[1, 5]] * 3
    torch.manual_seed(0)
    wide = SAE(48, 16, [ReLU()]).requires_grad_(False)
    hooks = (Hook(0), Hook(1, "resid_pre"), Hook(1, "mlp_hidden"))
    targets = [EvalTarget(sae, hook) for sae, hook in zip((sae_of(0), sae_of(0), wide), hooks, strict=True)]
    shares = [fires.share_F for fires in firing_frequencies(ctx.model, rows, targets, silent)]
    assert np.array_equal(shares[0], shares[1])
    found = {(n, latent): (p, v) for n, latent, p, v in collect_firings(ctx, rows, targets, drawn, shares, silent)}
    expected = wide.encode(ctx.model.capture_hooks(rows.ids, hooks[2:])[hooks[2]])[..., 5].flatten()
    expected[torch.isin(rows.ids, torch.tensor(ctx.special_ids)).flatten()] = 0
    assert np.array_equal(found[0, 5][1], found[1, 5][1])
    torch.testing.assert_close(torch.from_numpy(found[2, 5][1]), expected[expected > 0])


def test_references_and_settings_that_make_no_sense_are_refused(ctx):
    untrained, control = sae_of(0), sae_of(0)
    control.origin = {"variant": "frozen-decoder"}
    targets = [EvalTarget(sae, Hook(0), reference=True) for sae in (Identity(), untrained, control)]
    outcomes = Autointerp(context=32, latents=1, tokens=600).measure(ctx, targets, silent)
    assert [isinstance(outcome, UsageError) for outcome in outcomes] == [True, True, False]
    assert outcomes[2].n["latents"] == 1  # latents of a control are explained
    for change in ({"latents": 0}, {"context": 20}, {"tokens": 0}):
        with pytest.raises(UsageError, match="must be 1 or more"):
            replace(Autointerp(), **change).measure(ctx, [EvalTarget(sae_of(0), Hook(0))], silent)
    with pytest.raises(UsageError, match="less than one row of 9000 tokens"):
        Autointerp(context=9000).measure(ctx, [EvalTarget(sae_of(0), Hook(0))], silent)
