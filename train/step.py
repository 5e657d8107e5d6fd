"""The state of one training step, and the two kinds of parts that a recipe plugs into it: losses and mechanisms.

Shape suffixes in this folder: B tokens in the batch, D d_in, F d_sae, K active latents per token, A dead latents
(padded), N latents that may be active in the whole batch.
"""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from .dense_ops import squared_error
from .kernels.batch_operators import squared_distances
from .sae import SAE
from .sparse_ops import KeptLatents


@dataclass
class Step:
    """The state of one step. All tensors are on the device, and nothing reads a value back to the host."""

    i: Tensor  # () int64: index of the step, from 0
    sae: SAE
    optimizer: torch.optim.Optimizer
    x_BD: Tensor  # the batch as the SAE sees it: normalized, float32
    computed_pre_BF: Tensor | None  # use `pre_BF` instead; None if the activation is ReLU alone
    computed_f_BF: Tensor | None  # use `f_BF` instead; None as long as `kept` suffices
    computed_recon_BD: Tensor | None  # use `recon_BD` instead; None if the error was computed first
    kept: KeptLatents | None = None  # the latents of f_BF in sparse form, if the SAE computes sparsely
    metrics: dict[str, Tensor] = field(default_factory=dict)  # 0-d tensors that losses add; logged with the loss
    losses: dict[str, Tensor] = field(default_factory=dict)  # losses of one part of a batch
    part_of: "Step | None" = None  # the batch, if this is a part of it (train/accumulate.py)
    statistics: "dict[Mechanism, Tensor]" = field(default_factory=dict)  # for a batch in parts
    selected_N: Tensor | None = None  # the values of the latents that TopK or BatchTopK selected, if available
    values: Mapping[str, Tensor] = field(default_factory=dict)  # for losses, from a recipe's own pass (SAE.own_pass)
    _error_BD: Tensor | None = None
    _squared_error: Tensor | None = None
    _variance: Tensor | None = None

    @property
    def tokens(self) -> int:
        """B, the number of tokens in the batch."""
        return len(self.x_BD)

    @property
    def whole(self) -> "Step":
        """The whole batch.

        If the batch is computed in parts, this step has only `x_BD` and, for code with `reads_batch`, `error_BD` and
        `l0`.
        """
        return self if self.part_of is None else self.part_of

    # These values are computed once, on first access. Before Python 3.12, cached_property takes a lock, which cannot be
    # compiled, so the values that losses read are properties.

    @property
    def pre_BF(self) -> Tensor:
        """Pre-activations (B, F)."""
        if self.computed_pre_BF is None:
            raise AttributeError(
                "A training step with ReLU as its only activation keeps no pre-activations: the latents overwrite "
                "them. In a loss, compute pre-activations with step.sae.pre_activations(step.x_BD)."
            )
        return self.computed_pre_BF

    @pre_BF.setter
    def pre_BF(self, value_BF: Tensor) -> None:
        self.computed_pre_BF = value_BF

    @property
    def f_BF(self) -> Tensor:
        """Latents (B, F). If `kept` is not None, it contains the same latents without the zeros."""
        if self.computed_f_BF is None:
            assert self.kept is not None
            with torch.enable_grad():  # the first read may be in a coefficient, under no_grad
                self.computed_f_BF = self.kept.dense()
        return self.computed_f_BF

    @f_BF.setter
    def f_BF(self, value_BF: Tensor) -> None:
        self.computed_f_BF = value_BF
        for name in ("counts_F", "l0", "fired_F"):  # values of the previous latents
            self.__dict__.pop(name, None)

    @property
    def recon_BD(self) -> Tensor:
        """The reconstruction x_hat (B, D)."""
        if self.computed_recon_BD is None:
            assert self._error_BD is not None
            with torch.enable_grad():
                self.computed_recon_BD = self.x_BD - self._error_BD
        return self.computed_recon_BD

    @recon_BD.setter
    def recon_BD(self, value_BD: Tensor) -> None:
        self.computed_recon_BD = value_BD

    @property
    def error_BD(self) -> Tensor:
        """x - x_hat."""
        if self._error_BD is None:
            self._error_BD = self.x_BD - self.recon_BD
        return self._error_BD

    @error_BD.setter
    def error_BD(self, value_BD: Tensor | None) -> None:
        self._error_BD = value_BD

    @property
    def squared_error(self) -> Tensor:
        """Scalar: sum_BD (x - x_hat)^2."""
        if self._squared_error is None:
            whole = self._error_BD  # a batch that is computed in parts has `error_BD`, but no `recon_BD`
            self._squared_error = squared_error(self.recon_BD, self.x_BD) if whole is None else whole.square().sum()
        return self._squared_error

    @squared_error.setter
    def squared_error(self, value: Tensor | None) -> None:
        self._squared_error = value

    @property
    def variance(self) -> Tensor:
        """Scalar: sum_BD (x - mean_B x)^2."""
        if self._variance is None:
            self._variance = squared_distances(self.x_BD)
        return self._variance

    @variance.setter
    def variance(self, value: Tensor | None) -> None:
        self._variance = value

    @cached_property
    def counts_F(self) -> Tensor:
        """(F) float32: for how many tokens of the batch each latent is nonzero."""
        if self.kept is not None:
            return self.kept.counts()
        f_BF = self.f_BF.detach()
        if f_BF.device.type == "cpu":  # two fast passes; vector_norm would branch at each element on a CPU
            return torch.ne(f_BF, 0, out=torch.empty_like(f_BF)).sum(0, dtype=torch.float32)
        return torch.linalg.vector_norm(f_BF, 0, dim=0, dtype=torch.float32)  # one pass

    @cached_property
    def l0(self) -> Tensor:
        """Scalar: active latents per token."""
        return self.counts_F.sum() / self.tokens

    @cached_property
    def fired_F(self) -> Tensor:
        """Which latents are nonzero for some token of the batch."""
        return self.counts_F > 0


class LossTerm(nn.Module, ABC):
    """One term of the loss, a 0-d tensor. A term may add to `step.metrics` but changes nothing else.

    With `--accumulate` the term is computed for equal parts of the batch, and the mean over the parts has to equal the
    value for the whole batch. If the mean differs, `undivided` gives the reason, as a sentence without a period;
    otherwise `undivided` is "".
    """

    undivided: str = "not all of its losses are known to be means over tokens"
    reads_batch = False  # whether it reads `step.whole.error_BD` or `step.whole.l0`
    sparsity = False  # whether a larger coefficient leaves fewer latents active, so that `--l0` can control it

    @abstractmethod
    def forward(self, step: Step) -> Tensor: ...


class Mechanism(nn.Module):
    """A part of a recipe that acts before and after the optimizer's update of the weights.

    A mechanism's buffers are its state; its hooks run under no_grad.

    `after_backward` and `after_step` run in every step, so they keep fixed shapes and never read a value back to the
    host. `every_n_steps`, which runs after every `every`-th step, may change shapes and read values. If one of these
    three hooks changes a tensor that a step reads, it has to do so in place, because the graph of a captured step
    (train/capture.py) reads the same memory each time.
    """

    combine: ClassVar[Literal["", "mean", "min"]] = ""
    """How to combine the statistics of equal parts into the statistic of the batch; "" if there is no `statistic`."""
    undivided: str = ""  # why the mechanism needs the latents of a whole batch at once, as in LossTerm
    reads_batch = False  # whether it is called in the forward pass and reads `step.whole.error_BD` or `.l0`
    every: int | None = None
    reads_rows = False  # whether it implements `start_from_rows`
    has_kernels: ClassVar[bool] = False  # whether it can use operators that have kernels on a GPU
    by_kernels = False  # whether it uses them
    leaves_weights = True
    """Whether `after_backward` and `after_step` neither read nor write W_enc, W_dec, their gradients or moments.

    If so, kernels can do three things in one pass: project the gradient, update the weights and normalize them
    (`Variant.updates_at_once`). In a class that defines one of the two hooks, this is False unless the class sets it.
    """

    def __init_subclass__(cls) -> None:
        if vars(cls).keys() & {"after_backward", "after_step"}:
            cls.leaves_weights = vars(cls).get("leaves_weights", False)

    def start_from_rows(self, sae: SAE, sample_ND: Tensor) -> None:
        """Initialize the SAE from the first rows (N, D) that the run reads. Called before the first step of a run.

        The rows are normalized in the same way as the input of the SAE. Called only if `reads_rows`.
        """

    def statistic(self, step: Step) -> Tensor:
        """A tensor that `after_step` needs and that is computed from the latents."""
        raise NotImplementedError

    def read_latents(self, step: Step) -> Tensor:
        """The `statistic` of a batch, which may have been computed in parts."""
        return step.statistics[self] if self in step.statistics else self.statistic(step)

    def after_backward(self, step: Step) -> None:
        """Called when gradients are ready and before weights change."""

    def after_step(self, step: Step) -> None:
        """Called after weights have changed. The latents in `step` were computed with the weights before the update."""

    def every_n_steps(self, step: Step) -> None:
        """Called between steps. May read values, change shapes and rewrite weights. `step.i` includes the last step."""

    def between_bytes(self, sae: SAE, tokens: int) -> int:
        """The peak bytes that `every_n_steps` takes in addition to a step on `tokens` tokens.

        A few tensors with one element per latent need not be counted.
        """
        return 0

    def shape_key(self) -> Hashable:
        """A key that is different after `every_n_steps` has changed the shapes in a step.

        A new key leads to a new CUDA graph.
        """
        return None

    def calibrate(self, step: Step) -> None:
        """Called after training, for the forward passes on a few more batches.

        Fits a number, such as a threshold, to the final weights.
        """

    def export(self, sae: SAE) -> None:
        """Called after training. Changes the copy that will be saved; its normalization is already folded in."""

    def after_restore(self) -> None:
        """Called after buffers were loaded or moved. Recomputes everything that is derived from buffers."""

    def scalars(self) -> dict[str, Tensor]:
        """0-d tensors to log."""
        return {}
