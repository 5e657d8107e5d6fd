"""Sparse probing: its accuracies, their independence of other SAEs, and what is refused."""

import json
import random
from dataclasses import replace

import pytest
import torch

from sae.cache.hooks import Hook
from sae.common.errors import UsageError
from sae.evaluate.context import EvalContext
from sae.evaluate.latents import inspection
from sae.evaluate.metrics import sparse_probing as module
from sae.evaluate.metrics.base import EvalTarget, MetricResult
from sae.evaluate.metrics.probes import ProbeFeatures, make_generator
from sae.evaluate.metrics.registry import metrics_of_suite
from sae.evaluate.metrics.sparse_probing import SparseProbing, SparseProbingStdlib
from sae.evaluate.reference_saes import Identity, Zero
from sae.evaluate.results import read_result, write_result
from sae.train.activation_functions import ReLU
from sae.train.sae import SAE

AG, SENTIMENT = "fancyzhx/ag_news", "canrager/amazon_reviews_mcauley_1and5_sentiment"
WORDS = ("the quick brown fox", "jumps over a lazy", "dog while seven zebras", "quietly read yellow books")


def silent(done, total, note=""):
    pass


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(module, "EPOCHS", 6)  # test_saebench_sparse_probing.py uses all epochs


@pytest.fixture
def ctx(ctx, home) -> EvalContext:
    """A context with two datasets in its data folder, of four and two classes. The classes differ in their words."""
    rng = random.Random(0)
    for name, labels, column in ((AG, range(4), "label"), (SENTIMENT.removesuffix("_sentiment"), (1.0, 5.0), "rating")):
        for split in ("train", "test"):
            rows = [
                {"text": " ".join(rng.choices(WORDS[i].split(), k=6)), column: label}
                for i, label in enumerate(labels)
                for _ in range(20)
            ]
            path = home / "data" / name / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return replace(ctx, data=home / "data")


METRIC = SparseProbing(datasets=(AG, SENTIMENT), k=(1, 3), train_set_size=24, test_set_size=16, context=32)


def make_sae(seed: int = 0, latents: int = 40) -> SAE:
    torch.manual_seed(seed)
    sae = SAE(32, latents, [ReLU()]).requires_grad_(False)
    sae.W_dec /= sae.W_dec.norm(dim=1, keepdim=True)
    return sae


def measured(ctx: EvalContext, *coders, metric: SparseProbing = METRIC) -> list:
    return metric.measure(ctx, [EvalTarget(coder, Hook(1)) for coder in coders], silent)


def test_the_input_of_a_block_is_the_output_of_the_one_before_and_a_site_has_its_own_width(ctx):
    torch.manual_seed(0)
    wide = SAE(48, 40, [ReLU()]).requires_grad_(False)
    targets = [(make_sae(), Hook(0)), (make_sae(), Hook(1, "resid_pre")), (wide, Hook(1, "mlp_hidden"))]
    output, same, inside = METRIC.measure(ctx, [EvalTarget(*target) for target in targets], silent)
    assert output == same
    assert inside.metrics["llm"] != output.metrics["llm"]  # the model's probes read the activations at that site


def test_the_fields_are_saebench_s(ctx):
    (found,) = measured(ctx, make_sae())
    assert list(found.metrics) == ["llm", "sae"]
    for side, numbers in found.metrics.items():
        tops = [f"{side}_top_{k}_test_accuracy" for k in (1, 2, 3, 5, 10, 20, 50, 100)]
        assert list(numbers) == [f"{side}_test_accuracy", *tops]
        assert [name for name, value in numbers.items() if value is None] == [tops[1], *tops[3:]]
        assert list(found.intervals[side]) == [f"{side}_test_accuracy", tops[0], tops[2]]
        for name, (low, high) in found.intervals[side].items():
            assert low < numbers[name] < high or numbers[name] == 1
    assert [detail["dataset_name"] for detail in found.details] == [f"{AG}_results", f"{SENTIMENT}_results"]
    tops = [f"{side}_top_{k}_test_accuracy" for side in ("llm", "sae") for k in (1, 3)]
    latents = {"sae_top_1_latents": 1, "sae_top_3_latents": 3}
    for own in found.extra.values():
        assert own.keys() == {"llm_test_accuracy", "sae_test_accuracy", *tops, *latents}
        for name, k in latents.items():
            assert own[name].keys() == own["sae_test_accuracy"].keys()
            for chosen in own[name].values():
                assert len(chosen) == k and all(0 <= int(latent) < 40 for latent in chosen)
    by_class = found.extra[f"{AG}_results"]["sae_top_3_test_accuracy"]
    assert list(by_class) == ["0", "1", "2", "3"]
    assert found.details[0]["sae_top_3_test_accuracy"] == pytest.approx(sum(by_class.values()) / 4)
    means = [detail["sae_top_3_test_accuracy"] for detail in found.details]
    assert found.metrics["sae"]["sae_top_3_test_accuracy"] == pytest.approx(sum(means) / 2)
    assert found.n == {"datasets": 2, "tasks": 6, "test_texts_per_task": 16}


def test_the_latents_named_are_those_that_were_planted():
    """Latent 4 is 3 in class 0, latent 7 is 5 in classes 0 and 2, and latents 9 and 11 are 4 and 3 in class 2."""
    planted = {"0": {4: 3.0, 7: 5.0}, "1": {}, "2": {7: 5.0, 9: 4.0, 11: 3.0}}
    x_ND = torch.zeros(60, 20)
    for number, values in enumerate(planted.values()):
        for latent, value in values.items():
            x_ND[20 * number : 20 * number + 20, latent] = value
    features = dict.fromkeys(("train", "test"), ProbeFeatures(x_ND, dict.fromkeys(planted, 20)))
    scores = {AG: module.probe_dataset(features, (1, 3, 6), lambda *names: make_generator("paired", *names))}
    found = module.build_result(scores, scores, (1, 3, 6), 40, False)
    named = found.extra[f"{AG}_results"]  # the negatives of a class are half from each other class
    assert named["sae_top_1_latents"] == {"0": {"4": 3.0}, "1": {"7": -5.0}, "2": {"9": 4.0}}
    assert list(named["sae_top_3_latents"]["0"].items()) == [("4", 3.0), ("7", 2.5), ("9", -2.0)]
    assert list(named["sae_top_3_latents"]["2"].items()) == [("9", 4.0), ("11", 3.0), ("7", 2.5)]
    assert "sae_top_6_test_accuracy" in named and "sae_top_6_latents" not in named
    assert inspection.latent_labels({"sparse_probing": found}, 20) == {
        4: ["World (class of fancyzhx/ag_news, accuracy 1.00)"],
        9: ["Business (class of fancyzhx/ag_news, accuracy 1.00)"],
    }


def test_a_result_of_before_latents_were_named_is_kept(ctx, home):
    (found,) = measured(ctx, make_sae())
    write_result(home / "new", METRIC, METRIC.settings(ctx), found, {})
    assert read_result(home / "new", METRIC, METRIC.settings(ctx)) == found
    bare = {name: {k: v for k, v in own.items() if "latents" not in k} for name, own in found.extra.items()}
    old = replace(found, extra=bare)
    write_result(home / "old", METRIC, METRIC.settings(ctx) | {"definition": 1}, old, {})
    assert read_result(home / "old", METRIC, METRIC.settings(ctx)) == old
    assert inspection.latent_labels({METRIC.name: old}, 40) == {}


def test_the_identity_is_the_model_and_zero_is_chance(ctx):
    identity, zero = measured(ctx, Identity(), Zero())
    llm = [value for value in identity.metrics["llm"].values() if value is not None]
    assert llm == [value for value in identity.metrics["sae"].values() if value is not None]
    assert llm[0] > 0.75  # no word occurs in two classes
    assert {value for value in zero.metrics["sae"].values() if value is not None} == {0.5}
    assert zero.metrics["llm"] == identity.metrics["llm"]
    assert identity.flags == []
    assert zero.flags == [
        f"k={k}: in 6 of 6 tasks, the selected latents never vary, so the accuracy is exactly 0.5." for k in (1, 3)
    ]


@pytest.mark.parametrize("rng", ["paired", "saebench"])
def test_no_sae_changes_another_s_numbers(ctx, rng):
    metric = replace(METRIC, rng=rng)
    together = measured(ctx, make_sae(0), make_sae(1), metric=metric)
    assert [measured(ctx, make_sae(seed), metric=metric)[0] for seed in (0, 1)] == together
    assert together[0] != together[1]
    assert measured(ctx, make_sae(1), make_sae(0), metric=metric) == together[::-1]


def test_the_side_of_the_model_is_measured_once(ctx, monkeypatch):
    sides = []
    real = module.probe_dataset
    monkeypatch.setattr(
        module, "probe_dataset", lambda f, *rest: sides.append(f["train"].x_ND.shape[1]) or real(f, *rest)
    )
    first = measured(ctx, make_sae())
    assert sides == [32, 40, 32, 40]
    assert measured(ctx, make_sae()) == first and sides == [32, 40, 32, 40, 40, 40]
    measured(ctx, make_sae(), metric=replace(METRIC, k=(2,)))
    assert sides[6:] == [32, 40, 32, 40]


def test_the_length_of_decoder_rows_changes_nothing(ctx):
    sae, stretched = make_sae(), make_sae()
    factor = torch.linspace(0.01, 4, 40)
    stretched.W_dec /= factor[:, None]
    stretched.W_enc *= factor
    stretched.b_enc *= factor
    plain, folded = measured(ctx, sae, stretched)
    for name, value in plain.metrics["sae"].items():
        assert folded.metrics["sae"][name] == pytest.approx(value, abs=0.02)
    assert folded.flags == ["Decoder rows do not have unit length, so their norms were folded into the latents."]


def test_what_cannot_be_probed_has_a_sentence(ctx, home):
    narrow, wide = measured(ctx, make_sae(0, 2), make_sae())
    assert str(narrow).startswith("This SAE has 2 latents, too few for a probe on 3.") and isinstance(
        wide, MetricResult
    )
    with pytest.raises(UsageError, match="a probe needs at least one latent"):
        measured(ctx, make_sae(), metric=replace(METRIC, k=(0,)))
    with pytest.raises(UsageError, match="rng=fast is unknown"):
        measured(ctx, make_sae(), metric=replace(METRIC, rng="fast"))
    lines = [json.dumps({"text": " " * (i > 70), "label": i % 4}) + "\n" for i in range(80)]
    (home / "data" / AG / "train.jsonl").write_text("".join(lines))
    with pytest.raises(UsageError, match=r"ag_news: the text '.*' contains only special tokens"):
        measured(ctx, make_sae())


def test_k_is_that_of_the_mode_unless_asked(ctx):
    (metric,) = metrics_of_suite("sparse_probing")
    assert metric.ks("0.6.0") == (1, 2, 5) and metric.ks("2024-12") == (1, 2, 5, 10, 20, 50)
    (metric,) = metrics_of_suite("sparse_probing_stdlib", ["sparse_probing_stdlib.k=3,4"])
    assert isinstance(metric, SparseProbingStdlib) and metric.ks("0.6.0") == (3, 4)
    with pytest.raises(UsageError, match="'x' is not a valid value for k"):
        metrics_of_suite("sparse_probing", ["sparse_probing.k=x"])


def test_a_result_belongs_to_its_texts(ctx, home):
    before = METRIC.settings(ctx)
    assert before["k"] == (1, 3) and before["texts"][AG].startswith("sha256")
    path = home / "data" / AG / "test.jsonl"
    path.write_text(path.read_text() + path.read_text())
    assert METRIC.settings(ctx) != before
