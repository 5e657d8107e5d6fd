"""Operations whose results on a GPU can differ between two runs, and a check whether a call is one of them.

The list is that of torch.use_deterministic_algorithms. An operation that writes at indices is harmless if the order of
the writes does not change the result: no element is written twice, or the sums are exact, such as counts. That depends
on the values, so each such call is repeated with its writes in the opposite order.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .ledger import UNORDERED, note

# Names of operations below autograd: a differentiable function appears as the operations of its backward pass.
WRITES = {  # operations with the arguments (target, dimension, index, source)
    "index_add", "index_add_", "index_copy", "index_copy_", "scatter", "scatter_", "scatter_add", "scatter_add_",
    "scatter_reduce", "scatter_reduce_",
}  # fmt: skip
PUTS = {"index_put", "index_put_", "_index_put_impl_", "_unsafe_index_put"}  # CUDA sorts sums (accumulate=True)
ALWAYS = {
    "_adaptive_avg_pool2d_backward", "_adaptive_avg_pool3d_backward", "_ctc_loss_backward", "_cudnn_ctc_loss",
    "adaptive_max_pool2d_backward", "avg_pool3d_backward", "convolution", "convolution_backward",
    "cudnn_convolution", "fractional_max_pool2d_backward", "fractional_max_pool3d_backward",
    "grid_sampler_2d_backward", "grid_sampler_3d_backward", "histc", "max_pool3d_with_indices_backward",
    "max_unpool2d", "max_unpool3d", "median", "nanmedian", "nll_loss2d_forward", "nll_loss_forward", "put",
    "put_", "reflection_pad1d_backward", "reflection_pad2d_backward", "reflection_pad3d_backward",
    "replication_pad1d_backward", "replication_pad2d_backward", "replication_pad3d_backward",
    "upsample_bicubic2d_backward", "upsample_bilinear2d_backward", "upsample_linear1d_backward",
    "upsample_trilinear3d_backward",
}  # fmt: skip
SUMS = {"cumsum", "cumsum_", "bincount"}  # unordered only for floats: cumsum of floats, bincount with weights


def check_order(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Record a call whose result can depend on an order that a GPU does not keep. `args` are not changed."""
    if name in ALWAYS or (name in SUMS and sums_fractions(name, args, kwargs)):
        note(UNORDERED, f"{name} of {shape(args[0])}")
    elif name in WRITES and len(args) > 3 and isinstance(args[3], Tensor):
        target, dimension, index, source = args[:4]
        if index.numel() > 1 and index.device.type != "meta":
            along = dimension if index.dim() == source.dim() else 0  # index_add has one index for all slices
            turned = (target.clone(), dimension, index.flip(along), source.flip(dimension), *args[4:])
            if not source.any() and len(index.unique()) < len(index.flatten()) and index.dim() == 1:
                note(UNORDERED, f"{name} of {shape(target)} adds to a place twice, as far as zeros tell")
            else:
                compare(func, name, args, turned, kwargs)
    elif name in PUTS and not (len(args) > 3 and args[3]) and isinstance(args[2], Tensor) and args[2].numel() > 1:
        indices = [index for index in args[1] if index is not None]
        if all(index.dtype == torch.int64 and index.device.type != "meta" for index in indices):
            check_put(func, name, args, kwargs, indices)


def check_put(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], indices: list[Tensor]) -> None:
    """Check a call that writes values at indices, given for some or all dimensions of the tensor."""
    spread = torch.broadcast_tensors(*indices)
    if len(indices) < len(args[1]) or spread[0].dim() != 1:  # slices, or indices of several dimensions
        places = torch.stack([index.flatten() for index in spread])
        if places.unique(dim=1).shape[1] < places.shape[1]:
            note(UNORDERED, f"{name} of {shape(args[0])} writes to a place twice")
        return
    values = args[2].expand(*spread[0].shape, *args[0].shape[len(spread) :])
    turned = (args[0].clone(), [index.flip(0) for index in spread], values.flip(0), *args[3:])
    compare(func, name, args, turned, kwargs)


def compare(
    func: Callable[..., Tensor], name: str, args: tuple[Any, ...], turned: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    one, other = func(args[0].clone(), *args[1:], **kwargs), func(*turned, **kwargs)
    if not torch.equal(one.nan_to_num(), other.nan_to_num()):
        note(UNORDERED, f"{name} of {shape(args[0])} has other bits in another order")


def sums_fractions(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if name == "bincount":
        return (args[1] if len(args) > 1 else kwargs.get("weights")) is not None
    return (kwargs.get("dtype") or args[0].dtype).is_floating_point


def shape(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
