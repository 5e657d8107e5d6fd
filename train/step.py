"""What one optimisation step knows, and the two kinds of part that a recipe plugs into it.

Shape suffixes in this folder: B tokens in the batch, D d_in, F d_sae, K kept, A dead latents (padded).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from .sae import SAE
from .sparse_ops import KeptLatents


@dataclass
class Step:
    """One step, from the forward pass on. Everything in it is on the device; nothing reads a value back to the host."""

    i: Tensor  # () int64: index of the step, from 0
    sae: SAE
    optimizer: torch.optim.Optimizer
    x_BD: Tensor  # the batch as the SAE sees it: normalised, float32
    pre_BF: Tensor
    f_BF: Tensor
    recon_BD: Tensor
    kept: KeptLatents | None = None  # f_BF once more, where the SAE goes by rows
    metrics: dict[str, Tensor] = field(default_factory=dict)  # what a term found on the way and wants logged, each 0-d
    _error_BD: Tensor | None = None

    @property
    def tokens(self) -> int:
        return len(self.x_BD)

    @property
    def error_BD(self) -> Tensor:
        if self._error_BD is None:  # not a cached_property: until Python 3.12 it holds a lock, which cannot be compiled
            self._error_BD = self.x_BD - self.recon_BD
        return self._error_BD

    @cached_property
    def l0(self) -> Tensor:
        """() latents a token."""
        return self.f_BF.count_nonzero() / self.tokens  # a tenth of the time of sums over the tokens on a CPU

    @cached_property
    def fired_F(self) -> Tensor:
        """Which latents are nonzero for some token of the batch."""
        return self.f_BF.detach().any(0)


class LossTerm(nn.Module, ABC):
    """A summand of the loss. Reads the step, may leave a note in it, changes nothing else; returns a 0-d tensor."""

    sparsity = False  # whether a larger coefficient leaves fewer latents on, so that `--l0` can move it
    all_pairs = False  # whether it makes matrices of all pairs of latents

    @abstractmethod
    def forward(self, step: Step) -> Tensor: ...


class Mechanism(nn.Module):
    """Something that acts around the optimizer. Its buffers are its state; it runs under no_grad.

    `before` and `after` run in every step, keep fixed shapes and never read a value back to the host. What does, runs
    in `between`, after every `every`-th step.
    """

    every: int | None = None

    def after_backward(self, step: Step) -> None:
        """Gradients are ready, weights have not moved."""

    def after_step(self, step: Step) -> None:
        """Weights have moved; the step's latents are those of the weights before."""

    def every_n_steps(self, step: Step) -> None:
        """Between steps: may read values, change shapes and rewrite weights. `step.i` counts the step just taken."""

    def calibrate(self, step: Step) -> None:
        """Training is over: called for a few more batches, forward only, by mechanisms that settle a number then."""

    def export(self, sae: SAE) -> None:
        """The run is over: bring the copy that will be saved, already folded, into its public form."""

    def after_restore(self) -> None:
        """The buffers were loaded or moved: derive what is kept beside them."""

    def scalars(self) -> dict[str, Tensor]:
        """What to log, each a 0-d tensor."""
        return {}
