"""`sae train --accumulate N`: compute a batch in N equal parts and add up their gradients.

A step then keeps the latents of only one part in memory. Most losses are means over tokens, so they equal the mean of
the parts' means. Code that needs the whole batch reads `Step.whole`, which contains the input. If a loss or mechanism
of the recipe sets `reads_batch`, `Step.whole` also contains the errors and L0, which a first pass computes without
gradients. BatchTopK first runs a pass over the pre-activations to find the smallest value that it keeps in the batch. A
recipe is rejected if one of its losses, mechanisms or activations needs the latents of all tokens at once
(`undivided`). N changes the order of summation, so results differ by rounding from a run with N = 1.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from ..common.errors import UsageError
from .activation_functions import Activation, KeepTopK
from .step import LossTerm, Mechanism, Step
from .variant import Variant


class WholeBatch(Step):
    """A batch that is computed in parts. This step has no `pre_BF`, `f_BF`, `kept`, `counts_F` or `recon_BD`."""

    def __init__(self, i: Tensor, variant: Variant, optimizer: torch.optim.Optimizer, x_BD: Tensor) -> None:
        self.i, self.sae, self.optimizer = i, variant.sae, optimizer
        self.x_BD = variant.normalize(x_BD)
        self.part_of, self.metrics, self.statistics, self._squared_error = None, {}, {}, None
        self.readers = [m for m in variant.modules() if isinstance(m, Mechanism) and m.combine]

    @torch.no_grad()
    def summarize(self, parts: Iterator[Step]) -> dict[str, Tensor]:
        """Combine the values of the parts (not their latents) into values of the batch, and return the mean losses."""
        errors, l0s, fired_F = [], [], torch.zeros(self.sae.d_sae, dtype=torch.bool, device=self.x_BD.device)
        losses: dict[str, list[Tensor]] = {}
        metrics: dict[str, list[Tensor]] = {}
        statistics: dict[Mechanism, list[Tensor]] = {mechanism: [] for mechanism in self.readers}
        for step in parts:
            errors.append(step.error_BD.detach())
            l0s.append(step.l0)
            fired_F |= step.fired_F
            for name, loss in step.losses.items():
                losses.setdefault(name, []).append(loss.detach())
            for name, value in step.metrics.items():
                metrics.setdefault(name, []).append(value.detach())
            for mechanism, values in statistics.items():
                values.append(mechanism.statistic(step))
            del step  # free its memory before the next part is computed
        self._error_BD, self.l0, self.fired_F = torch.cat(errors), torch.stack(l0s).mean(), fired_F
        for mechanism, values in statistics.items():
            stacked_P = torch.stack(values)
            self.statistics[mechanism] = stacked_P.mean(0) if mechanism.combine == "mean" else stacked_P.amin(0)
        # Integer metrics are counts over the weights, so they are the same in every part.
        self.metrics = {n: torch.stack(v).mean() if v[0].is_floating_point() else v[0] for n, v in metrics.items()}
        return {name: torch.stack(values).mean() for name, values in losses.items()}


def run_in_parts(
    variant: Variant,
    i: Tensor,
    x_BD: Tensor,
    optimizer: torch.optim.Optimizer,
    count: int,
    precision: Callable[[], AbstractContextManager[None]],
    backward: bool = True,
) -> tuple[WholeBatch, dict[str, Tensor]]:
    """Run the forward pass of step i in `count` parts and, if `backward` is set, compute the gradients.

    `precision` returns a context manager that sets the precision of matrix products. Returns the batch and its weighted
    losses, detached from the graph. If `backward` is not set, there are no losses.
    """
    whole = WholeBatch(i, variant, optimizer, x_BD)
    parts = x_BD.split(len(x_BD) // count)

    def forward(with_losses: bool) -> Iterator[Step]:
        for part_BD in parts:
            with torch.set_grad_enabled(with_losses), precision():
                step = variant(i, part_BD, optimizer)
                step.part_of = whole
                if with_losses:
                    step.losses = variant.losses(step)
                    share = torch.stack(list(step.losses.values())).sum() / count
            if with_losses:
                share.backward()
            yield step
            del step

    choosing = [a for a in variant.sae.activation if isinstance(a, KeepTopK) and a.over_batch]
    try:
        for activation in choosing:
            with torch.no_grad(), precision():
                pre_activations = (variant.sae.pre_activations(variant.normalize(part_BD)) for part_BD in parts)
                activation.set_cut(pre_activations, len(x_BD))
        if not backward or any(part.reads_batch for part in losses_and_mechanisms(variant)):
            whole.summarize(forward(with_losses=False))
        return whole, whole.summarize(forward(with_losses=True)) if backward else {}
    finally:
        for activation in choosing:
            activation.cut = None


def losses_and_mechanisms(variant: Variant) -> Iterator[LossTerm | Mechanism]:
    for module in variant.modules():
        if isinstance(module, LossTerm | Mechanism):
            yield module


def reasons_against(variant: Variant) -> list[str]:
    """The reasons why the batches of a variant cannot be computed in parts; empty if they can."""
    activations = [module for module in variant.modules() if isinstance(module, Activation)]
    reasons = [part.undivided for part in [*activations, *losses_and_mechanisms(variant)]]
    return list(dict.fromkeys(filter(None, reasons)))


def check_parts(parts: int, batch_size: int, compiled: bool) -> int:
    """Return `parts`. Raises UsageError if a batch cannot be computed in that many parts."""
    if parts < 1 or batch_size % parts:
        raise UsageError(
            f"--accumulate {parts} does not divide a batch of {batch_size:,} tokens into equal parts. "
            "Give a divisor of the batch size."
        )
    if parts > 1 and compiled:
        raise UsageError("--accumulate cannot be combined with --compile. Leave one of them out.")
    return parts
