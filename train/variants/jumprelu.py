"""JumpReLU SAEs: each latent has a learned threshold (Rajamanoharan et al. 2024b).

    f = z H(z - theta),     z = x W_enc + b_enc

The gradient of a step function is zero or undefined. The following gradients are used instead, with K(u) = 1[|u| < 1/2]
and a bandwidth eps:

    d (z H(z - theta)) / d theta = -(theta/eps) K((z - theta)/eps)
    d H(z - theta)     / d theta = -(1/eps)     K((z - theta)/eps)

There is a recipe for each of three penalties: on the number of active latents (`jumprelu-step`), on the distance of
that number from a target (`jumprelu`), and on the tanh of the latents' values (`jumprelu-tanh`).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...common.errors import UsageError
from ..activation_functions import Activation
from ..kernels.operators import jump_counts, jump_gradients
from ..losses import MSE
from ..mechanisms import DeadLatents, UnitNormDecoder, UnitNormExport
from ..optimization import Optimization
from ..recipe import recipe
from ..sae import SAE
from ..schedules import warmup
from ..step import LossTerm, Mechanism, Step
from ..variant import RunConfig, Variant


class JumpFunction(torch.autograd.Function):
    """z H(z - theta). The gradient reaches z where the latent fires, and theta where |z - theta| < eps/2.

    With `to_input`, z also gets theta's gradient where |z - theta| < eps/2, with the opposite sign, because H depends
    only on z - theta.
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


class FiresFunction(torch.autograd.Function):
    """H(z - theta) in theta's dtype. Only theta gets a gradient, so a penalty on the count moves only theta."""

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


class JumpByKernels(JumpFunction):
    """`JumpFunction` with an operator that has a GPU kernel: one pass computes all gradients."""

    @staticmethod
    def backward(ctx: Any, grad_BF: Tensor) -> tuple[Tensor, Tensor, None, None]:
        z_BF, theta_F = ctx.saved_tensors
        to_z_BF, grad_F = jump_gradients(z_BF, theta_F, grad_BF, ctx.eps, ctx.to_input)
        return to_z_BF, -theta_F / ctx.eps * grad_F, None, None


class CountByKernels(torch.autograd.Function):
    """Scalar: sum_BF H(z - theta), by an operator with a GPU kernel. One pass computes the sum and theta's gradient."""

    @staticmethod
    def forward(ctx: Any, z_BF: Tensor, theta_F: Tensor, eps: float) -> Tensor:
        fires_F, near_F = jump_counts(z_BF.detach(), theta_F, eps)
        ctx.save_for_backward(near_F)
        ctx.eps = eps
        return fires_F.sum()

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[None, Tensor, None]:
        (near_F,) = ctx.saved_tensors
        return None, -gradient[0] * near_F / ctx.eps, None


class JumpReLU(Activation, name="jumprelu"):
    """z H(z - theta) with a threshold per latent, always in float32.

    `bandwidth` is a length on the axis of z, so it depends on the normalization of the run. The bandwidth is used only
    in training and is not rescaled.
    """

    has_kernels = True

    def __init__(self, d_sae: int, bandwidth: float, start: float = 0.0, ste_to_input: bool = False) -> None:
        super().__init__(d_sae=d_sae, bandwidth=bandwidth)  # the options that are saved with the SAE
        self.bandwidth, self.ste_to_input = bandwidth, ste_to_input
        self.threshold = nn.Parameter(torch.full((d_sae,), start))

    def forward(self, z_BF: Tensor) -> Tensor:
        function = JumpByKernels if self.by_kernels and self.training else JumpFunction
        f_BF: Tensor = function.apply(z_BF, self.threshold, self.bandwidth, self.ste_to_input)
        return f_BF

    def fires(self, z_BF: Tensor) -> Tensor:
        """(B, F): 1 where a latent fires, 0 elsewhere; has a gradient with respect to the thresholds."""
        fires_BF: Tensor = FiresFunction.apply(z_BF, self.threshold, self.bandwidth)
        return fires_BF

    def count(self, z_BF: Tensor) -> Tensor:
        """Scalar: the sum of `fires`, computed by an operator with a GPU kernel."""
        count: Tensor = CountByKernels.apply(z_BF, self.threshold, self.bandwidth)
        return count

    def rescale_(self, factor: float | Tensor) -> None:
        self.threshold.mul_(factor)


class NonNegativeThreshold(Mechanism):
    """Clamps theta to 0 or above after every step, so that active latents are positive."""

    leaves_weights = True

    def __init__(self, activation: JumpReLU) -> None:
        super().__init__()
        self.activation = activation

    def after_step(self, step: Step) -> None:
        self.activation.threshold.clamp_(min=0)

    def scalars(self) -> dict[str, Tensor]:
        return {"threshold": self.activation.threshold.detach().mean()}


class ThresholdSpeedup(Mechanism):
    """With `--l0`, scales the updates of thresholds so that a short run can move thresholds as far as a long run can.

    Paper: a threshold moves by about `lr` per step, like a weight. So 10,000 steps at a learning rate of 7e-5 can move
    a threshold by 0.7, but a run of a thousand steps ends with an L0 far above the target.
    """

    leaves_weights = True

    def __init__(self, activation: JumpReLU, steps: int, lr: Callable[[], float]) -> None:
        super().__init__()
        self.activation, self.steps, self.lr = activation, steps, lr

    def after_backward(self, step: Step) -> None:
        # The thresholds before this step's update; not part of the state.
        self.threshold_before_F = self.activation.threshold.detach().clone()

    def after_step(self, step: Step) -> None:
        factor = max(1.0, 0.7 / (self.steps * self.lr()))
        before_F, threshold = self.threshold_before_F, self.activation.threshold
        threshold.copy_(before_F + factor * (threshold - before_F))


def speed_up_thresholds(config: RunConfig, variant: Variant, activation: JumpReLU) -> Variant:
    """Add `ThresholdSpeedup` to the variant if the run has an `--l0`."""
    if config.l0 is not None:
        variant.mechanisms.insert(1, ThresholdSpeedup(activation, config.steps, lambda: variant.optimization.lr))
    return variant


class L0(LossTerm):
    """mean_B sum_F H(z - theta).

    H is computed from z, not from f. If z is just below theta, f is 0, which is far below theta. If H were computed
    from f, the threshold would therefore get only half its gradient.
    """

    sparsity = True
    undivided = ""

    def __init__(self, activation: JumpReLU) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, step: Step) -> Tensor:
        if self.activation.by_kernels:
            return self.activation.count(step.pre_BF) / step.tokens
        return self.activation.fires(step.pre_BF).sum(-1).mean()


class TargetL0(L0):
    """(L0 / target - 1)^2."""

    sparsity = False  # this loss has its own target, so `--l0` does not control its coefficient
    reads_batch = True

    def __init__(self, activation: JumpReLU, target: float) -> None:
        super().__init__(activation)
        self.target = target

    def forward(self, step: Step) -> Tensor:
        l0 = super().forward(step)
        if step.part_of is None:
            return (l0 / self.target - 1).square()
        # Each part returns the value for the whole batch, with only this part's share of the gradient.
        excess = step.whole.l0 / self.target - 1
        return excess.square() + 2 * excess / self.target * (l0 - l0.detach())


class Tanh(LossTerm):
    """mean_B sum_F tanh(c f |W_dec,i|): linear for small latents, constant for large ones."""

    sparsity = True
    undivided = ""

    def __init__(self, c: float) -> None:
        super().__init__()
        self.c = c

    def forward(self, step: Step) -> Tensor:
        return (self.c * step.f_BF.float() * step.sae.W_dec.norm(dim=1)).tanh().sum(-1).mean()


class PreActLoss(LossTerm):
    """mean_B sum_F ReLU(theta - z) |W_dec,i|: a weak pull on latents that do not fire, so that no latent stays dead."""

    undivided = ""

    def __init__(self, activation: JumpReLU) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, step: Step) -> Tensor:
        shortfall_BF = (self.activation.threshold - step.pre_BF).relu()
        return (shortfall_BF * step.sae.W_dec.norm(dim=1)).sum(-1).mean()


GEMMA_SCOPE = Optimization(lr=7e-5, beta1=0.0)


def make_activation(
    config: RunConfig, bandwidth: float, threshold: float, ste_to_input: bool = False, l0: float = 1.0
) -> JumpReLU:
    """The activation that all three recipes use. Raises a UsageError that lists every invalid option."""
    errors = []
    if bandwidth <= 0:
        errors.append(
            f"invalid bandwidth={bandwidth:g}: expected a positive number. Otherwise no latent is close enough to its "
            "threshold for the threshold to learn."
        )
    if threshold < 0:
        errors.append(f"invalid threshold={threshold:g}: expected 0 or more.")
    if l0 <= 0:
        errors.append(f"invalid l0={l0:g}: expected a positive number of latents per token.")
    if errors:
        raise UsageError("\n".join(errors))
    return JumpReLU(config.d_sae, bandwidth, threshold, ste_to_input)


def unit_norm_variant(
    config: RunConfig, activation: JumpReLU, loss: LossTerm, penalty: float, penalty_warmup: int | None
) -> Variant:
    """The variant of `jumprelu` and `jumprelu-step`: unit rows, and a penalty that rises from zero."""
    variant = Variant(
        SAE(config.d_in, config.d_sae, [activation], pre_bias=False),
        {"mse": (1.0, MSE()), "l0_penalty": (warmup(penalty, config.penalty_warmup(penalty_warmup)), loss)},
        [NonNegativeThreshold(activation), UnitNormDecoder()],
        GEMMA_SCOPE,
        dead=DeadLatents(config.d_sae, config.dead_after_tokens),
    )
    return speed_up_thresholds(config, variant, activation)


@recipe("jumprelu", paper="Rajamanoharan et al. 2024b")
def jumprelu(
    config: RunConfig,
    l0: float = 32,
    penalty: float = 1.0,
    penalty_warmup: int | None = None,
    bandwidth: float = 0.001,
    threshold: float = 0.001,
) -> Variant:
    """Learned thresholds under a penalty that keeps L0 at `l0`.

    The penalty is (L0/l0 - 1)^2. A threshold moves by about the learning rate per step, so at the default rate a run of
    a thousand steps ends far above `l0`. With `--l0`, the updates of the thresholds are scaled up, so that the run
    reaches its target.

    Args:
        l0: Target number of active latents per token.
        penalty: Strength of the penalty.
        penalty_warmup: Steps over which the penalty rises from zero. None: a twentieth of the run.
        bandwidth: Width eps of the window in which a threshold gets a gradient. Presumes inputs with E|x|^2 = 1.
        threshold: Initial threshold of every latent. Presumes inputs with E|x|^2 = 1.
    """
    activation = make_activation(config, bandwidth, threshold, l0=l0)
    return unit_norm_variant(config, activation, TargetL0(activation, l0), penalty, penalty_warmup)


@recipe("jumprelu-step", paper="Rajamanoharan et al. 2024b, Lieberum et al. 2024")
def jumprelu_step(
    config: RunConfig,
    penalty: float = 1e-3,
    penalty_warmup: int | None = None,
    bandwidth: float = 0.001,
    threshold: float = 0.001,
) -> Variant:
    """Learned thresholds under a penalty on L0, as in Gemma Scope.

    Args:
        penalty: Strength of the penalty on L0.
        penalty_warmup: Steps over which the penalty rises from zero. None: a twentieth of the run.
        bandwidth: Width eps of the window in which a threshold gets a gradient. Presumes inputs with E|x|^2 = 1.
        threshold: Initial threshold of every latent. Presumes inputs with E|x|^2 = 1.
    """
    activation = make_activation(config, bandwidth, threshold)
    return unit_norm_variant(config, activation, L0(activation), penalty, penalty_warmup)


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
    """Learned thresholds under a tanh penalty, with free decoder rows.

    Rows are scaled to unit norm when the SAE is saved. Options are in the paper's units, where inputs have E|x| =
    sqrt(d_in). For inputs with E|x|^2 = 1, penalty is divided by d_in, c is multiplied by sqrt(d_in), and reach,
    bandwidth and threshold are divided by sqrt(d_in).

    Paper: gives dJumpReLU/dx without the term that `ste_to_input` adds, but says that the estimator's gradient reaches
    all parameters. SAELens implements what the text says.

    Args:
        penalty: Strength of the tanh penalty, which rises over the whole run.
        c: Slope of the tanh.
        reach: Strength of the pull on latents that do not fire, so that no latent stays dead.
        bandwidth: Width eps of the window in which a threshold gets a gradient.
        threshold: Initial threshold of every latent.
        ste_to_input: Within the window, pass the threshold's gradient also to the pre-activation, and so to the
            encoder.
    """
    scale = config.d_in**0.5
    # Paper: learns log theta. Adam moves log theta by about the learning rate per step, so theta hardly changes. Here
    # theta itself is learned.
    activation = make_activation(config, bandwidth / scale, threshold / scale, ste_to_input)
    variant = Variant(
        SAE(config.d_in, config.d_sae, [activation], pre_bias=False),
        {
            "mse": (1.0, MSE()),
            "tanh": (warmup(penalty / scale**2, config.steps), Tanh(c * scale)),
            "reach": (reach / scale, PreActLoss(activation)),
        },
        [NonNegativeThreshold(activation), UnitNormExport()],
        Optimization(lr=2e-4),
        dead=DeadLatents(config.d_sae, config.dead_after_tokens),
    )
    return speed_up_thresholds(config, variant, activation)
