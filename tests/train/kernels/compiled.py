"""Compilation of the kernels for a GPU. Triton needs no GPU for that.

`python -m sae.tests.train.kernels.compiled` is a worker process in which the tests call these functions.
"""

import contextlib
import itertools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from triton.runtime.jit import JITFunction

from sae.tests.worker_process import serve
from sae.train.kernels import batch, gate, pair, prefix, threshold
from sae.train.kernels.jump import counts, gradients
from sae.train.kernels.largest import find_largest
from sae.train.kernels.rows import decode, sum_by_stretch
from sae.train.kernels.update import update_weights

POINTERS = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64"}


def compile_largest(shapes: list[tuple[int, int, int]], dtype: torch.dtype, capability: int) -> dict[str, int]:
    """Compile all kernels launched for these shapes (rows, n and k), and return the `stack_bytes` of each."""
    with recording() as launched:
        for rows, n, k in shapes:
            find_largest(torch.zeros(rows, n, dtype=dtype), k)
    return compile_launched(launched, capability)


def compile_rows(counts: list[int], dtype: torch.dtype, capability: int) -> dict[str, int]:
    """Compile the kernels that decode `counts` latents of a token, and those that sum rows in both layouts."""
    with recording() as launched:
        for count in counts:
            index_N = torch.arange(count)
            row_FD, x_BD = torch.zeros(count, 64, dtype=dtype), torch.zeros(1, 64)
            decode(torch.zeros(count), row_FD, index_N, index_N[:1], torch.zeros(64), x_BD)
        for transposed in (False, True):
            sum_by_stretch(index_N, row_FD, index_N[:1], torch.zeros(count), transposed)
    return compile_launched(launched, capability)


def compile_jump(dtype: torch.dtype, capability: int) -> dict[str, int]:
    """Compile the kernels of JumpReLU."""
    z_BF, theta_F = torch.zeros(1024, 64, dtype=dtype), torch.zeros(64)
    with recording() as launched:
        counts(z_BF, theta_F, 0.1)
        for to_input in (False, True):
            gradients(z_BF, theta_F, z_BF, 0.1, to_input)
    return compile_launched(launched, capability)


def compile_gate(dtype: torch.dtype, capability: int) -> dict[str, int]:
    """Compile the kernels of the gated SAE."""
    z_BF, parameter_F = torch.zeros(1024, 64, dtype=dtype), torch.zeros(64)
    with recording() as launched:
        gate.latents(z_BF, parameter_F, parameter_F, parameter_F)
        gate.gradients(z_BF, parameter_F, parameter_F, parameter_F, z_BF, z_BF, torch.zeros(()))
    return compile_launched(launched, capability)


def compile_pairs(capability: int) -> dict[str, int]:
    """Compile the kernel that counts pairs."""
    index_P = torch.zeros(100, dtype=torch.int64)
    with recording() as launched:
        pair.count(index_P.view(10, 10), index_P, index_P)
    return compile_launched(launched, capability)


def compile_threshold(dtype: torch.dtype, capability: int) -> dict[str, int]:
    """Compile the kernels that update the threshold of BatchTopK."""
    with recording() as launched:
        threshold.follow(torch.zeros(5000, dtype=dtype), torch.zeros(()), torch.zeros((), dtype=torch.int64), 0.1)
    return compile_launched(launched, capability)


def compile_prefixes(counts: list[int], dtype: torch.dtype, capability: int) -> dict[str, int]:
    """Compile the kernels that compare prefixes with the batch, for each number of prefixes in `counts`."""
    with recording() as launched:
        for count in counts:
            given = torch.zeros(count, 256, 128, dtype=dtype), torch.zeros(128), torch.zeros(256, 128)
            prefix.compare(*given)
            prefix.gradients(*given, torch.zeros(count))
    return compile_launched(launched, capability)


def compile_batch(dtype: torch.dtype, capability: int) -> dict[str, int]:
    """Compile the kernels of batch.py for batches and products of this dtype."""
    x_BD, bias_D, one = torch.zeros(64, 2304, dtype=dtype), torch.zeros(2304), torch.ones(())
    with recording() as launched:
        for scale, subtracted_D in ((one, bias_D), (bias_D, None)):
            batch.normalize(x_BD, bias_D, scale, subtracted_D, dtype)
        batch.compare(x_BD, bias_D, x_BD.float())
        batch.compare_backward(x_BD.float(), one, dtype)
    return compile_launched(launched, capability)


def compile_update(widths: list[int], dtype: torch.dtype, capability: int) -> dict[str, int]:
    """Compile the kernels that update a matrix with rows of norm 1 and a vector, with gradients of this dtype."""
    one, number = torch.zeros(()), torch.zeros((), dtype=torch.int64)
    with recording() as launched:
        for width, coupled, beta1 in itertools.product(widths, (True, False), (0.9, 0.0)):
            weights = [torch.zeros(2, width), torch.zeros(width)]
            update_weights(
                weights, [weight.to(dtype) for weight in weights], weights, weights, [one, one],
                [weights[0].bfloat16()], [True, False], [0.1, 0.1], one, number, number, one, one, 1.0, beta1,
                0.999, 1e-8, coupled,
            )  # fmt: skip
    return compile_launched(launched, capability)


Launched = list[tuple[Any, tuple[Any, ...], dict[str, Any]]]


@contextlib.contextmanager
def recording() -> Iterator[Launched]:
    """Record kernel launches and their arguments instead of running the kernels."""
    launched: Launched = []

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launched.append((kernel, args, options))

    with mock.patch.object(JITFunction, "run", record):
        yield launched


def compile_launched(launched: Launched, capability: int) -> dict[str, int]:
    target, stacks = GPUTarget("cuda", capability, 32), {}
    for kernel, args, options in launched:
        given = dict(zip(kernel.arg_names, args, strict=True))
        fixed = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
        types = {name: "constexpr" if name in fixed else type_of(value) for name, value in given.items()}
        constants = {(kernel.arg_names.index(name),): given[name] for name in fixed}
        aligned = [name for name in types if types[name] != "constexpr" and is_aligned(given[name])]
        attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
        built = compile(ASTSource(kernel, types, constants, attributes), target, options)
        name = f"{kernel.__name__} {[given[name] for name in sorted(fixed)]}"
        if given.get("COPIED"):
            assert "cvt.rn.bf16" in built.asm["ptx"], "weights are rounded to the nearest number"
        stacks[name] = stack_bytes(built.asm["cubin"])
    return stacks


def type_of(value: Any) -> str:
    """Triton's name for the type of an argument."""
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def is_aligned(value: Any) -> bool:
    """Whether Triton specializes a kernel on this argument being a multiple of 16. Addresses of tensors always are."""
    return isinstance(value, torch.Tensor) or isinstance(value, int) and value % 16 == 0


def stack_bytes(code: bytes) -> int:
    """The stack memory of each thread of a kernel, beyond its registers."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        shown = subprocess.run([knobs.nvidia.cuobjdump.path, "-res-usage", file.name], capture_output=True, check=True)
    (stack,) = re.findall(r"STACK:(\d+)", shown.stdout.decode() + shown.stderr.decode())
    return int(stack)


if __name__ == "__main__":
    torch.set_num_threads(1)
    assert __package__ is not None
    serve(__package__)
