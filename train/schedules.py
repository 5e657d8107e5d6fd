"""Schedules: the coefficient of a loss term as a function of the step, computed on the device."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .step import Step

Coefficient = Callable[[Step], Tensor | float]


def constant(value: float) -> Coefficient:
    return lambda step: value


def ramp(step: Step, steps: float) -> Tensor:
    """0 at step 0, rising linearly to 1 at step `steps`, then 1."""
    return (step.i / steps).clamp(max=1.0)


def linear(start: float, end: float, steps: float) -> Coefficient:
    """From `start` to `end` over `steps` steps, then `end`."""
    return lambda step: start + (end - start) * ramp(step, steps)


def cosine(start: float, end: float, steps: float) -> Coefficient:
    """end + (start - end)(1 + cos(pi t/T))/2."""
    return lambda step: end + 0.5 * (start - end) * (1 + torch.cos(math.pi * ramp(step, steps)))


def warmup(to: float, steps: int) -> Coefficient:
    """`to` times min(1, (t+1)/w), where t starts at 0. This is equation (4) of paper 002, where t starts at 1.

    The papers say only "linearly over w steps". dictionary_learning and SAELens use t/w, which is the same ramp one
    step later. The learning rate also uses (t+1)/w, because with t/w the first step would have no effect. So the
    penalty and the learning rate rise together.
    """
    return lambda step: to * ((step.i + 1) / max(steps, 1)).clamp(max=1.0)


def product(*factors: Coefficient) -> Coefficient:
    """The coefficient that is the product of several coefficients."""

    def coefficient(step: Step) -> Tensor | float:
        result: Tensor | float = 1.0
        for factor in factors:
            result = result * factor(step)
        return result

    return coefficient
