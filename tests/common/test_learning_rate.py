"""The schedule of the learning rate as plain numbers."""

import pytest
import torch

from sae.common.learning_rate import peak_share, rate_share
from sae.train.optimization import Optimization

SCHEDULES = [(1, 0, 0.8), (1, 5, 1.0), (40, 4, 0.8), (40, 40, 0.8), (40, 36, 0.5), (41, 60, 0.3), (40, 200, 0.0)]
# In the first, the decay begins before the warm-up ends, which is before the middle. In the second, it begins between
# two steps.
SCHEDULES += [(40, 10, 0.1), (41, 60, 0.8)]


@pytest.mark.parametrize(("steps", "warmup", "decay_start"), [*SCHEDULES, (800, 1000, 1.0), (100, 100, 1.0)])
def test_the_share_is_that_of_training_at_every_step(steps: int, warmup: int, decay_start: float) -> None:
    settings = Optimization(lr=2.0, warmup=warmup, decay_start=decay_start)
    expected = (settings.lr_at(torch.arange(steps), steps) / 2.0).tolist()
    assert [rate_share(i, steps, warmup, decay_start) for i in range(steps)] == pytest.approx(expected, rel=1e-6)
    assert peak_share(steps, warmup, decay_start) == pytest.approx(max(expected), rel=1e-6)
    assert settings.peak_share(steps) == peak_share(steps, warmup, decay_start)


def test_eight_hundred_steps_of_a_warm_up_of_a_thousand_reach_four_fifths() -> None:
    assert peak_share(800, 1000, 1.0) == pytest.approx(0.8)
    assert peak_share(800, 800, 1.0) == peak_share(800, 0, 0.8) == 1.0
    assert peak_share(0, 0, 0.8) == 0.0  # nothing was trained
