"""Parts about the device itself: its limits, and the kernels of this package."""

import time
from collections.abc import Iterator
from typing import Any

import torch
from sizes import Sizes, seconds

from sae.common.environment import environment_record
from sae.common.precision import float32_products
from sae.train.kernels.choice import reason_against_kernels
from sae.train.kernels.operators import largest

Entries = Iterator[tuple[str, dict[str, Any]]]


def ceilings(sizes: Sizes) -> Entries:
    """Products, memory, launches and pinned copies."""
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
    """Each kernel's result beside that of a stable sort in float64, and its time beside torch's.

    A further kernel of train/kernels/operators.py gets an entry here.
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
