"""`sae train --compile`: torch.compile of a step's forward pass, losses and their gradient.

What moves state (mechanisms, clipping, the optimizer) stays as it is. The sums of a compiled step run in another order,
so it is another run than an eager one, in the last bits and soon in more; the choice is part of a run's identity. Shapes
are compiled as they are, never as variables: what a step computes does not depend on which shapes came before, and so a
run that goes on from a checkpoint is still the same bit for bit, with the same compiler on the same kind of machine.
"""

from typing import Any

import torch
from torch import Tensor

from .loop import Trainer, autocast
from .step import Step

MANY = 1 << 16


def compile_step(training: Trainer, batch_size: int) -> str | None:
    """Compile the step of a training, trying it on zeros first; None, or why it stays eager, in a few words."""
    variant, optimizer = training.variant, training.optimizer

    def pure(i: Tensor, x_BD: Tensor) -> tuple[tuple[Any, ...], dict[str, Tensor], dict[str, Tensor]]:
        step = variant(i, x_BD, optimizer)
        losses = variant.losses(step)
        return (step.x_BD, step.pre_BF, step.f_BF, step.recon_BD, step.kept), losses, step.metrics

    # One for each length of the list of dead latents and each variant: over its limit, torch would stop.
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = MANY
    compiled = torch.compile(pure, fullgraph=True, dynamic=False)

    def forward_losses(x_BD: Tensor) -> tuple[Step, dict[str, Tensor]]:
        outputs, losses, metrics = compiled(training.i, x_BD)
        return Step(training.i, variant.sae, optimizer, *outputs, metrics=metrics), losses

    try:
        with autocast(training.device):
            _, losses = forward_losses(
                torch.zeros(batch_size, variant.sae.d_in, dtype=torch.bfloat16, device=training.device)
            )
        torch.stack(list(losses.values())).sum().backward()
    except Exception as error:  # whatever the compilers of this machine come up with
        return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    finally:
        optimizer.zero_grad(set_to_none=True)
    training.forward_losses = forward_losses  # type: ignore[method-assign]
    return None
