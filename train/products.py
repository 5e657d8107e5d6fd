"""Encode and decode with a trained SAE in its own precision, whatever precision the caller has set."""

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..common.precision import autocast, float32_products


def in_own_precision(method: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Wrap a method of an SAE so that products use the SAE's `precision` and results have the dtype of its weights.

    If `precision` is None, products use the precision that the caller has set. In training, this is the precision of
    the run.
    """

    @functools.wraps(method)
    def call(sae: Any, *args: Any, **kwargs: Any) -> Tensor:
        if sae.precision is None:
            return method(sae, *args, **kwargs)
        with float32_products(sae.precision), autocast(sae.precision, sae.W_enc.device.type):
            result = method(sae, *args, **kwargs)
        return result.to(sae.W_enc.dtype)

    return call
