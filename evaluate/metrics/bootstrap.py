"""Bootstrap over the texts of a probe task, with the same draws for every SAE."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from .batched_probes import is_correct
from .probes import ProbeTask, make_generator

REPLICATES = 400


@dataclass(frozen=True)
class BootstrapWeights:
    """How often each text is drawn (R, N): the first replicate has every text once, the others are a bootstrap's.

    So an accuracy is a vector (R,), every score made of accuracies is one too, and its first entry is the score.
    """

    times_RN: Tensor

    @classmethod
    def of(cls, counts: Sequence[int], *names: object, replicates: int = REPLICATES) -> Self:
        """Each class keeps its number of texts, which is by design. The same draws whatever the SAE, so differences
        between SAEs are paired; others for another problem, which `names` name, as its texts are others.
        """
        one = make_generator("paired", "bootstrap", *names)
        times = [torch.ones(1, sum(counts))]
        drawn = [torch.randint(count, (replicates, count), generator=one) for count in counts]
        times.append(torch.cat([torch.zeros(d.shape).scatter_add_(1, d, torch.ones(d.shape)) for d in drawn], 1))
        return cls(torch.cat(times).double())

    def accuracy(self, logit_N: Tensor, task: ProbeTask) -> Tensor:
        """(R,), rounded to float32 as SAEBench's are: that decides whether a difference of 0.001 is one."""
        times_RB = self.times_RN[:, task.rows]
        return (times_RB @ is_correct(logit_N, task) / times_RB.sum(1)).float().double()


def bootstrap_interval(score_R: Tensor) -> list[float]:
    """95 % of the bootstrap, of those of its replicates that have the score."""
    drawn_R = score_R[1:][score_R[1:].isfinite()]
    return torch.quantile(drawn_R, drawn_R.new_tensor([0.025, 0.975])).tolist() if len(drawn_R) else [math.nan] * 2
