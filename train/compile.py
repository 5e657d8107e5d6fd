"""`sae train --compile`: apply torch.compile to a step's forward pass, losses and gradients.

Code that changes state (mechanisms, clipping, the optimizer) is not compiled. A compiled step sums in a different order
from an eager step, so its results differ by rounding, and the differences grow over the run. So `--compile` is part of
a run's identity. Shapes are compiled as constants, never as variables, so that a step does not depend on earlier
shapes. A resumed run therefore still equals an uninterrupted one bit for bit, given the same compiler on the same kind
of machine.
"""

from typing import Any

import torch
from torch import Tensor

from ..common.errors import first_line
from ..common.precision import float32_products
from .kernel_update import KernelUpdate
from .loop import Trainer
from .step import Step

RECOMPILE_LIMIT = 1 << 16


def compile_step(trainer: Trainer, batch_size: int) -> str | None:
    """Compile a trainer's `forward_losses`, and try it on a batch of zeros.

    Returns None, or a short phrase that says why the trainer stays eager.
    """
    variant, optimizer = trainer.variant, trainer.optimizer
    variant.sae.by_kernels = False  # the compiler itself fuses the passes over a batch
    if isinstance(trainer.update, KernelUpdate):
        trainer.update.without_copies()  # compiled code rounds weights where it reads them

    def pure(i: Tensor, x_BD: Tensor) -> tuple[tuple[Any, ...], dict[str, Tensor], dict[str, Tensor]]:
        step = variant(i, x_BD, optimizer)
        losses = variant.losses(step)
        tensors = step.x_BD, step.computed_pre_BF, step.computed_f_BF, step.recon_BD, step.kept, step.selected_N
        return tensors, losses, step.metrics

    # Torch compiles once for each variant and each length of the list of dead latents. Torch's default limit is too
    # low for this number of compilations.
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = RECOMPILE_LIMIT
    compiled = torch.compile(pure, fullgraph=True, dynamic=False)

    def forward_losses(x_BD: Tensor) -> tuple[Step, dict[str, Tensor]]:
        outputs, losses, metrics = compiled(trainer.i, x_BD)
        x_BD, pre_BF, f_BF, recon_BD, kept, selected_N = outputs
        step = Step(trainer.i, variant.sae, optimizer, x_BD, pre_BF, f_BF, recon_BD, kept, metrics)
        step.selected_N = selected_N
        return step, losses

    zeros_BD = torch.zeros(batch_size, variant.sae.d_in, dtype=torch.bfloat16, device=trainer.device)
    try:
        with float32_products(trainer.precision):
            with trainer.autocast():
                _, losses = forward_losses(zeros_BD)
            torch.stack(list(losses.values())).sum().backward()
    except Exception as error:  # compilers may raise anything
        return first_line(error)
    finally:
        optimizer.zero_grad(set_to_none=True)
    trainer.forward_losses = forward_losses  # type: ignore[method-assign]
    return None
