"""The precision that a trained SAE encodes and decodes in, whatever is set around it."""

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..common.precision import autocast, float32_products


def in_own_precision(method: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A method of an SAE whose products are computed in its `precision`, with a result in the type of its weights.

    With None they are as around the call: in training as the run has them.
    """

    @functools.wraps(method)
    def call(sae: Any, *args: Any, **kwargs: Any) -> Tensor:
        if sae.precision is None:
            return method(sae, *args, **kwargs)
        with float32_products(sae.precision), autocast(sae.precision, sae.W_enc.device.type):
            result = method(sae, *args, **kwargs)
        return result.to(sae.W_enc.dtype)

    return call
