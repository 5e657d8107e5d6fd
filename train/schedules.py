"""Coefficients: how strongly a term counts at a step. Functions of the step, computed on the device."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .step import Step

Coefficient = Callable[[Step], Tensor | float]


def constant(value: float) -> Coefficient:
    return lambda step: value


def ramp(step: Step, steps: float) -> Tensor:
    """0 at step 0, 1 from step `steps` on."""
    return (step.i / steps).clamp(max=1.0)


def linear(start: float, end: float, steps: float) -> Coefficient:
    """start -> end over `steps`, then end."""
    return lambda step: start + (end - start) * ramp(step, steps)


def cosine(start: float, end: float, steps: float) -> Coefficient:
    """end + (start - end)(1 + cos(pi t/T))/2."""
    return lambda step: end + 0.5 * (start - end) * (1 + torch.cos(math.pi * ramp(step, steps)))


def warmup(to: float, steps: int) -> Coefficient:
    """min(1, (t+1)/w) of `to`, t from 0: (4) of paper 002 with t counted from 1.

    Papers say "linearly over w steps" and no more. dictionary_learning and SAELens have t/w, the same ramp a step later.
    Ours is the ramp of the rate, where t/w would lose a step: penalty and rate rise together, and w steps are w steps.
    """
    return lambda step: to * ((step.i + 1) / max(steps, 1)).clamp(max=1.0)


def product(*factors: Coefficient) -> Coefficient:
    """The product of several coefficients."""

    def coefficient(step: Step) -> Tensor | float:
        result: Tensor | float = 1.0
        for factor in factors:
            result = result * factor(step)
        return result

    return coefficient
