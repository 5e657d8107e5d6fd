"""Logits in float32 from a model that computes in bfloat16 or float16.

Such a model rounds its logits, both before and after a soft cap; around 16, the rounding steps are 1/16. With such
rounding, the KL divergence between two distributions is about 1e-3 nats where it should be zero. So the last matrix
multiplication returns its float32 sums unrounded, and the model's own code applies caps and scales in float32.
"""

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from .splice import replacing_forward

WEIGHTS_AT_ONCE = 2**24  # number of elements that are converted to float32 at once, on a CPU


def unrounded_logits(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """A context manager that makes a causal language model compute its logits in float32.

    It has no effect if the model is in float32, or if the last layer is not a plain linear layer (for example, because
    the layer is quantized).
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if type(head) is not nn.Linear or head.weight.dtype not in (torch.bfloat16, torch.float16):
        return contextlib.nullcontext()
    return replacing_forward(head, lambda x: unrounded_linear(x, head.weight, head.bias))


def unrounded_linear(x: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> Tensor:
    """x W^T + b in float32 (..., V), from x (..., D) and weights of lower precision."""
    logits = UnroundedProduct.apply(x.flatten(0, -2).to(weight_VD.dtype), weight_VD).unflatten(0, x.shape[:-1])
    return logits if bias_V is None else logits + bias_V


class UnroundedProduct(torch.autograd.Function):
    """x W^T with unrounded sums. Only x gets a gradient, in its own dtype, as in the model's own multiplication."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_VD: Tensor) -> Tensor:
        ctx.save_for_backward(weight_VD)
        if x_TD.device.type == "cuda":
            return torch.mm(x_TD, weight_VD.T, out_dtype=torch.float32)
        rows = max(1, WEIGHTS_AT_ONCE // weight_VD.shape[1])
        return torch.cat([x_TD.float() @ part_VD.float().T for part_VD in weight_VD.split(rows)], 1)

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor, None]:
        (weight_VD,) = ctx.saved_tensors
        return gradient[0].to(weight_VD.dtype) @ weight_VD, None
