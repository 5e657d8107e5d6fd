"""Compute the area under the ROC curve, bit for bit equal to scikit-learn's `roc_auc_score`, at ten times the speed.

To choose the regularization of the probes, thousands of AUCs are computed, each over a few texts. With so few texts,
scikit-learn spends nearly all of its time on checking arguments. Corners, ratios and trapezoids are computed in
scikit-learn's order, so that two probes have equal AUCs here if and only if they have equal AUCs in scikit-learn.

Shape suffixes: M texts, T thresholds.
"""

import math

import numpy as np


def roc_auc(label_M: np.ndarray, score_M: np.ndarray) -> float:
    """The AUC of finite scores with labels 0 and 1; NaN if all labels are equal."""
    if (label_M == label_M[0]).all():
        return math.nan
    order_M = np.argsort(score_M)[::-1]
    # Texts with equal scores are always on the same side of a threshold, so their order does not matter.
    last_T = np.append(np.flatnonzero(np.diff(score_M[order_M])), len(score_M) - 1)
    true_T = np.cumsum(label_M[order_M], dtype=np.float64)[last_T]
    false_T = 1 + last_T - true_T
    if len(last_T) > 2:  # leave out thresholds on straight lines, as in scikit-learn: they change how the sum rounds
        corner_T = np.ones(len(last_T), bool)
        corner_T[1:-1] = (np.diff(false_T, 2) != 0) | (np.diff(true_T, 2) != 0)
        true_T, false_T = true_T[corner_T], false_T[corner_T]
    true_T, false_T = np.append(0.0, true_T), np.append(0.0, false_T)
    return float(np.trapezoid(true_T / true_T[-1], false_T / false_T[-1]))
