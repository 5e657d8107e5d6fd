"""RAVEL matches SAEBench 0.6.0 in judgements, known facts, pairs, masks, answers and scores."""

from pathlib import Path

import numpy as np
import pytest
import torch

from sae.cache.context_format import ContextFormat
from sae.cache.contexts import Contexts
from sae.cache.hooks import Hook
from sae.evaluate.artifacts import ArtifactCache
from sae.evaluate.context import EvalContext
from sae.evaluate.datasets.ravel import RAVEL, load_facts
from sae.evaluate.metrics import ravel
from sae.evaluate.metrics.base import EvalTarget
from sae.evaluate.metrics.ravel import Ravel
from sae.evaluate.metrics.ravel_answers import is_right
from sae.evaluate.metrics.ravel_masks import Mask
from sae.evaluate.metrics.ravel_prompts import ask, draw_pairs, known_prompts, make_prompts, whole_batches
from sae.evaluate.reference_saes import Identity
from sae.harvest.model import find_model, load_model, load_tokenizer
from sae.train.sae import load_sae

pytestmark = pytest.mark.usefixtures("one_thread")

PROBLEM = Path(__file__).parents[1] / "fixtures" / "saebench" / "ravel_problem"
KINDS = ("relu", "topk", "jumprelu", "identity")
TYPES = ("town", "sage")


def silent(done, total, note=""):
    pass


@pytest.fixture(scope="module")
def metric(saebench) -> Ravel:
    theirs = dict(saebench.json("ravel/results")["settings"])
    theirs.pop("llm_dtype")
    attributes = [f"{t}.{a}" for t, of in theirs.pop("entity_attribute_selection").items() for a in of]
    return Ravel(tuple(attributes), batch_size=theirs.pop("llm_batch_size"), min_known_prompts=8, **theirs)


@pytest.fixture(scope="module")
def ctx(tmp_path_factory) -> EvalContext:
    source, config = find_model(str(PROBLEM))
    model = load_model(source, config, dtype="float32", device="cpu")
    nothing = Contexts(*(np.zeros(0) for _ in range(4)))
    artifacts, form = ArtifactCache(tmp_path_factory.mktemp("shelf")), ContextFormat(2, (0, 1, 2))
    return EvalContext(
        lambda: model, load_tokenizer(source), nothing, form, "0.6.0", source.identity(), {}, artifacts, PROBLEM
    )


@pytest.fixture(scope="module")
def measured(ctx, metric) -> dict[str, tuple]:
    """The result and the masks of each SAE. There is one mask per attribute."""
    masks: dict[str, list[Mask]] = {kind: [] for kind in KINDS}
    saes = {kind: Identity() if kind == "identity" else load_sae(PROBLEM / "saes" / kind) for kind in KINDS}
    describe = ravel.describe_mask

    def keep(mask: Mask):
        masks[next(kind for kind, sae in saes.items() if sae is mask.target.sae)].append(mask)
        return describe(mask)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ravel, "describe_mask", keep)
        outcomes = metric.measure(ctx, [EvalTarget(sae, Hook(0)) for sae in saes.values()], silent)
    return {kind: (outcome, masks[kind]) for kind, outcome in zip(KINDS, outcomes, strict=True)}


def test_judgements(saebench, record_comparison):
    """Judgements are equal for all combinations of some texts, values and answers."""
    of, expected = saebench.json("ravel/results")["judged"], saebench.arrays("ravel")["judged"]
    made = [is_right(t, v, a) for t in of["texts"] for v in of["values"] for a in of["answers"]]
    record_comparison("ravel", "judgements of answers", [], {"all": made == expected.tolist()})
    assert made == expected.tolist()
    assert 50 < sum(made) < len(made) - 50


@pytest.mark.parametrize("entity_type", TYPES)
def test_what_the_model_knows(saebench, record_comparison, ctx, metric, entity_type):
    arrays = saebench.arrays("ravel")
    attributes = metric.by_type[entity_type]
    prompts = make_prompts(ctx, load_facts(RAVEL, entity_type, attributes, PROBLEM), attributes)
    answer_NK = ask(ctx, prompts, metric.n_generated_tokens, entity_type, silent)
    every = known_prompts(prompts, answer_NK, ctx.tokenizer, 10**6)
    known = known_prompts(prompts, answer_NK, ctx.tokenizer, metric.top_n_entities)
    kept = {(prompt.text, prompt.attribute): i for i, prompt in enumerate(every)}
    same = {
        "first tokens": answer_NK[:, 0].tolist() == arrays[f"{entity_type}.first"].tolist(),
        "positions": [prompt.position for prompt in prompts] == arrays[f"{entity_type}.position"].tolist(),
        "known": len(every) == int(arrays[f"{entity_type}.right"].sum()),
        "kept": [kept[p.text, p.attribute] for p in known] == arrays[f"{entity_type}.kept"].tolist(),
    }
    record_comparison("ravel", f"known facts about a {entity_type}", [], same)
    assert all(same.values()) and len(known) < len(every) < len(prompts)


def test_pairs(saebench, record_comparison, ctx, metric):
    import random

    arrays, rng, same = saebench.arrays("ravel"), random.Random(metric.random_seed), {}
    for entity_type, attributes in metric.by_type.items():
        facts = metric.known_facts(ctx, entity_type, silent)
        for attribute in attributes:
            split = draw_pairs(facts.prompts, attributes, attribute, metric.num_pairs_per_attribute, 0.7, rng)
            for name, pairs in zip(("train", "test"), split, strict=True):
                ours = [p for batch in whole_batches(pairs, metric.batch_size) for p in batch]
                tokens = [[facts.prompts[pair.base].first_token, pair.target] for pair in ours]
                same[f"{entity_type}.{attribute}.{name}"] = (
                    tokens == arrays[f"{entity_type}.{attribute}.{name}"].tolist()
                )
    record_comparison("ravel", "pairs, in order", [], {"all": all(same.values())})
    assert all(same.values()) and len(same) == 10


@pytest.mark.parametrize("kind", KINDS)
def test_masks_answers_and_scores(saebench, record_comparison, measured, metric, kind):
    arrays, expected = saebench.arrays("ravel"), saebench.json("ravel/results")["scores"][kind]
    result, masks = measured[kind]
    for name, mask, entry in zip(metric.attributes, masks, result.details, strict=True):
        entity_type, _, attribute = name.partition(".")
        theirs_F = arrays[f"{kind}.{name}.mask"]
        of = expected["eval_result_unstructured"][f"{entity_type}_results"][f"{entity_type}_{attribute}"]
        same = torch.equal(mask.theta_F > 0, theirs_F > 0)
        pairs = [(of[score], entry[score]) for score in ("disentangle_score", "cause_score", "isolation_score")]
        record_comparison("ravel", f"{kind}: {name}", [*pairs, (theirs_F, mask.theta_F.detach())], {"latents": same})
        torch.testing.assert_close(mask.theta_F.detach(), theirs_F, rtol=0, atol=1e-4)
        assert same and 0 < int((theirs_F > 0).sum()) < len(theirs_F)
        for theirs, ours in pairs:
            assert ours == pytest.approx(theirs, abs=1e-4)
        right = arrays[f"{kind}.{name}.right"]
        assert len(right) == entry["cause_pairs"] + entry["isolation_pairs"]
    theirs = expected["eval_result_metrics"]["ravel"]
    record_comparison(
        "ravel", f"{kind}: scores", [(theirs[name], value) for name, value in result.metrics["ravel"].items()]
    )
    assert (
        result.metrics["ravel"] == pytest.approx(theirs, abs=1e-4) and theirs.keys() == result.metrics["ravel"].keys()
    )


def test_the_problem_tells_saes_apart(saebench):
    """If all scores were 0, 1 or the same, the comparison would show little."""
    found = [one["eval_result_metrics"]["ravel"]["disentanglement_score"] for one in
             saebench.json("ravel/results")["scores"].values()]  # fmt: skip
    assert len({round(score, 3) for score in found}) > 2 and all(0.3 < score < 1 for score in found)
