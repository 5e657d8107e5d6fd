"""Autointerp of runs with a judge behind a URL: its questions, the stored answers, and the cost in the plan."""

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sae.common.errors import UnavailableError, UsageError
from sae.evaluate.metrics.autointerp import TEST_QUESTION
from sae.evaluate.plan import EvaluateConfig, plan_evaluation
from sae.evaluate.run import evaluate, run_evaluation
from sae.harvest.plan import HarvestConfig, plan_harvest
from sae.harvest.run import run_harvest
from sae.train.activation_functions import ReLU, TopK
from sae.train.sae import SAE, save_sae


def random_sae() -> SAE:
    torch.manual_seed(0)
    sae = SAE(32, 16, [ReLU()])
    sae.b_enc.data[0] = -1e3  # never fires
    return sae.eval().requires_grad_(False)


@pytest.fixture
def run(tiny_cache, home) -> Path:
    origin = {
        "model": tiny_cache.identity["model"],
        "layer": 0,
        "cache": str(tiny_cache.folder),
        "fingerprint": tiny_cache.fingerprint,
    }
    save_sae(random_sae(), home / "runs" / "one", origin)
    return home / "runs" / "one"


SMALL = ["autointerp.latents=3", "autointerp.context=32", "autointerp.tokens=2000"]


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
    assert "The prompts for 3 latents are in evaluations/autointerp.json" in row.results["autointerp"].flags[-1]


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
    with pytest.raises(
        UnavailableError, match="did not answer with a chat completion.* answers received so far are stored"
    ):
        evaluate(config)
    assert not (run / "evaluations" / "autointerp.json").exists()
    (row, *_) = evaluate(config)
    assert not row.errors and len(row.results["autointerp"].extra) == 3
    asked = Counter(str(body["messages"]) for *_, body in server.seen)
    assert sorted(asked.values()) == [1] * 5 + [2, 2]  # asked twice: the test question, and the question that failed
    (kept,) = (run.parents[1] / "activations" / "evaluation").glob("judge-*")
    lines = [json.loads(line) for line in kept.read_text().split("\n") if line]
    assert sorted(str(line["messages"]) for line in lines) == sorted(asked - Counter({str(TEST_QUESTION): 2}))


def test_a_judge_that_fails_is_a_sentence_and_nothing_is_written(run, server):
    server.replies = [(401, {}, {"error": {"message": "no such key"}})]
    options = [*SMALL, f"autointerp.endpoint={server.url}", "autointerp.judge_model=j"]
    with pytest.raises(UnavailableError, match=r"rejects the key \(HTTP 401\).* It says: no such key"):
        plan_evaluation(EvaluateConfig(runs=[run], suite="autointerp", options=options, device="cpu"))
    assert not (run / "evaluations").exists() and len(server.seen) == 1
    found = plan_evaluation(
        EvaluateConfig(runs=[run], suite="core,autointerp", options=options, device="cpu")
    )  # core is still measured
    assert [list(group.settings) for group in found.groups] == [["core"]]
    assert "rejects the key" in str(found.rows[0].errors["autointerp"])
    with pytest.raises(UsageError, match=r"Name its model with --set autointerp\.judge_model"):
        evaluate(EvaluateConfig(runs=[run], suite="autointerp", options=options[:-1], device="cpu"))


def test_a_judge_that_answers_nothing_is_not_asked_further(run, server):
    server.replies = [server.completion(None)]  # like a model whose reasoning uses up the token limit
    options = [*SMALL, f"autointerp.endpoint={server.url}", "autointerp.judge_model=j"]
    with pytest.raises(
        UnavailableError, match="j at .* gave an empty answer to the test question. An answer is limited to 100 tokens"
    ):
        plan_evaluation(EvaluateConfig(runs=[run], suite="autointerp", options=options, device="cpu"))
    assert len(server.seen) == 1


ALL = "saebench,detection,fuzzing"


def asked_by(server) -> Counter:
    """How often each question was asked, without the test question."""
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
    """A cache with enough held-out text for the separate passages of detection and fuzzing."""
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
    """The judge that is always right reads the true labels from the result of the one that always says yes."""
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
    tokens = "k input tokens"
    assert line.startswith(asks) and line.endswith(f"{tokens}, and returns at most 3k output tokens")
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


@pytest.mark.slow
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
    plan = plan_evaluation(config_of(sparse_run, server, "j", "saebench"))  # the first result is read from the archive
    assert plan.rows[0].results["autointerp"] == first and len(server.seen) == seen
    assert not any(line.startswith("judge") for line in plan.describe())
    prices = ["autointerp.price_in=1000", "autointerp.price_out=2000"]
    config = config_of(sparse_run, server, "j", "fuzzing")
    (line,) = [
        line
        for line in plan_evaluation(replace(config, options=[*config.options, *prices])).describe()
        if line.startswith("judge")
    ]
    found = re.search(
        r"about (\d+)k input tokens.* 2k output tokens: at most about ([\d.]+) at 1000 and 2000 per", line
    )
    assert float(found[2]) == pytest.approx(int(found[1]) + 2 * 1.5, abs=0.6)
    assert line.endswith(f"; {6 * count} of its answers are already stored and not requested again")
    (only,) = evaluate(config)
    assert only.results["autointerp"].metrics == {"fuzzing": second.metrics["fuzzing"]}
    assert len(asked_by(server)) == 6 * count and not any("parsed" in flag for flag in only.results["autointerp"].flags)


def test_the_plan_says_what_a_judge_would_cost_if_none_is_named(run):
    config = EvaluateConfig([run], "autointerp", options=SMALL, device="cpu", references=False)
    (line,) = [line for line in plan_evaluation(config).describe() if line.startswith("judge")]
    assert line.startswith(
        "judge    none is named, so only the prompts are written; a judge would get at most 6 questions (2 for "
    )


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("autointerp.scores=detect", "there is no score 'detect'.*detection"),
        ("autointerp.price_in=-1", "prices per million tokens and must be 0 or more"),
        ("autointerp.price_out=inf", "prices per million tokens and must be 0 or more"),
        ("autointerp.price_out=nan", "prices per million tokens and must be 0 or more"),
    ],
)
def test_options_that_make_no_sense_are_refused(run, option, sentence):
    with pytest.raises(UsageError, match=sentence):
        plan_evaluation(EvaluateConfig([run], "autointerp", options=[*SMALL, option], device="cpu"))


def test_a_key_in_the_place_of_its_variable_is_refused_and_not_shown(run):
    option = "autointerp.key_variable=sk-live-123"
    with pytest.raises(UsageError, match="key_variable is not the name of an environment variable") as refused:
        plan_evaluation(EvaluateConfig([run], "autointerp", options=[*SMALL, option], device="cpu"))
    assert "sk-live" not in str(refused.value)
