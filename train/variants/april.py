"""Two more penalties on ReLU latents: one weighted by decoder norms, and one with a decreasing exponent.

april      L = |x - x_hat|^2 + l1 sum_i f_i |W_dec,i|          rows of W_dec are free
p-anneal   L = |x - x_hat|^2 + l1 c_t sum_i f_i^{p_t}          p_t: 1 -> p_end
"""

import torch
from torch import Tensor

from ...common.errors import UsageError
from ..losses import MSE
from ..mechanisms import DeadLatents, UnitNormDecoder, UnitNormExport
from ..optimization import Optimization
from ..recipe import recipe
from ..sae import SAE
from ..schedules import warmup
from ..step import LossTerm, Mechanism, Step
from ..variant import RunConfig, Variant


class WeightedL1(LossTerm):
    """mean_B sum_F |f_i| |W_dec,i|.

    Shrinking latents while lengthening their decoder rows does not reduce the penalty.
    """

    sparsity = True
    undivided = ""

    def forward(self, step: Step) -> Tensor:
        return (step.f_BF.float().abs().mean(0) * step.sae.W_dec.norm(dim=1)).sum()


@recipe("april", paper="Conerly et al. 2024 (Anthropic, April update)", width=1)
def april(config: RunConfig, l1: float = 5.0, l1_warmup: int | None = None) -> Variant:
    """An L1 penalty, weighted by the norms of the decoder rows.

    Decoder rows can have any norm. They are scaled to unit norm when the SAE is saved.

    Args:
        l1: Strength of the penalty in the paper's units, where inputs have E|x| = sqrt(d_in). For inputs with E|x|^2 =
            1, the equivalent strength is l1 / sqrt(d_in).
        l1_warmup: Steps over which the penalty rises from zero. None: a twentieth of the run.
    """
    sae = SAE(config.d_in, config.d_sae, pre_bias=False)
    for weight in (sae.W_dec, sae.W_enc):
        weight.data *= 0.1
    return Variant(
        sae,
        {"mse": (1.0, MSE()), "l1": (warmup(l1 / config.d_in**0.5, config.penalty_warmup(l1_warmup)), WeightedL1())},
        [UnitNormExport()],
        Optimization(lr=5e-5, b_dec_init="zero"),
        dead=DeadLatents(config.d_sae, config.dead_after_tokens),
    )


class PAnnealing(Mechanism):
    """The exponent p decreases from 1 to `end` in `updates` equal decrements.

    The first decrement takes place at step `start`, and the last decrement takes place one interval before step `stop`.
    At each change, the coefficient is multiplied by the ratio of the old penalty to the new penalty over the last
    `queue` batches, so that the value of the penalty is continuous.

    Paper: its code makes the last change at the last step, so the SAE is never trained with p_end.
    """

    factor: Tensor  # ()
    sums_Q2: Tensor  # mean_B sum_F f^p of the last batches, for the current p and for the next p
    combine = "mean"
    leaves_weights = True

    def __init__(self, end: float, start: float, stop: float, updates: int, queue: int) -> None:
        super().__init__()
        self.end, self.start, self.updates = end, start, updates
        self.interval = (stop - start) / updates
        self.register_buffer("factor", torch.ones(()))
        self.register_buffer("sums_Q2", torch.zeros(queue, 2))

    def changes(self, i: Tensor) -> Tensor:
        """The number of changes before step i."""
        return ((i - self.start) / self.interval).floor().add(1).clamp(0, self.updates)

    def p(self, changes: Tensor) -> Tensor:
        return 1 + (self.end - 1) * (changes / self.updates).clamp(max=1.0)

    def statistic(self, step: Step) -> Tensor:
        changes, f_BF = self.changes(step.i), step.f_BF.detach()
        return torch.stack([power_sum(f_BF, self.p(changes)), power_sum(f_BF, self.p(changes + 1))])

    def after_step(self, step: Step) -> None:
        changes, row_2 = self.changes(step.i), self.read_latents(step)
        self.sums_Q2.index_copy_(0, (step.i % len(self.sums_Q2)).view(1), row_2.view(1, 2))
        current, following = self.sums_Q2.sum(0)
        ratio = torch.where(following > 0, current / following, 1.0)
        p_changes = self.changes(step.i + 1) > changes
        self.factor.mul_(torch.where(p_changes, ratio, 1.0))
        self.sums_Q2.mul_(~p_changes)  # sums for the old exponents are not used for the next change

    def scalars(self) -> dict[str, Tensor]:
        return {"p_factor": self.factor}


def power_sum(f_BF: Tensor, p: Tensor) -> Tensor:
    """mean_B sum_F (f + 1e-6)^p over active latents. 1e-6 is added because the slope of f^p at zero is infinite."""
    f_BF = f_BF.float()
    return torch.where(f_BF > 0, (f_BF + 1e-6) ** p, 0.0).sum(-1).mean()


class Lp(LossTerm):
    """c_t mean_B sum_F f^{p_t}."""

    sparsity = True
    undivided = ""

    def __init__(self, annealing: PAnnealing) -> None:
        super().__init__()
        self.annealing = annealing

    def forward(self, step: Step) -> Tensor:
        p = self.annealing.p(self.annealing.changes(step.i))
        step.metrics["p"] = p
        return self.annealing.factor * power_sum(step.f_BF, p)


@recipe("p-anneal", paper="Karvonen et al. 2024", width=1)
def p_anneal(
    config: RunConfig,
    l1: float = 0.015,
    p_end: float = 0.2,
    start: float = 0.3,
    updates: int = 10,
    queue: int = 10,
    l1_warmup: int | None = None,
) -> Variant:
    """ReLU latents under a penalty whose exponent falls from 1 to 0.2.

    With a small exponent, the penalty counts latents instead of shrinking them.

    Args:
        l1: Strength of the penalty.
        p_end: Final exponent.
        start: Share of the run after which the exponent starts to fall.
        updates: Number of equal decrements by which the exponent falls.
        queue: Number of batches over which the penalty is measured, so that its value does not change with the
            exponent.
        l1_warmup: Steps over which the penalty rises from zero. None: a twentieth of the run.
    """
    errors = []
    if not 0 < p_end <= 1:
        errors.append(f"invalid p_end={p_end:g}: expected an exponent above 0 and up to 1.")
    if not 0 <= start < 1:
        errors.append(f"invalid start={start:g}: expected a share of the run from 0 to below 1.")
    errors += [
        f"invalid {name}={count}: expected 1 or more."
        for name, count in (("updates", updates), ("queue", queue))
        if count < 1
    ]
    if errors:
        raise UsageError("\n".join(errors))
    annealing = PAnnealing(p_end, start * config.steps, config.steps, updates, queue)
    return Variant(
        SAE(config.d_in, config.d_sae),
        {"mse": (1.0, MSE()), "lp": (warmup(l1, config.penalty_warmup(l1_warmup)), Lp(annealing))},
        [annealing, UnitNormDecoder()],
        dead=DeadLatents(config.d_sae, config.dead_after_tokens),
    )
