"""Kernels run in Triton's interpreter, which counts the bytes that they load and store.

`python -m sae.tests.train.kernels.interpreted`, with TRITON_INTERPRET=1, is a worker process in which the tests call
these functions. Each returns what the kernel computes, and its cost: the number of launches, and the bytes moved.
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from sae.tests.worker_process import serve
from sae.train.kernels import batch as batch_kernels
from sae.train.kernels import gate as gate_kernels
from sae.train.kernels import jump as jump_kernels
from sae.train.kernels import pair as pair_kernels
from sae.train.kernels import prefix as prefix_kernels
from sae.train.kernels import rows
from sae.train.kernels import threshold as threshold_kernels
from sae.train.kernels.division import SUM_TILE
from sae.train.kernels.largest import find_largest
from sae.train.kernels.update import update_weights


class Traffic:
    """Counts of kernel launches and of the bytes loaded and stored.

    Masked elements do not count. Elements that are accessed several times count each time.
    """

    def __init__(self) -> None:
        self.launches = self.loaded = self.stored = 0

    @property
    def cost(self) -> tuple[int, int]:
        """The number of launches, and the bytes loaded and stored."""
        return self.launches, self.loaded + self.stored


@contextlib.contextmanager
def counting() -> Iterator[Traffic]:
    traffic, builder = Traffic(), interpreter.interpreter_builder
    load, store, run = builder.create_masked_load, builder.create_masked_store, interpreter.GridExecutor.__call__

    def counted_load(pointers: Any, mask: Any, *more: Any) -> Any:
        traffic.loaded += moved(pointers, mask)
        return load(pointers, mask, *more)

    def counted_store(pointers: Any, value: Any, mask: Any, *more: Any) -> Any:
        traffic.stored += moved(pointers, mask)
        return store(pointers, value, mask, *more)

    def counted_run(executor: Any, *args: Any, **kwargs: Any) -> Any:
        traffic.launches += 1
        return run(executor, *args, **kwargs)

    with (
        mock.patch.object(builder, "create_masked_load", counted_load),
        mock.patch.object(builder, "create_masked_store", counted_store),
        mock.patch.object(interpreter.GridExecutor, "__call__", counted_run),
    ):
        yield traffic


def moved(pointers: Any, mask: Any) -> int:
    return int(mask.data.sum()) * pointers.get_element_ty().primitive_bitwidth // 8


def largest(z_RN: Tensor, k: int, **sizes: int) -> tuple[Tensor, tuple[int, int]]:
    """The indices that the kernels find, and their cost."""
    with counting() as traffic:
        index_RK = find_largest(z_RN, k, **sizes)
    return index_RK, traffic.cost


def decode(
    arguments: dict[str, Tensor], tile: tuple[int, int] | None = None
) -> tuple[tuple[Tensor, ...], tuple[int, int]]:
    """The outputs of the kernel that decodes, and its cost."""
    with counting() as traffic:
        found = rows.decode(**arguments, tile=tile)
    return found, traffic.cost


def sum_rows(
    arguments: dict[str, Tensor], transposed: bool, tile: tuple[int, int, int] = SUM_TILE
) -> tuple[Tensor, tuple[int, int]]:
    """The sums that the kernel computes, and its cost."""
    with counting() as traffic:
        found = rows.sum_by_stretch(**arguments, transposed=transposed, tile=tile)
    return found, traffic.cost


def jump(name: str, arguments: tuple[Any, ...]) -> tuple[tuple[Tensor, ...], tuple[int, int]]:
    """The outputs of a JumpReLU kernel run with small tiles, and its cost."""
    with counting() as traffic:
        found = getattr(jump_kernels, name)(*arguments, span=8, tile=(4, 8))
    return found, traffic.cost


def gate(name: str, arguments: tuple[Any, ...]) -> tuple[tuple[Tensor, ...], tuple[int, int]]:
    """The outputs of a kernel of the gated SAE run with small tiles, and its cost."""
    with counting() as traffic, mock.patch.object(interpreter, "_convert_float", rounded):
        found = getattr(gate_kernels, name)(*arguments, span=8, tile=(4, 8))
    return found, traffic.cost


def prefix(name: str, arguments: tuple[Any, ...]) -> tuple[tuple[Tensor, ...], tuple[int, int]]:
    """The outputs of a kernel of the prefixes run with small tiles, and its cost."""
    with counting() as traffic, mock.patch.object(interpreter, "_convert_float", rounded):
        found = getattr(prefix_kernels, name)(*arguments, span=8, tile=(4, 8))
    return found, traffic.cost


def pairs(arguments: tuple[Tensor, ...]) -> tuple[Tensor, tuple[int, int]]:
    """The counts of the kernel run with small tiles, and its cost."""
    with counting() as traffic:
        found = pair_kernels.count(*arguments, tile=(4, 2))
    return found, traffic.cost


def follow(arguments: tuple[Any, ...]) -> tuple[tuple[Tensor, ...], tuple[int, int]]:
    """The threshold and the number of batches after the kernels have run on small chunks, and their cost."""
    with counting() as traffic:
        threshold_kernels.follow(*arguments, programs=4, chunk=8)
    return arguments[1:3], traffic.cost


def batch(name: str, arguments: tuple[Any, ...], tile: tuple[int, int]) -> tuple[tuple[Tensor, ...], tuple[int, int]]:
    """The outputs of a kernel of batch.py, and its cost."""
    with counting() as traffic, mock.patch.object(interpreter, "_convert_float", rounded):
        found = getattr(batch_kernels, name)(*arguments, tile=tile)
    return found, traffic.cost


def update(given: list[Any]) -> tuple[dict[str, Any], tuple[int, int]]:
    """What the kernels return, the tensors that they update in place, and their cost."""
    weights, _, firsts, seconds, _, copies, *_, failed_at = given[:11]
    with counting() as traffic, mock.patch.object(interpreter, "_convert_float", rounded):
        norm, updated = update_weights(*given)
    found = {"weights": weights, "firsts": firsts, "seconds": seconds, "copies": copies, "failed_at": failed_at}
    return {**found, "norm": norm, "updated": updated}, traffic.cost


def rounded(values: Any, source: Any, target: Any, mode: Any) -> Any:
    """A conversion to bfloat16 that rounds, as a GPU does, where the interpreter cuts bits off."""
    if (source, target) != (tl.float32, tl.bfloat16):
        return CONVERT(values, source, target, mode)
    return torch.from_numpy(np.ascontiguousarray(values)).bfloat16().view(torch.int16).numpy().view(np.uint16)


CONVERT = interpreter._convert_float


if __name__ == "__main__":
    torch.set_num_threads(1)
    assert __package__ is not None
    serve(__package__)
