"""The feature collapse problem (paper 000): a baseline and ten runs, each the one before and one mechanism more.

    L = |x - x_hat|^2 + lambda(t) |f|_1 + alpha(t) L_contrast + beta(t) L_orth   (5)

Every default is a reading that works; the paper's letter, where it differs, is an option's other value. The paper
names five pairs of runs; the split inside a pair is ours. It gives no alpha, no beta, and no rule for lambda inside
its bounds.

Paper: calls absorption 0 and one split feature a collapse. 0 is the good end of that score, and 1 means no splitting.
Paper: 100,000 tokens in batches of 125 are 800 steps, all of them inside its warm-up of 1000 (`budget=paper`).
"""

import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...common.errors import UsageError
from ..activations import Activation, ReLU
from ..losses import L1, MSE
from ..mechanisms import ActivityEMA, DeadLatents, UnitNormDecoder
from ..recipe import register_ablation
from ..sae import SAE
from ..scaling import ScaleWithWidth
from ..schedules import Coefficient, cosine, product, ramp, warmup
from ..step import LossTerm, Mechanism, Step
from ..variant import Optimization, RunConfig, Variant

PAPER_EXACT = {
    "contrast_cos": ("jl", "angles seen through 128 of 2304 dimensions have a noise of 0.088, and tau ends at 0.05"),
    "l1_controller": ("none", "0.04 lies inside all bounds, so they never act"),
    "gs_axis": ("activation_batch", "latents depend on their batch and are hardly ever zero; one token has no rule"),
    "group_lr": ("softmax", "it sums to one and is flat over 16 groups, so every rate is lr/16"),
}

# Shapes here: G groups, M latents of a group, S dimensions of the sketch, N neighbours.


class DecoderRows(nn.Module):
    """The decoder's rows in groups, as losses and constraints compare them.

    They are W_dec itself, until Gram-Schmidt in the forward pass makes W_dec out of free rows.
    """

    free_FD: nn.Parameter | None

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.register_parameter("free_FD", None)

    def of(self, sae: SAE) -> nn.Parameter:
        return sae.W_dec if self.free_FD is None else self.free_FD

    def grouped(self, sae: SAE) -> Tensor:
        return self.of(sae).unflatten(0, (self.groups, -1))


# 4.1, first component: the projection, and the utilisation that is tracked beside it.


class Sketch(Mechanism):
    """Rows seen through R, the Q of a random Gaussian matrix: S dimensions, angles kept up to 1/sqrt(S). A monitor.

    Paper: R is d_sae x 128 and is to project features; with d_sae = d_in that is a decoder's row as well as a token's
    latents. `on` chooses: decoder, encoder, or activations, whose lengths alone are watched.
    """

    every = 50
    R_DS: Tensor  # (d_sae, S) on activations
    mean_cosine: Tensor  # ()
    max_cosine: Tensor  # ()
    length: Tensor  # ()

    def __init__(self, d_in: int, d_sae: int, size: int = 128, on: str = "decoder") -> None:
        super().__init__()
        self.on = on
        rows = d_sae if on == "activations" else d_in
        self.register_buffer("R_DS", torch.linalg.qr(torch.randn(rows, min(size, rows))).Q)
        for name in ("mean_cosine", "max_cosine", "length"):
            self.register_buffer(name, torch.zeros(()))

    def every_n_steps(self, step: Step) -> None:
        if self.on == "activations":
            f_BF = step.f_BF.detach().float()
            wide = (len(self.R_DS) / self.R_DS.shape[1]) ** 0.5  # R keeps S/F of a length's square on average
            short_B = (f_BF @ self.R_DS).norm(dim=1) * wide
            self.length.copy_((short_B / f_BF.norm(dim=1).clamp_min(1e-8)).mean())
            return
        rows_FD = step.sae.W_dec if self.on == "decoder" else step.sae.W_enc.T
        unit_FS = F.normalize(rows_FD.detach() @ self.R_DS, dim=1)
        n, total, largest = len(unit_FS), 0.0, torch.zeros((), device=unit_FS.device)
        for start in range(0, n, 1024):  # a wide dictionary's n x n cosines do not fit
            cosine_CF = (unit_FS[start : start + 1024] @ unit_FS.T).abs()
            cosine_CF.diagonal(start).zero_()
            total, largest = total + cosine_CF.sum(), torch.maximum(largest, cosine_CF.max())
        self.mean_cosine.copy_(total / (n * (n - 1)))
        self.max_cosine.copy_(largest)

    def scalars(self) -> dict[str, Tensor]:
        if self.on == "activations":
            return {"sketch_length": self.length}
        return {"sketch_mean_cosine": self.mean_cosine, "sketch_max_cosine": self.max_cosine}


class UtilizationEMA(ActivityEMA):
    """u_i: how often latent i fired lately, divided by the weight that the average has gathered since it began at 0."""

    gathered: Tensor  # ()

    def __init__(self, d_sae: int, beta: float = 0.9) -> None:
        super().__init__(d_sae, beta)
        self.register_buffer("gathered", torch.zeros(()))

    @property
    def u_F(self) -> Tensor:
        return self.rate_F / self.gathered.clamp_min(1e-8)

    def after_step(self, step: Step) -> None:
        super().after_step(step)
        self.gathered.lerp_(torch.ones_like(self.gathered), 1 - self.beta)

    def scalars(self) -> dict[str, Tensor]:
        return {"utilisation": self.u_F.mean(), "utilisation_max": self.u_F.max()}


# 4.2, first process.


class Contrast(LossTerm):
    """mean over pairs i < j, of a group or `everywhere`, of ReLU(|cos(W_i, W_j)| - tau(t))^power, tau by (4).

    Paper: through the sketch, the angle of unrelated rows has a standard deviation of 1/sqrt(128) = 0.088, so that at
    the final tau of 0.05 more than half of all unrelated pairs count as alike. Without `sketch` angles are exact.
    """

    def __init__(
        self,
        rows: DecoderRows,
        tau: Coefficient,
        power: float = 1.0,
        everywhere: bool = False,
        sketch: Sketch | None = None,
    ) -> None:
        super().__init__()
        self.rows, self.tau, self.power, self.everywhere, self.sketch = rows, tau, power, everywhere, sketch

    def forward(self, step: Step) -> Tensor:
        rows_FD = self.rows.of(step.sae)
        if self.sketch is not None:
            rows_FD = (rows_FD if self.sketch.on == "decoder" else step.sae.W_enc.T) @ self.sketch.R_DS
        rows_GMD = rows_FD.unflatten(0, (1 if self.everywhere else self.rows.groups, -1))
        unit_GMD = F.normalize(rows_GMD.float(), dim=-1)
        cosine_GMM = (unit_GMD @ unit_GMD.mT).float()
        groups, size, _ = cosine_GMM.shape
        tau = step.metrics["tau"] = torch.as_tensor(self.tau(step))
        excess = (cosine_GMM.abs() - tau).relu().pow(self.power)
        return excess.triu(1).sum() / (groups * size * (size - 1) / 2)


# 4.2, second process.


class DynamicL1(Mechanism):
    """lambda(t), kept in bounds that move linearly from [0.02, 1.0] to [0.01, 0.5].

    Paper: 0.04 lies in all of these bounds, so they never act on it (`none`, the letter). What they bound is open:
    `l0_target`, lambda <- lambda exp(kappa (L0/L0* - 1)); or `recon_ratio`, 0.04 times the error's share of the first.
    """

    value: Tensor  # ()
    error: Tensor  # (), the mean squared error lately
    first_error: Tensor  # ()

    def __init__(
        self, start: float, steps: int, target: float, mode: str = "l0_target", kappa: float = 0.01, beta: float = 0.9
    ) -> None:
        super().__init__()
        self.start, self.steps, self.target, self.mode, self.kappa, self.beta = start, steps, target, mode, kappa, beta
        self.register_buffer("value", torch.tensor(start))
        self.register_buffer("error", torch.zeros(()))
        self.register_buffer("first_error", torch.zeros(()))

    def bounded(self, value: Tensor, step: Step) -> Tensor:
        share = ramp(step, self.steps)
        return value.clamp(min=0.02 - 0.01 * share, max=1.0 - 0.5 * share)

    def coefficient(self, step: Step) -> Tensor:
        """lambda(t), the coefficient of |f|_1."""
        value = step.metrics["lambda"] = self.bounded(self.value, step)
        return value

    def after_step(self, step: Step) -> None:
        if self.mode == "l0_target":
            self.value.copy_(self.bounded(self.value * torch.exp(self.kappa * (step.l0 / self.target - 1)), step))
        elif self.mode == "recon_ratio":
            error = step.error_BD.detach().square().sum(-1).mean()
            self.first_error.copy_(torch.where(step.i == 0, error, self.first_error))
            self.error.copy_(torch.where(step.i == 0, error, self.error.lerp(error, 1 - self.beta)))
            self.value.copy_(self.start * self.error / self.first_error.clamp_min(1e-12))


class Diversity(LossTerm):
    """1 - H(p) / log n, p the shares of what the groups emit, or the latents as long as there are no groups.

    Paper: names a diversity loss and says no more. Shares are of activation, as a count has no gradient.
    """

    def __init__(self, groups: int | None) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, step: Step) -> Tensor:
        share_G = step.f_BF.float().abs().mean(0)
        if self.groups is not None:
            share_G = share_G.view(self.groups, -1).sum(1)
        share_G = share_G / share_G.sum().clamp_min(1e-8)
        entropy = -(share_G * share_G.clamp_min(1e-12).log()).sum()
        return 1 - entropy / math.log(len(share_G))


class GroupOrthogonalityLoss(LossTerm):
    """L_orth = mean_G |D_G D_G^T - I|_F^2 / M^2: what Gram-Schmidt would take away, as a loss."""

    def __init__(self, rows: DecoderRows) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, step: Step) -> Tensor:
        rows_GMD = self.rows.grouped(step.sae)
        gram_GMM = (rows_GMD @ rows_GMD.mT).float()
        return (gram_GMM - torch.eye(gram_GMM.shape[1], device=gram_GMM.device)).square().mean()


# 4.1, third component.


def gram_schmidt(rows_GMD: Tensor) -> Tensor:
    """Unit rows in the directions of (3), by a QR: modified Gram-Schmidt gives Q diag(R), up to R's signs.

    Paper: sums over j <= k, which subtracts a row from itself; it has to be j < k.
    """
    q_GDM, r_GMM = torch.linalg.qr(rows_GMD.mT)
    sign_GM = torch.where(r_GMM.diagonal(dim1=1, dim2=2) < 0, -1.0, 1.0)
    return (q_GDM * sign_GM[:, None, :].to(q_GDM.dtype)).mT


def combination(gram_GMM: Tensor) -> Tensor:
    """The unit lower triangular T for which the rows of T A are (3) of those of A, from A A^T = L L^T: diag(L) L^-1.

    The diagonal is raised by a millionth of its mean: silent latents are rows of zeros.
    """
    eye_MM = torch.eye(gram_GMM.shape[1], device=gram_GMM.device, dtype=gram_GMM.dtype)
    guard_G = 1e-6 * gram_GMM.diagonal(dim1=1, dim2=2).mean(1) + 1e-12
    L_GMM = torch.linalg.cholesky_ex(gram_GMM + guard_G[:, None, None] * eye_MM).L
    return torch.linalg.solve_triangular(L_GMM, eye_MM.expand_as(L_GMM), upper=False) * L_GMM.diagonal(
        dim1=1, dim2=2
    ).unsqueeze(2)


class GramSchmidt(Mechanism):
    """W_dec is the orthogonalisation (3) of free rows, group by group; the optimizer moves these. W_dec is saved.

    Gradient: `straight_through` hands that of a row of W_dec to its free row, less the part along either; `through`
    differentiates (3). Order: a group's first row stays and its last is changed most; `utilisation` puts the busiest
    latents first. With a sketch, (3) is computed with the inner products of the sketched rows.
    """

    def __init__(
        self,
        sae: SAE,
        rows: DecoderRows,
        utilisation: UtilizationEMA,
        order: str,
        gradient: str,
        sketch: Sketch | None = None,
    ) -> None:
        super().__init__()
        rows.free_FD = nn.Parameter(sae.W_dec.detach().clone())
        self.rows, self.utilisation, self.order, self.gradient, self.sketch = rows, utilisation, order, gradient, sketch

    def orthogonalised(self, free_FD: Tensor) -> Tensor:
        rows_GMD = free_FD.unflatten(0, (self.rows.groups, -1))
        place_GM1 = None
        if self.order == "utilisation":
            u_GM = self.utilisation.u_F.view(self.rows.groups, -1)
            place_GM1 = u_GM.argsort(dim=1, descending=True, stable=True)[..., None]
            rows_GMD = rows_GMD.take_along_dim(place_GM1, 1)
        if self.sketch is None:
            rows_GMD = gram_schmidt(rows_GMD)
        else:
            short_GMS = rows_GMD @ self.sketch.R_DS
            rows_GMD = F.normalize(combination(short_GMS @ short_GMS.mT) @ rows_GMD, dim=-1)
        if place_GM1 is not None:
            rows_GMD = rows_GMD.take_along_dim(place_GM1.argsort(dim=1), 1)
        return rows_GMD.flatten(0, 1)

    def after_backward(self, step: Step) -> None:
        weight, gradient, free = step.sae.W_dec, step.sae.W_dec.grad, self.rows.free_FD
        assert gradient is not None and free is not None  # the step has just been backpropagated
        if self.gradient == "through":
            with torch.enable_grad():
                free_FD = free.detach().requires_grad_()
                (handed,) = torch.autograd.grad(self.orthogonalised(free_FD), free_FD, gradient)
        else:
            handed = gradient - (gradient * weight).sum(1, keepdim=True) * weight
        total = handed if free.grad is None else handed + free.grad
        free.grad = total - (total * free).sum(1, keepdim=True) * free
        gradient.zero_()  # W_dec follows in `after`: the optimizer is not to move it, nor the clipping to count it

    def after_step(self, step: Step) -> None:
        assert self.rows.free_FD is not None
        free_FD = self.rows.free_FD.data
        free_FD /= free_FD.norm(dim=1, keepdim=True).clamp_min(1e-12)
        step.sae.W_dec.data.copy_(self.orthogonalised(free_FD))


class GramSchmidtLatents(Activation, name="gram_schmidt_latents"):
    """(3) to the letter: on the latents themselves, each a column over the batch. Afterwards nothing is done.

    Paper: so a token's latents depend on the rest of its batch, are negative in places and hardly ever zero, and a
    column beyond the number of tokens has nothing left. There is no rule for a single token.
    """

    def __init__(self, groups: int, gradient: str = "straight_through") -> None:
        super().__init__(groups=groups, gradient=gradient)
        self.groups, self.gradient = groups, gradient

    def forward(self, f_BF: Tensor) -> Tensor:
        if not self.training:
            return f_BF
        with torch.autocast(f_BF.device.type, enabled=False):
            rows_GMB = f_BF.float().T.unflatten(0, (self.groups, -1))
            T_GMM = combination(rows_GMB @ rows_GMB.mT)
            return ((T_GMM if self.gradient == "through" else T_GMM.detach()) @ rows_GMB).flatten(0, 1).T


# 4.1, second component.


class Groups(Mechanism):
    """What the groups are used: u of a group is the mean, or the largest, of its latents' utilisation."""

    def __init__(self, utilisation: UtilizationEMA, count: int, stat: str = "mean") -> None:
        super().__init__()
        self.utilisation, self.count, self.stat = utilisation, count, stat

    @property
    def u_G(self) -> Tensor:
        u_GM = self.utilisation.u_F.view(self.count, -1)
        return u_GM.mean(1) if self.stat == "mean" else u_GM.amax(1)

    def scalars(self) -> dict[str, Tensor]:
        return {"group_utilisation_min": self.u_G.min(), "group_utilisation_max": self.u_G.max()}


class GroupRate(Mechanism):
    """eta_g = eta_0 softmax(EMA(u_g)) (2), for all that belongs to the latents of a group.

    Adam ignores the scale of a gradient, so the update is scaled. Paper: a softmax over 16 groups sums to 1 and is flat
    for a u below 0.1, so the letter (`softmax`) divides the rate by 16 and does little else. `softmax_mean1` makes the
    mean rate eta_0, `softmax_temp` also divides u by its spread, `inverse` favours the groups that are used least.
    """

    def __init__(self, rows: DecoderRows, groups: Groups, mode: str = "softmax_mean1") -> None:
        super().__init__()
        self.rows, self.groups, self.mode = rows, groups, mode
        self.old: list[Tensor] = []  # of this step; nothing to keep

    @property
    def rate_G(self) -> Tensor:
        u_G = self.groups.u_G
        if self.mode == "softmax":
            return u_G.softmax(0)
        if self.mode != "softmax_mean1":
            u_G = u_G / u_G.std(correction=0).clamp_min(1e-8) * (-1 if self.mode == "inverse" else 1)
        return self.groups.count * u_G.softmax(0)

    def _owned(self, step: Step) -> list[Tensor]:
        return [self.rows.of(step.sae).data, step.sae.W_enc.data, step.sae.b_enc.data]

    def after_backward(self, step: Step) -> None:
        self.old = [weight.clone() for weight in self._owned(step)]

    def after_step(self, step: Step) -> None:
        rate_F = self.rate_G.repeat_interleave(step.sae.d_sae // self.groups.count)
        for weight, old, rate in zip(self._owned(step), self.old, (rate_F[:, None], rate_F, rate_F), strict=True):
            weight.copy_(old + rate * (weight - old))

    def scalars(self) -> dict[str, Tensor]:
        return {"group_rate_min": self.rate_G.min(), "group_rate_max": self.rate_G.max()}


# 4.2, third process.


class WinnerTakeAll(Activation, name="winner_take_all"):
    """Neighbours inhibit each other, f_i <- ReLU(f_i - gamma max_{j near i} s_ij f_j); then each group's best remain.

    s_ij = max(0, cos), kept with the SAE. `divisive`: f_i f_i / (f_i + gamma max ...). Both scale with f. No gradient
    goes to the rival: it would cost a copy of the latents for each neighbour.
    """

    near_FN: Tensor  # indices, as floats like all that is saved with an SAE
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
            with torch.no_grad():
                near_FN, rival_BF = self.near_FN.long(), torch.zeros_like(f_BF)
                for n in range(self.neighbours):
                    emitted_BF = f_BF.index_select(-1, near_FN[:, n]) * self.closeness_FN[:, n]
                    rival_BF = torch.maximum(rival_BF, self.gamma * emitted_BF)
            if self.inhibition == "subtractive":
                f_BF = (f_BF - rival_BF).relu()
            else:
                f_BF = f_BF * f_BF / (f_BF + rival_BF).clamp_min(1e-12)
        f_BGM = f_BF.unflatten(-1, (self.groups, -1))
        top = f_BGM.topk(self.winners, dim=-1, sorted=False)
        return torch.zeros_like(f_BGM).scatter(-1, top.indices, top.values).flatten(-2)


class Neighbours(Mechanism):
    """Who is near whom in a group, renewed every so many steps: by the angles of the encoder, or of the decoder.

    Paper: says proximity in feature space. Rows of the decoder are orthogonal in their group from run 6 on, so that
    nobody would be near anybody.
    """

    def __init__(self, activation: WinnerTakeAll, sae: SAE, near: str = "encoder", every: int = 100) -> None:
        super().__init__()
        self.activation, self.near, self.every = activation, near, every
        self.renew(sae)

    @torch.no_grad()
    def renew(self, sae: SAE) -> None:
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
        self.renew(step.sae)

    def scalars(self) -> dict[str, Tensor]:
        return {"neighbour_cosine": self.activation.closeness_FN.mean()}


class HardOrthogonality(Mechanism):
    """After the update each group's rows become the nearest orthonormal ones, five times X <- (3 X - X X^T X) / 2.

    Paper: gives no form. The iteration converges from rows that were orthonormal a few steps ago, and runs start so.
    """

    def __init__(self, rows: DecoderRows, steps: int = 1) -> None:
        super().__init__()
        self.rows, self.steps = rows, steps

    def after_step(self, step: Step) -> None:
        rows_FD = self.rows.of(step.sae).data
        x_GMD = rows_FD.unflatten(0, (self.rows.groups, -1))
        for _ in range(5):
            x_GMD = 1.5 * x_GMD - 0.5 * (x_GMD @ x_GMD.mT) @ x_GMD
        rows_FD.copy_(torch.where((step.i + 1) % self.steps == 0, x_GMD.flatten(0, 1), rows_FD))


# 4.3, last paragraph: what "the implementation uses for stability".


class BatchNorm(Activation, name="batch_norm"):
    """gain (z - mean)/sqrt(var + eps) + shift for each latent: of the batch in training, of running means afterwards.

    Paper: does not say where; before the ReLU, all latents then fire about half of the time until L1 moves `shift`.
    """

    mean_F: Tensor
    variance_F: Tensor
    eps: Tensor  # ()

    def __init__(self, d_sae: int, gain: float = 1.0) -> None:
        super().__init__(d_sae=d_sae)
        self.gain_F, self.shift_F = nn.Parameter(torch.full((d_sae,), gain)), nn.Parameter(torch.zeros(d_sae))
        self.register_buffer("mean_F", torch.zeros(d_sae))
        self.register_buffer("variance_F", torch.ones(d_sae))
        self.register_buffer("eps", torch.tensor(1e-8))

    def forward(self, z_BF: Tensor) -> Tensor:
        z_BF = z_BF.float()
        mean_F, variance_F = self.mean_F, self.variance_F
        if self.training:
            mean_F, variance_F = z_BF.mean(0), z_BF.var(0, correction=0)
        return self.gain_F * (z_BF - mean_F) / (variance_F + self.eps).sqrt() + self.shift_F

    def rescale_(self, factor: float) -> None:
        for value in (self.mean_F, self.gain_F, self.shift_F):
            value.mul_(factor)
        for square in (self.variance_F, self.eps):
            square.mul_(factor**2)


class RunningStatistics(Mechanism):
    """The running mean and variance of a BatchNorm; a forward pass does not change them. The first batch sets them."""

    def __init__(self, norm: BatchNorm, momentum: float = 0.1) -> None:
        super().__init__()
        self.norm, self.momentum = norm, momentum

    def after_step(self, step: Step) -> None:
        pre_BF = step.pre_BF.detach().float()
        rate = torch.where(step.i == 0, 1.0, self.momentum)
        self.norm.mean_F.lerp_(pre_BF.mean(0), rate)
        self.norm.variance_F.lerp_(pre_BF.var(0, correction=0), rate)


class RecentError(Mechanism):
    """The mean squared error lately, an average with momentum 0.9."""

    value: Tensor  # ()

    def __init__(self, beta: float = 0.9) -> None:
        super().__init__()
        self.beta = beta
        self.register_buffer("value", torch.zeros(()))

    def after_step(self, step: Step) -> None:
        error = step.error_BD.detach().square().sum(-1).mean()
        self.value.copy_(torch.where(step.i == 0, error, self.value.lerp(error, 1 - self.beta)))


class ImportantError(LossTerm):
    """mean_B w |x - x_hat|^2 with w = |x - x_hat|^2 over the recent mean: hard tokens count for more.

    Paper: momentum-based importance sampling, undefined. A token is read once in an epoch, so there is no past loss of
    its own to sample it by; what it would have been drawn more often, it weighs more here. With the correction 1/(N p)
    nothing would be left of it.
    """

    def __init__(self, recent: RecentError) -> None:
        super().__init__()
        self.recent = recent

    def forward(self, step: Step) -> Tensor:
        error_B = step.error_BD.square().sum(-1)
        known = torch.where(step.i == 0, error_B.detach().mean(), self.recent.value)
        return (error_B.detach() / known.clamp_min(1e-12) * error_B).mean()


class Balanced(LossTerm):
    """A term whose gradient, coefficient included, is at most `rho` times as long as that of the reconstruction.

    Paper: gradient balancing, undefined. Each balanced term costs a backward pass of its own.
    """

    def __init__(
        self, coefficient: Coefficient, term: LossTerm, rows: DecoderRows, reconstruction: float, rho: float
    ) -> None:
        super().__init__()
        self.coefficient, self.term, self.rows = coefficient, term, rows
        self.reconstruction, self.rho = reconstruction, rho

    def _length(self, value: Tensor, step: Step) -> Tensor:
        weights = {id(p): p for p in (*step.sae.parameters(), self.rows.of(step.sae))}.values()
        found = torch.autograd.grad(value, list(weights), retain_graph=True, allow_unused=True)
        return torch.stack([g.norm() for g in found if g is not None]).norm()

    def forward(self, step: Step) -> Tensor:
        value = self.coefficient(step) * self.term(step)
        if "reconstruction_gradient" not in step.metrics:
            error = self.reconstruction * step.error_BD.square().sum(-1).mean()
            step.metrics["reconstruction_gradient"] = self._length(error, step)
        longest = self.rho * step.metrics["reconstruction_gradient"]
        return value * (longest / self._length(value, step).clamp_min(1e-12)).clamp(max=1.0)


# Section 6: the runs.


def start_orthonormal(sae: SAE, rows: DecoderRows, why: str) -> None:
    """Begin with orthonormal rows in each group, and with the encoder as their transpose."""
    size = sae.d_sae // rows.groups
    if size > sae.d_in:
        raise UsageError(
            f"{why} needs groups of at most d_in = {sae.d_in} latents, and {rows.groups} groups of a "
            f"dictionary of {sae.d_sae} have {size}: give --set groups={fewest_groups(sae.d_in, sae.d_sae)}, "
            "or a smaller --width."
        )
    with torch.no_grad():
        unit_FD = gram_schmidt(rows.grouped(sae)).flatten(0, 1)
        sae.W_dec.copy_(unit_FD)
        sae.W_enc.copy_(unit_FD.T)


def fewest_groups(d_in: int, d_sae: int) -> int:
    """As few equal groups as have room for orthogonal rows: one where the dictionary is no wider than its input."""
    return next(g for g in range(1, d_sae + 1) if d_sae % g == 0 and d_sae // g <= d_in)


def optimization(config: RunConfig, normalize: str, budget: str | None) -> Optimization:
    """The paper's budget has a rate of its own."""
    if budget is not None:
        tokens = {"paper": 100_000, "matched": 10_000_000}[budget]
        if config.steps != tokens // config.batch_size:
            raise UsageError(
                f"budget={budget} is {tokens:,} tokens, {tokens // config.batch_size} steps of {config.batch_size}, and this "
                f"run has {config.steps}: give --steps {tokens // config.batch_size}, or leave the budget out. "
                "The paper's batch size is 125."
            )
    if budget != "paper":
        return Optimization(normalize=normalize)
    # Paper: warms up over 1000 steps. In a shorter run the rate rises to the last step and stays below its peak.
    lr = Optimization.lr * min(1.0, config.steps / 1000)
    return Optimization(normalize=normalize, lr=lr, warmup=min(1000, config.steps), decay_start=1.0)


def problems(given: dict[str, Any]) -> Iterator[str]:
    """What is wrong with the options of a run."""
    config, l0 = given["config"], given["l0"]
    for name in ("jl_dim", "neighbours", "hard_every", "contrast_power"):
        if given[name] <= 0:
            yield f"{name}={given[name]:g} is not positive."
    if given["contrast_cos"] == "jl" and given["jl_on"] == "activations":
        yield "contrast_cos=jl compares rows, and jl_on=activations projects none: give jl_on=decoder or encoder."
    if l0 is not None and not 0 < l0 <= config.d_sae:
        yield f"l0={l0:g} latents a token cannot be met with {config.d_sae}: give a number above 0 and up to that."
    if not 0 < given["wta_share"] <= 1:
        yield f"wta_share={given['wta_share']:g} is no share of the latents: give one above 0 and up to 1."
    if given["gamma"] < 0:
        yield f"gamma={given['gamma']:g} is negative."
    groups = given["groups"]
    if groups < 1 or config.d_sae % groups or config.d_sae // groups < 2:
        yield (
            f"A dictionary of {config.d_sae} cannot be divided into {groups} equal groups of two latents or more: "
            "give --set groups=... a divisor, or another --width."
        )


def build(
    config: RunConfig,
    number: int,
    l1: float = 0.04,
    l1_warmup: int | None = None,
    pre_bias: bool = False,
    units: Literal["field", "as_printed", "evidence"] = "field",
    budget: Literal["paper", "matched"] | None = None,
    batch_norm: Literal["off", "pre"] = "off",
    importance: Literal["off", "loss_ema"] = "off",
    jl_dim: int = ScaleWithWidth(128),
    jl_on: Literal["decoder", "encoder", "activations"] = "decoder",
    beta: float = 0.9,
    alpha: float = 0.1,
    alpha_warmup: int | None = None,
    contrast_cos: Literal["exact_group", "exact", "jl"] = "exact_group",
    tau_max: float = 0.4,
    tau_min: float = 0.05,
    contrast_power: float = 1.0,
    loss_units: Literal["fvu", "raw"] = "fvu",
    gradient_balance: float | None = None,
    l1_controller: Literal["l0_target", "recon_ratio", "none"] = "l0_target",
    l0: float | None = None,
    kappa: float = 0.01,
    diversity_strength: float = 0.01,
    beta_orth: float = 0.01,
    gs_axis: Literal["decoder_group", "jl", "activation_batch"] = "decoder_group",
    gs_order: Literal["index", "utilisation"] = "index",
    gs_gradient: Literal["straight_through", "through"] = "straight_through",
    groups: int = 16,
    group_stat: Literal["mean", "max"] = "mean",
    group_lr: Literal["softmax_mean1", "softmax", "softmax_temp", "inverse"] = "softmax_mean1",
    wta_share: float = 0.1,
    wta_scope: Literal["group", "global"] = "group",
    inhibition: Literal["subtractive", "divisive", "off"] = "subtractive",
    gamma: float = 0.25,
    neighbours: int = 8,
    near: Literal["encoder", "decoder"] = "encoder",
    hard_every: int = 1,
) -> Variant:
    """Run `number`: what each run adds has its section below, with its options.

    0   `budget`: paper is 100,000 tokens, matched 10 million. `units`: field (input of mean square norm 1, error
        summed), as_printed (raw input, summed), evidence (raw input, mean over dimensions)
    2   `contrast_cos`: pairs of a group; exact, all pairs; jl, all through the projection (the letter). `alpha_warmup`:
        steps over which this and later terms grow; None: 1000, or a tenth of a shorter run. `loss_units`: fvu, in
        which this and later terms count in shares of the input's variance. `gradient_balance`: the longest gradient
        of such a term over the reconstruction's; None: not balanced
    3   `l1_controller`: none is the letter, with which the bounds never act. `l0`: the target; None: 40, or an eighth
        of a narrow dictionary. `--l0` does not trust it: within its bounds and at this kappa L0 passes the target by
        far, so lambda goes on as in every other recipe
    6   `gs_axis`: rows of W_dec, group by group; jl, the same by their projections; activation_batch, the latents over
        the batch (the letter)
    7   `groups` are contiguous: rows start at random, so that another division is the same
    """
    if number < 7:  # rows are compared with all others for which there is room in one group
        groups = fewest_groups(config.d_in, config.d_sae)
    if wrong := list(problems(locals())):
        raise UsageError("\n".join(wrong))
    sae, rows = SAE(config.d_in, config.d_sae, pre_bias=pre_bias), DecoderRows(groups)
    chain: list[Activation] = [ReLU()]
    mechanisms: list[Mechanism] = []
    late: list[Mechanism] = []  # after all others, before the unit norm
    error: LossTerm = MSE()
    if batch_norm == "pre":
        norm = BatchNorm(config.d_sae, config.d_in**-0.5)  # about the spread of a unit row's product with a unit input
        chain.insert(0, norm)
        mechanisms.append(RunningStatistics(norm))
    if importance == "loss_ema":
        recent = RecentError()
        mechanisms.append(recent)
        error = ImportantError(recent)
    reconstruction = 1 / config.d_in if units == "evidence" else 1.0
    terms: dict[str, tuple[Coefficient | float, LossTerm]] = {
        "mse": (reconstruction, error), "l1": (warmup(l1, config.penalty_warmup(l1_warmup)), L1()),
    }  # fmt: skip

    def add(name: str, symbol: str | None, strength: float, term: LossTerm) -> None:
        """A term that grows; in shares of the input's variance, and balanced, if wished."""
        growth = warmup(strength, min(1000, config.steps // 10) if alpha_warmup is None else alpha_warmup)

        def coefficient(step: Step) -> Tensor:
            value = torch.as_tensor(growth(step))
            if symbol:
                step.metrics[symbol] = value
            if loss_units == "raw":
                return value
            centred_BD = step.x_BD - step.x_BD.mean(0)
            return value * reconstruction * centred_BD.square().sum(-1).mean()

        if gradient_balance is None:
            terms[name] = (coefficient, term)
        else:
            terms[name] = (1.0, Balanced(coefficient, term, rows, reconstruction, gradient_balance))

    if number >= 1:
        sketch, utilisation = Sketch(config.d_in, config.d_sae, jl_dim, jl_on), UtilizationEMA(config.d_sae, beta)
        mechanisms += [utilisation, sketch]
    if number >= 2:
        tau = cosine(tau_max, tau_min, config.steps)
        seen = sketch if contrast_cos == "jl" else None
        add("contrast", "alpha", alpha, Contrast(rows, tau, contrast_power, contrast_cos != "exact_group", seen))
    if number >= 3:
        control = DynamicL1(l1, config.steps, min(40.0, config.d_sae / 8) if l0 is None else l0, l1_controller, kappa)
        mechanisms.append(control)
        terms["l1"] = (product(warmup(1.0, config.penalty_warmup(l1_warmup)), control.coefficient), L1())
    if number >= 4:
        add("diversity", None, diversity_strength, Diversity(groups if number >= 7 else None))
    if number >= 5:
        add("orthogonality", "beta", beta_orth, GroupOrthogonalityLoss(rows))
    if number >= 6 and gs_axis == "activation_batch":
        chain.append(GramSchmidtLatents(groups, gs_gradient))
    elif number >= 6:
        size, watch = config.d_sae // groups, sketch if gs_axis == "jl" else None
        if watch is not None and (jl_on != "decoder" or size > watch.R_DS.shape[1]):
            raise UsageError(
                f"gs_axis=jl needs jl_on=decoder and groups of at most jl_dim = {watch.R_DS.shape[1]} latents; "
                f"{groups} groups of {config.d_sae} have {size}."
            )
        start_orthonormal(sae, rows, "Gram-Schmidt")
        late.append(GramSchmidt(sae, rows, utilisation, gs_order, gs_gradient, watch))
    if number >= 7:
        grouped = Groups(utilisation, groups, group_stat)
        mechanisms.append(grouped)
    if number >= 8:
        mechanisms.append(GroupRate(rows, grouped, group_lr))
    if number >= 9:
        if config.l0 is not None:
            wta_share = max(wta_share, config.l0 / config.d_sae)  # room for what `--l0` asks for
        winners, fields = math.ceil(wta_share * config.d_sae / groups), groups
        if wta_scope == "global":
            winners, fields = winners * groups, 1
        compete = WinnerTakeAll(config.d_sae, fields, winners, gamma, neighbours, inhibition)
        chain.append(compete)
        mechanisms.append(Neighbours(compete, sae, near))
    if number >= 10:
        # Paper: with (3) in the forward pass as well; of rows that are orthonormal, (3) changes nothing.
        start_orthonormal(sae, rows, "Hard orthogonality")
        mechanisms.append(HardOrthogonality(rows, hard_every))
    sae.activation = nn.Sequential(*chain)
    how = optimization(config, "unit_ms" if units == "field" else "none", budget)
    dead = DeadLatents(config.d_sae, config.dead_after_tokens)
    return Variant(sae, terms, [*mechanisms, *late, UnitNormDecoder()], how, dead=dead)


RUNS: tuple[tuple[str, str, tuple[str, ...]], ...] = (  # what each adds, its equation, and its options
    ("ReLU latents and an L1 penalty.", "(1)", ()),
    (
        "A Johnson-Lindenstrauss projection and an average of utilisation watch.", "4.1",
        ("jl_dim", "jl_on", "beta"),
    ),
    (
        "Rows at a smaller angle than an annealed threshold allows are pushed apart (4).", "(4)",
        ("alpha", "alpha_warmup", "contrast_cos", "tau_max", "tau_min", "contrast_power", "loss_units", "gradient_balance"),
    ),
    (
        "The L1 penalty moves inside bounds that fall from [0.02, 1.0] to [0.01, 0.5].", "4.2",
        ("l1_controller", "l0", "kappa"),
    ),
    ("A loss for latents, and later groups, that are used unequally.", "6", ("diversity_strength",)),
    ("Gram-Schmidt as a loss: rows of a group that are not orthogonal are penalised (5).", "(5)", ("beta_orth",)),
    ("Modified Gram-Schmidt in the forward pass (3).", "(3)", ("gs_axis", "gs_order", "gs_gradient")),
    (
        "Sixteen groups of neighbouring latents; all that compared any two rows now compares those of a group.", "4.1",
        ("groups", "group_stat"),
    ),
    ("Each group's rate follows its utilisation (2).", "(2)", ("group_lr",)),
    (
        "Latents inhibit their neighbours, and the best tenth of each group remains.", "4.2",
        ("wta_share", "wta_scope", "inhibition", "gamma", "neighbours", "near"),
    ),
    ("After each update the rows of a group are made orthonormal.", "6", ("hard_every",)),
)  # fmt: skip


def name_of(number: int) -> str:
    return f"collapse-{number:02d}" if number else "collapse-baseline"


# 2048 tokens to a batch, so that these runs read one stream with all others; the paper's 125 is --batch-size 125.
for _number, (_summary, _equation, _) in enumerate(RUNS):
    _later = [name for _, _, names in RUNS[_number + 1 :] for name in names]
    _head = f"Run {_number}, `{name_of(_number - 1)}` and one thing more. " if _number else ""
    _about = {"paper": "000", "equations": _equation, "width": 1, "paper_exact": PAPER_EXACT}
    register_ablation(name_of(_number), build, _head + _summary, _about, *_later, number=_number)
