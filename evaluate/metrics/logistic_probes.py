"""Logistic probes that use the same splits as sae-probes and choose latents and regularization in the same way.

Source: sae-probes 0.4.2, `utils_data.py`, `run_sae_evals.py` and `utils_training.py` (Kantamneni et al. 2025). If the
rows and labels are the same as in sae-probes, the texts of a split, the ranking of latents and the probes are also the
same. As in sae-probes, every random draw is seeded with 42.

Shape suffixes: N texts, M texts of a split, F latents, K of them, D features.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...common.errors import UsageError
from .logistic_regression import SEED, logistic_trainer
from .roc_auc import roc_auc

STRENGTHS = np.logspace(5, -5, 10)  # the values of C to try, with the weakest regularization first
FEW, SOME = 12, 128  # with at most FEW texts, each pair is left out once; with fewer than SOME, there are six folds
MIN_TEST = 100  # number of texts that are reserved for the test
SHARES = tuple(np.linspace(0.05, 0.95, 19).tolist())  # shares of positive texts in the setting "imbalance"
TRAIN_SIZES = np.unique(np.round(np.logspace(1, 10, 20, base=2)).astype(int))  # setting "scarcity": 2 to 1,024
SETTINGS = ("normal", "scarcity", "imbalance")
BLOCK = 4096  # number of latents to rank at a time


class ProbeSplit(NamedTuple):
    """The texts that a probe is trained and tested on, as indices (M,), and the share of positive texts."""

    train_M: np.ndarray
    test_M: np.ndarray
    share: float


class ProbeScore(NamedTuple):
    """The test scores of a probe on a split, and the C that cross-validation chose by AUC."""

    test_auc: float
    test_accuracy: float
    validation_auc: float
    strength: float


# --- splits -----------------------------------------------------------------------------------------------------------


def splits_of(
    setting: str, label_N: np.ndarray, max_train: int = 1024, shares: Sequence[float] = SHARES
) -> list[ProbeSplit]:
    """The splits of a data set in one of SETTINGS.

    `normal` is a single split with up to `max_train` training texts. One of the other texts is not used, and the rest
    are test texts. In both parts, half of the texts are positive. `scarcity` has a split for each of TRAIN_SIZES up to
    `max_train`. `imbalance` has a split for each of `shares`, all with the same number of texts. At least 100 texts are
    reserved for the test.

    Raises UsageError for an unknown setting, or too few texts.
    """
    texts = len(label_N)
    largest = min(texts - MIN_TEST, max_train)
    if setting == "normal":
        sizes = [(largest, texts - largest - 1, 0.5)]
    elif setting == "scarcity":
        sizes = [(int(size), texts - int(size) - 1, 0.5) for size in TRAIN_SIZES if size <= largest]
    elif setting == "imbalance":
        both = imbalanced_size(label_N)
        largest = min(both - MIN_TEST, max_train)
        sizes = [(largest, max(MIN_TEST, both - largest - 1), share) for share in shares]
    else:
        raise UsageError(f"setting={setting} is unknown. Expected {', '.join(SETTINGS[:-1])} or {SETTINGS[-1]}.")
    if largest < 2:
        raise UsageError(
            f"{texts} texts are too few for the setting {setting}: {MIN_TEST} are reserved for the test, and "
            "at least two are needed for training. Raise max_texts."
        )
    return [draw_split(label_N, *size) for size in sizes]


def imbalanced_size(label_N: np.ndarray) -> int:
    """The largest number of texts for which every one of SHARES is possible. For each class, the split with the largest
    share of that class sets the limit."""
    positive = int(label_N.sum())
    return int(min((len(label_N) - positive) / (1 - min(SHARES)), positive / max(SHARES)))


def draw_split(label_N: np.ndarray, train: int, test: int, share: float) -> ProbeSplit:
    """Draw `train` and `test` texts without repetition, in random order. In each part of `size` texts, ceil(share *
    size) are positive."""
    random = np.random.RandomState(SEED)
    left = {label: np.flatnonzero(label_N == label) for label in (1, 0)}
    parts = []
    for size in (train, test):
        positive = math.ceil(share * size)
        drawn = {}
        for label, count in ((1, positive), (0, size - positive)):
            drawn[label] = random.choice(left[label], size=count, replace=False)
        left = {label: np.setdiff1d(left[label], drawn[label]) for label in left}
        parts.append(np.concatenate([drawn[1], drawn[0]]))
    return ProbeSplit(random.permutation(parts[0]), random.permutation(parts[1]), share)


# --- latents ----------------------------------------------------------------------------------------------------------


def rank_latents(f_MF: Tensor, label_M: Tensor, count: int) -> Tensor:
    """The `count` latents that best separate the classes, best first.

    Each latent is divided by its mean over the texts where it is not zero; its score is the absolute difference of its
    means over positive and negative texts.
    """
    difference_F = torch.cat([scaled_difference(part_MF, label_M) for part_MF in f_MF.split(BLOCK, dim=1)])
    return difference_F.abs().argsort(descending=True)[:count]


def scaled_difference(f_MF: Tensor, label_M: Tensor) -> Tensor:
    active_F = f_MF.abs().sum(0) / ((f_MF != 0).sum(0) + 1e-6)
    scaled_MF = f_MF / (active_F + 1e-6)
    return scaled_MF[label_M == 1].mean(0) - scaled_MF[label_M == 0].mean(0)


# --- probes -----------------------------------------------------------------------------------------------------------


def fit_probe(
    x_MD: np.ndarray, label_M: np.ndarray, test_x_MD: np.ndarray, test_label_M: np.ndarray, *, l1: bool
) -> ProbeScore:
    """Choose C by cross-validation, train a probe with this C on all training texts, and score it on the test texts.

    For the training with the chosen C, the training texts are in a new random order.

    The penalty is L1 (saga) or L2 (lbfgs); both stop after 1,000 iterations, converged or not. Among equal AUCs, the
    largest C is chosen. With three texts or fewer, C is 1 and the validation AUC is measured on the training texts.
    """
    # sae-probes passes torch tensors to scikit-learn, which does not recognize them and computes in float64.
    x_MD, test_x_MD = x_MD.astype(np.float64), test_x_MD.astype(np.float64)
    strength, validation_auc = 1.0, math.nan
    if len(x_MD) > 3:
        strength, validation_auc = choose_strength(x_MD, label_M, l1)
    order_M = np.random.RandomState(SEED).permutation(len(x_MD))
    x_MD, label_M = x_MD[order_M], label_M[order_M]
    model = logistic_trainer(x_MD, label_M, l1=l1)(strength)
    if len(x_MD) <= 3:
        validation_auc = roc_auc(label_M, model.probability(x_MD))
    return ProbeScore(
        roc_auc(test_label_M, model.probability(test_x_MD)),
        float(np.mean((model.decision(test_x_MD) > 0) == test_label_M)),
        validation_auc,
        strength,
    )


def choose_strength(x_MD: np.ndarray, label_M: np.ndarray, l1: bool) -> tuple[float, float]:
    """The C with the highest mean AUC over the folds, and that AUC."""
    fold_aucs = [fold_auc(x_MD, label_M, *fold, l1) for fold in folds_of(label_M)]
    means: list[float] = []
    for strength in STRENGTHS.tolist():
        means.append(float(np.mean([auc(strength) for auc in fold_aucs])))
        if means[-1] == 1:
            break  # no AUC can be higher, and among equal AUCs the first is chosen
    best = int(np.argmax(means))
    return float(STRENGTHS[best]), means[best]


def folds_of(label_M: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The folds of cross-validation: indices to train on and to validate on.

    Up to 12 texts: one fold for every pair of texts, with this pair as the validation part. Up to 127 texts: six
    stratified folds. More texts: one fold, whose validation part is the last 20 %, but at most 100 texts. With up to
    127 texts, folds whose validation part lacks a class are left out.
    """
    from sklearn.model_selection import LeavePOut, StratifiedKFold

    texts = len(label_M)
    if texts >= SOME:
        train = texts - min(int(0.2 * texts), 100)
        yield np.arange(train), np.arange(train, texts)
        return
    folds = LeavePOut(2) if texts <= FEW else StratifiedKFold(6, shuffle=True, random_state=SEED)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a class can have fewer texts than folds, as in sae-probes
        drawn = list(folds.split(label_M[:, None], label_M))
    yield from (fold for fold in drawn if len(np.unique(label_M[fold[1]])) == 2)


def fold_auc(
    x_MD: np.ndarray, label_M: np.ndarray, train_M: np.ndarray, validation_M: np.ndarray, l1: bool
) -> Callable[[float], float]:
    """The validation AUC of a fold as a function of C; 0.5 if the training part has only one class."""
    train_x_MD, train_label_M = x_MD[train_M], label_M[train_M]
    if (train_label_M == train_label_M[0]).all():
        return lambda strength: 0.5
    train = logistic_trainer(train_x_MD, train_label_M, l1=l1)
    validation_x_MD, validation_label_M = x_MD[validation_M], label_M[validation_M]
    return lambda strength: roc_auc(validation_label_M, train(strength).probability(validation_x_MD))
