"""The operator that updates all weights at once: see operators.py."""

import torch
from torch import Tensor

from ..optimizer import total_norm


def update_by_torch(
    weights: list[Tensor],
    gradients: list[Tensor],
    firsts: list[Tensor],
    seconds: list[Tensor],
    steps: list[Tensor],
    copies: list[Tensor],
    unit: list[bool],
    decays: list[float],
    loss: Tensor,
    i: Tensor,
    failed_at: Tensor,
    rates_S: Tensor,
    corrections_S2: Tensor,
    limit: float | None,
    beta1: float,
    beta2: float,
    eps: float,
    coupled: bool,
) -> tuple[Tensor, Tensor]:
    """Take a step of Adam. The result equals that of `clip_gradients`, the optimizer and `UnitNormDecoder`.

    Args:
        weights: float32, each contiguous.
        gradients: their gradients, float32 or bfloat16.
        firsts: Adam's first moments. If `beta1` is 0, first moments affect nothing, and kernels leave them as they are.
        seconds: Adam's second moments.
        steps: () float32 for each weight: its number of updates so far, which this function does not increment.
        copies: bfloat16 copies of the first weights; they receive the updated values.
        unit: for each weight, whether it is a matrix with unit rows. The gradients of such rows are projected onto the
            tangent space, and the rows are normalized after the update.
        decays: the weight decay of each weight. If `coupled` is true, the decay is added to the clipped gradient;
            otherwise it shrinks the weight.
        loss: () float32.
        i: () int64, index of the step.
        failed_at: () int64, the first step whose loss or gradient was not finite, or -1. Starting at that step, nothing
            is updated.
        rates_S: (S) float32, the learning rate of each step.
        corrections_S2: (S, 2) float32, 1 - beta1^s and sqrt(1 - beta2^s), for the s-th update.
        limit: maximum norm of all gradients together, after the projection; None: no limit.

    Returns:
        The norm, and 1 if the weights were updated or 0 otherwise; both () float32.
    """
    projected = [gradient.to(torch.float32, copy=True) for gradient in gradients]  # Adam scales them in place
    for weight, gradient, is_unit in zip(weights, projected, unit, strict=True):
        if is_unit:
            gradient.addcmul_(weight, (gradient * weight).sum(1, keepdim=True), value=-1)
    norm = total_norm(projected)
    failed = (failed_at < 0) & ~torch.isfinite(loss + norm)
    failed_at.copy_(torch.where(failed, i, failed_at))
    skips = (failed_at >= 0).float()
    adam = torch._fused_adam_ if coupled else torch._fused_adamw_
    for n, (weight, gradient) in enumerate(zip(weights, projected, strict=True)):
        adam(
            [weight], [gradient], [firsts[n]], [seconds[n]], [], [steps[n] + 1],
            lr=rates_S.index_select(0, i.view(1)).squeeze(), beta1=beta1, beta2=beta2, weight_decay=decays[n], eps=eps,
            amsgrad=False, maximize=False,
            grad_scale=None if limit is None else ((norm + 1e-6) / limit).clamp_min(1.0), found_inf=skips,
        )  # fmt: skip
        if unit[n]:
            normalized = weight / weight.norm(dim=1, keepdim=True).clamp_min(1e-12)
            weight.copy_(torch.where(skips > 0, weight, normalized))
    for copy, weight in zip(copies, weights, strict=False):
        copy.copy_(weight)
    return norm, 1 - skips


update = torch.library.custom_op(
    "sae::update", update_by_torch, mutates_args=("weights", "firsts", "seconds", "copies", "failed_at"),
    device_types="cpu",
)  # fmt: skip


@update.register_fake
def _(weights: list[Tensor], *others: object) -> tuple[Tensor, Tensor]:
    return tuple(weights[0].new_empty((), dtype=torch.float32) for _ in range(2))  # type: ignore[return-value]


@update.register_kernel("cuda")
def _(*given: object) -> tuple[Tensor, Tensor]:
    from .update import update_weights

    return update_weights(*given)  # type: ignore[arg-type]
