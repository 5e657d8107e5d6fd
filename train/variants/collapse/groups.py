"""Paper 000: groups of latents, with a learning rate (4.1), sampling (4.3) and winner-take-all (4.2) for each group."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...activation_functions import Activation
from ...sae import SAE
from ...step import Mechanism, Step
from .monitors import UtilizationEMA


class DecoderRows(nn.Module):
    """The decoder's rows in equal groups. Losses and constraints compare rows within a group.

    The rows are W_dec itself, unless Gram-Schmidt in the forward pass computes W_dec from free rows.
    """

    free_FD: nn.Parameter | None

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.register_parameter("free_FD", None)

    def parameter(self, sae: SAE) -> nn.Parameter:
        """The rows that the optimizer updates (F, D)."""
        return sae.W_dec if self.free_FD is None else self.free_FD

    def grouped(self, sae: SAE) -> Tensor:
        """The same rows, by group (G, M, D)."""
        return self.parameter(sae).unflatten(0, (self.groups, -1))


# 4.1, second component: groups, each with its learning rate.


class GroupUtilization(Mechanism):
    """Computes u_g of (2) for each group: the mean or the maximum of its latents' utilization."""

    def __init__(self, utilization: UtilizationEMA, count: int, stat: str = "mean") -> None:
        super().__init__()
        self.utilisation, self.count, self.stat = utilization, count, stat  # this spelling is a key in checkpoints

    @property
    def u_G(self) -> Tensor:
        u_GM = self.utilisation.u_F.view(self.count, -1)
        return u_GM.mean(1) if self.stat == "mean" else u_GM.amax(1)

    def scalars(self) -> dict[str, Tensor]:
        return {"group_utilisation_min": self.u_G.min(), "group_utilisation_max": self.u_G.max()}


class GroupUpdate(Mechanism):
    """Scales the update of each group of latents, in W_dec (or its free rows), W_enc and b_enc.

    Adam ignores the scale of a gradient, so the update is scaled instead of the gradient. The factors of several such
    mechanisms multiply.
    """

    def __init__(self, rows: DecoderRows, count: int) -> None:
        super().__init__()
        self.rows, self.count = rows, count
        self.weights_before: list[Tensor] = []  # before this step's update; not part of the state

    def factor_G(self, step: Step) -> Tensor:
        """The factor on the update of each group (G). Called once per step, after the optimizer."""
        raise NotImplementedError

    def weights(self, step: Step) -> list[Tensor]:
        """The weights that are scaled: first one of shape (F, D), then those of shape (..., F)."""
        return [self.rows.parameter(step.sae).data, step.sae.W_enc.data, step.sae.b_enc.data]

    def after_backward(self, step: Step) -> None:
        self.weights_before = [weight.clone() for weight in self.weights(step)]

    def after_step(self, step: Step) -> None:
        factor_F = self.factor_G(step).repeat_interleave(step.sae.d_sae // self.count)
        weights = self.weights(step)
        factors = (factor_F[:, None], *[factor_F] * (len(weights) - 1))
        for weight, before, factor in zip(weights, self.weights_before, factors, strict=True):
            weight.copy_(before + factor * (weight - before))


class GroupLearningRate(GroupUpdate):
    """eta_g = eta_0 softmax(EMA(u_g)) (2), for W_dec, W_enc and b_enc of the latents in a group.

    `rates_differed` counts, over all steps, the groups whose rate differed from eta_0 by more than 0.1 %. `mode`
    selects the ratio of the rate to eta_0:
        softmax        softmax(u): the paper
        softmax_mean1  G softmax(u), so that the mean rate is eta_0
        softmax_temp   as softmax_mean1, with u divided by its standard deviation
        inverse        as softmax_temp with -u, which favors the groups that are used least

    Paper: a softmax over 16 groups sums to 1 and is nearly uniform for u below 0.1, so `softmax` divides the rate by
    about 16 and has hardly any other effect.
    """

    acted_rates_differed: Tensor  # () int64

    def __init__(self, rows: DecoderRows, groups: GroupUtilization, mode: str = "softmax_mean1") -> None:
        super().__init__(rows, groups.count)
        self.groups, self.mode = groups, mode
        self.register_buffer("acted_rates_differed", torch.zeros((), dtype=torch.int64))

    @property
    def rate_G(self) -> Tensor:
        u_G = self.groups.u_G
        if self.mode == "softmax":
            return u_G.softmax(0)
        if self.mode != "softmax_mean1":
            u_G = u_G / u_G.std(correction=0).clamp_min(1e-8) * (-1 if self.mode == "inverse" else 1)
        return self.groups.count * u_G.softmax(0)

    def factor_G(self, step: Step) -> Tensor:
        rate_G = self.rate_G
        self.acted_rates_differed.add_(((rate_G - 1).abs() > 1e-3).sum())
        return rate_G

    def scalars(self) -> dict[str, Tensor]:
        return {
            "group_rate_min": self.rate_G.min(),
            "group_rate_max": self.rate_G.max(),
            "rates_differed": self.acted_rates_differed,
        }


# 4.3: importance sampling of groups.


class GroupSampling(GroupUpdate):
    """In each step, draws some groups at random and updates only these; recently used groups are drawn more often.

        s_g = 0.1/G + 0.9 u_g / sum u,   p_g = min(1, share G s_g),   update <- update [g drawn] / p_g

    u_g is the exponential moving average that (2) defines; its decay is the paper's "momentum". One uniform random
    number per step determines which groups are drawn (systematic sampling). So g is drawn with probability p_g, and
    about `share` of the groups are drawn in every step. Because of the factor 1/p_g, the expected update equals the
    update without sampling. So sampling does not change the learning rates of (2), which run 8 adds. While a group is
    not drawn, no weight of its latents changes, not even in a batch norm. The Adam moments of these weights still
    change.

    `groups_skipped` counts, over all steps, the groups that were not drawn.

    Paper: says only "adaptive per-group learning rates maintained through momentum-based importance sampling" (section
    4.3), and uses importance sampling in every run (section 5). The share, the uniform part 0.1/G and the factor 1/p
    are ours. Without the uniform part, a silent group would never be drawn again. Without 1/p, the sampling itself
    would scale learning rates by utilization, so the effect of (2) would be applied twice.
    """

    acted_groups_skipped: Tensor  # () int64
    uniform_T: Tensor  # one random number per step, drawn in advance so that a resumed run uses the same numbers

    def __init__(self, rows: DecoderRows, d_sae: int, count: int, share: float, beta: float, steps: int) -> None:
        super().__init__(rows, count)
        self.share, self.utilization = share, UtilizationEMA(d_sae, beta)
        generator = torch.Generator().manual_seed(torch.initial_seed())
        self.register_buffer("uniform_T", torch.rand(max(steps, 1), generator=generator, device="cpu"))
        self.register_buffer("acted_groups_skipped", torch.zeros((), dtype=torch.int64))

    @property
    def probability_G(self) -> Tensor:
        """p_g."""
        u_G = self.utilization.u_F.view(self.count, -1).mean(1)
        share_G = 0.1 / self.count + 0.9 * u_G / u_G.sum().clamp_min(1e-8)
        return (self.share * self.count * share_G).clamp(max=1.0)

    def factor_G(self, step: Step) -> Tensor:
        self.utilization.after_step(step)
        probability_G = self.probability_G
        # The groups are adjacent intervals on a line, each as long as its probability. A group is drawn if one of the
        # points uniform, uniform + 1, ... lies in its interval.
        uniform_1 = self.uniform_T.index_select(0, (step.i % len(self.uniform_T)).view(1))
        # `cumsum` is not used, because its order of summation on a GPU differs from run to run. A sum in float64 that
        # is rounded afterwards is the same in any order.
        until_GG = torch.ones(self.count, self.count, dtype=torch.float64, device=probability_G.device).tril()
        end_G = (until_GG * probability_G).sum(1).to(probability_G.dtype) - uniform_1
        drawn_G = end_G.floor() > (end_G - probability_G).floor()
        self.acted_groups_skipped.add_((~drawn_G).sum())
        return drawn_G / probability_G

    def weights(self, step: Step) -> list[Tensor]:
        per_latent = [weight.data for activation in step.sae.activation for weight in activation.parameters()]
        return [*super().weights(step), *per_latent]

    def scalars(self) -> dict[str, Tensor]:
        return {"groups_skipped": self.acted_groups_skipped}


# 4.2, third process: winner-take-all with local inhibition.

# The counts of `WinnerTakeAll` cover only this many tokens of a batch; counting all would need a pass over all latents.
COUNTED_TOKENS = 128


class WinnerTakeAll(Activation, name="winner_take_all"):
    """Neighbors inhibit each other; then only the largest latents of each group stay active.

        subtractive  f_i <- ReLU(f_i - gamma max_{j near i} s_ij f_j)
        divisive     f_i <- f_i^2 / (f_i + gamma max_{j near i} s_ij f_j)

    s_ij = max(0, cos). s_ij and the neighbors are saved with the SAE. Both forms are homogeneous in f. The strongest
    neighbor gets no gradient, because computing this gradient would need a copy of the latents for each neighbor.

    `counts` contains two numbers for the first 128 tokens of the last training batch: the active latents that
    inhibition weakened by more than 0.1 % (`inhibited`), and the latents that were still active after inhibition but
    were not among the largest (`outcompeted`).
    """

    near_FN: Tensor  # indices; stored as floats, like everything that is saved with an SAE
    closeness_FN: Tensor

    def __init__(
        self,
        d_sae: int,
        groups: int,
        winners: int,
        gamma: float = 0.25,
        neighbours: int = 8,
        inhibition: str = "subtractive",
        near_scope: str = "group",
    ) -> None:
        options: dict[str, Any] = dict(groups=groups, winners=winners, gamma=gamma)
        options |= dict(neighbours=neighbours, inhibition=inhibition)
        if near_scope != "group":
            options["near_scope"] = near_scope  # omitted by default, so that earlier versions can read the SAE
        super().__init__(d_sae=d_sae, **options)
        self.groups, self.winners, self.gamma, self.inhibition = groups, winners, gamma, inhibition
        self.near_scope, self.near_groups = near_scope, groups if near_scope == "group" else 1
        self.neighbours = min(neighbours, d_sae // self.near_groups - 1)
        self.counts: dict[str, Tensor] = {}
        self.register_buffer("near_FN", torch.zeros(d_sae, self.neighbours))
        self.register_buffer("closeness_FN", torch.zeros(d_sae, self.neighbours))

    def forward(self, f_BF: Tensor) -> Tensor:
        given_BF = f_BF
        if self.inhibition != "off":
            f_BF = self.inhibit(f_BF)
        f_BGM = f_BF.unflatten(-1, (self.groups, -1))
        top = f_BGM.topk(self.winners, dim=-1, sorted=False)
        if self.training:
            few = slice(COUNTED_TOKENS)
            given_NF, f_NF, top_NGK = given_BF.detach()[few], f_BF.detach()[few], top.values.detach()[few]
            self.counts = {
                "inhibited": (f_NF < (1 - 1e-3) * given_NF).sum(),
                "outcompeted": f_NF.count_nonzero() - top_NGK.count_nonzero(),
            }
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
    """Finds each latent's nearest neighbors at intervals of `every` steps, by cosines of encoder or decoder directions.

    The activation's `near_scope` determines whether the latent's group or the whole dictionary is searched.

    The paper speaks of proximity in feature space, and does not mention groups. Starting with run 6, decoder rows in a
    group are orthogonal. So no two decoder rows of a group are near each other. Two encoder directions of a group are
    hardly ever near each other, because the encoder is initialized as the decoder's transpose. Within groups,
    inhibition therefore has hardly any effect.
    """

    def __init__(self, activation: WinnerTakeAll, sae: SAE, near: str = "encoder", every: int = 100) -> None:
        super().__init__()
        self.activation, self.near, self.every = activation, near, every
        self.update(sae)

    @torch.no_grad()
    def update(self, sae: SAE) -> None:
        """Store each latent's nearest neighbors and their cosines in the buffers of the activation function."""
        groups, count = self.activation.near_groups, self.activation.neighbours
        rows_FD = sae.W_enc.T if self.near == "encoder" else sae.W_dec
        unit_GMD = F.normalize(rows_FD, dim=1).unflatten(0, (groups, -1))
        size = unit_GMD.shape[1]
        first_G = torch.arange(groups, device=rows_FD.device) * size
        near_GMN = self.activation.near_FN.view(groups, size, count)
        closeness_GMN = self.activation.closeness_FN.view(groups, size, count)
        rows = size if self.activation.near_scope == "group" else 1024  # all rows at once would need too much memory
        for start in range(0, size, rows):
            some = slice(start, start + rows)
            cosine_GCM = unit_GMD[:, some] @ unit_GMD.mT
            cosine_GCM.diagonal(start, dim1=1, dim2=2).fill_(-2.0)
            top = cosine_GCM.topk(count, dim=-1)
            near_GMN[:, some] = (top.indices + first_G[:, None, None]).float()
            closeness_GMN[:, some] = top.values.clamp_min(0)

    def between_bytes(self, sae: SAE, tokens: int) -> int:
        size = sae.d_sae // self.activation.near_groups
        together = sae.d_sae if self.activation.near_scope == "group" else min(1024, sae.d_sae)
        return 4 * (sae.d_sae * sae.d_in + together * size)  # unit rows, cosines

    def every_n_steps(self, step: Step) -> None:
        self.update(step.sae)

    def scalars(self) -> dict[str, Tensor]:
        return {"neighbour_cosine": self.activation.closeness_FN.mean()}
