"""Progress reports during training."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from ..common.errors import SaeError


class Overview(NamedTuple):
    """The progress of the runs of all launched processes."""

    steps_done: int  # total over all runs
    steps: int
    finished: frozenset[str]  # names of runs
    runs: int
    metrics: dict[str, dict[str, float]]  # run name -> its last logged metrics, if there are any


@dataclass(frozen=True)
class TrainProgress:
    """Callbacks that training calls. By default, they print nothing."""

    step: Callable[[int, int, dict[str, dict[str, float]]], None] = lambda step, steps, metrics: None
    """Called when metrics are logged, with the steps taken, the total of steps, and run name -> metrics."""
    say: Callable[[str], None] = lambda sentence: None
    """Called with sentences such as "... resumes from step 1000."."""
    problem: Callable[[str], None] | None = None
    """Called in every process with sentences that users have to see; None: `say`."""
    overview: Callable[[Overview], None] = lambda overview: None
    """Called every few seconds in the first of several launched processes."""

    end: Callable[[SaeError], None] = lambda error: None
    """Called with the error in each launched process that ends with one, before the error is raised."""

    def say_problem(self, sentence: str) -> None:
        (self.problem or self.say)(sentence)


SILENT = TrainProgress()
