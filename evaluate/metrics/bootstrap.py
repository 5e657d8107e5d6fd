"""Bootstrap over test texts for the intervals of SCR and TPP, with the same draws for every SAE.

Shape suffixes: N texts, B texts of a task, R replicates.
"""

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
    """How often each replicate contains each text (R, N). Replicate 0 is the sample itself, with every text once.

    An accuracy is therefore a vector (R,), and so is every score computed from accuracies. Entry 0 is the score of the
    sample.
    """

    weight_RN: Tensor

    @classmethod
    def of(cls, counts: Sequence[int], *names: object, replicates: int = REPLICATES) -> Self:
        """Resample within each class, because the number of texts of each class (`counts`) is fixed by design.

        The draws are seeded by `names`, which identify the problem. The draws are the same for every SAE, so
        differences between SAEs are paired.
        """
        generator = make_generator("paired", "bootstrap", *names)
        drawn = [torch.randint(count, (replicates, count), generator=generator) for count in counts]
        resampled = torch.cat([torch.zeros(d.shape).scatter_add_(1, d, torch.ones(d.shape)) for d in drawn], 1)
        return cls(torch.cat([torch.ones(1, sum(counts)), resampled]).double())

    def accuracy(self, logit_N: Tensor, task: ProbeTask) -> Tensor:
        """The accuracy in each replicate (R,), rounded to float32 as in SAEBench.

        The rounding decides whether a difference reaches SCR's threshold of 0.001.
        """
        weight_RB = self.weight_RN[:, task.rows]
        return (weight_RB @ is_correct(logit_N, task) / weight_RB.sum(1)).float().double()


def bootstrap_interval(score_R: Tensor) -> list[float]:
    """The 95 % interval over the replicates in which the score is defined."""
    finite_R = score_R[1:][score_R[1:].isfinite()]
    return torch.quantile(finite_R, finite_R.new_tensor([0.025, 0.975])).tolist() if len(finite_R) else [math.nan] * 2
