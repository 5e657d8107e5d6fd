"""Paper 000: the losses of 4.2 and 4.3, and the balance between them."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ...schedules import Coefficient
from ...step import LossTerm, Step
from .groups import DecoderRows
from .monitors import RecentError, Sketch


class ContrastLoss(LossTerm):
    """mean over pairs i < j (in a group, or all) of ReLU(|cos(v_i, v_j)| - tau(t))^power, with tau by (4).

    v_i is the row of latent i in the decoder, or its activations over the batch (`on`).

    The paper measures the "cosine similarity between features", and in the paper, f denotes activations. By default, we
    compare decoder rows, because over few tokens the activations of unrelated latents look alike, and an inactive
    latent is similar to no other latent. Paper: after the sketch, the cosine of unrelated rows has a standard deviation
    of 1/sqrt(128) = 0.088. So at the final tau of 0.05, more than half of all unrelated pairs count as similar. Without
    `sketch`, cosines are exact.
    """

    def __init__(
        self,
        rows: DecoderRows,
        tau: Coefficient,
        power: float = 1.0,
        across_groups: bool = False,
        sketch: Sketch | None = None,
        on: str = "decoder",
    ) -> None:
        super().__init__()
        self.rows, self.tau, self.power, self.sketch, self.on = rows, tau, power, sketch, on
        self.across_groups = across_groups
        self.undivided = "" if on == "decoder" else "latents are compared over the whole batch"

    def forward(self, step: Step) -> Tensor:
        rows_FD: Tensor = self.rows.parameter(step.sae) if self.on == "decoder" else step.f_BF.T
        if self.sketch is not None:
            rows_FD = (rows_FD if self.sketch.on == "decoder" else step.sae.W_enc.T) @ self.sketch.R_DS
        rows_GMD = rows_FD.unflatten(0, (1 if self.across_groups else self.rows.groups, -1))
        unit_GMD = F.normalize(rows_GMD.float(), dim=-1)
        cosine_GMM = (unit_GMD @ unit_GMD.mT).float()
        groups, size, _ = cosine_GMM.shape
        tau = step.metrics["tau"] = torch.as_tensor(self.tau(step))
        excess_GMM = (cosine_GMM.abs() - tau).relu().triu(1)
        step.metrics["pairs_over_tau"] = excess_GMM.detach().count_nonzero()
        return excess_GMM.pow(self.power).sum() / (groups * size * (size - 1) / 2)


class DiversityLoss(LossTerm):
    """1 - H(p) / log n, where p are the shares of the n groups (without groups: the n latents) in the total activation.

    The loss is 0 if all groups are used equally, and 1 if only one group is used.

    The paper names a diversity loss without defining it. Shares are computed from activations, because a count has no
    gradient.
    """

    undivided = "the entropy is computed from shares in the whole batch"

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


class ImportanceWeightedMSE(LossTerm):
    """mean_B w |x - x_hat|^2, where w is |x - x_hat|^2 divided by its recent mean, without a gradient.

    Paper: mentions momentum-based importance sampling without defining it. This class weights tokens by importance;
    `GroupSampling` draws groups, as 4.3 says. A token is read once per epoch, so there is no earlier loss from which to
    compute its probability. A token with a large error therefore gets a larger weight instead of being drawn more
    often. The usual correction 1/(N p) would undo this weighting.
    """

    undivided, reads_batch = "", True

    def __init__(self, recent: RecentError) -> None:
        super().__init__()
        self.recent = recent

    def forward(self, step: Step) -> Tensor:
        error_B = step.error_BD.square().sum(-1)
        mean = torch.where(step.i == 0, step.whole.error_BD.detach().square().sum(-1).mean(), self.recent.value)
        return (error_B.detach() / mean.clamp_min(1e-12) * error_B).mean()


class BalancedLoss(LossTerm):
    """Scales down a loss whose gradient has a large norm.

    After that, the norm of the gradient of the loss, times the loss's coefficient, is at most `rho` times the norm of
    the gradient of the reconstruction error.

    Paper: mentions gradient balancing without defining it. Each balanced loss needs an extra backward pass.
    `losses_balanced` counts the losses that were scaled down in a step.
    """

    undivided = "balancing a loss needs the length of its gradient over the whole batch"

    def __init__(
        self, coefficient: Coefficient, term: LossTerm, rows: DecoderRows, reconstruction: float, rho: float
    ) -> None:
        super().__init__()
        self.coefficient, self.term, self.rows = coefficient, term, rows
        self.reconstruction, self.rho = reconstruction, rho

    def _gradient_norm(self, value: Tensor, step: Step) -> Tensor:
        weights = {id(p): p for p in (*step.sae.parameters(), self.rows.parameter(step.sae))}.values()
        gradients = torch.autograd.grad(value, list(weights), retain_graph=True, allow_unused=True)
        return torch.stack([g.norm() for g in gradients if g is not None]).norm()

    def forward(self, step: Step) -> Tensor:
        value = self.coefficient(step) * self.term(step)
        if "reconstruction_gradient" not in step.metrics:
            error = self.reconstruction * step.error_BD.square().sum(-1).mean()
            step.metrics["reconstruction_gradient"] = self._gradient_norm(error, step)
        limit = self.rho * step.metrics["reconstruction_gradient"]
        factor = (limit / self._gradient_norm(value, step).clamp_min(1e-12)).clamp(max=1.0)
        step.metrics["losses_balanced"] = step.metrics.get("losses_balanced", 0) + (factor < 1).long()
        return value * factor
