"""Mechanisms that more than one recipe uses."""

import torch
from torch import Tensor

from .sae import BatchTopK
from .step import Mechanism, Step


class UnitNormDecoder(Mechanism):
    """Rows of W_dec stay on the unit sphere, and the optimizer is not fed the radial gradient. The last mechanism."""

    def before(self, step: Step) -> None:
        weight, gradient = step.sae.W_dec.data, step.sae.W_dec.grad
        assert gradient is not None  # the step has just been backpropagated
        gradient -= (gradient * weight).sum(1, keepdim=True) * weight

    def after(self, step: Step) -> None:
        weight = step.sae.W_dec.data
        weight /= weight.norm(dim=1, keepdim=True).clamp_min(1e-12)


class DeadLatents(Mechanism):
    """Tokens since each latent last fired; dead are those over `after_tokens`.

    `index_A` lists the dead for AuxK, padded to a power of two, and is renewed every `every` steps only, so that shapes
    stay fixed in between.
    """

    since_F: Tensor  # int64, tokens
    dead_F: Tensor  # bool, as of the last renewal

    def __init__(self, d_sae: int, after_tokens: int, every: int = 50) -> None:
        super().__init__()
        self.after_tokens, self.every = after_tokens, every
        self.register_buffer("since_F", torch.zeros(d_sae, dtype=torch.int64))
        self.register_buffer("dead_F", torch.zeros(d_sae, dtype=torch.bool))
        self.index_A, self.real_A = torch.zeros(0, dtype=torch.int64), torch.zeros(0)

    def after(self, step: Step) -> None:
        self.since_F.add_(step.tokens).mul_(~step.fired_F)

    def between(self, step: Step) -> None:
        self.dead_F.copy_(self.since_F >= self.after_tokens)
        self.restored()

    def restored(self) -> None:
        """dead_F as a padded list of indices; padding points at latent 0 and is masked by `real_A`."""
        found = self.dead_F.nonzero().squeeze(1)
        size = min(1 << max(6, (len(found) - 1).bit_length()), len(self.dead_F)) if len(found) else 0
        self.index_A = torch.zeros(size, dtype=torch.int64, device=self.dead_F.device)
        self.index_A[: len(found)] = found
        self.real_A = torch.zeros(size, device=self.dead_F.device)
        self.real_A[: len(found)] = 1

    def scalars(self) -> dict[str, Tensor]:
        return {"dead": (self.since_F >= self.after_tokens).float().mean()}


class ActivityEMA(Mechanism):
    """rate_i <- beta rate_i + (1 - beta) mean_B 1[f_i > threshold]: how often each latent fires, lately."""

    rate_F: Tensor

    def __init__(self, d_sae: int, beta: float = 0.9, threshold: float = 0.0) -> None:
        super().__init__()
        self.beta, self.threshold = beta, threshold
        self.register_buffer("rate_F", torch.zeros(d_sae))

    def after(self, step: Step) -> None:
        self.rate_F.lerp_((step.f_BF.detach() > self.threshold).float().mean(0), 1 - self.beta)


def forget(step: Step, index_N: Tensor) -> None:
    """Zero the optimizer's moments of some latents, wherever their weights are. Whoever rewrites weights calls it."""
    sae = step.sae
    for parameter, dimension in ((sae.W_dec, 0), (sae.W_enc, 1), (sae.b_enc, 0)):
        for name, moment in step.optimizer.state.get(parameter, {}).items():
            if name != "step":
                moment.index_fill_(dimension, index_N, 0.0)


class Threshold(Mechanism):
    """The threshold of a BatchTopK follows the smallest latent that its batches keep, t <- t + rate (min - t).

    When training is over it becomes the mean of that minimum over fresh batches, so that the number of latents a token
    is k on average for the final weights, however short the run was.
    """

    batches: Tensor  # () int64

    def __init__(self, activation: BatchTopK, rate: float = 0.01) -> None:
        super().__init__()
        self.activation, self.rate = activation, rate
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))
        self.calibrated = 0

    def _follow(self, step: Step, rate: Tensor | float) -> None:
        kept = step.f_BF.detach().float()
        smallest = torch.where(kept > 0, kept, torch.inf).min()
        threshold = self.activation.threshold
        target = torch.where(smallest.isinf(), threshold, smallest)  # a batch in which nothing fired says nothing
        threshold.copy_(threshold + rate * (target - threshold))

    def after(self, step: Step) -> None:
        self._follow(step, torch.where(self.batches == 0, 1.0, self.rate))
        self.batches.add_(1)

    def calibrate(self, step: Step) -> None:
        self.calibrated += 1
        self._follow(step, 1 / self.calibrated)

    def scalars(self) -> dict[str, Tensor]:
        return {"threshold": self.activation.threshold}
