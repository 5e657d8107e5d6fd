"""What linear probes read from texts, and what they read once latents are ablated: the arithmetic of SCR and TPP.

SAEBench ablates by x' = x - x_hat + decode(f with some latents set to 0), at every position of the padded text. The
decoder is affine, so a probe on the mean of x' over a text reads

    w x_mean + b - sum over ablated i of F_i (w . d_i),    F_i = (sum of f_i over all positions) / (counted tokens)

and nothing has to be decoded: one pass through the encoder gives every ablation (evaluation spec 5.5, 13.2).

Shape suffixes: N texts, B texts of a task, D d_in, F latents, P probes, R replicates of a bootstrap.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from ..cache.errors import UsageError
from .metric import Coder
from .rows import Pooled

PROBE_BATCH = 16
PROBE_EPOCHS = 20
PROBE_LR = 1e-3
PROBE_L1 = 1e-3
REPLICATES = 400


@dataclass(frozen=True)
class Task:
    """A binary task: which texts, and whether each is a positive one (bool); each (B,)."""

    rows_B: Tensor
    positive_B: Tensor


@dataclass(frozen=True)
class Probes:
    """Linear probes: a positive logit says yes."""

    weight_PD: Tensor
    bias_P: Tensor

    def logits(self, x_ND: Tensor) -> Tensor:
        return x_ND @ self.weight_PD.T + self.bias_P


def train_probes(
    x_ND: Tensor,
    tasks: Sequence[Task],
    x_test_ND: Tensor,
    test_tasks: Sequence[Task],
    generator: torch.Generator,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Probes:
    """One probe per task, all in one batched product: cross-entropy + 1e-3 |w|_1, AdamW, 20 epochs of batches of 16.

    Of each probe the epoch with the best test accuracy is kept, the first of equal ones, as SAEBench does. The tasks
    are of one size. Memory: the texts, and a few times (P, D).
    """
    # Paper: SAEBench trains in the model's dtype, bfloat16 for Gemma, one probe after the other.
    rows_PB = torch.stack([task.rows_B for task in tasks])
    label_PB = torch.stack([task.positive_B for task in tasks]).to(x_ND.dtype)
    bound = x_ND.shape[1] ** -0.5
    weight_PD, bias_P = (
        torch.empty(shape, dtype=x_ND.dtype).uniform_(-bound, bound, generator=generator).requires_grad_()
        for shape in ((len(tasks), x_ND.shape[1]), (len(tasks),))
    )
    optimizer = torch.optim.AdamW([weight_PD, bias_P], lr=PROBE_LR, weight_decay=0.01, foreach=True)
    best_P = torch.full((len(tasks),), -1.0, dtype=torch.float64)
    kept = Probes(weight_PD.detach().clone(), bias_P.detach().clone())
    for epoch in range(PROBE_EPOCHS):
        order_PB = torch.stack([torch.randperm(rows_PB.shape[1], generator=generator) for _ in tasks])
        for batch_Pb in order_PB.split(PROBE_BATCH, 1):
            x_PbD = x_ND[rows_PB.gather(1, batch_Pb)]
            logit_Pb = (x_PbD @ weight_PD[:, :, None])[:, :, 0] + bias_P[:, None]
            loss_Pb = torch.nn.functional.binary_cross_entropy_with_logits(
                logit_Pb, label_PB.gather(1, batch_Pb), reduction="none"
            )
            optimizer.zero_grad()
            (loss_Pb.mean(1).sum() + PROBE_L1 * weight_PD.abs().sum()).backward()
            optimizer.step()
        now = Probes(weight_PD.detach(), bias_P.detach())
        logits_NP = now.logits(x_test_ND)
        accuracy_P = torch.stack([correct(logits_NP[:, p], task).mean() for p, task in enumerate(test_tasks)])
        better_P = accuracy_P > best_P
        best_P[better_P] = accuracy_P[better_P]
        kept.weight_PD[better_P], kept.bias_P[better_P] = now.weight_PD[better_P], now.bias_P[better_P]
        progress(epoch + 1, PROBE_EPOCHS)
    return kept


def correct(logit_N: Tensor, task: Task) -> Tensor:
    """1 where the logit has the sign of its label, 0 elsewhere (B,), in float64."""
    return ((logit_N[task.rows_B] > 0) == task.positive_B).double()


@dataclass(frozen=True)
class Resample:
    """How often each text is drawn (R, N): the first replicate has every text once, the others are a bootstrap's.

    So an accuracy is a vector (R,), every score made of accuracies is one too, and its first entry is the score.
    """

    times_RN: Tensor

    @classmethod
    def of(cls, texts: int, replicates: int = REPLICATES) -> Self:
        """The same draws whatever the SAE: differences between SAEs are paired."""
        draw = torch.randint(texts, (replicates, texts), generator=torch.Generator().manual_seed(0))
        times_RN = torch.ones(1 + replicates, texts)
        times_RN[1:] = torch.zeros(replicates, texts).scatter_add_(1, draw, torch.ones(replicates, texts))
        return cls(times_RN.double())

    def accuracy(self, logit_N: Tensor, task: Task) -> Tensor:
        """(R,), rounded to float32 as SAEBench's are: that decides whether a difference of 0.001 is one."""
        times_RB = self.times_RN[:, task.rows_B]
        return (times_RB @ correct(logit_N, task) / times_RB.sum(1)).float().double()


def interval(score_R: Tensor) -> list[float]:
    """95 % of the bootstrap."""
    return torch.quantile(score_R[1:], score_R.new_tensor([0.025, 0.975])).tolist()


def difference(pooled: Pooled, task: Task) -> Tensor:
    """Mean latents of the positive texts minus those of the negative ones (F,), over the counted tokens."""
    rows_BF = pooled.mean_NF[task.rows_B]
    return rows_BF[task.positive_B].mean(0) - rows_BF[~task.positive_B].mean(0)


def strongest(effect_F: Tensor, count: int) -> Tensor:
    """The latents of largest effect, `count` or as many as have an effect that is not 0.

    Where effects are negative, a latent without any ranks before them and may be picked; which one of several is
    left to `topk`, as in SAEBench.
    """
    return effect_F.topk(min(count, int(effect_F.count_nonzero()))).indices


@dataclass(frozen=True)
class Readout:
    """What probes read from each text, and what each latent adds to that."""

    logit_NP: Tensor
    latent_NF: Tensor  # over all positions, per counted token
    align_FP: Tensor  # w . d: what a probe reads of one unit of a latent

    @classmethod
    def of(cls, probes: Probes, mean_ND: Tensor, pooled: Pooled, W_dec: Tensor, context: int) -> Self:
        """`context` is what SAEBench pads texts to. A latent that fires on a zero row fires in all of the padding."""
        padded_N = context - pooled.count_N
        latent_NF = (pooled.sum_NF + padded_N[:, None] * pooled.zero_F) / pooled.count_N[:, None]
        return cls(probes.logits(mean_ND), latent_NF, W_dec @ probes.weight_PD.T)

    def ablated(self, latents: Tensor) -> Tensor:
        """The logits (N, P) without these latents."""
        return self.logit_NP - self.latent_NF[:, latents] @ self.align_FP[latents]


@torch.no_grad()
def decoder_of(sae: Coder, d_in: int, device: torch.device) -> Tensor:
    """The decoder's matrix (F, D) on the CPU; that of an object without W_dec is what it makes of unit latents.

    Raises UsageError where decode is no affine function of the latents, which the read-out relies on.
    """
    d_sae = sae.encode(torch.zeros(1, d_in, device=device)).shape[-1]
    offset_D = sae.decode(torch.zeros(1, d_sae, device=device))[0]
    W_dec = getattr(sae, "W_dec", None)
    if W_dec is None:
        W_dec = sae.decode(torch.eye(d_sae, device=device)) - offset_D
    f_BF = torch.rand(4, d_sae, generator=torch.Generator().manual_seed(0)).to(device)
    decoded_BD = sae.decode(f_BF).float()
    error = (decoded_BD - (f_BF @ W_dec + offset_D)).abs().max()
    if not error <= 1e-2 * decoded_BD.abs().max():
        raise UsageError(
            "This SAE decodes by more than f W_dec + b, so what ablating a latent does to a probe cannot be read off "
            "W_dec. SCR and TPP measure SAEs with an affine decoder only."
        )
    return W_dec.float().cpu()


def check_thresholds(thresholds: Sequence[int], d_sae: int, metric: str) -> None:
    """Raises UsageError when an SAE has fewer latents than are to be ablated."""
    if (most := max(thresholds)) > d_sae:
        fit = ",".join(str(n) for n in thresholds if n <= d_sae) or str(d_sae)
        raise UsageError(
            f"{metric} ablates up to {most} latents, and this SAE has {d_sae}. "
            f"Give thresholds that fit: --set {metric}.thresholds={fit}."
        )
