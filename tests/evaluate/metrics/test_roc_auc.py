"""The AUC is bit-identical to scikit-learn's roc_auc_score, and is the share of pairs that are in the right order."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from sae.evaluate.metrics.roc_auc import roc_auc

LABELS = st.lists(st.integers(0, 1), min_size=2, max_size=60).filter(lambda labels: len(set(labels)) == 2)


@settings(max_examples=150)
@given(LABELS, st.sampled_from([1, 2, 3, 8, 10**9]), st.integers(0, 2**32 - 1))
def test_it_has_the_bits_of_scikit_learn_however_many_scores_are_equal(labels, levels, seed):
    random, label = np.random.RandomState(seed), np.array(labels)
    score = random.randint(levels, size=len(label)) / 7 + label * random.randint(2)
    found = roc_auc(label, score)
    assert found == roc_auc_score(label, score) and type(found) is float


@pytest.mark.parametrize("texts", [200, 700])
def test_also_where_the_sum_has_many_terms(texts):
    random = np.random.RandomState(texts)
    for _ in range(20):
        label = random.randint(2, size=texts)
        score = (random.randn(texts) + label).round(random.randint(1, 5))
        assert roc_auc(label, score) == roc_auc_score(label, score)


def test_it_counts_the_pairs_in_the_right_order():
    assert roc_auc(np.array([0, 1]), np.array([0.2, 0.3])) == 1
    assert roc_auc(np.array([1, 0]), np.array([0.2, 0.3])) == 0
    assert roc_auc(np.array([1, 0, 1, 0]), np.array([0.5] * 4)) == 0.5
    assert roc_auc(np.array([0, 1, 1, 0]), np.array([0.1, 0.4, 0.35, 0.35])) == 3.5 / 4
    assert np.isnan(roc_auc(np.array([1, 1]), np.array([0.1, 0.2])))
    assert np.isnan(roc_auc(np.array([0, 0]), np.array([0.1, 0.2])))
