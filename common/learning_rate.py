"""The learning rate schedule as plain numbers, for training and for pages about trained runs."""

import math


def rate_share(step: int, steps: int, warmup: int, decay_start: float) -> float:
    """The learning rate of a step as a share of its peak: min(1, (step + 1)/warmup), times a factor that falls linearly
    from 1 to 0 once the decay starts. `step` counts from 0, and `decay_start` is a share of the run."""
    up = min((step + 1) / max(warmup, 1), 1.0)
    down = min((steps - step) / max(steps * (1 - decay_start), 1), 1.0)
    return up * down


def peak_share(steps: int, warmup: int, decay_start: float) -> float:
    """The largest `rate_share` of a run: 1, unless the warm-up is incomplete when the decay begins or the run ends."""
    if steps < 1:
        return 0.0
    decay = max(steps * (1 - decay_start), 1)
    # Until the decay begins, the share does not fall; once the warm-up has ended, it does not rise. If the decay begins
    # during the warm-up, the share is a parabola between these two points.
    top = min(max((steps - 1) / 2, steps - decay), warmup - 1)
    around = {min(max(step, 0), steps - 1) for step in (math.floor(top), math.ceil(top))}
    return max(rate_share(step, steps, warmup, decay_start) for step in around)
