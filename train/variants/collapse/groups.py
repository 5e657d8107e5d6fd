"""Paper 000: groups of latents with their own learning rates (4.1), and winner-take-all within them (4.2)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...activation_functions import Activation
from ...sae import SAE
from ...step import Mechanism, Step
from .monitors import UtilizationEMA


class DecoderRows(nn.Module):
    """The decoder's rows in equal groups, as losses and constraints compare them.

    They are W_dec itself, unless Gram-Schmidt in the forward pass makes W_dec out of free rows.
    """

    free_FD: nn.Parameter | None

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.register_parameter("free_FD", None)

    def parameter(self, sae: SAE) -> nn.Parameter:
        """The rows that the optimizer moves (F, D)."""
        return sae.W_dec if self.free_FD is None else self.free_FD

    def grouped(self, sae: SAE) -> Tensor:
        """The same by group (G, M, D)."""
        return self.parameter(sae).unflatten(0, (self.groups, -1))


# 4.1, second component: groups, each with its learning rate.


class GroupUtilization(Mechanism):
    """u_g of (2) for each group: the mean, or the maximum, of its latents' utilization. A monitor."""

    def __init__(self, utilization: UtilizationEMA, count: int, stat: str = "mean") -> None:
        super().__init__()
        self.utilisation, self.count, self.stat = utilization, count, stat  # the spelling is a key in checkpoints

    @property
    def u_G(self) -> Tensor:
        u_GM = self.utilisation.u_F.view(self.count, -1)
        return u_GM.mean(1) if self.stat == "mean" else u_GM.amax(1)

    def scalars(self) -> dict[str, Tensor]:
        return {"group_utilisation_min": self.u_G.min(), "group_utilisation_max": self.u_G.max()}


class GroupLearningRate(Mechanism):
    """eta_g = eta_0 softmax(EMA(u_g)) (2), for W_dec, W_enc and b_enc of the latents in a group.

    Adam ignores the scale of a gradient, so the update is scaled, not the gradient. By `mode` the rate over eta_0 is
        softmax        softmax(u): the paper
        softmax_mean1  G softmax(u), so that the mean rate is eta_0
        softmax_temp   the same with u divided by its standard deviation
        inverse        the same with -u, which favors the groups that are used least

    Paper: a softmax over 16 groups sums to 1 and is flat for a u below 0.1, so `softmax` divides the rate by 16 and
    does little else.
    """

    def __init__(self, rows: DecoderRows, groups: GroupUtilization, mode: str = "softmax_mean1") -> None:
        super().__init__()
        self.rows, self.groups, self.mode = rows, groups, mode
        self.weights_before: list[Tensor] = []  # before this step's update; not part of the state

    @property
    def rate_G(self) -> Tensor:
        u_G = self.groups.u_G
        if self.mode == "softmax":
            return u_G.softmax(0)
        if self.mode != "softmax_mean1":
            u_G = u_G / u_G.std(correction=0).clamp_min(1e-8) * (-1 if self.mode == "inverse" else 1)
        return self.groups.count * u_G.softmax(0)

    def _weights(self, step: Step) -> list[Tensor]:
        return [self.rows.parameter(step.sae).data, step.sae.W_enc.data, step.sae.b_enc.data]

    def after_backward(self, step: Step) -> None:
        self.weights_before = [weight.clone() for weight in self._weights(step)]

    def after_step(self, step: Step) -> None:
        rate_F = self.rate_G.repeat_interleave(step.sae.d_sae // self.groups.count)
        rates = (rate_F[:, None], rate_F, rate_F)
        for weight, before, rate in zip(self._weights(step), self.weights_before, rates, strict=True):
            weight.copy_(before + rate * (weight - before))

    def scalars(self) -> dict[str, Tensor]:
        return {"group_rate_min": self.rate_G.min(), "group_rate_max": self.rate_G.max()}


# 4.2, third process: winner-take-all with local inhibition.


class WinnerTakeAll(Activation, name="winner_take_all"):
    """Neighbors inhibit each other, then only the largest latents of each group stay on.

        subtractive  f_i <- ReLU(f_i - gamma max_{j near i} s_ij f_j)
        divisive     f_i <- f_i^2 / (f_i + gamma max_{j near i} s_ij f_j)

    s_ij = max(0, cos) and the neighbors are saved with the SAE. Both forms scale with f. The strongest neighbor gets
    no gradient: it would cost a copy of the latents for each neighbor.
    """

    near_FN: Tensor  # indices, as floats like everything that is saved with an SAE
    closeness_FN: Tensor

    def __init__(
        self,
        d_sae: int,
        groups: int,
        winners: int,
        gamma: float = 0.25,
        neighbours: int = 8,
        inhibition: str = "subtractive",
    ) -> None:
        super().__init__(
            d_sae=d_sae, groups=groups, winners=winners, gamma=gamma, neighbours=neighbours, inhibition=inhibition
        )
        self.groups, self.winners, self.gamma, self.inhibition = groups, winners, gamma, inhibition
        self.neighbours = min(neighbours, d_sae // groups - 1)
        self.register_buffer("near_FN", torch.zeros(d_sae, self.neighbours))
        self.register_buffer("closeness_FN", torch.zeros(d_sae, self.neighbours))

    def forward(self, f_BF: Tensor) -> Tensor:
        if self.inhibition != "off":
            f_BF = self.inhibit(f_BF)
        f_BGM = f_BF.unflatten(-1, (self.groups, -1))
        top = f_BGM.topk(self.winners, dim=-1, sorted=False)
        return torch.zeros_like(f_BGM).scatter(-1, top.indices, top.values).flatten(-2)

    def inhibit(self, f_BF: Tensor) -> Tensor:
        """Latents after inhibition by their strongest neighbor."""
        with torch.no_grad():
            near_FN, rival_BF = self.near_FN.long(), torch.zeros_like(f_BF)
            for n in range(self.neighbours):
                weighted_BF = f_BF.index_select(-1, near_FN[:, n]) * self.closeness_FN[:, n]
                rival_BF = torch.maximum(rival_BF, self.gamma * weighted_BF)
        if self.inhibition == "subtractive":
            return (f_BF - rival_BF).relu()
        return f_BF * f_BF / (f_BF + rival_BF).clamp_min(1e-12)


class Neighbours(Mechanism):
    """Finds each latent's nearest neighbors in its group every `every` steps, by angles of the encoder or the decoder.

    Paper: says proximity in feature space. Rows of the decoder are orthogonal in their group from run 6 on, so by the
    decoder no two latents are near each other.
    """

    def __init__(self, activation: WinnerTakeAll, sae: SAE, near: str = "encoder", every: int = 100) -> None:
        super().__init__()
        self.activation, self.near, self.every = activation, near, every
        self.update(sae)

    @torch.no_grad()
    def update(self, sae: SAE) -> None:
        """Write neighbors and their cosines into the activation."""
        groups, count = self.activation.groups, self.activation.neighbours
        rows_FD = sae.W_enc.T if self.near == "encoder" else sae.W_dec
        unit_GMD = F.normalize(rows_FD, dim=1).unflatten(0, (groups, -1))
        cosine_GMM = unit_GMD @ unit_GMD.mT
        cosine_GMM.diagonal(dim1=1, dim2=2).fill_(-2.0)
        top = cosine_GMM.topk(count, dim=-1)
        first_G = torch.arange(groups, device=rows_FD.device) * unit_GMD.shape[1]
        self.activation.near_FN.copy_((top.indices + first_G[:, None, None]).flatten(0, 1))
        self.activation.closeness_FN.copy_(top.values.clamp_min(0).flatten(0, 1))

    def every_n_steps(self, step: Step) -> None:
        self.update(step.sae)

    def scalars(self) -> dict[str, Tensor]:
        return {"neighbour_cosine": self.activation.closeness_FN.mean()}
