"""SCR and TPP match SAEBench 0.6.0 on its own activations and probes."""

import json
from dataclasses import replace

import pytest
import torch

from sae.cache.context_format import ContextFormat
from sae.cache.contexts import Contexts
from sae.cache.hooks import Hook
from sae.evaluate.artifacts import ArtifactCache
from sae.evaluate.context import EvalContext
from sae.evaluate.datasets import labeled
from sae.evaluate.metrics import ablation
from sae.evaluate.metrics.base import EvalTarget
from sae.evaluate.metrics.batched_probes import LinearProbes
from sae.evaluate.metrics.pooled_activations import TextRows
from sae.evaluate.metrics.probe_readout import strongest_latents
from sae.evaluate.metrics.probes import LabeledRows
from sae.evaluate.metrics.scr import ATTRIBUTE, CLASS, Scr, scr_scores
from sae.evaluate.metrics.tpp import Tpp

KINDS = ("relu", "topk", "jumprelu")
SCR_KEYS = ("male / female", "professor / nurse", "male_professor / female_nurse")  # of our three probes
BIASED_ON = {
    CLASS: f"{SCR_KEYS[2]} probe on {SCR_KEYS[1]} data",
    ATTRIBUTE: f"{SCR_KEYS[2]} probe on {SCR_KEYS[0]} data",
}
BIOS, REVIEWS = (f"{labeled.BIOS}_class_set1", labeled.REVIEWS)
TASKS = {
    "scr": {BIOS: f"{BIOS}/professor/nurse", REVIEWS: f"{REVIEWS}/Books/CDs_and_Vinyl"},
    "tpp": {BIOS: BIOS, REVIEWS: REVIEWS},
}
SHORT = {labeled.BIOS: "bios", labeled.REVIEWS: "amazon"}


@pytest.fixture
def ctx(saebench, tokenizer, tmp_path, monkeypatch) -> EvalContext:
    """A context with the tables as files, one pair of classes per table, and SAEBench's activations of the texts."""
    found = {}  # text -> its rows
    for name, splits in saebench.json("problem/tables").items():
        for split, columns in splits.items():
            file = tmp_path / name / f"{split}.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
            file.write_text("\n".join(map(json.dumps, rows)) + "\n")
            ids_NS, x_NSD = saebench.texts(f"{SHORT[name]}.{split}")
            for row, ids_S, x_SD in zip(rows, ids_NS, x_NSD, strict=True):
                text = row["hard_text" if "hard_text" in row else "text"]
                found[text] = x_SD[~torch.isin(ids_S, torch.tensor([0, 1, 2]))]
    for name, pair in ((BIOS, (21, 13)), (REVIEWS, (24, 26))):
        monkeypatch.setitem(labeled.DATASETS, name, replace(labeled.DATASETS[name], pairs=(pair,)))

    def read_labeled(ctx, hooks, name, classes, progress, context):
        parts = [found[text] for split in classes.values() for own in split.values() for text in own]
        counts = {split: {label: len(own) for label, own in classes[split].items()} for split in classes}
        rows = TextRows(torch.cat(parts), torch.tensor([len(part) for part in parts]))
        return {hook: LabeledRows(rows, counts) for hook in hooks}

    monkeypatch.setattr(ablation, "read_labeled_rows", read_labeled)
    nothing = Contexts(*(torch.zeros(0).numpy() for _ in range(4)))
    return EvalContext(
        lambda: saebench.model, tokenizer, nothing, ContextFormat(2, (0, 1, 2)), "0.6.0", {}, {},
        ArtifactCache(tmp_path / "shelf"), tmp_path,
    )  # fmt: skip


def settings(saebench, metric: str) -> dict:
    asked = saebench.json(f"{metric}/results")["relu"]["eval_config"]
    return {
        "thresholds": tuple(asked["n_values"]), "train_set_size": asked["train_set_size"],
        "test_set_size": asked["test_set_size"], "context": asked["context_length"], "rng": "saebench",
    }  # fmt: skip


def give_probes(saebench, monkeypatch, metric: str) -> None:
    """Replace our training of probes: for each dataset in turn, return SAEBench's probes."""
    arrays, chosen = saebench.arrays(metric), {}
    for dataset, task in TASKS[metric].items():
        keys = SCR_KEYS if metric == "scr" else map(str, labeled.DATASETS[dataset].classes)
        weights, biases = zip(
            *((arrays[f"{task}/probe/{key}/weight"], arrays[f"{task}/probe/{key}/bias"]) for key in keys), strict=True
        )
        chosen[dataset] = LinearProbes(torch.stack(weights), torch.cat(biases))
    queue = iter(chosen.values())
    monkeypatch.setattr(ablation, "train_probes", lambda *_: next(queue))


def record_calls(monkeypatch, owner: type, name: str) -> list:
    """A list to which each call of the method appends its return value."""
    calls, method = [], getattr(owner, name)

    def wrapped(*arguments, **more):
        calls.append(method(*arguments, **more))
        return calls[-1]

    monkeypatch.setattr(owner, name, wrapped)
    return calls


def agree(ours: dict, reference: dict) -> None:
    assert ours == pytest.approx({name: value for name, value in reference.items() if value is not None}, abs=1e-7)


def selected(step, effect_PF) -> bool:
    """Whether the n latents with the largest effects equal SAEBench's, for each probe and every n."""
    return all(
        sorted(strongest_latents(effect_F, int(n)).tolist()) == latents
        for own, effect_F in zip(step["selected"].values(), effect_PF, strict=True)
        for n, latents in own.items()
    )


def scores_beside(headline: str, reference: dict, ours: dict) -> list[tuple]:
    """Pairs of SAEBench's score and ours, for each score that SAEBench has. The headline comes first."""
    names = sorted((n for n, value in reference.items() if value is not None), key=lambda name: name != headline)
    return [(reference[name], ours[name]) for name in names]


@pytest.mark.parametrize("kind", KINDS)
def test_scr(saebench, ctx, monkeypatch, record_comparison, kind):
    give_probes(saebench, monkeypatch, "scr")
    effects = record_calls(monkeypatch, Scr, "effects")
    reference = saebench.json("scr/results")[kind]
    metric = Scr((BIOS, REVIEWS), **settings(saebench, "scr"))
    (found,) = metric.measure(ctx, [EvalTarget(saebench.saes[kind], Hook(0))], lambda *_: None)
    scores = reference["eval_result_metrics"]["scr_metrics"]
    headline = "scr_metric_threshold_20"
    chosen = [
        selected({"selected": {key: reference["steps"][task]["selected"][key] for key in SCR_KEYS}}, effect_PF)
        for task, effect_PF in zip(TASKS["scr"].values(), effects, strict=True)
    ]
    pairs = scores_beside(headline, scores, found.metrics["scr_metrics"])
    record_comparison("SCR", f"{kind}: {headline}", pairs, {"latents chosen": all(chosen)})
    agree(found.metrics["scr_metrics"], scores)
    assert all(chosen)
    assert [detail["dataset_name"] for detail in found.details] == [
        d["dataset_name"] for d in reference["eval_result_details"]
    ]
    for ours, detail in zip(found.details, reference["eval_result_details"], strict=True):
        agree(
            {k: v for k, v in ours.items() if k != "dataset_name"},
            {k: v for k, v in detail.items() if k != "dataset_name"},
        )
    for task, effect_PF, kept in zip(TASKS["scr"].values(), effects, found.extra.values(), strict=True):
        clean = saebench.json("scr/results")["clean_accuracies"][task]
        assert kept["class"] == {"own_probe": clean[SCR_KEYS[1]], "biased_probe": clean[BIASED_ON[CLASS]]}
        assert kept["attribute"] == {"own_probe": clean[SCR_KEYS[0]], "biased_probe": clean[BIASED_ON[ATTRIBUTE]]}
        for key, effect_F in zip(SCR_KEYS, effect_PF, strict=True):
            torch.testing.assert_close(
                effect_F, saebench.arrays("scr")[f"{kind}/{task}/effects/{key}"], rtol=1e-4, atol=1e-6
            )


@pytest.mark.parametrize("kind", KINDS)
def test_tpp(saebench, ctx, monkeypatch, record_comparison, kind):
    """The clean accuracies are taken from SAEBench, which draws their texts while it trains its probes."""
    give_probes(saebench, monkeypatch, "tpp")
    effects, accuracies = (
        record_calls(monkeypatch, Tpp, "effects"),
        record_calls(monkeypatch, Tpp, "ablated_accuracies"),
    )
    reference = saebench.json("tpp/results")[kind]
    clean = saebench.json("tpp/results")["clean_accuracies"]

    def clean_of(metric, problem, *_):
        by_class = clean[problem.name.removesuffix("_tpp_results")]
        return [torch.tensor([accuracy], dtype=torch.float64) for accuracy in by_class.values()]

    monkeypatch.setattr(Tpp, "clean_accuracies", clean_of)
    metric = Tpp((BIOS, REVIEWS), **settings(saebench, "tpp"))
    (found,) = metric.measure(ctx, [EvalTarget(saebench.saes[kind], Hook(0))], lambda *_: None)
    calls = {len(effects): accuracies, len(effects) * 2: accuracies[1::2]}[len(accuracies)]  # odd calls have the leak
    steps = [reference["steps"][dataset] for dataset in TASKS["tpp"]]
    scores = reference["eval_result_metrics"]["tpp_metrics"]
    headline = "tpp_threshold_20_total_metric"
    chosen = [selected(step, effect_PF) for step, effect_PF in zip(steps, effects, strict=True)]
    pairs = scores_beside(headline, scores, found.metrics["tpp_metrics"])
    record_comparison("TPP", f"{kind}: {headline}", pairs, {"latents chosen": all(chosen)})
    assert all(chosen)
    for dataset, step, ablated, effect_PF in zip(TASKS["tpp"], steps, calls, effects, strict=True):
        for own, (by_n, effect_F) in zip(step["accuracies"], zip(ablated, effect_PF, strict=True), strict=True):
            expected_F = saebench.arrays("tpp")[f"{kind}/{dataset}/effects/{own}"]
            torch.testing.assert_close(effect_F, expected_F, rtol=1e-4, atol=1e-6)
            for n, after in by_n.items():
                assert [float(a_R[0]) for a_R in after] == list(step["accuracies"][own][str(n)].values())
    agree(found.metrics["tpp_metrics"], scores)
    for ours, detail in zip(found.details, reference["eval_result_details"], strict=True):
        assert ours.pop("dataset_name") == detail["dataset_name"]
        agree(ours, {k: v for k, v in detail.items() if k != "dataset_name"})
    for problem, own in zip(found.extra.values(), reference["eval_result_unstructured"].values(), strict=True):
        for label, scores in own.items():
            agree({k: v for k, v in problem[label].items() if k != "clean_accuracy"}, scores)


def test_scores_of_made_up_accuracies(saebench):
    for case in saebench.json("scr/results")["edges"].values():

        def one(accuracy):
            return torch.tensor([accuracy], dtype=torch.float64)

        biased = {target: one(case["clean"][name]) for target, name in BIASED_ON.items()}
        clean = {target: one(case["clean"][SCR_KEYS[target]]) for target in BIASED_ON}
        ablated = {
            target: {int(n): one(after[name]) for n, after in case["ablated"][SCR_KEYS[other]].items()}
            for (target, name), other in zip(BIASED_ON.items(), (ATTRIBUTE, CLASS), strict=True)
        }
        found = {name: float(score_R[0]) for name, score_R in scr_scores(biased, clean, ablated, "0.6.0").items()}
        agree(found, case["scores"])


def test_the_latents_that_are_selected(saebench):
    for case in saebench.json("scr/results")["selection"]:
        assert sorted(strongest_latents(torch.tensor(case["effects"]), case["n"]).tolist()) == case["selected"]
