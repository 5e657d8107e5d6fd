"""Autointerp: scores by judges whose answers are scripted, and by a judge behind a URL."""

import json
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sae.cache.layout import Hook
from sae.common.errors import UnavailableError, UsageError
from sae.evaluate.inputs import make_context
from sae.evaluate.metrics import latent_firings as module
from sae.evaluate.metrics.activation_examples import LatentExamples, TokenText, select_examples
from sae.evaluate.metrics.autointerp import TEST_QUESTION, Autointerp
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
from sae.evaluate.plan import EvaluateConfig, plan_evaluation
from sae.evaluate.reference_saes import Identity
from sae.evaluate.run import evaluate, run_evaluation
from sae.harvest.model import find_model, load_tokenizer
from sae.harvest.plan import HarvestConfig, plan_harvest
from sae.harvest.run import run_harvest
from sae.train.activation_functions import ReLU, TopK
from sae.train.sae import SAE, save_sae

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
    packed = pack_contexts(ctx, 32)
    rows = packed.ids
    monkeypatch.setattr("sae.evaluate.metrics.packing.TOKENS_PER_FORWARD", 5 * 32)  # several batches to a pass
    assert len(rows) > 10
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
    """Answers the first prompt with an explanation, and the second as `predict` says of its text."""

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
    """The entries of latents that are asked about as SAEBench does."""
    latents = {latent: JudgedLatent(examples) for latent, examples in found.items()}
    kept = KeptAnswers(judge, folder / f"{id(judge)}.jsonl")
    return judge_latents(kept, latents, words, ("saebench",), silent)


def latents_of(words: TokenText) -> dict[int, LatentExamples]:
    rng = np.random.default_rng(0)
    ids = rng.integers(300, 1500, (30, CONTEXT))  # none of these tokens contains <<
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
        "4 latents fire on more than 15 tokens",
        "1 latents have too few separate passages and are left out.",
        "1 latents are left out: the judge's answers could not be parsed.",
    ]
    nobody = Scripted("?")
    result = Autointerp(latents=3).result(judged(nobody, found, words, tmp_path), 3, torch.zeros(1, 1), nobody)
    assert result.metrics == {"autointerp": {"autointerp_score": None, "autointerp_std_dev": None}}


@pytest.fixture
def run(tiny_cache, home) -> Path:
    origin = {
        "model": tiny_cache.identity["model"],
        "layer": 0,
        "cache": str(tiny_cache.folder),
        "fingerprint": tiny_cache.fingerprint,
    }
    save_sae(sae_of(0), home / "runs" / "one", origin)
    return home / "runs" / "one"


SMALL = ["autointerp.latents=3", "autointerp.context=32", "autointerp.tokens=2000"]


def test_it_is_in_no_suite_unless_an_option_is_set():
    assert all("autointerp" not in names for names in SUITES.values()) and "autointerp" in METRICS
    assert [metric.name for metric in metrics_of_suite("quick", ["autointerp.endpoint=http://x"])][-1] == "autointerp"
    assert "autointerp" not in [metric.name for metric in metrics_of_suite("full")]
    with pytest.raises(UsageError, match="with a metric of this suite"):
        metrics_of_suite("core", ["autointerp.endpoint=http://x"])


def test_without_an_endpoint_the_result_file_holds_the_prompts(run):
    rows = evaluate(EvaluateConfig(runs=[run], suite="autointerp", options=SMALL, device="cpu"))
    (row,) = [row for row in rows if not row.target.reference]
    found = json.loads((run / "evaluations" / "autointerp.json").read_text())
    entries = found["eval_result_unstructured"]["extra"]
    assert found["eval_result_metrics"] == {} and len(entries) == 3 and "0" not in entries
    for entry in entries.values():
        (_, explained), (_, scored) = entry["prompts"]
        assert explained["content"].count("\n") == 14 and scored["content"].count("\n") == 15
        assert scored["content"].startswith("The latent activates on {explanation}") and entry["score"] is None
    assert "the prompts for 3 latents are in evaluations/autointerp.json" in row.results["autointerp"].flags[-1]


def test_a_judge_behind_a_url_scores_the_latents(run, server, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret")

    def reply(body):
        asked = body["messages"][-1]["content"]
        return server.completion(
            "None" if asked.startswith("The latent activates on words") else "This latent activates on words."
        )

    server.replies = [reply]
    options = [
        *SMALL,
        f"autointerp.endpoint={server.url}",
        "autointerp.judge_model=j",
        "autointerp.key_variable=JUDGE_KEY",
    ]
    rows = evaluate(EvaluateConfig(runs=[run], suite="autointerp", options=options, device="cpu"))
    (row,) = [row for row in rows if not row.target.reference]
    entries = row.results["autointerp"].extra
    scores = [1 - len(entry["correct seqs"]) / 14 for entry in entries.values()]
    assert row.results["autointerp"].metrics["autointerp"]["autointerp_score"] == pytest.approx(sum(scores) / 3)
    assert len(server.seen) == 1 + 6 and {(path, key) for path, key, _ in server.seen} == {
        ("/v1/chat/completions", "Bearer secret")
    }
    assert {body["model"] for *_, body in server.seen} == {"j"}
    text = (run / "evaluations" / "autointerp.json").read_text()
    assert "secret" not in text and "words." in text
    assert not row.errors


def test_a_judge_that_stops_answering_is_asked_only_the_rest(run, server):
    failing = iter([True])

    def reply(body):
        explained = body["messages"][-1]["content"].startswith("The latent activates on")
        if explained and next(failing, False):
            return (200, {}, b"[" * 100_000)
        return server.completion("None" if explained else "This latent activates on words.")

    server.replies = [reply]
    options = [*SMALL, f"autointerp.endpoint={server.url}", "autointerp.judge_model=j"]
    config = EvaluateConfig(runs=[run], suite="autointerp", options=options, device="cpu")
    with pytest.raises(UnavailableError, match="did not answer with a chat completion.* answers so far are kept"):
        evaluate(config)
    assert not (run / "evaluations" / "autointerp.json").exists()
    (row, *_) = evaluate(config)
    assert not row.errors and len(row.results["autointerp"].extra) == 3
    asked = Counter(str(body["messages"]) for *_, body in server.seen)
    assert sorted(asked.values()) == [1] * 5 + [2, 2]  # twice: the test question, and the one that failed
    (kept,) = (run.parents[1] / "activations" / "evaluation").glob("judge-*")
    lines = [json.loads(line) for line in kept.read_text().split("\n") if line]
    assert sorted(str(line["messages"]) for line in lines) == sorted(asked - Counter({str(TEST_QUESTION): 2}))


def test_a_judge_that_fails_is_a_sentence_and_nothing_is_written(run, server):
    server.replies = [(401, {}, {"error": {"message": "no such key"}})]
    options = [*SMALL, f"autointerp.endpoint={server.url}", "autointerp.judge_model=j"]
    with pytest.raises(UnavailableError, match=r"refuses the key \(HTTP 401\).* It says: no such key"):
        plan_evaluation(EvaluateConfig(runs=[run], suite="autointerp", options=options, device="cpu"))
    assert not (run / "evaluations").exists() and len(server.seen) == 1
    found = plan_evaluation(
        EvaluateConfig(runs=[run], suite="core,autointerp", options=options, device="cpu")
    )  # core is to be measured
    assert [list(group.settings) for group in found.groups] == [["core"]]
    assert "refuses the key" in str(found.rows[0].errors["autointerp"])
    with pytest.raises(UsageError, match=r"Name it with --set autointerp\.judge_model"):
        evaluate(EvaluateConfig(runs=[run], suite="autointerp", options=options[:-1], device="cpu"))


ALL = "saebench,detection,fuzzing"


def asked_by(server) -> Counter:
    """How often each question was asked, the test question aside."""
    return Counter(str(body["messages"]) for *_, body in server.seen if body["messages"] != TEST_QUESTION)


def kind_of(body) -> str:
    system, *user = body["messages"]
    if not user:
        return "test"
    if not user[0]["content"].startswith("The latent activates on"):
        return "explain"
    return (
        "saebench" if "or with None" in system["content"] else "fuzzing" if "<<" in system["content"] else "detection"
    )


ANSWERS = {"test": "None", "explain": "This latent activates on words.", "saebench": "None"}


@pytest.fixture(scope="module")
def long_cache(tiny_model, sentences, tmp_path_factory):
    """With enough held-out text for the separate passages of detection and fuzzing."""
    config = HarvestConfig(
        model=str(tiny_model), dataset=str(sentences), layers=(0,), tokens=6000, context=64, window=2048, held_out=0.5,
        device="cpu", out=tmp_path_factory.mktemp("activations") / "long",
    )  # fmt: skip
    return run_harvest(plan_harvest(config))


@pytest.fixture
def sparse_run(long_cache, home) -> Path:
    origin = {"model": long_cache.identity["model"], "layer": 0, "cache": str(long_cache.folder)}
    torch.manual_seed(0)
    save_sae(SAE(32, 32, [TopK(1)]).eval(), home / "runs" / "sparse", origin | {"fingerprint": long_cache.fingerprint})
    return home / "runs" / "sparse"


def config_of(run: Path, server, judge_model: str, scores: str) -> EvaluateConfig:
    options = ["latents=3", "context=64", "tokens=6000", f"endpoint={server.url}", f"judge_model={judge_model}"]
    options = [f"autointerp.{option}" for option in (*options, f"scores={scores}")]
    return EvaluateConfig([run], "autointerp", options=options, device="cpu", references=False)


def always_yes(server):
    def reply(body):
        passages = body["messages"][-1]["content"].count("\n") - 1
        return server.completion(ANSWERS.get(kind_of(body), ", ".join("1" * passages)))

    return reply


def test_a_judge_that_always_says_yes_has_one_half_and_a_right_one_has_one(sparse_run, server):
    """The truth that the right one knows is in the result of the other."""
    server.replies = [always_yes(server)]
    config = config_of(sparse_run, server, "yes", ALL)
    plan = plan_evaluation(config)
    (line,) = [line for line in plan.describe() if line.startswith("judge")]
    (row,) = run_evaluation(plan)
    entries = row.results["autointerp"].extra
    truth = {}
    for entry in entries.values():
        for score in ("detection", "fuzzing"):
            prompts = [str(prompt) for prompt in entry["prompts"][2:] if kind_of({"messages": prompt}) == score]
            fires = entry[score]["fires"]
            assert sum(fires) * 2 == len(fires) == 20 and len(prompts) == 4
            truth |= {prompt: fires[5 * n : 5 * n + 5] for n, prompt in enumerate(prompts)}
    found = json.loads((sparse_run / "evaluations" / "autointerp.json").read_text())["eval_result_metrics"]
    for score in ("detection", "fuzzing"):
        rates = {"balanced_accuracy": 0.5, "true_positive_rate": 1, "true_negative_rate": 0}
        assert found[score] == {f"{score}_{rate}": value for rate, value in rates.items()}
        assert any(flag.startswith(f"{score}: the 95 % interval") for flag in row.results["autointerp"].flags)
    asked = asked_by(server)
    assert len(asked) == 10 * len(entries) > 10 and set(asked.values()) == {1}
    asks = f"judge    yes at {server.url} gets at most 30 questions (10 for each of 3 latents), about "
    tokens = "k tokens in"
    assert line.startswith(asks) and line.endswith(f"{tokens}, and gives at most 3k tokens out")
    thousands = line.removeprefix(asks).split(tokens)[0]
    tokenizer = plan.groups[0].ctx.tokenizer
    texts = [one["content"] for entry in entries.values() for prompt in entry["prompts"] for one in prompt]
    ours = sum(len(tokenizer(text)["input_ids"]) for text in texts) / len(asked)
    assert 0.75 < ours / (1000 * int(thousands) / 30) < 1.25

    def right(body):
        fires = truth.get(str(body["messages"]))
        return server.completion(ANSWERS[kind_of(body)] if fires is None else ",".join(str(int(one)) for one in fires))

    server.replies = [right]
    (row,) = evaluate(config_of(sparse_run, server, "right", ALL))
    metrics = row.results["autointerp"].metrics
    assert metrics["detection"]["detection_balanced_accuracy"] == metrics["fuzzing"]["fuzzing_balanced_accuracy"] == 1
    assert metrics["autointerp"]["autointerp_score"] == found["autointerp"]["autointerp_score"]


def test_a_further_score_reuses_the_explanations_and_leaves_the_first_as_it_is(sparse_run, server):
    server.replies = [always_yes(server)]
    (alone,) = evaluate(config_of(sparse_run, server, "j", "saebench"))
    before = asked_by(server)
    count = len(alone.results["autointerp"].extra)
    assert Counter(kind_of(body) for *_, body in server.seen) == {"test": 1, "explain": count, "saebench": count}
    assert count > 1
    (later,) = evaluate(config_of(sparse_run, server, "j", "fuzzing,saebench"))
    bodies = [body for *_, body in server.seen if str(body["messages"]) not in before]
    assert Counter(map(kind_of, bodies)) == {"test": 2, "fuzzing": 4 * count}
    first, second = (row.results["autointerp"] for row in (alone, later))
    assert second.metrics.keys() == {"autointerp", "fuzzing"} and first.metrics.keys() == {"autointerp"}
    assert second.metrics["autointerp"] == first.metrics["autointerp"]
    for latent, entry in first.extra.items():
        other = second.extra[latent]
        assert other["prompts"][:2] == entry["prompts"] and other["answers"][:2] == entry["answers"]
    seen = len(server.seen)
    plan = plan_evaluation(config_of(sparse_run, server, "j", "saebench"))  # the first result was archived, and is read
    assert plan.rows[0].results["autointerp"] == first and len(server.seen) == seen
    assert not any(line.startswith("judge") for line in plan.describe())
    prices = ["autointerp.price_in=1000", "autointerp.price_out=2000"]
    config = config_of(sparse_run, server, "j", "fuzzing")
    (line,) = [
        line
        for line in plan_evaluation(replace(config, options=[*config.options, *prices])).describe()
        if line.startswith("judge")
    ]
    found = re.search(r"about (\d+)k tokens in.* 2k tokens out: at most about ([\d.]+) at 1000 and 2000 per", line)
    assert float(found[2]) == pytest.approx(int(found[1]) + 2 * 1.5, abs=0.6)
    assert line.endswith(f"; {6 * count} of its answers are kept and not asked for again")
    (only,) = evaluate(config)
    assert only.results["autointerp"].metrics == {"fuzzing": second.metrics["fuzzing"]}
    assert len(asked_by(server)) == 6 * count and not any("parsed" in flag for flag in only.results["autointerp"].flags)


def test_settings_are_those_of_earlier_results_unless_other_scores_are_asked_for(ctx):
    def settings(**options):
        return Autointerp(**options).settings(ctx)

    earlier = {"endpoint", "judge_model", "key_variable", "latents", "tokens", "context", "dead_latent_threshold"}
    assert settings().keys() == earlier | {"definition"} | ctx.settings.keys() | ctx.text_identity.keys()
    assert settings(price_in=3.0, price_out=1.0) == settings()
    assert settings(scores=("fuzzing",)) != settings()
    assert settings(scores=("fuzzing", "saebench")) == settings(scores=("saebench", "fuzzing", "fuzzing"))


def test_the_plan_says_what_a_judge_would_cost_if_none_is_named(run):
    config = EvaluateConfig([run], "autointerp", options=SMALL, device="cpu", references=False)
    (line,) = [line for line in plan_evaluation(config).describe() if line.startswith("judge")]
    assert line.startswith("judge    none is named, the prompts are written; one would get at most 6 questions (2 for ")


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("autointerp.scores=detect", "there is no score 'detect'.*detection"),
        ("autointerp.price_in=-1", "price_out must be 0 or more, per million tokens"),
        ("autointerp.price_out=inf", "price_out must be 0 or more, per million tokens"),
        ("autointerp.price_out=nan", "price_out must be 0 or more, per million tokens"),
    ],
)
def test_options_that_make_no_sense_are_refused(run, option, sentence):
    with pytest.raises(UsageError, match=sentence):
        plan_evaluation(EvaluateConfig([run], "autointerp", options=[*SMALL, option], device="cpu"))


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
    assert outcomes[2].n["latents"] == 1  # a control is explained
    for change in ({"latents": 0}, {"context": 20}, {"tokens": 0}):
        with pytest.raises(UsageError, match="must be 1 or more"):
            replace(Autointerp(), **change).measure(ctx, [EvalTarget(sae_of(0), Hook(0))], silent)
    with pytest.raises(UsageError, match="less than one row of 9000 tokens"):
        Autointerp(context=9000).measure(ctx, [EvalTarget(sae_of(0), Hook(0))], silent)
