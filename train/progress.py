"""What training reports while it runs."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class TrainProgress:
    """Callbacks of training, silent by default."""

    step: Callable[[int, int, dict[str, dict[str, float]]], None] = lambda step, steps, metrics: None
    """Called when metrics are logged, with the steps taken, the steps in all, and run name -> metrics."""
    say: Callable[[str], None] = lambda sentence: None
    """Called with sentences such as "... resumes from step 1000."."""


SILENT = TrainProgress()
