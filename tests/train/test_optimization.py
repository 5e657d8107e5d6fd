"""The learning rate over a run."""

import pytest
import torch

from sae.train.optimization import Optimization


def test_the_learning_rate_rises_stays_and_falls() -> None:
    """lr (t+1)/w up to w = 10, lr until 0.8 of 100 steps, then lr (T - t)/20: the last step still moves."""
    how = Optimization(lr=2.0, warmup=10, decay_start=0.8)
    expected = {0: 0.2, 9: 2.0, 10: 2.0, 80: 2.0, 90: 1.0, 99: 0.1}
    assert {t: float(how.lr_at(torch.tensor(t), 100)) for t in expected} == pytest.approx(expected, rel=1e-5)
