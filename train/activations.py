"""Activation functions: the chain from pre-activations to latents. They are saved with an SAE."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from . import sparse_ops


class Activation(nn.Module):
    """One link in the chain from pre-activations to latents; its name and `options` rebuild it."""

    registry: ClassVar[dict[str, type["Activation"]]] = {}
    name: ClassVar[str]
    sees_input: ClassVar[bool] = False  # whether forward takes (z_BF, x_BD): a router does

    def __init_subclass__(cls, *, name: str = "") -> None:
        if not name:
            return  # a base of several
        if name in Activation.registry:
            raise TypeError(
                f"two activations are called {name!r}: {Activation.registry[name].__module__}, {cls.__module__}"
            )
        cls.name = name
        Activation.registry[name] = cls

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def rescale_(self, factor: float) -> None:
        """Make act(factor * z) = factor * act_before(z). Nothing to do where that holds already."""

    def recenter_(self, mean_D: Tensor) -> None:
        """Make act(z, x) = act_before(z, x - mean). Nothing to do for what does not see the input."""


class ReLU(Activation, name="relu"):
    def forward(self, z_BF: Tensor) -> Tensor:
        return z_BF.relu()


class KeepTopK(Activation):
    """Chooses k latents a token and keeps the positive ones of those.

    While `AnnealK` lowers their number it is `now`, at most the `room` that tensors have.
    """

    now: Tensor | None  # () float32; of the training, and not saved with an SAE

    def __init__(self, k: float) -> None:
        super().__init__(k=k)
        self.k = self.room = k
        self.register_buffer("now", None, persistent=False)

    @property
    def anneals(self) -> bool:
        return self.training and self.now is not None and self.room != self.k

    def select(self, z_BF: Tensor) -> Tensor:
        """(N) int64: places in the flattened z of the latents chosen, rising by token."""
        raise NotImplementedError

    def forward(self, z_BF: Tensor) -> Tensor:
        flat_index_N = self.select(z_BF.detach().reshape(-1, z_BF.shape[-1]))
        return sparse_ops.scatter_latents(z_BF.flatten().index_select(0, flat_index_N).relu(), flat_index_N, z_BF)

    def annealed(self, z: Tensor, tokens: int) -> Tensor:
        """The latents (..., n) that are positive and among the largest `now` `tokens` of their row; the others are zero."""
        assert self.now is not None
        top = z.relu().topk(int(self.room * tokens))
        rank = torch.arange(top.values.shape[-1], device=z.device)
        return torch.zeros_like(z).scatter(-1, top.indices, top.values * (rank < (self.now * tokens).floor()))


def topk_indices(z_BF: Tensor, k: int) -> Tensor:
    """Which k of each row are the largest (B, k), in any order.

    On a CPU, where `topk` takes as long as the encoder's product: they are in those k groups whose maxima are the largest.
    """
    groups, rest = divmod(z_BF.shape[1], 8)
    if z_BF.device.type != "cpu" or rest or groups < 2 * k:
        return z_BF.topk(k, sorted=False).indices
    z_B8G = z_BF.unflatten(1, (8, groups))
    group_BK = z_B8G.amax(1).topk(k, sorted=False).indices
    place_BK = z_B8G.gather(2, group_BK[:, None].expand(-1, 8, -1)).flatten(1).topk(k, sorted=False).indices
    return place_BK // k * groups + group_BK.gather(1, place_BK % k)


class TopK(KeepTopK, name="topk"):
    """Keep the k largest latents of each token, and of those the positive ones (Gao et al. 2024)."""

    def __init__(self, k: int) -> None:
        super().__init__(k)

    def select(self, z_BF: Tensor) -> Tensor:
        index_BK = topk_indices(z_BF, self.k)
        begin_B = torch.arange(0, z_BF.numel(), z_BF.shape[1], device=z_BF.device)
        return (index_BK + begin_B[:, None]).flatten()

    def forward(self, z_BF: Tensor) -> Tensor:
        return self.annealed(z_BF, 1) if self.anneals else super().forward(z_BF)


class BatchTopK(KeepTopK, name="batchtopk"):
    """Training: keep the B k largest latents of the batch. Afterwards: keep what exceeds `threshold` (Bussmann et al. 2024).

    So a loaded SAE codes each token by itself. The threshold is moved by the mechanism `Threshold`.
    """

    threshold: Tensor  # ()

    def __init__(self, k: float) -> None:
        super().__init__(k)
        self.register_buffer("threshold", torch.zeros(()))

    def select(self, z_BF: Tensor) -> Tensor:
        return z_BF.flatten().topk(int(self.k * len(z_BF)), sorted=False).indices.sort().values

    def forward(self, z_BF: Tensor) -> Tensor:
        if not self.training:
            return z_BF.relu() * (z_BF > self.threshold)
        if self.anneals:
            return self.annealed(z_BF.flatten(), z_BF.shape[:-1].numel()).view_as(z_BF)
        return super().forward(z_BF)

    def rescale_(self, factor: float) -> None:
        self.threshold.mul_(factor)
