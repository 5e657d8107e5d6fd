"""Resampling of latents that are dead according to the sliding window of paper 004, equation (4)."""

import torch
from torch import Tensor

from ...mechanisms import DeadLatents, ResampleDead
from ...step import Step


class ResampleByWindow(ResampleDead):
    """Resamples latents with p_i < `below`, where p_i is a sum over the last steps divided by `window` (4).

    `stability` selects the contribution of a step to p_i: with `any`, 1 if latent i fires on any token of the batch;
    with `mean`, the share of tokens on which it fires. The paper does not say which contribution is meant; with `mean`,
    most latents of a sparse SAE count as dead. At the start of the run and after each restart, a latent has a full
    window before it can be restarted.

    Paper: its sum from t - w to t has w + 1 terms. By default, `terms` is w; set it to w + 1 to follow the paper's
    formula.

    Args:
        every: steps between two restarts; default `window`.
        terms: steps in the sum; default `window`.
    """

    fired_WF: Tensor  # the terms of the sum, in a ring buffer
    acted_silent: Tensor  # () int64, number of latents with p_i < `below`, summed over all checks
    leaves_weights = True
    combine = "mean"

    def __init__(
        self,
        dead: DeadLatents,
        window: int,
        until: int,
        below: float,
        stability: str,
        *,
        every: int | None = None,
        terms: int | None = None,
    ) -> None:
        super().__init__(dead, every or window, until)
        self.window, self.below, self.stability = window, below, stability
        self.register_buffer("fired_WF", torch.ones(terms or window, len(dead.since_F)))
        self.register_buffer("acted_silent", torch.zeros((), dtype=torch.int64))
        self.fired_WF[window:] = 0  # so that the first full window has w terms

    def statistic(self, step: Step) -> Tensor:
        return (step.f_BF.detach() != 0).float().mean(0)

    def after_step(self, step: Step) -> None:
        fired_F = step.fired_F.float() if self.stability == "any" else self.read_latents(step)
        self.fired_WF.index_copy_(0, (step.i % len(self.fired_WF)).view(1), fired_F[None])

    def silent(self) -> Tensor:
        return self.fired_WF.sum(0) < self.below * self.window

    def every_n_steps(self, step: Step) -> None:
        if int(step.i) <= self.until:
            index_N = self.silent().nonzero().squeeze(1)
            self.acted_silent += len(index_N)
            self.restart(step, index_N)

    def restart(self, step: Step, index_N: Tensor) -> Tensor:
        restarted_N = super().restart(step, index_N)
        self.fired_WF[:, restarted_N] = 1
        if len(self.fired_WF) > self.window:
            # What this step adds to the window was measured before the latent restarted. The next w steps do not
            # overwrite it.
            self.fired_WF[int(step.i) % len(self.fired_WF), restarted_N] = 0
        return restarted_N

    def scalars(self) -> dict[str, Tensor]:
        return super().scalars() | {"stability": self.fired_WF.mean(), "silent": self.acted_silent}
