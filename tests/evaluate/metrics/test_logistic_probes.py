"""Probes equal those of sae-probes 0.4.2 on made-up rows, and splits, ranking and folds follow their rules."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, roc_auc_score

from sae.common.errors import UsageError
from sae.evaluate.metrics import logistic_probes as module
from sae.evaluate.metrics.logistic_probes import (
    SHARES,
    choose_strength,
    draw_split,
    fit_probe,
    fold_auc,
    folds_of,
    rank_latents,
    splits_of,
)
from sae.evaluate.metrics.sae_probes import encode_rows, probe_latents

FOLDER = Path(__file__).parents[1] / "fixtures" / "sae_probes"
KS = (1, 5, 16)


class Fixture:
    """The files that sae_probes_reference.py wrote: 340 made-up rows, the SAE max(0, x W + b), sae-probes' scores."""

    def __init__(self) -> None:
        arrays = load_file(FOLDER / "arrays.safetensors")
        self.x, self.W, self.b = (arrays[name].float() for name in ("x", "W", "b"))
        self.label = arrays["label"].numpy().astype(np.int64)
        self.scores = json.loads((FOLDER / "scores.json").read_text())

    def encode(self, x):
        return (x @ self.W + self.b).relu()


@pytest.fixture(scope="module")
def peer() -> Fixture:
    return Fixture()


def of_split(probes: list[dict[str, Any]], split: Any) -> list[dict[str, Any]]:
    """The probes of one split, which is identified by its size or its share."""
    return [
        one
        for one in probes
        if (
            abs(one["frac"] - split.share) < 1e-9
            if "frac" in one
            else one.get("num_train") in (None, len(split.train_M))
        )
    ]


@pytest.mark.parametrize("setting", ["normal", "scarcity", pytest.param("imbalance", marks=pytest.mark.slow)])
def test_probes_on_latents_are_those_of_sae_probes(peer, setting):
    probes, compared = peer.scores["sae"][setting], 0
    latents = encode_rows(peer, peer.x, "cpu")
    for split in splits_of(setting, peer.label):
        expected = of_split(probes, split)
        if not expected:
            continue  # the fixture has only some sizes and shares
        found = probe_latents(latents, peer.label, split, KS, l1=True)
        for k, score in zip(KS, found.probes, strict=True):
            (one,) = [probe for probe in expected if probe["k"] == k]
            assert found.latents[:k] == one["indices"]
            assert score.test_auc == pytest.approx(one["test_auc"], abs=1e-6)
            assert score.validation_auc == pytest.approx(one["val_auc"], abs=1e-6)
            assert score.test_accuracy == pytest.approx(one["test_acc"], abs=1e-6)
            compared += 1
    assert compared == len(probes) == 3 * {"normal": 1, "scarcity": 5, "imbalance": 2}[setting]


@pytest.mark.parametrize("setting", ["normal", "scarcity", "imbalance"])
def test_probes_on_the_model_are_those_of_sae_probes(peer, setting):
    probes, compared = peer.scores["llm"][setting], 0
    for split in splits_of(setting, peer.label, shares=[round(share * 20) / 20 for share in SHARES]):
        x = peer.x.numpy()
        for one in of_split(probes, split) if setting != "normal" else probes:
            found = fit_probe(
                x[split.train_M], peer.label[split.train_M], x[split.test_M], peer.label[split.test_M], l1=False
            )
            assert found.test_auc == pytest.approx(one["test_auc"], abs=1e-6)
            assert found.validation_auc == pytest.approx(one["val_auc"], abs=1e-6)
            assert found.test_accuracy == pytest.approx(one["test_acc"], abs=1e-6)
            compared += 1
    assert compared == len(probes) > 0


def test_splits_are_disjoint_and_have_their_sizes_and_shares():
    label = np.arange(3000) % 2
    (normal,) = splits_of("normal", label)
    assert (len(normal.train_M), len(normal.test_M)) == (1024, 3000 - 1024 - 1)
    scarce = splits_of("scarcity", label)
    sizes = [len(split.train_M) for split in scarce]
    assert sizes == sorted(set(sizes)) and sizes[0] == 2 and sizes[-1] == 1024
    imbalanced = splits_of("imbalance", label)
    assert {len(split.train_M) for split in imbalanced} == {1024}
    assert {len(split.test_M) for split in imbalanced} == {int(1500 / 0.95) - 1024 - 1}
    assert [split.share for split in imbalanced] == list(SHARES)
    for split in [normal, *scarce, *imbalanced]:
        assert len({*split.train_M, *split.test_M}) == len(split.train_M) + len(split.test_M)
        for texts in split[:2]:
            assert 0 <= label[texts].sum() - split.share * len(texts) < 1
    small = splits_of("scarcity", label[:150])
    assert max(len(split.train_M) for split in small) <= 50


def test_too_few_texts_and_unknown_settings_are_refused():
    with pytest.raises(UsageError, match="101 texts are too few for the setting normal"):
        splits_of("normal", np.arange(101) % 2)
    with pytest.raises(UsageError, match="setting=none is unknown. Expected normal, scarcity or imbalance"):
        splits_of("none", np.arange(300) % 2)


def test_latents_rank_by_scaled_differences_whatever_their_sign_and_scale(monkeypatch):
    label = torch.tensor([1, 1, 1, 1, 0, 0, 0, 0])
    f = torch.zeros(8, 4)
    f[:2, 0] = 5  # score 0.5: active on half of the positive texts
    f[4:7, 1] = 0.01  # score -0.75: active on three quarters of the negative texts
    f[:, 2] = 7  # score 0: always active
    f[0, 3] = 1  # score 0.25: active on one of four positive texts
    assert rank_latents(f, label, 4).tolist() == [1, 0, 3, 2]
    scaled = f * torch.tensor([0.1, 100, 3, 8])
    assert rank_latents(scaled, label, 3).tolist() == [1, 0, 3]
    signed = torch.zeros(8, 2)
    signed[0, 0], signed[4, 0] = 3, -1  # mean absolute value 2 where active, so the score is 0.375 + 0.125
    signed[4:7, 1] = 0.01
    assert rank_latents(signed, label, 2).tolist() == [1, 0]
    wide = torch.rand(8, 37, generator=torch.Generator().manual_seed(0)).relu()
    whole = rank_latents(wide, label, 37)
    monkeypatch.setattr(module, "BLOCK", 5)
    assert rank_latents(wide, label, 37).tolist() == whole.tolist()


def test_folds():
    few = list(folds_of(np.array([0, 0, 0, 1, 1, 1])))
    assert len(few) == 9 and all(len(validation) == 2 for _, validation in few)  # 9 of 15 pairs have both classes
    assert [len(list(folds_of(np.arange(texts) % 2))) for texts in (12, 13, 127, 128)] == [36, 6, 6, 1]
    some = list(folds_of(np.arange(60) % 2))
    assert len(some) == 6 and sorted(i for _, validation in some for i in validation) == list(range(60))
    ((train, validation),) = folds_of(np.arange(400) % 2)
    assert train.tolist() == [*range(320)] and validation.tolist() == [*range(320, 400)]
    ((train, validation),) = folds_of(np.arange(1024) % 2)
    assert len(validation) == 100


def test_a_fold_of_one_class_is_chance_in_training_and_nothing_in_validation():
    x, label = np.arange(6.0)[:, None], np.array([0, 0, 0, 1, 1, 0])
    both, zeros = np.array([0, 3]), np.array([1, 2])
    assert fold_auc(x, label, zeros, both, l1=False)(1.0) == 0.5
    assert np.isnan(fold_auc(x, label, both, zeros, l1=False)(1.0))
    assert fold_auc(x, label, both, np.array([1, 4]), l1=False)(1.0) == 1


def test_the_weakest_regularization_of_the_best_is_chosen_and_a_perfect_one_ends_the_search(monkeypatch):
    strengths, aucs = [], {0: 0.7, 1: 0.9, 2: 0.9, 3: 0.6}

    def auc(strength):
        strengths.append(strength)
        return aucs.get(len(strengths) - 1, 0.5)

    monkeypatch.setattr(module, "fold_auc", lambda *fold: auc)
    label = np.arange(200) % 2
    assert choose_strength(np.zeros((200, 1)), label, True) == (module.STRENGTHS[1], 0.9)
    assert strengths == list(module.STRENGTHS)
    strengths.clear()
    aucs[2] = 1.0
    assert choose_strength(np.zeros((200, 1)), label, True) == (module.STRENGTHS[2], 1.0) and len(strengths) == 3


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("texts", [4, 9, 30, 140])
@pytest.mark.parametrize("l1", [True, False])
def test_a_probe_is_what_scikit_learn_gives_by_the_definition(texts, l1, monkeypatch):
    """Each number is bit-identical to that of scikit-learn's functions, for every number of folds."""
    monkeypatch.setattr(module, "STRENGTHS", np.array([1e3, 0.5, 0.01]))
    random = np.random.RandomState(texts)
    label, test_label = (np.append([0, 1], random.randint(2, size=count - 2)) for count in (texts, 60))
    x, test_x = (random.gamma(2, 2, (len(y), 5)) * (random.rand(len(y), 5) < 0.3 + 0.3 * y[:, None])
                 for y in (label, test_label))  # fmt: skip
    found = fit_probe(x, label, test_x, test_label, l1=l1)

    def train(rows, strength):
        options = {"l1_ratio": 1, "solver": "saga"} if l1 else {}
        return LogisticRegression(C=strength, random_state=42, max_iter=1000, **options).fit(x[rows], label[rows])

    means = []
    for strength in module.STRENGTHS:
        aucs = [
            roc_auc_score(label[validation], train(rows, strength).predict_proba(x[validation])[:, 1])
            if len({*label[rows]}) == 2
            else 0.5
            for rows, validation in folds_of(label)
        ]
        means.append(np.mean(aucs))
    best = int(np.argmax(means))
    model = train(np.random.RandomState(42).permutation(texts), module.STRENGTHS[best])
    auc = roc_auc_score(test_label, model.predict_proba(test_x)[:, 1])
    assert found == (auc, accuracy_score(test_label, model.predict(test_x)), means[best], module.STRENGTHS[best])
    assert all(type(number) is float for number in found)


def test_a_probe_of_three_texts_does_not_choose():
    x, label = np.array([[0.0], [9.0], [2.0]], np.float32), np.array([0, 1, 0])
    found = fit_probe(x, label, x, label, l1=True)
    assert found.strength == 1 and found.validation_auc == 1 == found.test_auc


def test_a_logit_of_zero_predicts_the_negative_class():
    found = fit_probe(np.zeros((2, 3)), np.array([0, 1]), np.zeros((4, 3)), np.array([0, 0, 0, 1]), l1=False)
    assert (found.test_accuracy, found.test_auc) == (0.75, 0.5)


def test_more_positive_texts_are_drawn_where_a_share_is_not_whole():
    split = draw_split(np.arange(40) % 2, 5, 7, 0.5)
    assert (np.arange(40) % 2)[split.train_M].sum() == 3 and (np.arange(40) % 2)[split.test_M].sum() == 4
