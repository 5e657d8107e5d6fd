"""Paper 000, 4.3: batch normalization, one of the things "the implementation uses for stability"."""

import torch
from torch import Tensor, nn

from ...activation_functions import Activation
from ...step import Mechanism, Step


class BatchNorm(Activation, name="batch_norm"):
    """gain (z - mean)/sqrt(var + eps) + shift for each latent. Training uses the statistics of the batch.

    After training, running averages of the statistics are used.

    Paper: does not say where it normalizes. Before the ReLU, batch normalization makes all latents fire about half of
    the time until L1 changes `shift`. The paper states no initial gain. If inputs are normalized, our initial gain
    keeps the scale of the pre-activations; otherwise the initial gain is 1, as usual.
    """

    undivided = "batch normalization needs the mean and variance of the whole batch"
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
    """Updates the running mean and variance of a BatchNorm after each step. The first batch initializes them.

    A forward pass does not change the running mean and variance.
    """

    def __init__(self, norm: BatchNorm, momentum: float = 0.1) -> None:
        super().__init__()
        self.norm, self.momentum = norm, momentum

    def after_step(self, step: Step) -> None:
        pre_BF = step.pre_BF.detach().float()
        rate = torch.where(step.i == 0, 1.0, self.momentum)
        self.norm.mean_F.lerp_(pre_BF.mean(0), rate)
        self.norm.variance_F.lerp_(pre_BF.var(0, correction=0), rate)
