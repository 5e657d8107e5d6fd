"""Parts about the device itself: its limits, and the kernels of this package."""

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from sizes import Sizes, seconds
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map_only

from sae.common.environment import environment_record
from sae.common.precision import float32_products
from sae.train.kernels.batch_operators import (
    compare,
    compare_backward,
    compare_backward_by_torch,
    compare_by_torch,
    normalize_batch,
    normalize_by_torch,
)
from sae.train.kernels.choice import reason_against_kernels
from sae.train.kernels.gate_operator import (
    gate_gradients,
    gate_gradients_by_torch,
    gate_latents,
    gate_latents_by_torch,
)
from sae.train.kernels.gram_operator import gram
from sae.train.kernels.operators import (
    decode_by_bags,
    decode_rows,
    jump_counts,
    jump_counts_by_torch,
    jump_gradients,
    jump_gradients_by_torch,
    largest,
    sum_by_bags,
    sum_rows,
)  # fmt: skip
from sae.train.kernels.pair_operator import count_pairs, count_pairs_by_torch
from sae.train.kernels.prefix_operator import (
    compare_prefixes,
    compare_prefixes_by_torch,
    prefix_gradients,
    prefix_gradients_by_torch,
)
from sae.train.kernels.threshold_operator import follow_by_torch, follow_threshold
from sae.train.kernels.update_operator import update, update_by_torch

Entries = Iterator[tuple[str, dict[str, Any]]]


def ceilings(sizes: Sizes) -> Entries:
    """Speeds of matrix products, memory, kernel launches and pinned copies."""
    if not torch.cuda.is_available():
        raise RuntimeError("torch sees no GPU")
    yield "environment", environment_record()
    n = sizes.product
    for name, dtype, precision in (
        ("bfloat16", torch.bfloat16, "float32"),
        ("tf32", torch.float32, "tf32"),
        ("float32", torch.float32, "float32"),
    ):
        a, b = (torch.randn(n, n, device="cuda").to(dtype) for _ in range(2))
        with float32_products(precision):
            yield f"product {name}", {"flops": 2 * n**3 / seconds(lambda a=a, b=b: a @ b, sizes)}
    source = torch.ones(sizes.copied // 4, device="cuda")
    target = torch.empty_like(source)
    yield "memory", {"bytes_per_s": 2 * source.nbytes / seconds(lambda: target.copy_(source), sizes)}
    one = torch.ones(8, device="cuda")
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(sizes.launches):
        one.add_(1)
    queued = time.perf_counter() - started
    torch.cuda.synchronize()
    whole = time.perf_counter() - started
    yield "launch", {"host_s": queued / sizes.launches, "s": whole / sizes.launches}
    host = torch.empty(sizes.copied // 4, pin_memory=True)
    for name, copy in (
        ("to the GPU", lambda: target.copy_(host, non_blocking=True)),
        ("to the host", lambda: host.copy_(target, non_blocking=True)),
    ):
        yield f"pinned copy {name}", {"bytes_per_s": host.nbytes / seconds(copy, sizes)}


def kernels(sizes: Sizes) -> Entries:
    """Compare each kernel's result with a stable sort in float64 or with torch, and its time with torch's.

    Add an entry here for each new kernel of train/kernels.
    """
    if reason := reason_against_kernels("cuda"):
        yield "refused", {"reason": reason}
    for d_sae, batch in sizes.steps:
        for dtype in (torch.bfloat16, torch.float32):
            z_BF = torch.randn(batch, d_sae, device="cuda").to(dtype)
            ways = {"rows": (z_BF, sizes.k), "batch": (z_BF.view(1, -1), sizes.k * batch)}
            for name, (z_RN, k) in ways.items():
                exact = z_RN.double().sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values
                found = largest(z_RN, k)
                yield (
                    f"largest of {name}, {d_sae}x{batch} {str(dtype).removeprefix('torch.')}",
                    {
                        "wrong": int((found != exact).sum()),
                        "ms": 1e3 * seconds(lambda z=z_RN, k=k: largest(z, k), sizes),
                        "torch_ms": 1e3 * seconds(lambda z=z_RN, k=k: z.topk(k, sorted=False), sizes),
                    },
                )
        for name, kernel, by_torch in sums(sizes, d_sae, batch):
            apart = [(a - b).abs() > 1e-2 * b.abs().max() for a, b in zip(kernel(), by_torch(), strict=True)]
            yield (
                f"{name}, {d_sae}x{batch} bfloat16",
                {
                    "wrong": sum(int(one.sum()) for one in apart),
                    "ms": 1e3 * seconds(kernel, sizes),
                    "torch_ms": 1e3 * seconds(by_torch, sizes),
                },
            )


def sums(sizes: Sizes, d_sae: int, batch: int) -> Iterator[tuple[str, Callable[[], Any], Callable[[], Any]]]:
    """The kernels that compute sums, each with the torch operations that compute nearly the same result."""
    device, count = torch.device("cuda"), batch * sizes.k
    row_FD, x_BD = (torch.randn(rows, sizes.d_in, device=device) for rows in (d_sae, batch))
    value_N, bias_D = torch.randn(count, device=device), torch.randn(sizes.d_in, device=device)
    latent_N = torch.randint(0, d_sae, (count,), device=device)
    token_start_B = torch.arange(0, count, sizes.k, device=device)
    one, dtype = torch.ones((), device=device), torch.bfloat16
    rows_BD = x_BD.bfloat16()
    normalizing, comparing, back = (rows_BD, bias_D, one, bias_D, dtype), (rows_BD, bias_D, x_BD), (x_BD, one, dtype)
    yield "normalize_batch", lambda: normalize_batch(*normalizing), lambda: normalize_by_torch(*normalizing)
    yield "compare", lambda: compare(*comparing), lambda: compare_by_torch(*comparing)
    yield "compare_backward", lambda: compare_backward(*back), lambda: compare_backward_by_torch(*back)
    decoding = value_N, row_FD.bfloat16(), latent_N, token_start_B, bias_D, x_BD
    yield "decode_rows", lambda: decode_rows(*decoding), lambda: decode_by_bags(*decoding)
    by_latent_N, order_N = latent_N.sort(stable=True)
    start_F = torch.searchsorted(by_latent_N, torch.arange(d_sae, device=device))
    adding = order_N.div(sizes.k, rounding_mode="floor"), x_BD.bfloat16(), start_F, value_N[order_N]
    yield "sum_rows", lambda: [sum_rows(*adding, transposed=True)], lambda: [sum_by_bags(*adding, transposed=True)]
    z_BF, g_BF = (torch.randn(batch, d_sae, device=device).bfloat16() for _ in range(2))
    theta_F, eps = torch.rand(d_sae, device=device), 0.1
    jump = z_BF, theta_F, g_BF, eps, False
    yield "jump_gradients", lambda: jump_gradients(*jump), lambda: jump_gradients_by_torch(*jump)
    yield "jump_counts", lambda: jump_counts(z_BF, theta_F, eps), lambda: jump_counts_by_torch(z_BF, theta_F, eps)
    gate = z_BF, theta_F, theta_F, theta_F, g_BF, g_BF, theta_F[0]
    yield "gate_latents", lambda: gate_latents(*gate[:4]), lambda: gate_latents_by_torch(*gate[:4])
    yield "gate_gradients", lambda: gate_gradients(*gate), lambda: gate_gradients_by_torch(*gate)
    prefixes = x_BD.expand(5, -1, -1).bfloat16(), bias_D, x_BD, torch.ones(5, device=device)
    yield "compare_prefixes", lambda: compare_prefixes(*prefixes[:3]), lambda: compare_prefixes_by_torch(*prefixes[:3])
    yield "prefix_gradients", lambda: prefix_gradients(*prefixes), lambda: prefix_gradients_by_torch(*prefixes)
    word_FW = torch.randint(-(2**63), 2**63 - 1, (d_sae, max(batch // 64, 1)), device=device)
    pairs = word_FW, *torch.randint(d_sae, (2, 16 * d_sae), device=device)
    yield "count_pairs", lambda: [count_pairs(*pairs)], lambda: [count_pairs_by_torch(*pairs)]
    f_GBM = z_BF.unflatten(1, (-1, math.gcd(d_sae, 2048))).transpose(0, 1)
    yield "gram", lambda: [gram(f_GBM)], lambda: [f_GBM.float().mT @ f_GBM.float()]
    following = z_BF.flatten()[:count], 0 * one, torch.zeros((), dtype=torch.int64, device=device), 0.01
    yield "follow_threshold", changing(follow_threshold, following), changing(follow_by_torch, following)
    updating = update_arguments(sizes.d_in, d_sae)
    yield "update", changing(update, updating), changing(update_by_torch, updating)


def update_arguments(d_in: int, d_sae: int) -> tuple[Any, ...]:
    """The arguments of `update` for the weights of an SAE, in its first step."""
    shapes = (d_sae, d_in), (d_in, d_sae), (d_sae,), (d_in,)
    weights, gradients = (
        [F.normalize(torch.randn(*shape, device="cuda"), dim=-1) for shape in shapes] for _ in range(2)
    )
    gradients[:2] = [gradient.bfloat16() for gradient in gradients[:2]]
    firsts, seconds = ([torch.zeros_like(weight) for weight in weights] for _ in range(2))
    one, place = torch.ones((), device="cuda"), torch.zeros((), dtype=torch.int64, device="cuda")
    return (
        weights, gradients, firsts, seconds, [0 * one for _ in weights], [weight.bfloat16() for weight in weights[:2]],
        [True, False, False, False], [0.0] * 4, one, place, place - 1, 1e-3 * one.view(1),
        torch.tensor([[0.1, 0.03]], device="cuda"), 1.0, 0.9, 0.999, 1e-8, False,
    )  # fmt: skip


def changing(operator: Callable[..., Any], given: tuple[Any, ...]) -> Callable[[], list[Tensor]]:
    """A function that calls the operator with copies of its arguments, because the operator changes them. Each call
    returns the copied tensors."""
    own = tree_map_only(Tensor, Tensor.clone, given)

    def call() -> list[Tensor]:
        operator(*own)
        return [leaf for leaf in tree_leaves(own) if isinstance(leaf, Tensor)]

    return call
