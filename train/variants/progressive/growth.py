"""Paper 001: growth, (3) and (4). The number of latents that are enabled next depends on how many latents fire."""

import math

import torch
from torch import Tensor

from ...activation_functions import Activation
from ...mechanisms import ActivityEMA, DeadLatents
from ...step import Mechanism, Step


class EnabledLatents(Activation, name="enabled"):
    """Sets latents that are not yet enabled to minus infinity, so they neither fire nor take part in competition."""

    on_F: Tensor  # 1 or 0

    def __init__(self, d_sae: int) -> None:
        super().__init__(d_sae=d_sae)
        self.register_buffer("on_F", torch.ones(d_sae))

    def forward(self, z_BF: Tensor) -> Tensor:
        return torch.where(self.on_F > 0, z_BF, -torch.inf)


class EnabledUtilization(ActivityEMA):
    """v_i (3) and rho, the share of the enabled latents that are in use.

    Paper: 1[|f_i(x_t)| > tau] is for one token, but here x_t is a batch. `reading` selects v_i and rho:
      alive_fraction  v_i is the share of tokens that use i, and rho the share of enabled latents with v_i over 0.001
      mean            v_i is the share of tokens that use i, so rho is about L0/n, always below 0.3
      any             v_i is whether any token uses i, so rho is about 1

    v is used only for rho, and rho is used only in (4) and (6). `acted_smoothed` is the sum, over all steps, of the
    absolute difference between the smoothed rho and the rho of the step's batch alone.
    """

    undivided = "the utilization of latents is computed from the whole batch"
    rho: Tensor  # ()
    acted_smoothed: Tensor  # () float32
    leaves_weights = True

    def __init__(self, enabled: EnabledLatents, beta: float, tau: float, reading: str = "alive_fraction") -> None:
        super().__init__(len(enabled.on_F), beta, tau)
        self.enabled = enabled
        self.reading = reading
        self.register_buffer("rho", torch.zeros(()))
        self.register_buffer("acted_smoothed", torch.zeros(()))

    def after_step(self, step: Step) -> None:
        fired_BF = step.f_BF.detach() > self.threshold
        batch_F = fired_BF.any(0).float() if self.reading == "any" else fired_BF.float().mean(0)
        self.rate_F.lerp_(batch_F, 1 - self.beta)
        self.rho.copy_(self.utilization(self.rate_F))
        self.acted_smoothed.add_((self.rho - self.utilization(batch_F)).abs())

    def utilization(self, rate_F: Tensor) -> Tensor:
        """rho (3) for latents that fire at these rates."""
        v_F = (rate_F > 1e-3).float() if self.reading == "alive_fraction" else rate_F
        return (v_F * self.enabled.on_F).sum() / self.enabled.on_F.sum()

    def scalars(self) -> dict[str, Tensor]:
        return {"rho": self.rho, "smoothed": self.acted_smoothed}


class GrowCapacity(Mechanism):
    """Starts with a share of the latents (`start`) and enables more every `interval` steps. rho sets how many (4).

    Until a latent is enabled, its weights keep their initial values: it gets no gradient and no decoupled weight decay,
    and does not count as dead. When a latent is enabled, its Adam moments are zero, but its Adam step count is that of
    all latents. `n_ref` is the n of (4); None stands for d_sae.

    Paper: 0.1 n rho is at least 69 at n = 2304, so "adaptive 2-7" is always 7 and "adaptive 4-10" always 10. Within
    these ranges, the increments vary with rho only for n around 100.

    The paper does not say which latents are enabled first. Here `order` decides: `index`, or `importance`, the
    frequency with which a latent that is not yet enabled would fire, averaged as in (3).

    `acted_grown` counts the latents enabled since the start. `acted_adapted` counts the increments that differ from the
    fixed 5 because of rho.
    """

    n: Tensor  # (), not rounded
    wish_F: Tensor  # how often each latent would fire if it were enabled
    acted_grown: Tensor  # () int64
    acted_adapted: Tensor  # () int64

    def __init__(
        self,
        enabled: EnabledLatents,
        utilization: EnabledUtilization,
        dead: DeadLatents,
        start: float,
        interval: int = 10,
        hybrid: bool = True,
        n_ref: int | None = 100,
        pace: float = 1.0,
        order: str = "index",
    ) -> None:
        super().__init__()
        self.enabled, self.use, self.dead = enabled, utilization, dead  # `use` is a key in checkpoints
        self.interval, self.hybrid, self.pace = interval, hybrid, pace
        self.order = order
        d_sae = len(enabled.on_F)
        self.n_ref = d_sae if n_ref is None else n_ref
        first = max(1, math.ceil(start * d_sae))
        enabled.on_F[first:] = 0
        self.register_buffer("n", torch.tensor(float(first)))
        self.register_buffer("wish_F", torch.zeros(d_sae))
        for name in ("acted_grown", "acted_adapted"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64))

    def increment(self, rho: Tensor) -> Tensor:
        """The number of latents that (4) enables in one increment, at the paper's width."""
        low = torch.full_like(rho, 5.0)
        if not self.hybrid:
            return low
        middle = (0.1 * self.n_ref * rho).floor().clamp(2, 7)
        high = (0.15 * self.n_ref * rho).floor().clamp(4, 10)
        return torch.where(rho < 0.3, low, torch.where(rho < 0.6, middle, high))

    def after_backward(self, step: Step) -> None:
        # The weights to which weight decay applies, with their values before this step's update; not part of the state.
        groups = step.optimizer.param_groups
        decayed = {id(weight) for group in groups if group["weight_decay"] for weight in group["params"]}
        weights = ((name, getattr(step.sae, name)) for name in ("W_enc", "b_enc", "W_dec"))
        self.before = {name: weight.detach().clone() for name, weight in weights if id(weight) in decayed}

    def after_step(self, step: Step) -> None:
        on_F = self.enabled.on_F
        for name, before in self.before.items():  # latents that are not enabled stay as they were
            weight = getattr(step.sae, name).data
            weight.copy_(torch.where((on_F[:, None] if name == "W_dec" else on_F) > 0, weight, before))
        due = (step.i + 1) % self.interval == 0
        increment = self.increment(self.use.rho)
        self.acted_adapted.add_(due & (increment != 5) & (self.n < len(on_F)))
        self.n.add_(torch.where(due, self.pace * increment, 0)).clamp_(max=len(on_F))
        if self.order == "importance":
            would_fire_BF = step.pre_BF.detach() > self.use.threshold
            self.wish_F.lerp_(would_fire_BF.float().mean(0), 1 - self.use.beta)
        ranked_F = torch.where(on_F > 0, torch.inf, self.wish_F).argsort(descending=True, stable=True)
        rank_F = torch.empty_like(ranked_F).scatter_(0, ranked_F, torch.arange(len(on_F), device=on_F.device))
        now_F = rank_F < self.n.floor()
        self.acted_grown.add_((now_F & (on_F == 0)).sum())
        on_F.copy_(now_F)
        self.dead.since_F.masked_fill_(on_F == 0, 0)

    def scalars(self) -> dict[str, Tensor]:
        return {"enabled": self.enabled.on_F.sum(), "grown": self.acted_grown, "adapted": self.acted_adapted}
