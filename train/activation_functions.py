"""Activation functions, which map pre-activations to latents. An SAE applies a chain of them and saves their names."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from . import sparse_ops
from .kernels.operators import largest

SAMPLE_EVERY = 127  # prime, so that over many rows the sample covers all latents of a dictionary


class Activation(nn.Module):
    """One function in the chain from pre-activations to latents. Its name and `options` are saved with the SAE."""

    registry: ClassVar[dict[str, type["Activation"]]] = {}
    name: ClassVar[str]
    sees_input: ClassVar[bool] = False  # whether forward takes (z_BF, x_BD), as a router does
    nonnegative: ClassVar[bool] = False  # whether no latent is ever below zero
    has_kernels: ClassVar[bool] = False  # whether training can use operators with GPU kernels
    by_kernels = False  # whether training uses these operators
    undivided: str = ""  # why a batch cannot be encoded in parts, as a sentence without a period; "" if it can

    def __init_subclass__(cls, *, name: str = "") -> None:
        if not name:
            return  # a base class
        if name in Activation.registry:
            raise TypeError(
                f"two activations are named {name!r}: {Activation.registry[name].__module__}, {cls.__module__}"
            )
        cls.name = name
        Activation.registry[name] = cls

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def rescale_(self, factor: float) -> None:
        """Change the parameters so that act(factor * z) = factor * act_before(z). ReLU and TopK need no change."""

    def recenter_(self, mean_D: Tensor) -> None:
        """Change the parameters so that act(z, x) = act_before(z, x - mean). For activations with `sees_input`."""


def activation_chain(activations: Iterable[Activation]) -> Sequence[Activation]:
    """Combine the activations into one nn.Sequential, typed as a sequence of activations."""
    return cast("Sequence[Activation]", nn.Sequential(*activations))


class ReLU(Activation, name="relu"):
    nonnegative = True

    def forward(self, z_BF: Tensor) -> Tensor:
        return z_BF.relu()


class KeepTopK(Activation):
    """Selects k latents per token and keeps the positive ones among them.

    While the mechanism AnnealK lowers k, the current k is `now`, and tensors have room for `max_k`.
    """

    now: Tensor | None  # () float32; part of the training state, not saved with an SAE
    nonnegative = True
    over_batch: ClassVar[bool] = False  # whether it selects among the latents of all tokens of a batch
    cut: Tensor | None = None  # (); if a batch is computed in parts, the smallest pre-activation kept in the batch
    has_kernels = True

    def __init__(self, k: float) -> None:
        super().__init__(k=k)
        self.k = self.max_k = k
        self.register_buffer("now", None, persistent=False)

    @property
    def anneals(self) -> bool:
        return self.training and self.now is not None and self.max_k != self.k

    def select(self, z_BF: Tensor) -> Tensor:
        """(N) int64: indices of the selected latents in the flattened z, ascending by token."""
        raise NotImplementedError

    def forward(self, z_BF: Tensor) -> Tensor:
        flat_index_N = self.select(z_BF.detach().reshape(-1, z_BF.shape[-1]))
        return sparse_ops.scatter_latents(z_BF.flatten().index_select(0, flat_index_N).relu(), flat_index_N, z_BF)

    def set_cut(self, parts: Iterable[Tensor], tokens: int) -> None:
        """Set `cut` from the pre-activations of the parts of a batch. The iterator computes one part at a time."""
        raise NotImplementedError

    def annealed(self, z: Tensor, tokens: int) -> Tensor:
        """Keep the positive latents among the largest `now * tokens` of each row of z (..., n); the others are zero."""
        assert self.now is not None
        top = z.relu().topk(int(self.max_k * tokens))
        rank = torch.arange(top.values.shape[-1], device=z.device)
        return torch.zeros_like(z).scatter(-1, top.indices, top.values * (rank < (self.now * tokens).floor()))


def topk_indices(z_BF: Tensor, k: int) -> Tensor:
    """(B, k): the indices of the k largest elements of each row, in any order.

    On a CPU, `topk` takes as long as the encoder's matrix product. So on a CPU each row is split into groups of 8
    elements: the k largest elements are in the k groups with the largest maxima.
    """
    groups, rest = divmod(z_BF.shape[1], 8)
    if z_BF.device.type != "cpu" or rest or groups < 2 * k:
        return z_BF.topk(k, sorted=False).indices
    z_B8G = z_BF.unflatten(1, (8, groups))
    group_BK = z_B8G.amax(1).topk(k, sorted=False).indices
    place_BK = z_B8G.gather(2, group_BK[:, None].expand(-1, 8, -1)).flatten(1).topk(k, sorted=False).indices
    return place_BK // k * groups + group_BK.gather(1, place_BK % k)


def largest_indices(z_N: Tensor, count: int) -> Tensor:
    """(count) int64: the indices of the largest elements, ascending. Any of several equal elements may be chosen.

    On a CPU, `topk` over all latents of a batch runs on one thread and takes longer than a matrix product on two
    threads. So on a CPU, a lower bound that slightly more than `count` elements reach is estimated from a sample, and
    `topk` runs only on the elements that reach it. The number of these elements has to be known, so the sample cannot
    be used while a step is traced with tensors that hold no values.
    """
    is_traced = type(z_N) is not Tensor or torch.compiler.is_compiling()
    found_N = None if z_N.device.type != "cpu" or is_traced else largest_by_sample(z_N, count)
    return topk_indices(z_N[None], count)[0].sort().values if found_N is None else found_N


def largest_by_sample(z_N: Tensor, count: int) -> Tensor | None:
    """Like `largest_indices`, but returns None if the sample's bound is too high."""
    sample = z_N[::SAMPLE_EVERY]
    expected = count / SAMPLE_EVERY  # how many of the `count` largest elements the sample contains on average
    margin = 0.1 * expected + 3 * math.sqrt(expected)
    rank = int(expected + margin) + 1
    if rank > len(sample):
        return None
    top = sample.topk(rank).values
    candidate_M = (z_N < top[-1]).logical_not_().nonzero()[:, 0]  # includes every NaN, which counts as large
    if len(candidate_M) < count:
        return None
    # Candidates above a second bound are kept without being ranked, so that `topk`, which runs on one thread, has less
    # to sort.
    value_M, surplus = z_N[candidate_M], len(candidate_M) - count
    open_L = (value_M <= top[max(int(expected - margin), 0)]).nonzero()[:, 0]
    if len(open_L) < surplus:  # the second bound is too low
        open_L = torch.arange(len(value_M))
    kept_M = torch.ones_like(candidate_M, dtype=torch.bool)
    kept_M[open_L[value_M[open_L].topk(surplus, largest=False, sorted=False).indices]] = False
    return candidate_M[kept_M]


class TopK(KeepTopK, name="topk"):
    """Keeps the k largest latents of each token, if they are positive (Gao et al. 2024)."""

    k: int

    def __init__(self, k: int) -> None:
        super().__init__(k)

    def select(self, z_BF: Tensor) -> Tensor:
        index_BK = largest(z_BF, self.k) if self.by_kernels and self.training else topk_indices(z_BF, self.k)
        begin_B = torch.arange(0, z_BF.numel(), z_BF.shape[1], device=z_BF.device)
        return (index_BK + begin_B[:, None]).flatten()

    def forward(self, z_BF: Tensor) -> Tensor:
        return self.annealed(z_BF, 1) if self.anneals else super().forward(z_BF)


class BatchTopK(KeepTopK, name="batchtopk"):
    """In training, keeps the B * k largest latents of a batch; afterwards, keeps all latents above `threshold`.

    See Bussmann et al. 2024.

    Because of the threshold, a loaded SAE encodes each token independently. The mechanism BatchTopKThreshold sets
    `threshold`.
    """

    threshold: Tensor  # ()
    over_batch = True

    def __init__(self, k: float) -> None:
        super().__init__(k)
        self.register_buffer("threshold", torch.zeros(()))

    def set_cut(self, parts: Iterable[Tensor], tokens: int) -> None:
        largest = None
        for z_BF in parts:
            z = z_BF.flatten() if largest is None else torch.cat([z_BF.flatten(), largest])
            largest = z.topk(min(int(self.max_k * tokens), len(z))).values
        assert largest is not None
        if self.anneals:
            assert self.now is not None
            self.cut = largest.gather(0, (self.now * tokens).floor().long().clamp(1, len(largest))[None] - 1)[0]
        else:
            self.cut = largest[int(self.k * tokens) - 1]

    def select(self, z_BF: Tensor) -> Tensor:
        z_N, count = z_BF.flatten(), int(self.k * len(z_BF))
        return largest(z_N[None], count)[0] if self.by_kernels and self.training else largest_indices(z_N, count)

    def forward(self, z_BF: Tensor) -> Tensor:
        if not self.training:
            return z_BF.relu() * (z_BF > self.threshold)
        if self.cut is not None:
            return z_BF.relu() * (z_BF >= self.cut)
        if self.anneals:
            return self.annealed(z_BF.flatten(), z_BF.shape[:-1].numel()).view_as(z_BF)
        return super().forward(z_BF)

    def rescale_(self, factor: float) -> None:
        self.threshold.mul_(factor)
