"""Bootstrap accuracies and intervals equal their definitions."""

import math

import pytest
import torch

from sae.evaluate.metrics.batched_probes import is_correct
from sae.evaluate.metrics.bootstrap import BootstrapWeights, bootstrap_interval
from sae.evaluate.metrics.probes import ProbeTask


def test_accuracies_count_every_text_once_and_then_as_often_as_drawn():
    task = ProbeTask(torch.tensor([0, 1, 3, 4]), torch.tensor([1.0, 1, 0, 0]))
    logit_N = torch.tensor([1.0, -1, 5, 2, -3])
    assert is_correct(logit_N, task).tolist() == [1, 0, 0, 1]
    resample = BootstrapWeights.of([3, 2], replicates=50)
    accuracy_R = resample.accuracy(logit_N, task)
    assert accuracy_R[0] == 0.5
    for times_N, accuracy in zip(resample.weight_RN, accuracy_R, strict=True):
        drawn = [right for right, row in zip([1, 0, 0, 1], [0, 1, 3, 4], strict=True) for _ in range(int(times_N[row]))]
        assert float(accuracy) == pytest.approx(sum(drawn) / len(drawn), abs=1e-7)
    assert (resample.weight_RN.sum(1) == 5).all()
    assert torch.equal(BootstrapWeights.of([3, 2], replicates=50).weight_RN, resample.weight_RN)


def test_the_interval_is_that_of_a_proportion():
    task = ProbeTask(torch.arange(1000), torch.ones(1000))
    logit_N = torch.where(torch.arange(1000) < 800, 1.0, -1.0)
    low, high = bootstrap_interval(BootstrapWeights.of([1000], replicates=2000).accuracy(logit_N, task))
    error = 1.96 * (0.8 * 0.2 / 1000) ** 0.5
    assert low == pytest.approx(0.8 - error, abs=0.004)
    assert high == pytest.approx(0.8 + error, abs=0.004)


def test_classes_keep_their_size_and_problems_their_own_draws():
    """If all texts of one class are right and none of another, the accuracy has no spread. Two problems have
    independent draws."""
    task = ProbeTask(torch.arange(200), torch.ones(200))
    right_N = torch.where(torch.arange(200) < 100, 1.0, -1.0)
    assert bootstrap_interval(BootstrapWeights.of([100, 100], "a").accuracy(right_N, task)) == [0.5, 0.5]
    half_N = torch.where(torch.arange(200) % 2 == 0, 1.0, -1.0)
    a_R, b_R = (BootstrapWeights.of([100, 100], name).accuracy(half_N, task)[1:] for name in "ab")
    assert abs(float(torch.stack([a_R, b_R]).corrcoef()[0, 1])) < 0.15


def test_the_interval_is_of_the_replicates_alone():
    """The first entry is the sample itself and does not count, nor do replicates without a finite score."""
    score_R = torch.tensor([1e6, 4.0, torch.nan, 0.0, 3.0, 1.0, 2.0, torch.inf], dtype=torch.float64)
    assert bootstrap_interval(score_R) == pytest.approx([0.1, 3.9])
    assert all(map(math.isnan, bootstrap_interval(torch.tensor([1.0, torch.nan], dtype=torch.float64))))
