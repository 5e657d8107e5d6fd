"""Unlearning on a Gemma 2 whose weights are written by hand, so that the effect of clamping a latent is known.

The model answers with the letter that precedes " value" or " number". In the first block, each token copies the letter
two tokens back; in the second, the last token attends to those two words and reads the letter there. Of the questions
that the model knows, most questions of the target have " value" as the right choice; the others, and those of the other
sets, have " number". If neither word is a choice, the model answers A, the first letter of "Answer", so the right
choice is never the first one.
"""

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM

from sae.cache.context_format import ContextFormat
from sae.cache.contexts import Contexts
from sae.cache.hooks import Hook
from sae.common.errors import SaeError, UnavailableError, UsageError
from sae.evaluate.artifacts import ArtifactCache
from sae.evaluate.context import EvalContext
from sae.evaluate.metrics.base import EvalTarget
from sae.evaluate.metrics.multiple_choice import MultipleChoiceModel
from sae.evaluate.metrics.packing import PackedRows, firing_frequencies, pack_texts
from sae.evaluate.metrics.unlearning import Unlearning, unlearning_score
from sae.evaluate.metrics.unlearning_data import dataset_paths, reader, sample_long_texts
from sae.evaluate.plan import EvaluateConfig
from sae.evaluate.reference_saes import Identity
from sae.evaluate.run import evaluate
from sae.harvest.mini import WEIGHTS
from sae.harvest.model import find_model, load_model, load_tokenizer
from sae.harvest.plan import HarvestConfig as Harvest
from sae.harvest.plan import plan_harvest
from sae.harvest.run import run_harvest
from sae.train.activation_functions import ReLU
from sae.train.sae import SAE, save_sae

VALUE, NUMBER = 652, 1125  # the tokens of " value" and " number"
CONSTANT, FILLER, LOOKED_FOR, OF_VALUE, OF_NUMBER, COPY = 31, 20, 8, 10, 12, 4  # dimensions; COPY is the first of four
THETA = 10000.0 ** -(torch.arange(8) / 8)
TEMPLATE = "{{ bos_token }}{% for m in messages %}user\n{{ m['content'] }}\n{% endfor %}{{ 'model\n' }}"
SMALL = {"context": 8, "rows": 64, "n_features": (1,), "retain_thresholds": (0.01,)}
SIDE = "high_school_geography"


def silent(done, total, note=""):
    pass


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> Path:
    """The folder of the base model. The instruction-tuned model beside it is the same, with a chat template."""
    config = Gemma2Config(
        vocab_size=8192, hidden_size=32, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1,
        num_key_value_heads=1, head_dim=16, query_pre_attn_scalar=16, pad_token_id=0, eos_token_id=1, bos_token_id=2,
        attn_logit_softcapping=None, final_logit_softcapping=None,
    )  # fmt: skip
    model = Gemma2ForCausalLM(config)
    tokenizer = AutoTokenizer.from_pretrained(WEIGHTS)
    letters = [tokenizer.encode(letter, add_special_tokens=False)[0] for letter in "ABCD"]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        embedding = model.model.embed_tokens.weight
        embedding[:, CONSTANT] = 1
        embedding[:, FILLER] = 1  # all embeddings have the same norm
        for number, letter in enumerate(letters):
            embedding[letter, FILLER], embedding[letter, number] = 0, 1
            embedding[tokenizer.encode(f" {'ABCD'[number]}", add_special_tokens=False), FILLER] = 0
        for word, own in ((VALUE, OF_VALUE), (NUMBER, OF_NUMBER)):
            embedding[word, FILLER], embedding[word, LOOKED_FOR], embedding[word, own] = 0, 0.5**0.5, 0.5**0.5
        first, second = (block.self_attn for block in model.model.layers)
        first.q_proj.weight[:8, CONSTANT], first.q_proj.weight[8:, CONSTANT] = (
            20 * torch.cos(2 * THETA),
            -20 * torch.sin(2 * THETA),
        )
        first.k_proj.weight[:8, CONSTANT] = 1
        second.q_proj.weight[7, CONSTANT] = 20
        second.k_proj.weight[7, LOOKED_FOR] = 1
        for i in range(4):
            first.v_proj.weight[i, i] = first.o_proj.weight[COPY + i, i] = 1
            second.v_proj.weight[i, COPY + i] = second.o_proj.weight[i, i] = 1
    folder = tmp_path_factory.mktemp("models")
    for name in ("planted", "planted-it"):
        model.save_pretrained(folder / name)
        tokenizer.chat_template = TEMPLATE if name.endswith("-it") else None
        tokenizer.save_pretrained(folder / name)
    return folder / "planted"


def question(right: str, place: int, number: int) -> dict:
    choices = ["line", "name", "list"]
    choices.insert(place, right)
    return {"question": f"Which is it, {number} of them?", "choices": choices, "answer": place}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """The target has six questions that the model knows, four of them by " value", and one that it does not know."""
    folder = tmp_path_factory.mktemp("data")

    def write(path: str, rows: list[dict]) -> None:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text("".join(json.dumps(row) + "\n" for row in rows))

    target = [question("value" if i < 4 else "number", 1 + i % 3, i) for i in range(6)]
    write("cais/wmdp/wmdp-bio/test.jsonl", [question("class", 2, 9), *target])
    write(f"cais/mmlu/{SIDE}/test.jsonl", [question("number", 1 + i % 3, i) for i in range(5)])
    write("cais/mmlu/human_aging/test.jsonl", [question("number", 1, 7), question("class", 1, 8)])
    forget = ["the value of a value is a value and a number of names " * 2, "the value of a list of value " * 3]
    write("bio-forget-corpus.jsonl", [{"text": text, "title": ""} for text in forget] + [{"text": "short"}])
    write(
        "Salesforce/wikitext/wikitext-2-raw-v1/test.jsonl", [{"text": "a line of the file of names and lists " * 3}] * 4
    )
    return folder


def sae_that_fires_on(*words: int) -> SAE:
    """Latent 3 fires on " value" and latent 7 on " number", if that word is given.

    Each decodes to the direction that the second block attends to.
    """
    torch.manual_seed(0)
    sae = SAE(32, 12, [ReLU()], pre_bias=False)
    sae.W_enc.data.zero_()
    for word, latent, own in ((VALUE, 3, OF_VALUE), (NUMBER, 7, OF_NUMBER)):
        sae.W_dec.data[latent] = torch.eye(32)[LOOKED_FOR]
        if word in words:
            sae.W_enc.data[own, latent] = 1
    return sae.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def ctx(planted, data, tmp_path_factory) -> EvalContext:
    source, config = find_model(str(planted))
    model = load_model(source, config, dtype="float32", device="cpu")
    nothing = Contexts(*(np.zeros(0) for _ in range(4)))
    identity = {"model": source.name, "revision": source.revision, "attention": "eager", "llm_dtype": "float32"}
    artifacts = ArtifactCache(tmp_path_factory.mktemp("shelf"))
    form = ContextFormat(2, (0, 1, 2))
    return EvalContext(
        lambda: model, load_tokenizer(source), nothing, form, "0.6.0", identity, {}, artifacts, data,
        model_argument=str(planted),
    )  # fmt: skip


@pytest.fixture
def metric() -> Unlearning:
    return Unlearning(side_effects=(SIDE, "human_aging"), **SMALL)


def test_the_input_of_a_block_is_the_output_of_the_one_before(ctx, metric):
    """The same SAE unlearns the same at both hooks."""
    sae = sae_that_fires_on(VALUE)
    output, same = metric.measure(ctx, [EvalTarget(sae, hook) for hook in (Hook(0), Hook(1, "resid_pre"))], silent)
    assert output == same and output.metrics["unlearning"]["unlearning_score"] > 0


def test_clamping_the_latent_of_the_subject_costs_just_the_answers_that_hang_on_it(ctx, metric):
    """Four of the six questions are lost. The other two, and all questions of the other sets, are still answered right.

    The result of an SAE does not depend on the SAEs that are measured with it.
    """
    both = replace(metric, n_features=(1, 2))
    sae, every, silent_one = (sae_that_fires_on(*w) for w in ((VALUE,), (VALUE, NUMBER), ()))
    targets = [EvalTarget(one, Hook(0)) for one in (sae, Identity(), every, silent_one)]
    first, identity, second, third = both.measure(ctx, targets, silent)
    assert first.metrics == {"unlearning": {"unlearning_score": pytest.approx(4 / 6)}}
    assert {name: first.n[name] for name in ("wmdp-bio", SIDE, "human_aging")} == {
        "wmdp-bio": 6,
        SIDE: 5,
        "human_aging": 1,
    }
    assert [d["features"] for d in first.details] == [[3]] * 8
    assert {(d["wmdp-bio"], d["side_effects"], d[SIDE]) for d in first.details} == {(2 / 6, 1.0, 1.0)}
    assert "multiple of 1/6" in first.flags[0] and "With only 6 other questions" in first.flags[1]
    low, high = first.intervals["unlearning"]["unlearning_score"]
    assert low < 4 / 6 < high
    assert isinstance(identity, UsageError) and "W_dec" in str(identity)
    # with two latents, that of " number" costs the other sets too, so the setting is inadmissible and does not count
    assert {(tuple(d["features"]), d["wmdp-bio"], d["side_effects"]) for d in second.details} == {
        ((3,), 2 / 6, 1.0), ((3, 7), 0.0, 0.0),
    }  # fmt: skip
    assert second.metrics == first.metrics
    assert third.metrics == {"unlearning": {"unlearning_score": 0}} and third.details == []
    assert any("nothing was clamped" in flag for flag in third.flags)
    (alone,) = both.measure(ctx, [EvalTarget(every, Hook(0))], silent)
    assert alone == second
    (inadmissible,) = replace(metric, n_features=(2,)).measure(ctx, [EvalTarget(every, Hook(0))], silent)
    assert inadmissible.metrics == {"unlearning": {"unlearning_score": 0}}
    assert any("Under every intervention" in flag for flag in inadmissible.flags)


def test_the_length_of_decoder_rows_changes_nothing_and_is_said(ctx, metric):
    sae = sae_that_fires_on(VALUE)
    scaled = sae_that_fires_on(VALUE)
    scaled.W_dec.mul_(0.01)
    scaled.W_enc.mul_(100)
    plain, folded = metric.measure(ctx, [EvalTarget(sae, Hook(0)), EvalTarget(scaled, Hook(0))], silent)
    assert folded.metrics == plain.metrics and folded.details == plain.details
    assert [flag for flag in folded.flags if flag not in plain.flags] == [
        "Decoder rows do not have unit length, so their norms were folded into the latents."
    ]


def readers(metric, ctx):
    return {name: reader(path, ctx.data) for name, path in dataset_paths(metric.side_effects, ctx.data).items()}


def test_outlier_rows_are_neither_counted_nor_clamped_and_saebench_s_score_counts_them(ctx, metric):
    """If all rows are outliers, no latent fires. The score under SAEBench's name is computed without a limit."""
    target = EvalTarget(sae_that_fires_on(VALUE), Hook(0))
    (plain,) = metric.measure(ctx, [target], silent)
    (found,) = metric.measure_both(ctx, [replace(target, norm_limit=0.1)], silent)
    assert (found.metrics, found.details, found.intervals) == (plain.metrics, plain.details, plain.intervals)
    assert found.masked.metrics == {"unlearning": {"unlearning_score": 0}} and found.masked.details == []
    asked = metric.load(ctx)
    rows = metric.corpora(readers(metric, ctx), asked).values()
    counted = sum(int(asked.context_format.counted(rows_RS).sum()) for rows_RS in rows)
    questions = [
        asked.prompt(question.subject, question)
        for name, read in readers(metric, ctx).items()
        if name in ("wmdp-bio", *metric.side_effects)
        for question in metric.questions(ctx, name, read, asked, silent)
    ]
    assert found.n["outlier_rows"] == counted + sum(len(ids) - 1 for ids in questions)  # without BOS, the first token


def test_known_questions_are_found_once_for_a_model(ctx, metric, monkeypatch, tmp_path):
    ctx, metric = replace(ctx, artifacts=ArtifactCache(tmp_path)), replace(metric, side_effects=("human_aging",))
    asked_for = []
    answers = MultipleChoiceModel.answers
    monkeypatch.setattr(
        MultipleChoiceModel, "answers", lambda self, prompts: asked_for.append(len(prompts)) or answers(self, prompts)
    )
    first = metric.measure(ctx, [EvalTarget(sae_that_fires_on(VALUE), Hook(0))], silent)
    assert len(asked_for) == 2 * 24
    assert max(asked_for) == 7 and asked_for[23] == 6  # a question that was answered wrongly once is not asked again
    assert metric.measure(ctx, [EvalTarget(sae_that_fires_on(VALUE), Hook(0))], silent) == first
    assert len(asked_for) == 2 * 24


def test_evaluate_writes_it_and_a_missing_corpus_fails_alone(ctx, planted, data, sentences, home):
    cache = run_harvest(
        plan_harvest(
            Harvest(
                model=str(planted),
                dataset=str(sentences),
                layers=(0,),
                tokens=300,
                context=32,
                window=512,
                held_out=0.2,
                device="cpu",
                out=home / "activations" / "small",
            )  # fmt: skip
        )
    )
    origin = {
        "model": cache.identity["model"],
        "layer": 0,
        "cache": str(cache.folder),
        "fingerprint": cache.fingerprint,
    }
    run = home / "runs" / "one"
    save_sae(sae_that_fires_on(VALUE), run, origin)
    options = [
        f"unlearning.side_effects={SIDE}",
        "unlearning.context=8",
        "unlearning.rows=64",
        "unlearning.n_features=1",
    ]
    shutil.copytree(ctx.artifacts.folder, home / "activations" / "evaluation")  # the known questions
    request = EvaluateConfig(
        runs=[run], suite="unlearning", options=options, data=data, device="cpu", tokens=50, references=False
    )
    (row,) = evaluate(request)
    found = json.loads((run / "evaluations" / "unlearning.json").read_text())
    assert found["eval_result_metrics"] == {"unlearning": {"unlearning_score": pytest.approx(4 / 6)}}
    assert found["eval_config"]["questioned"]["name"].startswith("planted-it-")
    assert found["eval_config"]["data"].keys() == {"forget", "retain", "wmdp-bio", SIDE}
    assert row.results["unlearning"].n["forget_rows"] > 4
    (row,) = evaluate(replace(request, suite="core,unlearning", data=None))
    assert "core" in row.results and isinstance(row.errors["unlearning"], UnavailableError)
    assert "use --data with a folder that contains cais/wmdp-bio-forget-corpus/train.jsonl (or .parquet)" in str(
        row.errors["unlearning"]
    )


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"model": "./nowhere"}, UnavailableError, r"there is no \./nowhere\. Give the folder or the Hub id"),
        (
            {"model": "somebody/something-it"},
            UnavailableError,
            "license at https://huggingface.co/somebody/something-it",
        ),
        ({"rng": "none"}, UsageError, "unlearning.rng=none is unknown. Expected paired or saebench"),
        ({"rows": 0}, UsageError, "must be 1 or more"),
        ({"context": 4000}, UsageError, "has less than one row of 4000 tokens"),
        (
            {"side_effects": ("virology",)},
            UnavailableError,
            "cais/mmlu could not be read: .* cais/mmlu/virology/test.jsonl",
        ),
    ],
)
def test_what_cannot_be_measured_is_a_sentence(ctx, metric, change, error, sentence):
    with pytest.raises(error, match=sentence):
        replace(metric, **change).measure(ctx, [EvalTarget(sae_that_fires_on(VALUE), Hook(0))], silent)


def test_a_model_that_is_not_the_one_is_refused(ctx, metric, planted, tiny_model, tmp_path):
    targets = [EvalTarget(sae_that_fires_on(VALUE), Hook(0))]
    with pytest.raises(
        UsageError, match=r"planted-\w{8} has no chat template, so it is not an instruction-tuned model"
    ):
        replace(metric, model=str(planted)).measure(ctx, targets, silent)
    mini = replace(ctx, model_argument="gemma-2-mini")
    with pytest.raises(UnavailableError, match="there is no gemma-2-mini-it"):
        metric.settings(mini)
    with pytest.raises(
        UsageError, match="has 26 blocks of width 128, but the model of the SAEs has 2 blocks of width 32"
    ):
        replace(metric, model=str(WEIGHTS)).measure(ctx, targets, silent)
    tiny = shutil.copytree(tiny_model, tmp_path / "tiny-it")
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tiny)
    with pytest.raises(SaeError, match="answers no questions of wmdp-bio right under all 24 orders"):  # it is random
        replace(metric, model=str(tiny)).measure(ctx, targets, silent)


def test_the_score_is_the_best_of_what_costs_at_most_one_percent():
    assert unlearning_score([(500, 308), (480, 305), (400, 304)], 533, 308) == pytest.approx(53 / 533)
    assert unlearning_score([(100, 304), (200, 300)], 533, 308) == 0
    assert unlearning_score([(0, 306)], 533, 308) == 1
    assert unlearning_score([], 533, 308) == 0
    assert unlearning_score([(10, 99)], 100, 100) == pytest.approx(0.9)


def test_the_interval_chooses_the_best_intervention_anew(metric):
    """Two interventions lose different halves of the questions. In a bootstrap replicate, the better of the two scores
    higher than either does on average."""
    halves = torch.arange(200) < 100
    right, wrong = torch.ones(100, dtype=torch.bool), torch.arange(100) < 70

    def of(target: list[torch.Tensor], others: list[torch.Tensor]) -> list[float]:
        return metric.interval({"wmdp-bio": target, SIDE: others, "human_aging": [right[:0]] * len(target)})

    low, high = of([halves], [right])
    spread = 1.96 * (0.25 / 200) ** 0.5
    assert [low, high] == pytest.approx([0.5 - spread, 0.5 + spread], abs=0.015)
    best_low, best_high = of([halves, ~halves], [right] * 2)
    assert 0.5 <= best_low < 0.51 and best_high == pytest.approx(0.5 + 2.24 * (0.25 / 200) ** 0.5, abs=0.015)
    assert of([halves, ~halves], [right, wrong]) == [low, high]  # the second intervention is never admissible
    doubtful = torch.arange(100) < 99  # 99 % are right; in many replicates it is less
    assert of([halves], [doubtful])[0] == 0 and of([halves], [doubtful])[1] == pytest.approx(high, abs=0.015)
    assert of([halves], [wrong]) == [0, 0]


def test_texts_are_long_ones_drawn_as_random_sample_draws():
    texts = [f"{i} " + "x" * (48 + i % 3) for i in range(40)]

    def data():
        return iter([{"text": None}, *({"text": text} for text in texts)])

    long = [text for text in texts if len(text) > 50]
    assert 10 < len(long) < 40
    assert sample_long_texts(data, random.Random(42), None) == long
    assert sample_long_texts(data, random.Random(42), 6) == random.Random(42).sample(long, 6)
    assert sorted(sample_long_texts(data, random.Random(42), 1024)) == sorted(long)


def test_rows_are_drawn_from_one_generator_in_turn_or_from_their_own(ctx, metric):
    asked = metric.load(ctx)
    data = readers(metric, ctx)
    one = torch.Generator().manual_seed(42)
    drawn = replace(metric, rng="saebench").corpora(data, asked)
    for name in ("forget", "retain"):
        rows = pack_texts(
            sample_long_texts(data[name], random.Random(42), 1024 if name == "forget" else None), asked.tokenizer, 8,
            bos_id=2,
        )  # fmt: skip
        assert torch.equal(drawn[name], rows[torch.randperm(len(rows), generator=one)])
    paired = metric.corpora(data, asked)
    assert torch.equal(paired["retain"], metric.corpora(data, asked)["retain"])
    assert not torch.equal(paired["retain"], drawn["retain"])
    assert len(replace(metric, rows=3).corpora(data, asked)["forget"]) == 3


def test_shares_are_of_the_counted_tokens(ctx, metric):
    asked = metric.load(ctx)
    rows = torch.tensor([[2, VALUE, 300, VALUE], [2, 1, NUMBER, 300]])
    packed = PackedRows(rows, asked.context_format.counted(rows))
    ((share, tokens, outliers),) = firing_frequencies(
        asked.model, packed, [EvalTarget(sae_that_fires_on(VALUE, NUMBER), Hook(0))], silent
    )
    assert (tokens, outliers) == (5, 0)
    assert share[3] == pytest.approx(2 / 5) and share[7] == pytest.approx(1 / 5) and share[0] == 0


def test_data_are_the_same_from_either_kind_of_file(data, ctx, metric, tmp_path):
    import pyarrow.parquet

    other = shutil.copytree(data, tmp_path / "data")
    for file in (other / "bio-forget-corpus.jsonl", other / "cais/wmdp/wmdp-bio/test.jsonl"):
        table = pyarrow.Table.from_pylist([json.loads(line) for line in file.read_text().splitlines()])
        pyarrow.parquet.write_table(table, file.with_suffix(".parquet"))
        file.unlink()
    assert metric.settings(replace(ctx, data=other)) == metric.settings(ctx)
