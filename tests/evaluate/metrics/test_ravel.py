"""RAVEL on a Gemma 2 whose weights are written by hand, so that the effect of exchanging a latent is known.

Each of the sixteen things has a color and a shape, which are dimensions of its embedding. In the second block every
token attends to the thing and copies both attributes. The last token, "color" or "shape", decides which one the model
answers with. So each attribute has its own dimensions in the residual stream after the first block, and an SAE with one
latent per dimension can change one attribute without the other.
"""

import itertools
import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM

from sae.cache.context_format import ContextFormat
from sae.cache.contexts import Contexts
from sae.cache.hooks import Hook
from sae.common.errors import SaeError, UnavailableError, UsageError
from sae.evaluate.artifacts import ArtifactCache
from sae.evaluate.context import EvalContext
from sae.evaluate.datasets.ravel import FACTS, RAVEL, file_name, load_facts
from sae.evaluate.metrics import ravel_masks, ravel_prompts
from sae.evaluate.metrics.base import EvalTarget, MetricResult
from sae.evaluate.metrics.ravel import Ravel, RavelFacts
from sae.evaluate.metrics.ravel_masks import Mask, answer_under
from sae.evaluate.metrics.ravel_prompts import draw_pairs, entity_positions, fill
from sae.evaluate.metrics.ravel_scores import AttributeScores, mean_scores, score_intervals
from sae.evaluate.plan import EvaluateConfig
from sae.evaluate.reference_saes import Identity, Zero
from sae.evaluate.run import evaluate
from sae.harvest.mini import WEIGHTS
from sae.harvest.model import find_model, load_model, load_tokenizer
from sae.harvest.plan import HarvestConfig as Harvest
from sae.harvest.plan import plan_harvest
from sae.harvest.run import run_harvest
from sae.train.activation_functions import ReLU
from sae.train.sae import SAE, save_sae

pytestmark = pytest.mark.usefixtures("one_thread")

COLORS, SHAPES = ("red", "blue", "green", "grey"), ("ball", "cube", "cone", "ring")
THINGS = {f"thing{i}": pair for i, pair in enumerate(itertools.product(range(4), range(4)))}
ENTITY, COLOR, SHAPE, CONSTANT, FILLER, COPY = 8, 9, 10, 11, 12, 16  # dimensions; 0 to 7 are colors and shapes
WORDS = ("<pad>", "<eos>", "<bos>", "<unk>", "the", "see", "color", "shape", *THINGS, *COLORS, *SHAPES)
TEMPLATES = {
    "Color": ["the %s color", "see the thing0 the %s color"],
    "Shape": ["the %s shape", "see see the %s shape"],
}
OPTIONS = {
    "attributes": ("thing.Color", "thing.Shape"), "learning_rate": 0.05, "n_generated_tokens": 2,
    "min_known_prompts": 16,
}  # fmt: skip


def silent(done, total, note=""):
    pass


def write_facts(folder: Path, templates: dict, values: dict) -> Path:
    (folder / RAVEL).mkdir(parents=True, exist_ok=True)
    for part, content in (("attribute_to_prompts", templates), ("entity_attributes", values)):
        (folder / RAVEL / file_name("thing", part)).write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> Path:
    """The folder of the model that knows the things."""
    config = Gemma2Config(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1,
        num_key_value_heads=1, head_dim=16, query_pre_attn_scalar=16, pad_token_id=0, eos_token_id=1, bos_token_id=2,
        attn_logit_softcapping=None, final_logit_softcapping=None, tie_word_embeddings=False,
    )  # fmt: skip
    model = Gemma2ForCausalLM(config)
    token = {word: number for number, word in enumerate(WORDS)}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
        embedding[:, CONSTANT] = 1  # all embeddings have the same norm
        embedding[:, FILLER] = 3**0.5
        for thing, (color, shape) in THINGS.items():
            embedding[token[thing], [color, 4 + shape, ENTITY]] = 1
            embedding[token[thing], FILLER] = 0
        for word, own, names, first in (("color", COLOR, COLORS, 0), ("shape", SHAPE, SHAPES, 4)):
            embedding[token[word], [own, FILLER]] = torch.tensor([3**0.5, 0])
            for number, name in enumerate(names):
                head[token[name], [own, COPY + first + number]] = 1
        attention = model.model.layers[1].self_attn
        attention.q_proj.weight[7, CONSTANT], attention.k_proj.weight[7, ENTITY] = 20, 1
        for i in range(8):
            attention.v_proj.weight[i, i] = attention.o_proj.weight[COPY + i, i] = 1
    folder = tmp_path_factory.mktemp("models") / "planted"
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel(token, unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.WhitespaceSplit(), decoders.Sequence([])
    tokenizer.add_special_tokens(["<pad>", "<eos>", "<bos>", "<unk>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {f"{name}_token": f"<{name}>" for name in ("pad", "eos", "bos", "unk")}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **special})
    )
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Facts that the model knows, except for the color of the last thing, which is wrong here."""
    values = {thing: {"Color": COLORS[c], "Shape": SHAPES[s]} for thing, (c, s) in THINGS.items()}
    values["thing15"]["Color"] = "red"
    return write_facts(tmp_path_factory.mktemp("data"), TEMPLATES, values)


@pytest.fixture(scope="module")
def ctx(planted, data, tmp_path_factory) -> EvalContext:
    source, config = find_model(str(planted))
    model = load_model(source, config, dtype="float32", device="cpu")
    nothing = Contexts(*(np.zeros(0) for _ in range(4)))
    identity = {"model": source.name, "revision": source.revision, "attention": "eager", "llm_dtype": "float32"}
    artifacts, form = ArtifactCache(tmp_path_factory.mktemp("shelf")), ContextFormat(2, (0, 1, 2))
    tokenizer = load_tokenizer(source)
    return EvalContext(lambda: model, tokenizer, nothing, form, "0.6.0", identity, {}, artifacts, data)


@pytest.fixture
def metric() -> Ravel:
    return Ravel(**OPTIONS)


def one_by_one() -> SAE:
    """An SAE with one latent per dimension. Latents 0 to 3 are colors, and 4 to 7 are shapes."""
    sae = SAE(32, 32, [ReLU()], pre_bias=False)
    for name in ("W_enc", "W_dec"):
        getattr(sae, name).data.copy_(torch.eye(32))
    return sae.eval().requires_grad_(False)


def whole_things() -> SAE:
    """An SAE with one latent per thing, which decodes to the thing's embedding. No attribute can be exchanged alone."""
    x = torch.zeros(16, 32)
    for number, (color, shape) in enumerate(THINGS.values()):
        x[number, [color, 4 + shape, ENTITY, CONSTANT]] = 1
    sae = SAE(32, 16, [ReLU()], pre_bias=False)
    scale = 32**0.5
    sae.W_enc.data.copy_(
        x.T - 0.5 * (x[0, ENTITY] + x[0, CONSTANT]) * torch.eye(32)[[ENTITY, CONSTANT]].sum(0)[:, None]
    )
    sae.b_enc.data.fill_(-scale)
    sae.W_dec.data.copy_(x)
    return sae.eval().requires_grad_(False)


def scores(outcome) -> dict[str, float]:
    return outcome.metrics["ravel"]


def test_an_sae_with_the_attributes_one_by_one_changes_one_and_keeps_the_other(ctx, metric):
    (found,) = metric.measure(ctx, [EvalTarget(one_by_one(), Hook(0))], silent)
    assert scores(found) == {"disentanglement_score": 1, "cause_score": 1, "isolation_score": 1}
    of_color, of_shape = found.details
    assert of_color["entity_attribute"] == "thing_Color" and of_shape["entity_attribute"] == "thing_Shape"
    assert set(of_color["top_latents"]) <= {0, 1, 2, 3} and set(of_shape["top_latents"]) <= {4, 5, 6, 7}
    assert of_color["latents"] == len(of_color["top_latents"]) >= 3 and of_color["of_latents"] == 32
    assert found.n["questions"] == 64 and found.n["known_questions"] == 62 and found.n["entities"] == 16
    assert found.intervals["ravel"] == {name: [1, 1] for name in scores(found)} and not found.flags


def test_latents_of_whole_entities_cannot_keep_what_they_do_not_change(ctx, metric):
    """Whatever the mask exchanges, one attribute loses what the other gains."""
    sae = whole_things()
    x = ravel_prompts.entity_rows(ctx, ravel_prompts.make_prompts(ctx, load_facts(RAVEL, "thing", ("Color", "Shape"),
        ctx.data), ("Color",)), [Hook(0)], silent)[Hook(0)]  # fmt: skip
    assert ((sae.encode(x) > 0).sum(1) == 1).all()
    (found,) = metric.measure(ctx, [EvalTarget(sae, Hook(0))], silent)
    assert scores(found)["disentanglement_score"] < 0.8
    low, high = found.intervals["ravel"]["disentanglement_score"]
    assert low < scores(found)["disentanglement_score"] < high


@pytest.mark.parametrize(("theta", "cause", "isolation"), [(1, 1, 0), (-1, 0, 1), (0, 0, 1)])
def test_a_mask_over_everything_or_nothing_has_one_score_of_1_and_one_of_0(
    ctx, metric, monkeypatch, theta, cause, isolation
):
    """The source of a pair always differs from the base in the attribute that is asked for."""
    monkeypatch.setattr(Mask, "step", lambda mask, *_: mask.theta_F.data.fill_(theta))
    for sae in (one_by_one(), Identity(), whole_things()):
        (found,) = metric.measure(ctx, [EvalTarget(sae, Hook(0))], silent)
        assert scores(found)["cause_score"] == cause and scores(found)["isolation_score"] == isolation
        assert any("No latent was chosen for thing.Color, thing.Shape" in flag for flag in found.flags) == (theta < 1)


@pytest.mark.slow
def test_an_sae_alone_is_measured_as_in_company_at_any_hook_and_by_any_batch_of_answers(ctx, metric, monkeypatch):
    targets = [EvalTarget(one_by_one(), Hook(0)), EvalTarget(whole_things(), Hook(0)), EvalTarget(Zero(), Hook(0))]
    targets.append(EvalTarget(one_by_one(), Hook(1, "resid_pre")))  # the same activations
    together = metric.measure(ctx, targets, silent)
    monkeypatch.setattr(ravel_masks, "PAIRS_PER_GENERATION", 5)
    for target, found in zip(targets, together, strict=True):
        assert metric.measure(ctx, [target], silent) == [found]
    assert together[3] == together[0]
    assert scores(together[2])["cause_score"] < 0.5  # the zero SAE removes the entity
    assert metric.measure(ctx, targets[:1], silent) != replace(metric, random_seed=7).measure(ctx, targets[:1], silent)


def test_the_model_is_asked_once_and_after_a_kill_goes_on(ctx, metric, monkeypatch, tmp_path):
    ctx, asked, generate = replace(ctx, artifacts=ArtifactCache(tmp_path)), [], ravel_prompts.generate
    monkeypatch.setattr(ravel_prompts, "PROMPTS_PER_BLOCK", 24)

    def note(model, batch, *rest):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(len(batch.ids_NS))
        return generate(model, batch, *rest)

    monkeypatch.setattr(ravel_prompts, "generate", note)
    with pytest.raises(KeyboardInterrupt):
        metric.known_facts(ctx, "thing", silent)
    assert asked == [24, 24]
    asked.clear()
    first = metric.known_facts(ctx, "thing", silent)
    assert asked == [16] and metric.known_facts(ctx, "thing", silent) == first and asked == [16]


def test_outlier_rows_are_left_out_and_saebench_s_number_counts_them(ctx, metric):
    """All embeddings have the same norm, so a limit excludes all rows or none. At the end thing3 is scaled."""
    target = EvalTarget(one_by_one(), Hook(0), norm_limit=100.0)
    (plain,) = metric.measure(ctx, [target], silent)
    (none,) = metric.measure(ctx, [replace(target, norm_limit=1.0)], silent)
    assert "outlier_rows" not in plain.n and isinstance(none, SaeError)
    assert "thing.Color: 0 of 32 questions answered right" in str(none)
    rows = ravel_prompts.entity_rows

    def doubled(*arguments):
        found = rows(*arguments)
        prompts = arguments[1]
        scale = torch.tensor([2.0 if prompt.entity == "thing3" else 1.0 for prompt in prompts])
        return {hook: x_ND * scale[:, None] for hook, x_ND in found.items()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sae.evaluate.metrics.ravel.entity_rows", doubled)
        (found,) = metric.measure_both(ctx, [replace(target, norm_limit=15.0)], silent)
    assert found.n["outlier_rows"] == found.masked.n["outlier_rows"] == 4
    assert found.n["known_questions"] == 62 and found.masked.n["known_questions"] == 58
    assert found.masked.n["entities"] == 15


def test_too_few_known_facts_are_a_refusal_with_numbers(ctx, metric):
    numbers = (
        r"thing\.Color: 30 of 32 questions answered right; thing\.Shape: 32 of 32 .*lower ravel\.min_known_prompts"
    )
    with pytest.raises(SaeError, match=f"too few facts .*each of them 33 questions .*{numbers}"):
        replace(metric, min_known_prompts=33).measure(ctx, [EvalTarget(one_by_one(), Hook(0))], silent)
    with pytest.raises(SaeError, match=r"thing\.Color: 30 of 32 .*thing\.Shape: there is no other attribute to keep"):
        replace(metric, min_known_prompts=31).measure(ctx, [EvalTarget(one_by_one(), Hook(0))], silent)


def test_an_attribute_that_is_not_known_is_left_out_and_said(ctx, metric, planted, tmp_path):
    templates = TEMPLATES | {"Age": ["the %s color"], "Kind": ["the %s shape"]}
    values = {t: {"Color": COLORS[c], "Shape": SHAPES[s], "Age": "old", "Kind": None} for t, (c, s) in THINGS.items()}
    ctx = replace(ctx, data=write_facts(tmp_path, templates, values))
    metric = replace(metric, attributes=("thing.Color", "thing.Age", "thing.Kind", "thing.Shape"))
    (found,) = metric.measure(ctx, [EvalTarget(one_by_one(), Hook(0))], silent)
    assert [entry["entity_attribute"] for entry in found.details] == ["thing_Color", "thing_Shape"]
    assert "thing.Age: 0 of 16 questions answered right; thing.Kind: 0 of 0" in found.flags[0]


def test_an_sae_of_nan_fails_alone(ctx, metric):
    broken = one_by_one()
    broken.W_enc.data.fill_(torch.nan)
    first, second = metric.measure(ctx, [EvalTarget(broken, Hook(0)), EvalTarget(one_by_one(), Hook(0))], silent)
    assert isinstance(first, SaeError) and "NaN or infinite" in str(first)
    assert scores(second)["disentanglement_score"] == 1


def test_evaluate_writes_it_and_without_facts_it_fails_alone(planted, data, home, tmp_path, monkeypatch):
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"see the thing{i} the color shape " * 4}) + "\n" for i in range(16)))
    request = Harvest(
        model=str(planted), dataset=str(text), layers=(0,), tokens=200, context=16, window=512, held_out=0.2,
        device="cpu", out=home / "activations" / "small",
    )  # fmt: skip
    cache = run_harvest(plan_harvest(request))
    origin = {
        "model": cache.identity["model"], "layer": 0, "cache": str(cache.folder), "fingerprint": cache.fingerprint
    }  # fmt: skip
    run = home / "runs" / "one"
    save_sae(one_by_one(), run, origin)
    options = [f"ravel.{name}={','.join(v) if isinstance(v, tuple) else v}" for name, v in OPTIONS.items()]
    request = EvaluateConfig(
        runs=[run], suite="ravel", options=options, data=data, device="cpu", tokens=50, references=False
    )
    (row,) = evaluate(request)
    found = json.loads((run / "evaluations" / "ravel.json").read_text())
    assert found["eval_type_id"] == "ravel" and found["eval_config"]["facts"].startswith("sha256 ")
    assert found["eval_result_metrics"]["ravel"] == {
        "disentanglement_score": 1, "cause_score": 1, "isolation_score": 1,
    }  # fmt: skip
    assert {entry["entity_attribute"] for entry in found["eval_result_details"]} == {"thing_Color", "thing_Shape"}
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (row,) = evaluate(replace(request, suite="core,ravel", options=[], data=None))
    assert "core" in row.results and isinstance(row.errors["ravel"], UnavailableError)
    assert f"{RAVEL}/ravel_city_attribute_to_prompts.json" in str(row.errors["ravel"])


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"attributes": ("thing.Color",)}, UsageError, "has thing.Color. Give two or more different attributes"),
        ({"attributes": ("thing.Color", "thing.Color")}, UsageError, "two or more different attributes"),
        ({"attributes": ("thing", "Color")}, UsageError, "two or more different attributes"),
        (
            {"attributes": ("thing.Color", "thing.Shap")},
            UsageError,
            r"no questions about thing\.Shap; did you mean Shape",
        ),
        ({"attributes": ("place.A", "place.B")}, UnavailableError, r"ravel_place_attribute_to_prompts\.json .* --data"),
        ({"train_test_split": 1.0}, UsageError, "train_test_split=1.0: give a share between 0 and 1"),
        ({"learning_rate": -1.0}, UsageError, "learning_rate=-1.0: give a number above 0"),
        ({"learning_rate": float("nan")}, UsageError, "learning_rate=nan: give a number above 0"),
        ({"min_known_prompts": 0}, UsageError, "min_known_prompts=0: give 1 or more"),
        ({"num_epochs": 0}, UsageError, "ravel.num_epochs=0: give 1 or more"),
        ({"batch_size": 500}, UsageError, "a batch needs 500. Use a smaller ravel.batch_size"),
    ],
)
def test_what_cannot_be_measured_is_a_sentence(ctx, metric, monkeypatch, change, error, sentence):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(error, match=sentence):
        replace(metric, **change).measure(ctx, [EvalTarget(one_by_one(), Hook(0))], silent)


@pytest.mark.parametrize(
    ("templates", "values", "sentence"),
    [
        ([], {}, "expected {attribute"),
        ({"Color": "the %s"}, {}, "expected {attribute"),
        ({"Color": ["the thing"]}, {}, "'the thing' is a template of Color. Expected exactly one %s"),
        ({"Color": ["%s or %s"]}, {}, "Expected exactly one %s"),
        ({"Color": ["%s"]}, {"thing0": "red"}, "expected {entity"),
        ({"Color": ["%s"]}, {"thing0": {"Color": 3}}, "the Color of thing0 is 3. Expected a text"),
    ],
)
def test_facts_of_another_schema_are_a_sentence(tmp_path, templates, values, sentence):
    with pytest.raises(UsageError, match=sentence):
        load_facts(RAVEL, "thing", ("Color",), write_facts(tmp_path, templates, values))


def test_the_facts_of_the_package_are_whole_and_small():
    for entity_type, attributes in RavelFacts().by_type.items():
        facts = load_facts(FACTS, entity_type, attributes, None)
        assert len(facts.values) >= 80 and all(values.keys() == {*attributes} for values in facts.values.values())
        assert facts.templates.keys() == {*attributes}
        # if a question began with the entity, the entity's row would be an attention sink in models without BOS
        assert not any(text.startswith("%s") for texts in facts.templates.values() for text in texts)
        for attribute in attributes:
            assert len({values[attribute] for values in facts.values.values()}) > 4
    folder = Path(load_facts.__code__.co_filename).with_name("facts")
    assert sum(path.stat().st_size for path in folder.iterdir()) < 100_000
    with pytest.raises(UsageError, match="no facts about the entity type towns; .*city, country"):
        load_facts(FACTS, "towns", (), None)


def test_a_small_model_that_knows_no_geography_is_refused(tiny_model, tmp_path):
    source, config = find_model(str(tiny_model))
    model = load_model(source, config, dtype="float32", device="cpu")
    ctx = EvalContext(
        lambda: model, load_tokenizer(source), Contexts(*(np.zeros(0) for _ in range(4))), ContextFormat(2, (0, 1, 2)),
        "0.6.0", source.identity() | {"model": source.name}, {}, ArtifactCache(tmp_path),
    )  # fmt: skip
    metric = RavelFacts(attributes=("city.Country", "city.Continent"), n_generated_tokens=1)
    with pytest.raises(
        SaeError, match=r"too few facts .*city\.Country: 0 of 690 questions answered right; city\.Continent"
    ):
        metric.measure(ctx, [EvalTarget(Identity(), Hook(0))], silent)


@pytest.mark.parametrize(
    ("template", "entity", "last"),
    [
        ("the city of %s is in", "New York", " York"),
        ('[{"city": "%s", "lang": "', "Bergen", None),
        ("100%% of %s speak", "Oslo", None),
        ("%s", "Quito", None),
    ],
)
def test_the_entity_s_last_token_is_the_last_that_begins_in_it(tokenizer, template, entity, last):
    text, end = fill(template, entity)
    assert text == template % entity
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    (position,) = entity_positions(tokenizer, [(text, end)])
    assert tokenizer.decode(ids[: len(ids) + position + 1]).strip().endswith(entity[-1])
    assert position == -1 or entity[-1] not in tokenizer.decode(ids[len(ids) + position + 1 :])[:1]
    after = tokenizer(template.split("%s")[1].replace("%%", "%"), add_special_tokens=False)["input_ids"]
    if not after or ids[-len(after) :] == after:
        assert position == -len(after) - 1  # SAEBench's count


def test_pairs_differ_in_the_attribute_and_each_kind_is_as_frequent(ctx, metric):
    facts = metric.known_facts(ctx, "thing", silent)
    for count in (10, 500):
        train, test = draw_pairs(facts.prompts, facts.attributes, "Color", count, 0.7, random.Random(0))
        pairs = [*train, *test]
        assert len(pairs) == 2 * min(count, 30) and len(train) == int(0.7 * len(pairs))
        kinds = [facts.prompts[pair.base].attribute for pair in pairs]
        assert kinds.count("Color") == kinds.count("Shape") == min(count, 30)
        for pair in pairs:
            base, source = facts.prompts[pair.base], facts.prompts[pair.source]
            wanted = source if base.attribute == "Color" else base
            assert base.attribute == source.attribute and base.value != source.value
            assert (pair.value, pair.target) == (wanted.value, wanted.first_token)


def attribute(name: str, rows: list[tuple[str, bool, bool]], entity_type: str = "thing") -> AttributeScores:
    return AttributeScores(entity_type, name, *map(list, zip(*rows, strict=True)), {"latents": 1})


def test_scores_are_means_over_attributes_then_types_and_entities_are_drawn_with_all_their_pairs():
    first = attribute("A", [("a", True, True), ("b", True, False), ("a", False, True), ("b", False, True)])
    second = attribute("B", [("a", True, True), ("b", True, True), ("a", False, False), ("b", False, False)])
    third = attribute("C", [("c", True, False), ("d", True, False), ("c", False, True), ("d", False, True)], "place")
    found = mean_scores({"thing": [first, second], "place": [third]})
    assert found == {"disentanglement_score": 0.5625, "cause_score": 0.375, "isolation_score": 0.75}
    scored = MetricResult.of({"ravel": found}, [one.detail for one in (first, second, third)])
    for column in Ravel.columns:  # the mean of the values that are paired between SAEs is the score
        unit, values = Ravel.values_by_unit(scored, column)
        assert unit == "attribute" and values.keys() == {"thing_A", "thing_B", "place_C"}
        assert sum(values.values()) / 3 == pytest.approx(found[column.name])
    intervals = score_intervals({"thing": [first, second], "place": [third]}, 0)
    # a bootstrap draw has a twice, b twice, or both: A's cause score is 1, 0 or 1/2, and no other score varies
    assert intervals["cause_score"] == [0.25, 0.5] and intervals["isolation_score"] == [0.75, 0.75]
    alone = score_intervals({"thing": [attribute("A", [("a", True, True), ("a", False, True)])]}, 0)
    assert all(np.isnan(end) for interval in alone.values() for end in interval)


def test_an_answer_under_a_mask_is_given_in_the_first_pass_only(ctx, metric):
    """If the mask exchanges both attributes, the whole answer is the one that the model gives to the source."""
    facts = metric.known_facts(ctx, "thing", silent)
    rows = ravel_prompts.entity_rows(ctx, facts.prompts, [Hook(0)], silent)[Hook(0)]
    mask = Mask(EvalTarget(one_by_one(), Hook(0)), 32, 0.1, "cpu")
    mask.theta_F.data.fill_(1)
    pairs = [ravel_prompts.FactPair(0, source, 0, "") for source in range(len(facts.prompts))]
    same = [pair for pair in pairs if facts.prompts[pair.source].text.startswith("the thing")
            and facts.prompts[pair.source].attribute == facts.prompts[0].attribute]  # fmt: skip
    answers = answer_under(ctx, mask, facts.prompts, rows, same, 3)
    own = ravel_prompts.ask(ctx, facts.prompts, 3, "thing", silent)
    assert answers == ctx.tokenizer.batch_decode(own[[pair.source for pair in same]]) and len(set(answers)) > 3


def test_the_temperature_falls_from_1_to_1e_4_over_the_steps_of_a_mask(ctx, metric, monkeypatch):
    assert ravel_masks.temperatures(5, torch.float32) == pytest.approx([1, 0.1, 0.01, 0.001, 0.0001], rel=1e-5)
    rounded = torch.logspace(0, -4, 5, dtype=torch.bfloat16).tolist()
    assert ravel_masks.temperatures(5, torch.bfloat16) == rounded != ravel_masks.temperatures(5, torch.float32)
    used = []
    step = Mask.step
    monkeypatch.setattr(Mask, "step", lambda self, *args: used.append(args[-1]) or step(self, *args))
    facts = metric.known_facts(ctx, "thing", silent)
    rows = ravel_prompts.entity_rows(ctx, facts.prompts, [Hook(0)], silent)
    pair = ravel_prompts.FactPair(0, 1, 0, "")
    mask = Mask(EvalTarget(one_by_one(), Hook(0)), 32, 0.1, "cpu")
    ravel_masks.train_masks(ctx, [mask], facts.prompts, rows, [[pair], [pair]], 2, "", silent)  # 2 epochs of 2 batches
    assert used == ravel_masks.temperatures(4, torch.float32)


def test_a_cold_mask_is_all_or_nothing_and_a_warm_one_mixes(ctx, metric):
    """theta is 0.01 for every latent. At temperature 1e-4, every latent is exchanged completely; at temperature 1, each
    is exchanged by a share of 0.5025."""
    facts = metric.known_facts(ctx, "thing", silent)
    rows_ND = ravel_prompts.entity_rows(ctx, facts.prompts, [Hook(0)], silent)[Hook(0)]
    train, _ = draw_pairs(facts.prompts, facts.attributes, "Color", 10, 0.7, random.Random(0))
    batch = ravel_masks.PairBatch.of(ctx, facts.prompts, train, [Hook(0)])
    losses = {}
    for temperature in (1e-4, 1.0):
        mask = Mask(EvalTarget(one_by_one(), Hook(0)), 32, 0.1, "cpu")
        mask.theta_F.data.fill_(0.01)
        mask.step(ctx, batch, rows_ND[batch.source_N], temperature)
        losses[temperature] = mask.loss
    for temperature, share in ((1e-4, 1.0), (1.0, 1 / (1 + np.exp(-0.01)))):
        x_NSD = batch.run.activations[Hook(0)].clone()
        at = (torch.arange(len(train)), batch.prompts.entity_N)
        x_NSD[at] = (1 - share) * x_NSD[at].relu() + share * rows_ND[batch.source_N].relu()  # one latent per dimension
        final_NSD = batch.run.run_from(Hook(0), x_NSD)
        logits_NV = ctx.model.unembed(final_NSD[torch.arange(len(train)), batch.prompts.last_N])
        expected = torch.nn.functional.cross_entropy(logits_NV, batch.target_N)
        assert losses[temperature] == pytest.approx(float(expected), rel=1e-4)
    assert abs(losses[1e-4] - losses[1.0]) > 0.01


def test_the_embedded_model_s_tokenizer_has_offsets():
    assert AutoTokenizer.from_pretrained(WEIGHTS)("a b", return_offsets_mapping=True)["offset_mapping"]
