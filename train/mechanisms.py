"""Mechanisms that more than one recipe uses."""

import math
from collections.abc import Hashable

import torch
from torch import Tensor

from .activation_functions import BatchTopK, KeepTopK
from .kernels.threshold_operator import follow_by_torch, follow_threshold, lowest_positive, move_threshold
from .sae import SAE
from .step import Mechanism, Step


class UnitNormDecoder(Mechanism):
    """Keeps the rows of W_dec on the unit sphere and removes the radial gradient. Has to be the last mechanism."""

    by_kernels = False  # whether the kernels that update the weights do this instead (train/kernel_update.py)

    def after_backward(self, step: Step) -> None:
        if self.by_kernels:
            return
        weight, gradient = step.sae.W_dec.data, step.sae.W_dec.grad
        assert gradient is not None  # the step's loss has just been backpropagated
        gradient.addcmul_(weight, (gradient * weight).sum(1, keepdim=True), value=-1)

    def after_step(self, step: Step) -> None:
        if self.by_kernels:
            return
        weight = step.sae.W_dec.data
        weight /= weight.norm(dim=1, keepdim=True).clamp_min(1e-12)


class UnitNormExport(Mechanism):
    """Rescales the decoder rows of the saved SAE to unit length without changing its function.

    The formula for decoders whose rows are not constrained in training is:

        f_i <- f_i |W_i|,   W_i <- W_i / |W_i|

    Only for activations that act on each latent separately: an activation that selects among latents would see changed
    magnitudes.
    """

    def export(self, sae: SAE) -> None:
        norm_F = sae.W_dec.norm(dim=1).clamp_min(1e-12)
        sae.W_dec.div_(norm_F[:, None])
        sae.W_enc.mul_(norm_F)
        sae.b_enc.mul_(norm_F)
        for activation in sae.activation:
            activation.rescale_(norm_F)  # one factor per latent


class DeadLatents(Mechanism):
    """Counts the tokens since each latent last fired; a latent is dead after `after_tokens`.

    `index_A` lists the dead latents for AuxK, padded to a power of two. The list is updated in place every `every`
    steps, so shapes stay fixed in between. `real_A` is 1 for entries of the list and 0 for padding.
    """

    since_F: Tensor  # int64: tokens since each latent last fired
    dead_F: Tensor  # bool, as of the last update
    leaves_weights = True

    def __init__(self, d_sae: int, after_tokens: int, every: int = 50) -> None:
        super().__init__()
        self.after_tokens, self.every = after_tokens, every
        self.register_buffer("since_F", torch.zeros(d_sae, dtype=torch.int64))
        self.register_buffer("dead_F", torch.zeros(d_sae, dtype=torch.bool))
        self.index_A, self.real_A = torch.zeros(0, dtype=torch.int64), torch.zeros(0)
        self._index_F, self._real_F = self.index_A, self.real_A  # memory for both lists, with room for all latents

    def after_step(self, step: Step) -> None:
        self.since_F.add_(step.tokens).masked_fill_(step.fired_F, 0)

    def every_n_steps(self, step: Step) -> None:
        self.dead_F.copy_(self.since_F >= self.after_tokens)
        self.after_restore()

    def after_restore(self) -> None:
        """Rebuild the padded list from dead_F. The padding points at latent 0 and is masked by `real_A`."""
        dead_N = self.dead_F.nonzero().squeeze(1)
        count = len(dead_N)
        size = min(1 << max(6, (count - 1).bit_length()), len(self.dead_F)) if count else 0
        if len(self._index_F) < size or self._index_F.device != dead_N.device:
            self._index_F = torch.zeros_like(self.since_F)
            self._real_F = torch.zeros(len(self._index_F), device=dead_N.device)
        self.index_A, self.real_A = self._index_F[:size].zero_(), self._real_F[:size].zero_()
        self.index_A[:count] = dead_N
        self.real_A[:count] = 1

    def shape_key(self) -> Hashable:
        return len(self.index_A)

    def scalars(self) -> dict[str, Tensor]:
        return {"dead": (self.since_F >= self.after_tokens).float().mean()}


class ActivityEMA(Mechanism):
    """A running mean of how often each latent fires: rate_i <- beta rate_i + (1 - beta) mean_B 1[f_i > threshold]."""

    rate_F: Tensor
    combine = "mean"
    leaves_weights = True

    def __init__(self, d_sae: int, beta: float = 0.9, threshold: float = 0.0) -> None:
        super().__init__()
        self.beta, self.threshold = beta, threshold
        self.register_buffer("rate_F", torch.zeros(d_sae))

    def statistic(self, step: Step) -> Tensor:
        if self.threshold == 0 and step.sae.activation[-1].nonnegative:
            return step.counts_F / step.tokens
        return (step.f_BF.detach() > self.threshold).float().mean(0)

    def after_step(self, step: Step) -> None:
        self.rate_F.lerp_(self.read_latents(step), 1 - self.beta)


def reset_adam_state(step: Step, index_N: Tensor) -> None:
    """Set Adam's moments to zero for the weights of some latents. To be called after rewriting these weights."""
    sae = step.sae
    for parameter, dimension in ((sae.W_dec, 0), (sae.W_enc, 1), (sae.b_enc, 0)):
        for name, moment in step.optimizer.state.get(parameter, {}).items():
            if name != "step":
                moment.index_fill_(dimension, index_N, 0.0)


class ResampleDead(Mechanism):
    """Restarts dead latents in the directions of badly reconstructed tokens (Bricken et al. 2023).

    Every `every` steps until step `until`, each dead latent is set to the direction v = x - b_dec of a token drawn with
    a probability proportional to loss^2: W_dec,i = v/|v|, W_enc,i = 0.2 v/|v| times the mean encoder norm of the other
    latents, and b_enc,i = 0. Its Adam state is reset. Tokens are drawn without replacement; if there are more dead
    latents than tokens, the remaining latents restart the next time.
    """

    restarts: Tensor  # () int64, total
    generator_state: Tensor  # uint8

    def __init__(self, dead: DeadLatents, every: int, until: int) -> None:
        super().__init__()
        self.dead, self.every, self.until = dead, every, until
        self.register_buffer("restarts", torch.zeros((), dtype=torch.int64))
        generator = torch.Generator().manual_seed(torch.initial_seed())
        self.register_buffer("generator_state", generator.get_state())

    def silent(self) -> Tensor:
        """(F) bool: whether each latent is dead now."""
        return self.dead.since_F >= self.dead.after_tokens

    def every_n_steps(self, step: Step) -> None:
        if int(step.i) <= self.until:
            self.restart(step, self.silent().nonzero().squeeze(1))

    def restart(self, step: Step, index_N: Tensor) -> Tensor:
        """Restart latents, each in the direction of a token of the batch. Returns the latents that were restarted."""
        sae = step.sae
        probability_B = step.error_BD.square().sum(1).double().square().nan_to_num(0.0, 0.0, 0.0).cpu()
        index_N = index_N[: int((probability_B > 0).sum())]
        if not len(index_N):
            return index_N
        generator = torch.Generator()
        generator.set_state(self.generator_state.cpu())
        token_N = torch.multinomial(probability_B, len(index_N), generator=generator).to(index_N.device)
        self.generator_state.copy_(generator.get_state())

        direction_ND = step.x_BD[token_N] - sae.b_dec
        direction_ND = direction_ND / direction_ND.norm(dim=1, keepdim=True).clamp_min(1e-12)
        others_F = torch.ones(sae.d_sae, dtype=torch.bool, device=index_N.device).index_fill(0, index_N, False)
        norm = sae.W_enc[:, others_F].norm(dim=0).mean() if others_F.any() else sae.W_enc.norm(dim=0).mean()
        sae.W_dec.data[index_N] = direction_ND
        sae.W_enc.data[:, index_N] = (0.2 * norm * direction_ND).T
        # A restarted latent sees x - b_dec, even if the encoder does not subtract b_dec.
        sae.b_enc.data[index_N] = 0 if sae.pre_bias else -(sae.b_dec @ sae.W_enc[:, index_N])
        reset_adam_state(step, index_N)
        self.dead.since_F[index_N] = 0
        self.restarts += len(index_N)
        return index_N

    def scalars(self) -> dict[str, Tensor]:
        return {"resampled": self.restarts}


class BatchTopKThreshold(Mechanism):
    """Makes the threshold t of a BatchTopK follow the smallest value kept in each batch: t <- t + rate (min - t).

    After training, the smallest kept value is averaged over further batches, and the threshold is set to that mean.
    These are the batches that follow, or the first batches if the epoch has ended. So with the final weights, k latents
    per token are active on average, however short the run was.
    """

    batches: Tensor  # () int64
    combine = "min"
    leaves_weights = True
    has_kernels = True

    def __init__(self, activation: BatchTopK, rate: float = 0.01) -> None:
        super().__init__()
        self.activation, self.rate = activation, rate
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))
        self.calibrated = 0

    def statistic(self, step: Step) -> Tensor:
        return lowest_positive(self.latents(step))

    def latents(self, step: Step) -> Tensor:
        return (step.f_BF if step.selected_N is None else step.selected_N).detach()

    def after_step(self, step: Step) -> None:
        lowest = step.statistics.get(self)  # set only if the batch was computed in parts
        value_N = self.latents(step) if lowest is None else lowest
        follow = follow_threshold if self.by_kernels else follow_by_torch
        follow(value_N, self.activation.threshold, self.batches, self.rate)

    def calibrate(self, step: Step) -> None:
        self.calibrated += 1
        move_threshold(self.read_latents(step), self.activation.threshold, 1 / self.calibrated)

    def scalars(self) -> dict[str, Tensor]:
        return {"threshold": self.activation.threshold}


class AnnealK(Mechanism):
    """Lowers k from `start`: step t keeps k_t = start + (k - start) min(1, t/steps) latents per token, rounded down.

    With many active latents at first, few die. Tensors have room for the largest k_t until the next call of
    `every_n_steps`; unused slots are masked.

    dictionary_learning (`k_anneal_steps`) and sparsify (`k_decay_steps`) do the same with start = d_in.
    Paper: none of the papers' baselines lowers k. dictionary_learning sets k to k_t after step t, so its first step
    uses k.
    """

    room: Tensor  # () int64
    leaves_weights = True

    def __init__(self, activation: KeepTopK, start: float, steps: int, every: int = 50) -> None:
        super().__init__()
        self.activation, self.start, self.steps, self.every = activation, start, steps, every
        self.register_buffer("room", torch.tensor(math.ceil(start)))
        activation.now, activation.max_k = torch.tensor(float(start)), math.ceil(start)

    def after_step(self, step: Step) -> None:
        assert self.activation.now is not None  # set by __init__
        share = ((step.i + 1) / self.steps).clamp(max=1.0)
        self.activation.now.copy_(self.start * (1 - share) + self.activation.k * share)

    def every_n_steps(self, step: Step) -> None:
        assert self.activation.now is not None
        self.room.copy_(self.activation.now.ceil())
        self.after_restore()

    def after_restore(self) -> None:
        room, k = int(self.room), self.activation.k
        self.activation.max_k = room if room > math.ceil(k) else k

    def shape_key(self) -> Hashable:
        return self.activation.max_k

    def scalars(self) -> dict[str, Tensor]:
        assert self.activation.now is not None
        return {"k": self.activation.now}
