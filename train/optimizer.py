"""The optimizer of a variant, and the limit of its gradient."""

import torch
from torch import Tensor

from .variant import Variant


def make_optimizer(variant: Variant, device: str) -> torch.optim.Optimizer:
    """Fused Adam or AdamW with its learning rate and its skip-update flag on the device.

    They differ in the weight decay alone: Adam adds it to the (clipped) gradient, AdamW subtracts it from the weights.
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
    # Attributes that the fused kernel reads: it skips the update where found_inf is not zero.
    optimizer.grad_scale, optimizer.found_inf = None, torch.zeros((), device=device)  # type: ignore[attr-defined]
    return optimizer


def clip_gradients(variant: Variant, max_norm: float | None) -> Tensor:
    """Clip the global gradient norm to `max_norm`; returns the norm before clipping."""
    limit = float("inf") if max_norm is None else max_norm
    return torch.nn.utils.clip_grad_norm_(variant.parameters(), limit, foreach=True)
