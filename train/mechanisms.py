"""Mechanisms that more than one recipe uses."""

import math

import torch
from torch import Tensor

from .activations import BatchTopK, KeepTopK
from .sae import SAE
from .step import Mechanism, Step


class UnitNormDecoder(Mechanism):
    """Rows of W_dec stay on the unit sphere, and the optimizer is not fed the radial gradient. The last mechanism."""

    def after_backward(self, step: Step) -> None:
        weight, gradient = step.sae.W_dec.data, step.sae.W_dec.grad
        assert gradient is not None  # the step has just been backpropagated
        gradient -= (gradient * weight).sum(1, keepdim=True) * weight

    def after_step(self, step: Step) -> None:
        weight = step.sae.W_dec.data
        weight /= weight.norm(dim=1, keepdim=True).clamp_min(1e-12)


class UnitNormExport(Mechanism):
    """Rows are free in training; the saved SAE has unit rows and the function it had.

        f_i <- f_i |W_i|,   W_i <- W_i / |W_i|

    For activations that act on each latent alone: a choice between latents would see other sizes.
    """

    def export(self, sae: SAE) -> None:
        norm_F = sae.W_dec.norm(dim=1).clamp_min(1e-12)
        sae.W_dec.div_(norm_F[:, None])
        sae.W_enc.mul_(norm_F)
        sae.b_enc.mul_(norm_F)
        for link in sae.activation:
            link.rescale_(norm_F)  # type: ignore[operator]


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

    def after_step(self, step: Step) -> None:
        self.since_F.add_(step.tokens).mul_(~step.fired_F)

    def every_n_steps(self, step: Step) -> None:
        self.dead_F.copy_(self.since_F >= self.after_tokens)
        self.after_restore()

    def after_restore(self) -> None:
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

    def after_step(self, step: Step) -> None:
        self.rate_F.lerp_((step.f_BF.detach() > self.threshold).float().mean(0), 1 - self.beta)


def reset_adam_state(step: Step, index_N: Tensor) -> None:
    """Zero the optimizer's moments of some latents, wherever their weights are. Whoever rewrites weights calls it."""
    sae = step.sae
    for parameter, dimension in ((sae.W_dec, 0), (sae.W_enc, 1), (sae.b_enc, 0)):
        for name, moment in step.optimizer.state.get(parameter, {}).items():
            if name != "step":
                moment.index_fill_(dimension, index_N, 0.0)


class ResampleDead(Mechanism):
    """Dead latents restart on tokens that are badly reconstructed (Bricken et al. 2023).

    Every `every` steps until step `until`, each dead latent takes the direction v = x - b_dec of a token drawn with
    probability ~ loss^2: W_dec,i = v/|v|, W_enc,i = 0.2 v/|v| times the mean norm of the encoder of the others, b_enc,i
    = 0, and Adam forgets it. No token is drawn twice at once; dead latents beyond the batch wait for the next time.
    """

    restarts: Tensor  # () int64, in all
    generator_state: Tensor  # uint8

    def __init__(self, dead: DeadLatents, every: int, until: int) -> None:
        super().__init__()
        self.dead, self.every, self.until = dead, every, until
        self.register_buffer("restarts", torch.zeros((), dtype=torch.int64))
        generator = torch.Generator().manual_seed(torch.initial_seed())
        self.register_buffer("generator_state", generator.get_state())

    def silent(self) -> Tensor:
        """Which latents are dead now, bool (F)."""
        return self.dead.since_F >= self.dead.after_tokens

    def every_n_steps(self, step: Step) -> None:
        if int(step.i) <= self.until:
            self.restart(step, self.silent().nonzero().squeeze(1))

    def restart(self, step: Step, index_N: Tensor) -> Tensor:
        """Restart these latents on tokens of the batch; returns those that got one."""
        sae = step.sae
        chance_B = step.error_BD.square().sum(1).double().square().nan_to_num(0.0, 0.0, 0.0).cpu()
        index_N = index_N[: int((chance_B > 0).sum())]
        if not len(index_N):
            return index_N
        generator = torch.Generator()
        generator.set_state(self.generator_state.cpu())
        token_N = torch.multinomial(chance_B, len(index_N), generator=generator).to(index_N.device)
        self.generator_state.copy_(generator.get_state())

        direction_ND = step.x_BD[token_N] - sae.b_dec
        direction_ND = direction_ND / direction_ND.norm(dim=1, keepdim=True).clamp_min(1e-12)
        others_F = torch.ones(sae.d_sae, dtype=torch.bool, device=index_N.device).index_fill(0, index_N, False)
        norm = sae.W_enc[:, others_F].norm(dim=0).mean() if others_F.any() else sae.W_enc.norm(dim=0).mean()
        sae.W_dec.data[index_N] = direction_ND
        sae.W_enc.data[:, index_N] = (0.2 * norm * direction_ND).T
        # A restarted latent sees x - b_dec, whether or not the encoder subtracts it for the others.
        sae.b_enc.data[index_N] = 0 if sae.pre_bias else -(sae.b_dec @ sae.W_enc[:, index_N])
        reset_adam_state(step, index_N)
        self.dead.since_F[index_N] = 0
        self.restarts += len(index_N)
        return index_N

    def scalars(self) -> dict[str, Tensor]:
        return {"resampled": self.restarts}


class BatchTopKThreshold(Mechanism):
    """The threshold of a BatchTopK follows the smallest latent that its batches keep, t <- t + rate (min - t).

    When training is over it becomes the mean of that minimum over the batches that would come next (after one epoch of
    the cache: its rows again), so that the number of latents a token is k on average for the final weights, however short the run was.
    """

    batches: Tensor  # () int64

    def __init__(self, activation: BatchTopK, rate: float = 0.01) -> None:
        super().__init__()
        self.activation, self.rate = activation, rate
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))
        self.calibrated = 0

    def _follow(self, step: Step, rate: Tensor | float) -> None:
        kept = (step.kept.value_N if step.kept else step.f_BF).detach().float()
        smallest = torch.where(kept > 0, kept, torch.inf).min()
        threshold = self.activation.threshold
        target = torch.where(smallest.isinf(), threshold, smallest)  # a batch in which nothing fired says nothing
        threshold.copy_(threshold + rate * (target - threshold))

    def after_step(self, step: Step) -> None:
        self._follow(step, torch.where(self.batches == 0, 1.0, self.rate))
        self.batches.add_(1)

    def calibrate(self, step: Step) -> None:
        self.calibrated += 1
        self._follow(step, 1 / self.calibrated)

    def scalars(self) -> dict[str, Tensor]:
        return {"threshold": self.activation.threshold}


class AnnealK(Mechanism):
    """Step t keeps k_t = start + (k - start) min(1, t/steps) latents a token, rounded down: many at first, so that few die.

    Shapes have room for the k_t of the last of every `every` steps, and what is over k_t is masked.

    dictionary_learning (`k_anneal_steps`) and sparsify (`k_decay_steps`) do so from start = d_in.
    Paper: no baseline's. dictionary_learning sets k after a step to that step's k_t, so its first step has k.
    """

    room: Tensor  # () int64

    def __init__(self, activation: KeepTopK, start: float, steps: int, every: int = 50) -> None:
        super().__init__()
        self.activation, self.start, self.steps, self.every = activation, start, steps, every
        self.register_buffer("room", torch.tensor(math.ceil(start)))
        activation.now, activation.room = torch.tensor(float(start)), math.ceil(start)

    def after_step(self, step: Step) -> None:
        assert self.activation.now is not None  # this mechanism put it there
        share = ((step.i + 1) / self.steps).clamp(max=1.0)
        self.activation.now.copy_(self.start * (1 - share) + self.activation.k * share)

    def every_n_steps(self, step: Step) -> None:
        assert self.activation.now is not None
        self.room.copy_(self.activation.now.ceil())
        self.after_restore()

    def after_restore(self) -> None:
        room, k = int(self.room), self.activation.k
        self.activation.room = room if room > math.ceil(k) else k

    def scalars(self) -> dict[str, Tensor]:
        assert self.activation.now is not None
        return {"k": self.activation.now}
