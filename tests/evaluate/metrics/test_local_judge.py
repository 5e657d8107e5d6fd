"""The local judge, with a random chat model of two blocks whose answers have no meaning."""

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sae.common.errors import UsageError
from sae.evaluate.metrics import local_judge as module
from sae.evaluate.metrics.local_judge import LocalJudge, batches
from sae.evaluate.plan import EvaluateConfig, plan_evaluation
from sae.evaluate.run import evaluate
from sae.train.activation_functions import ReLU
from sae.train.sae import SAE, save_sae

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
WITHOUT_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system message') }}{% endif %}" + TEMPLATE
)
QUESTIONS = [
    [{"role": "system", "content": "Answer."}, {"role": "user", "content": "a word " * length}] for length in (3, 40, 1)
]


@pytest.fixture(autouse=True)
def short_answers(monkeypatch):
    monkeypatch.setattr(module, "MAX_ANSWER_TOKENS", 6)


@pytest.fixture
def chat_model(tiny_model: Path, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "tiny-chat"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def answers_of(judge: LocalJudge, questions=QUESTIONS) -> list[str]:
    found = {}
    judge.answer_all(questions, found.__setitem__)
    return [found[index] for index in range(len(questions))]


def test_an_answer_is_the_most_likely_token_each_time_whatever_it_is_batched_with(chat_model):
    """Each answer equals that of a plain loop without batching, padding or a KV cache."""
    judge = LocalJudge(str(chat_model), "cpu", "float32")
    expected = []
    for messages in QUESTIONS:
        ids = torch.tensor([judge.encode(messages)])
        start = ids.shape[1]
        while ids.shape[1] < start + 6 and ids[0, -1] != 1:
            ids = torch.cat([ids, judge.model(ids).logits[:, -1:].argmax(-1)], 1)
        expected.append(judge.tokenizer.decode(ids[0, start:], skip_special_tokens=True))
    assert answers_of(judge) == expected and len(set(expected)) > 1
    assert [answers_of(judge, [one]) for one in QUESTIONS] == [[one] for one in expected]


def test_the_conversation_goes_through_the_chat_template(chat_model):
    judge = LocalJudge(str(chat_model), "cpu", "float32")
    text = judge.tokenizer.decode(judge.encode(QUESTIONS[2]))
    assert text == "<bos>system: Answer.\nuser: a word \nassistant:"


def test_a_template_without_system_messages_gets_one_conversation_of_the_user(chat_model):
    (chat_model / "chat_template.jinja").write_text(WITHOUT_SYSTEM)
    judge = LocalJudge(str(chat_model), "cpu", "float32")
    assert judge.tokenizer.decode(judge.encode(QUESTIONS[2])) == "<bos>user: Answer.\n\na word \nassistant:"


def test_batches_hold_every_prompt_once_and_at_most_so_many_tokens():
    lengths = [5, 90, 40, 41, 39, 5, 300, 7]
    found = list(batches(lengths, 200))
    assert sorted(index for batch in found for index in batch) == list(range(8))
    for batch in found:
        assert len(batch) == 1 or len(batch) * (max(lengths[index] for index in batch) + 6) <= 200
    assert found[0] == [6] and len(found) < 6 and list(batches([], 10)) == []


def test_a_model_without_a_chat_template_is_refused(tiny_model):
    with pytest.raises(UsageError, match="has no chat template, so it cannot answer questions. Name a model"):
        LocalJudge(str(tiny_model), "cpu", "float32")


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"judge_model=.*nowhere: there is no such folder\. Give the Hub id or"):
        LocalJudge(str(tmp_path / "nowhere"), "cpu", "float32")


@pytest.fixture
def run(tiny_cache, home) -> Path:
    torch.manual_seed(0)
    origin = {
        "model": tiny_cache.identity["model"],
        "layer": 0,
        "cache": str(tiny_cache.folder),
        "fingerprint": tiny_cache.fingerprint,
    }
    return save_sae(SAE(32, 16, [ReLU()]).eval(), home / "runs" / "one", origin) or home / "runs" / "one"


def test_a_local_judge_end_to_end_and_again_without_loading_it(run, chat_model, monkeypatch):
    options = ["autointerp.latents=2", "autointerp.context=32", "autointerp.tokens=2000", "autointerp.endpoint=local"]
    options += [f"autointerp.judge_model={chat_model}", "autointerp.scores=saebench,detection,fuzzing"]
    config = EvaluateConfig([run], "autointerp", options=options, device="cpu", references=False)
    plan = plan_evaluation(config)
    assert any(f"{chat_model} at local gets at most 20 questions" in line for line in plan.describe())
    (row,) = evaluate(config)
    result = row.results["autointerp"]
    assert not row.errors and len(result.extra) == 2
    for entry in result.extra.values():
        assert len(entry["prompts"]) == len(entry["answers"]) > (entry["explanation"] is not None)
    loads = Counter()
    monkeypatch.setattr(module, "load_whole_model", lambda *_, **__: loads.update("x"))
    (again,) = evaluate(replace(config, force=True))
    assert again.results["autointerp"] == result and not loads
    (chat_model / "chat_template.jinja").write_text(TEMPLATE + " ")
    assert not plan_evaluation(config).rows[0].results  # it is another model, whose answers differ


def test_the_test_question_of_a_plan_does_not_load_the_model(run, chat_model, monkeypatch):
    monkeypatch.setattr(module, "load_whole_model", lambda *_, **__: pytest.fail("loaded"))
    options = ["autointerp.endpoint=local", f"autointerp.judge_model={chat_model}"]
    assert plan_evaluation(EvaluateConfig([run], "autointerp", options=options, device="cpu")).has_work
    with pytest.raises(UsageError, match="autointerp.endpoint is local, but no judge is named"):
        plan_evaluation(EvaluateConfig([run], "autointerp", options=options[:1], device="cpu"))
