"""Sparse probing matches SAEBench 0.6.0: the texts, draws, latents and accuracies, from the same activations."""

import json

import pytest
import torch

from sae.evaluate.datasets.labeled import DATASETS, Texts, load_texts
from sae.evaluate.metrics import sparse_probing as module
from sae.evaluate.metrics.pooled_activations import TextRows
from sae.evaluate.metrics.probes import LabeledRows, make_generator, pool_unit_norm
from sae.evaluate.metrics.sparse_probing import ProbingScores, build_result, probe_dataset

BIOS, SENTIMENT = "LabHC/bias_in_bios_class_set1", "canrager/amazon_reviews_mcauley_1and5_sentiment"
TABLES = {
    BIOS: ("LabHC/bias_in_bios", "hard_text", "bios"),
    SENTIMENT: ("canrager/amazon_reviews_mcauley_1and5", "text", "amazon"),
}
KS = (1, 2, 5)
TEST_TEXTS = 72  # per data set
ONE_TEXT = 1 / TEST_TEXTS  # the effect of one text on an accuracy


@pytest.fixture
def data(saebench, home):
    """A data folder with the tables."""
    for table, splits in saebench.json("problem/tables").items():
        for split, columns in splits.items():
            rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
            path = home / "data" / table / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return home / "data"


def texts_of(saebench, data, dataset: str) -> Texts:
    config = saebench.json("sparse_probing/results")["relu"]["eval_config"]
    return load_texts(dataset, data, config["probe_train_set_size"], config["probe_test_set_size"])


def rows_of(saebench, dataset: str, texts: Texts) -> LabeledRows:
    table, column, short = TABLES[dataset]
    parts, counts = [], {}
    for split, classes in texts.items():
        of = {text: i for i, text in enumerate(saebench.json("problem/tables")[table][split][column])}
        _, x_NSD = saebench.texts(f"{short}.{split}")
        parts += [x_NSD[of[text]] for own in classes.values() for text in own]
        counts[split] = {label: len(own) for label, own in classes.items()}
    kept = [x_SD[(x_SD != 0).any(1)] for x_SD in parts]
    return LabeledRows(TextRows(torch.cat(kept), torch.tensor([len(x) for x in kept])), counts)


@pytest.mark.parametrize("dataset", TABLES)
def test_the_texts_are_the_same_in_the_same_order(saebench, data, dataset):
    table, column, _ = TABLES[dataset]
    expected = saebench.json("sparse_probing/results")["rows"][dataset]
    found = texts_of(saebench, data, dataset)
    for split, classes in found.items():
        listed = saebench.json("problem/tables")[table][split][column]
        assert list(classes) == [str(label) for label in DATASETS[dataset].classes]
        for label, own in classes.items():
            assert own == [listed[row] for row in expected[split][label]]


@pytest.mark.parametrize("run", ["relu", "topk", "jumprelu", "relu.first"])
def test_draws_latents_probes_and_accuracies_are_the_same(saebench, data, monkeypatch, record_comparison, run):
    labels, chosen, trained = [], [], []

    def record_answers(name, into, what):
        real = getattr(module, name)

        def recording(*given, **options):
            answer = real(*given, **options)
            into.append(what(answer))
            return answer

        monkeypatch.setattr(module, name, recording)

    record_answers("one_vs_rest_task", labels, lambda task: "".join(str(int(x)) for x in task.label))
    record_answers("top_features", chosen, lambda columns: columns.tolist())
    record_answers("train_probe", trained, lambda made: made)
    expected = saebench.json("sparse_probing/results")[run]
    arrays = saebench.arrays("sparse_probing")
    draws = make_generator("saebench")
    scores: dict[str, dict[str, ProbingScores]] = {"llm": {}, "sae": {}}
    pairs, same = [], {"draws": True, "latents": True}
    for dataset in TABLES:
        rows = rows_of(saebench, dataset, texts_of(saebench, data, dataset))
        features = {"llm": rows.rows.mean_ND()} if run.endswith(".first") else {}
        pooled, scaled = pool_unit_norm(saebench.saes[run.removesuffix(".first")], rows.rows, torch.device("cpu"))
        assert not scaled
        for side, x_ND in (features | {"sae": pooled.mean_NF}).items():
            del labels[:], chosen[:], trained[:]
            found = scores[side][dataset] = probe_dataset(rows.split(x_ND), KS, lambda *_: draws)
            reference = expected["probes"][dataset][side]
            flat = [reference[k][label] for k in ("all", *map(str, KS)) for label in found.full]
            draws_of_saebench = [text for each in flat for text in (each["train_labels"], each["test_labels"])]
            latents_of_saebench = [each["latents"] for each in flat if "latents" in each]
            same["draws"] &= labels == draws_of_saebench
            same["latents"] &= chosen == latents_of_saebench
            ours = [*found.full.values(), *(score for top in found.top.values() for score in top.values())]
            pairs += zip([each["accuracy"] for each in flat], ours, strict=True)
            for label, made in zip(found.full, trained, strict=True):
                key = f"{run}/{dataset}/{side}/all/{label}"
                torch.testing.assert_close(made.weight_D, arrays[f"{key}/weight"], rtol=1e-3, atol=1e-4)
                torch.testing.assert_close(made.bias, arrays[f"{key}/bias"], rtol=1e-3, atol=1e-4)
    ours = build_result(scores["llm"] or scores["sae"], scores["sae"], KS, TEST_TEXTS, folded=False)
    name = "sae_top_1_test_accuracy"
    headline = (expected["eval_result_metrics"]["sae"][name], ours.metrics["sae"][name])
    record_comparison("sparse probing", f"{run}: {name}", [headline, *pairs], same)
    assert all(same.values())
    # The fit of a probe stops at a tolerance, so the class of a text at its boundary depends on the processor.
    moved = [abs(mine - theirs) for theirs, mine in pairs if mine != pytest.approx(theirs, abs=1e-7)]
    assert len(moved) <= 2 and max(moved, default=0) <= ONE_TEXT + 1e-7
    within = ONE_TEXT + 1e-7 if moved else 1e-7
    for side in ("llm", "sae") if scores["llm"] else ("sae",):
        for name, value in expected["eval_result_metrics"][side].items():
            assert ours.metrics[side][name] == (None if value is None else pytest.approx(value, abs=within))
    for detail, reference in zip(ours.details, expected["eval_result_details"], strict=True):
        assert detail.keys() == reference.keys() and detail["dataset_name"] == reference["dataset_name"]
        assert detail["sae_top_5_test_accuracy"] == pytest.approx(reference["sae_top_5_test_accuracy"], abs=within)


@pytest.mark.parametrize("kind", ["relu", "topk", "jumprelu"])
def test_pooled_latents_are_the_same(saebench, data, kind):
    rows = rows_of(saebench, BIOS, texts_of(saebench, data, BIOS))
    latents = rows.split(pool_unit_norm(saebench.saes[kind], rows.rows, torch.device("cpu"))[0].mean_NF)["train"].x_ND
    means = rows.split(rows.rows.mean_ND())["train"].x_ND
    each = rows.counts["train"]["0"]
    for start, label in ((0, "0"), (each, "1")):
        arrays = saebench.arrays("sparse_probing")
        torch.testing.assert_close(latents[start : start + 4], arrays[f"{kind}.pooled.{label}"])
        torch.testing.assert_close(means[start : start + 4], arrays[f"llm_mean.{label}"])
