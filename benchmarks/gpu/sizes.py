"""The sizes at which everything is measured: on a GPU, and on the simulated GPU, which only exercises the code."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

BUDGET = ("relu", "topk", "batchtopk", "matryoshka", "jumprelu", "gated", "decorrelation", "competition")


@dataclass(frozen=True)
class Sizes:
    """The sizes for an H200, on which all parts together take at most eight minutes."""

    product: int = 8192  # of a square matrix
    copied: int = 1 << 30  # bytes
    launches: int = 2000
    rounds: int = 20  # of which the median is taken
    d_in: int = 2304
    recipe: tuple[int, int] = (2304, 2048)  # latents, tokens, of every recipe
    steps: tuple[tuple[int, int], ...] = ((2304, 2048), (18432, 4096), (65536, 4096))
    k: int = 100
    stacked: int = 16  # runs of a pass
    ratios: tuple[int, ...] = (64, 128, 256, 512, 1024)  # n/k
    border: tuple[int, int] = (32768, 4096)  # latents, tokens
    checkpoint: int = 65536  # latents
    cache_gb: float = 1.0
    harvested: int = 500_000  # tokens
    window: int = 131_072
    layers: tuple[int, ...] = (5, 12, 19)
    core_rows: int = 50_000  # harvested
    core_tokens: int | None = None  # evaluated; None: the default of sae evaluate


SMALL = Sizes(
    product=64, copied=1 << 12, launches=10, rounds=1, d_in=16, recipe=(64, 32), steps=((64, 32),), k=4, stacked=2,
    ratios=(4, 16), border=(64, 32), checkpoint=64, cache_gb=2e-4, harvested=600, window=256, layers=(0, 1),
    core_rows=1500, core_tokens=256,
)  # fmt: skip


def seconds(function: Callable[[], Any], sizes: Sizes, calls: int = 1) -> float:
    """The median time of a call of `function`, including the kernels that it launches. Several calls are timed in each
    round, after one call to warm up."""
    function()
    rounds = []
    for _ in range(sizes.rounds):
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(calls):
            function()
        torch.cuda.synchronize()
        rounds.append((time.perf_counter() - started) / calls)
    return statistics.median(rounds)
