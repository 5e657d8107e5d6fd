"""The training loop: every variant of a pass takes one step on each batch."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from ..common.precision import autocast, default_precision, float32_products
from .accumulate import run_in_parts
from .kernel_update import KernelUpdate
from .metrics import MetricSums
from .optimizer import OptimizerUpdate, WeightUpdate, make_optimizer
from .step import Step
from .variant import Variant


def train_loop(
    trainers: Sequence["Trainer"],
    batches: Iterator[Tensor],
    steps: range,
    after_step: Callable[[int], bool],
    replay: Callable[[Sequence["Trainer"], Tensor], dict["Trainer", Step]] | None = None,
) -> None:
    """Take steps until `after_step(number)` returns True.

    On each batch the trainers take their steps one after the other, unless `replay` takes the steps of all trainers.
    """
    for number in steps:
        x_BD = next(batches)
        taken = {} if replay is None else replay(trainers, x_BD)
        for trainer in trainers:
            trainer.run_periodic(number, taken.pop(trainer) if taken else trainer.step(x_BD))
        if after_step(number):
            break


class Trainer:
    """Trains one variant on its device. Checkpoints contain the variant, the optimizer, `i` and `failed_at`.

    Each batch is computed in `parts` parts, one after the other (`--accumulate`). `precision` is the precision of
    matrix products in the forward and backward passes; None: the default of the device.
    """

    def __init__(self, variant: Variant, steps: int, device: str, parts: int = 1, precision: str | None = None) -> None:
        self.variant, self.steps, self.device, self.parts = variant, steps, device, parts
        self.precision = precision or default_precision(device)
        self.autocast = partial(autocast, self.precision, device)
        self.restored_version: int | None = None  # `step_version` of the checkpoint that was restored
        self.changing = False  # whether a step has begun to change the state and has not finished
        self.i = torch.zeros((), dtype=torch.int64, device=device)  # index of the next step
        # The first step with a non-finite loss or gradient; -1 if there is none.
        self.failed_at = torch.full((), -1, dtype=torch.int64, device=device)
        self.optimizer = make_optimizer(variant, device)
        self.update: WeightUpdate = OptimizerUpdate(variant, self.optimizer, steps)
        if variant.updates_by_kernels:
            self.update = KernelUpdate(variant, self.optimizer, steps, self.precision == "bfloat16", parts > 1)
        self.metrics = MetricSums(device)  # over the steps since the last pop_metrics

    def step(self, x_BD: Tensor) -> Step:
        """One optimization step on raw activations (B, d_in). Reads no value back to the host."""
        variant = self.variant
        step, losses, loss = self.backward(x_BD)
        with torch.no_grad():
            for mechanism in variant.mechanisms:
                mechanism.after_backward(step)
            self.changing = True
            grad_norm = self.update.step(loss, self.i, self.failed_at)
            for mechanism in variant.mechanisms:
                mechanism.after_step(step)
            self._add_metrics(step, loss, losses, grad_norm)
            self.i += 1
        self.optimizer.zero_grad(set_to_none=True)
        return step

    def backward(self, x_BD: Tensor) -> tuple[Step, dict[str, Tensor], Tensor]:
        """The forward pass, and the gradients of its weighted losses. Also returns these losses and their sum."""
        self.update.make_copies()
        with float32_products(self.precision):
            if self.parts > 1:
                step, losses = self._run_in_parts(x_BD)
                return step, losses, torch.stack(list(losses.values())).sum()
            with self.autocast():
                step, losses = self.forward_losses(x_BD)
            loss = torch.stack(list(losses.values())).sum()
            loss.backward()
        return step, losses, loss.detach()

    @torch.no_grad()
    def forward(self, x_BD: Tensor) -> Step:
        """Only the forward pass."""
        with float32_products(self.precision):
            if self.parts > 1:
                return self._run_in_parts(x_BD, backward=False)[0]
            with self.autocast():
                return self.variant(self.i, x_BD, self.optimizer)

    def _run_in_parts(self, x_BD: Tensor, backward: bool = True) -> tuple[Step, dict[str, Tensor]]:
        return run_in_parts(self.variant, self.i, x_BD, self.optimizer, self.parts, self.autocast, backward)

    def forward_losses(self, x_BD: Tensor) -> tuple[Step, dict[str, Tensor]]:
        """The forward pass and its weighted losses. Changes no state, so `--compile` can compile it."""
        step = self.variant(self.i, x_BD, self.optimizer)
        return step, self.variant.losses(step)

    @torch.no_grad()
    def run_periodic(self, number: int, step: Step) -> None:
        """After step `number`, call the mechanisms that are due: each acts every `mechanism.every` steps."""
        due = [one for one in self.variant.mechanisms if one.every and (number + 1) % one.every == 0]
        for mechanism in due:
            mechanism.every_n_steps(step)
        if due:
            self.update.renew_copies()
        self.changing = False

    def _add_metrics(self, step: Step, loss: Tensor, losses: dict[str, Tensor], grad_norm: Tensor) -> None:
        metrics = {
            "loss": loss,
            **losses,
            "l0": step.l0,
            "explained_variance": 1 - step.squared_error / step.variance,
            "gradient_norm": grad_norm,
            **step.metrics,
        }
        self.metrics.add(metrics)

    def pop_metrics(self, reset: bool = True) -> dict[str, float]:
        """Means over the steps since the last reset, and the mechanisms' current scalars, all read at once."""
        return self.metrics.read(self.variant.scalars(), reset)
