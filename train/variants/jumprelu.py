"""JumpReLU SAEs: each latent has a threshold, and learns it (Rajamanoharan et al. 2024b).

    f = z H(z - theta),     z = x W_enc + b_enc

A step has no useful gradient. These stand in for it, with K(u) = 1[|u| < 1/2] and a bandwidth eps:

    d (z H(z - theta)) / d theta = -(theta/eps) K((z - theta)/eps)
    d H(z - theta)     / d theta = -(1/eps)     K((z - theta)/eps)

Three penalties: on the number of latents (`jumprelu-step`), on its distance from a target (`jumprelu`), and on the tanh
of their sizes (`jumprelu-tanh`).
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...common.errors import UsageError
from ..activations import Activation
from ..losses import MSE
from ..mechanisms import DeadLatents, UnitNormDecoder, UnitNormExport
from ..recipe import recipe
from ..sae import SAE
from ..schedules import warmup
from ..step import LossTerm, Mechanism, Step
from ..variant import Optimization, RunConfig, Variant


class Jump(torch.autograd.Function):
    """z H(z - theta). The gradient reaches z where the latent fires, and theta within eps/2 of it.

    With `to_input` what theta gets there z gets too, with the other sign: H depends on z - theta alone.
    """

    @staticmethod
    def forward(ctx: Any, z_BF: Tensor, theta_F: Tensor, eps: float, to_input: bool) -> Tensor:
        ctx.save_for_backward(z_BF, theta_F)
        ctx.eps, ctx.to_input = eps, to_input
        return z_BF * (z_BF > theta_F)

    @staticmethod
    def backward(ctx: Any, grad_BF: Tensor) -> tuple[Tensor, Tensor, None, None]:
        z_BF, theta_F = ctx.saved_tensors
        near_BF = (z_BF - theta_F).abs() < ctx.eps / 2
        grad_F = (grad_BF.to(theta_F.dtype) * near_BF).sum_to_size(theta_F.shape)
        to_z_BF = grad_BF * (z_BF > theta_F)
        if ctx.to_input:
            to_z_BF = to_z_BF + (theta_F / ctx.eps).to(grad_BF.dtype) * near_BF * grad_BF
        return to_z_BF, -theta_F / ctx.eps * grad_F, None, None


class Fires(torch.autograd.Function):
    """H(z - theta) in theta's dtype. The gradient reaches theta alone: a count pulls at no pre-activation."""

    @staticmethod
    def forward(ctx: Any, z_BF: Tensor, theta_F: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(z_BF, theta_F)
        ctx.eps = eps
        return (z_BF > theta_F).to(theta_F.dtype)

    @staticmethod
    def backward(ctx: Any, grad_BF: Tensor) -> tuple[None, Tensor, None]:
        z_BF, theta_F = ctx.saved_tensors
        near_BF = (z_BF - theta_F).abs() < ctx.eps / 2
        return None, -(grad_BF * near_BF).sum_to_size(theta_F.shape) / ctx.eps, None


class JumpReLU(Activation, name="jumprelu"):
    """z H(z - theta) with a threshold per latent, kept in float32 by everything that holds it.

    `bandwidth` is a length on the axis of z, so it presumes the normalisation of the run; it matters in training only
    and is not rescaled.
    """

    def __init__(self, d_sae: int, bandwidth: float, start: float = 0.0, ste_to_input: bool = False) -> None:
        super().__init__(d_sae=d_sae, bandwidth=bandwidth)  # all that an SAE is rebuilt with to encode
        self.bandwidth, self.ste_to_input = bandwidth, ste_to_input
        self.threshold = nn.Parameter(torch.full((d_sae,), start))

    def forward(self, z_BF: Tensor) -> Tensor:
        return Jump.apply(z_BF, self.threshold, self.bandwidth, self.ste_to_input)

    def fires(self, z_BF: Tensor) -> Tensor:
        return Fires.apply(z_BF, self.threshold, self.bandwidth)

    def rescale_(self, factor: float | Tensor) -> None:
        self.threshold.mul_(factor)


class NotNegative(Mechanism):
    """theta >= 0 after every step, so that what fires is positive."""

    def __init__(self, activation: JumpReLU) -> None:
        super().__init__()
        self.activation = activation

    def after_step(self, step: Step) -> None:
        self.activation.threshold.clamp_(min=0)

    def scalars(self) -> dict[str, Tensor]:
        return {"threshold": self.activation.threshold.detach().mean()}


class ThresholdSpeedup(Mechanism):
    """`--l0`: thresholds have the way in a short run that 10,000 steps at a rate of 7e-5 have, 0.7 in all.

    Paper: a threshold moves by about the rate `lr` a step, as weights do, so a run of a thousand steps ends far above
    its target.
    """

    def __init__(self, activation: JumpReLU, steps: int, lr: Callable[[], float]) -> None:
        super().__init__()
        self.activation, self.steps, self.lr = activation, steps, lr

    def after_backward(self, step: Step) -> None:
        self.old_F = self.activation.threshold.detach().clone()  # of this step; nothing to keep

    def after_step(self, step: Step) -> None:
        faster = max(1.0, 0.7 / (self.steps * self.lr()))
        self.activation.threshold.copy_(self.old_F + faster * (self.activation.threshold - self.old_F))


def arrives(config: RunConfig, variant: Variant, activation: JumpReLU) -> Variant:
    """The variant; with `--l0` its thresholds hurry."""
    if config.l0 is not None:
        variant.mechanisms.insert(1, ThresholdSpeedup(activation, config.steps, lambda: variant.optimization.lr))
    return variant


class L0(LossTerm):
    """mean_B sum_F H(z - theta).

    H sees z, not f: in f, a z just below theta counts as far below, and the threshold would get half its gradient.
    """

    sparsity = True

    def __init__(self, activation: JumpReLU) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, step: Step) -> Tensor:
        return self.activation.fires(step.pre_BF).sum(-1).mean()


class TargetL0(L0):
    """(L0 / target - 1)^2."""

    sparsity = False  # it has a target of its own

    def __init__(self, activation: JumpReLU, target: float) -> None:
        super().__init__(activation)
        self.target = target

    def forward(self, step: Step) -> Tensor:
        return (super().forward(step) / self.target - 1).square()


class Tanh(LossTerm):
    """mean_B sum_F tanh(c f |W_dec,i|): linear in small latents, constant in large ones."""

    sparsity = True

    def __init__(self, c: float) -> None:
        super().__init__()
        self.c = c

    def forward(self, step: Step) -> Tensor:
        return (self.c * step.f_BF.float() * step.sae.W_dec.norm(dim=1)).tanh().sum(-1).mean()


class PreActLoss(LossTerm):
    """mean_B sum_F ReLU(theta - z) |W_dec,i|: a small pull on latents that do not fire, so that none dies for good."""

    def __init__(self, activation: JumpReLU) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, step: Step) -> Tensor:
        short_BF = (self.activation.threshold - step.pre_BF).relu()
        return (short_BF * step.sae.W_dec.norm(dim=1)).sum(-1).mean()


GEMMA_SCOPE = Optimization(lr=7e-5, beta1=0.0)


def problems(bandwidth: float, threshold: float, l0: float) -> Iterator[str]:
    """What is wrong with the options of a JumpReLU."""
    if bandwidth <= 0:
        yield f"bandwidth={bandwidth:g} is not positive: no latent would be near enough for its threshold to learn."
    if threshold < 0:
        yield f"threshold={threshold:g} is negative, and stays at 0 or above."
    if l0 <= 0:
        yield f"l0={l0:g} latents a token are no target: give a number above 0."


def jump_relu(
    config: RunConfig, bandwidth: float, threshold: float, l0: float = 1.0, ste_to_input: bool = False
) -> JumpReLU:
    if wrong := list(problems(bandwidth, threshold, l0)):
        raise UsageError("\n".join(wrong))
    return JumpReLU(config.d_sae, bandwidth, threshold, ste_to_input)


def jump(config: RunConfig, activation: JumpReLU, penalty: float, steps: int | None, term: LossTerm) -> Variant:
    """What `jumprelu` and `jumprelu-step` share: unit rows, and a penalty that grows over a twentieth of the run."""
    variant = Variant(
        SAE(config.d_in, config.d_sae, [activation], pre_bias=False),
        {"mse": (1.0, MSE()), "l0_penalty": (warmup(penalty, config.penalty_warmup(steps)), term)},
        [NotNegative(activation), UnitNormDecoder()],
        GEMMA_SCOPE,
        dead=DeadLatents(config.d_sae, config.dead_after_tokens),
    )
    return arrives(config, variant, activation)


@recipe("jumprelu", paper="Rajamanoharan et al. 2024b")
def jumprelu(
    config: RunConfig,
    l0: float = 32,
    penalty: float = 1.0,
    penalty_warmup: int | None = None,
    bandwidth: float = 0.001,
    threshold: float = 0.001,
) -> Variant:
    """Learned thresholds under (L0/l0 - 1)^2: the number of latents a token settles at `l0`.

    `bandwidth` and `threshold`, its start, presume inputs with E|x|^2 = 1. A threshold moves by about lr a step: at the
    default lr a run of a thousand steps ends far above `l0`; with `--l0` thresholds alone move faster, and it arrives.
    """
    activation = jump_relu(config, bandwidth, threshold, l0)
    return jump(config, activation, penalty, penalty_warmup, TargetL0(activation, l0))


@recipe("jumprelu-step", paper="Rajamanoharan et al. 2024b, Lieberum et al. 2024")
def jumprelu_step(
    config: RunConfig,
    penalty: float = 1e-3,
    penalty_warmup: int | None = None,
    bandwidth: float = 0.001,
    threshold: float = 0.001,
) -> Variant:
    """Learned thresholds under `penalty` times L0, as in Gemma Scope.

    `bandwidth` and `threshold`, its start, presume inputs with E|x|^2 = 1.
    """
    activation = jump_relu(config, bandwidth, threshold)
    return jump(config, activation, penalty, penalty_warmup, L0(activation))


@recipe("jumprelu-tanh", paper="Conerly et al. 2025 (Anthropic, January update)")
def jumprelu_tanh(
    config: RunConfig,
    penalty: float = 20.0,
    c: float = 4.0,
    reach: float = 3e-6,
    bandwidth: float = 2.0,
    threshold: float = 0.1,
    ste_to_input: bool = False,
) -> Variant:
    """Learned thresholds under a tanh of the latents' sizes, with free decoder rows; saved with unit rows.

    Options count in the paper's units, inputs with E|x| = sqrt(d_in). With E|x|^2 = 1 the same objective, divided by
    d_in, has penalty/d_in, c sqrt(d_in), and reach, bandwidth and threshold over sqrt(d_in).

    `ste_to_input`: what the step gives a threshold it also gives the pre-activation, and so the encoder. Paper: prints
    dJumpReLU/dx without it, and writes that the estimator's gradient reaches all parameters; SAELens has it.
    """
    unit = config.d_in**0.5
    # Paper: learns log theta, which Adam moves by its rate in log space: hardly at all. theta itself is learned here.
    activation = jump_relu(config, bandwidth / unit, threshold / unit, ste_to_input=ste_to_input)
    variant = Variant(
        SAE(config.d_in, config.d_sae, [activation], pre_bias=False),
        {
            "mse": (1.0, MSE()),
            "tanh": (warmup(penalty / unit**2, config.steps), Tanh(c * unit)),
            "reach": (reach / unit, PreActLoss(activation)),
        },
        [NotNegative(activation), UnitNormExport()],
        Optimization(lr=2e-4),
        dead=DeadLatents(config.d_sae, config.dead_after_tokens),
    )
    return arrives(config, variant, activation)
