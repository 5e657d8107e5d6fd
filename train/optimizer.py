"""The optimizer of a variant, and gradient clipping."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .variant import Variant


def make_optimizer(variant: Variant, device: str) -> torch.optim.Optimizer:
    """Fused Adam or AdamW. Its learning rate and its flag to skip an update are on the device.

    Adam and AdamW differ only in weight decay: Adam adds it to the (clipped) gradient, AdamW subtracts it from the
    weights.
    """
    settings, W_enc = variant.optimization, variant.sae.W_enc
    others = [p for p in variant.parameters() if p is not W_enc]
    decay = settings.weight_decay
    decay_of_others = decay if settings.weight_decay_on == "all" else 0.0
    kind = torch.optim.Adam if settings.weight_decay_form == "coupled" else torch.optim.AdamW
    optimizer = kind(
        [{"params": [W_enc], "weight_decay": decay}, {"params": others, "weight_decay": decay_of_others}],
        lr=torch.tensor(settings.lr, device=device),
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        fused=True,
    )
    # The fused kernel reads these attributes: it divides gradients by grad_scale, and skips the update if found_inf is
    # not zero.
    optimizer.grad_scale, optimizer.found_inf = None, torch.zeros((), device=device)  # type: ignore[attr-defined]
    return optimizer


class WeightUpdate:
    """Clips the gradient and updates the weights of a variant."""

    def step(self, loss: Tensor, i: Tensor, failed_at: Tensor) -> Tensor:
        """Take step `i` () int64, and return the norm of the gradient.

        `failed_at` () int64 is the first step whose loss or gradient was not finite, or -1. If step `i` is the first
        such step, `failed_at` is set to `i`. From that step on, the weights do not change. The host notices this when
        it next logs.
        """
        raise NotImplementedError

    def make_copies(self) -> None:
        """Create the copies of weights that matrix products read, unless they exist. Called before each forward
        pass."""

    def renew_copies(self) -> None:
        """Update the copies that `make_copies` made. Call this after other code has written weights."""


class OptimizerUpdate(WeightUpdate):
    """Updates the weights with a torch optimizer, by torch operations instead of kernels."""

    def __init__(self, variant: Variant, optimizer: torch.optim.Optimizer, steps: int) -> None:
        self.variant, self.optimizer, self.steps = variant, optimizer, steps

    def step(self, loss: Tensor, i: Tensor, failed_at: Tensor) -> Tensor:
        norm = clip_gradients(self.variant, self.optimizer)
        failed = (failed_at < 0) & ~torch.isfinite(loss + norm)
        failed_at.copy_(torch.where(failed, i, failed_at))
        self.optimizer.found_inf.copy_(failed_at >= 0)  # type: ignore[attr-defined]
        self.optimizer.param_groups[0]["lr"].copy_(self.variant.optimization.lr_at(i, self.steps))
        self.optimizer.step()
        return norm


@contextlib.contextmanager
def capturable(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """A context manager inside which the optimizer may be captured in a CUDA graph.

    The optimizer keeps its learning rate, step counts and flags on the device, so its results do not depend on torch's
    setting `capturable`. If `capturable` is false, torch refuses to capture the optimizer. If `capturable` is true,
    torch warns whenever the optimizer is not captured.
    """
    for group in optimizer.param_groups:
        group["capturable"] = True
    try:
        yield
    finally:
        for group in optimizer.param_groups:
            group["capturable"] = False


def clip_gradients(variant: Variant, optimizer: torch.optim.Optimizer) -> Tensor:
    """Limit the global gradient norm of the next update to the option `clip`. Returns the norm before clipping.

    The kernel that updates the weights also scales the gradients, so clipping needs no separate pass.
    """
    gradients = [p.grad for p in variant.parameters() if p.grad is not None]
    norm = total_norm(gradients)
    if (limit := variant.optimization.clip) is not None:
        scale = ((norm + 1e-6) / limit).clamp_min(1.0)
        if scale.dtype == torch.float32:
            optimizer.grad_scale = scale  # type: ignore[attr-defined]
        else:  # the kernel reads only float32
            torch._foreach_div_(gradients, scale)
    return norm


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Scalar: the L2 norm of all elements together.

    Matrices are first reduced row by row: a CPU uses all threads for that, but only one for the norm of a whole tensor.
    """
    parts = [torch.linalg.vector_norm(g, dim=-1) if g.dim() > 1 else g for g in gradients]
    return torch.linalg.vector_norm(torch.cat([part.flatten() for part in parts]))
