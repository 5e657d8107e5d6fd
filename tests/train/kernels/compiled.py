"""Kernels compiled for a GPU, which Triton does without one.

python -m sae.tests.train.kernels.compiled answers calls of these functions.
"""

from typing import Any
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from triton.runtime.jit import JITFunction

from sae.tests.worker_process import serve
from sae.train.kernels.largest import find_largest

POINTERS = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64"}


def compile_largest(shapes: list[tuple[int, int, int]], dtype: torch.dtype, capability: int) -> dict[str, int]:
    """Compile all kernels that are launched for these rows, n and k. Returns the bytes of machine code of each."""
    launched: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launched.append((kernel, args, options))

    with mock.patch.object(JITFunction, "run", record):
        for rows, n, k in shapes:
            find_largest(torch.zeros(rows, n, dtype=dtype), k)
    target, sizes = GPUTarget("cuda", capability, 32), {}
    for kernel, args, options in launched:
        given = dict(zip(kernel.arg_names, args, strict=True))
        fixed = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
        types = {
            name: "constexpr" if name in fixed else POINTERS[value.dtype] if isinstance(value, torch.Tensor) else "i32"
            for name, value in given.items()
        }
        constants = {(kernel.arg_names.index(name),): given[name] for name in fixed}
        built = compile(ASTSource(kernel, types, constants), target, options)
        name = f"{kernel.__name__} {[given[name] for name in sorted(fixed)]}"
        sizes[name] = len(built.asm["cubin"])
    return sizes


if __name__ == "__main__":
    torch.set_num_threads(1)
    assert __package__ is not None
    serve(__package__)
