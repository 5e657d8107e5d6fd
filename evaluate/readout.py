"""What linear probes read from texts, and what they read once latents are ablated: the arithmetic of SCR and TPP.

SAEBench ablates by x' = x - x_hat + decode(f with some latents set to 0), at every position of the padded text. The
decoder is affine, so a probe on the mean of x' over a text reads

    w x_mean + b - sum over ablated i of F_i (w . d_i),    F_i = (sum of f_i over all positions) / (counted tokens)

and nothing has to be decoded: one pass through the encoder gives every ablation (evaluation spec 5.5, 13.2).

Shape suffixes: N texts, B texts of a task, D d_in, F latents, P probes, R replicates of a bootstrap.
"""

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from ..cache.errors import SaeError, UsageError
from ..cache.files import digest_of
from .bench import Bench
from .metric import Coder, Metric, Outcome, Progress, Result, Subject
from .rows import Pooled, Rows, pool, read_rows
from .texts import SPLITS, pinned

THRESHOLDS = (2, 5, 10, 20, 50, 100, 500)  # latents ablated
SEED = 42
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


def differences(pooled: Pooled, tasks: Sequence[Task]) -> Tensor:
    """Mean latents of each task's positive texts minus those of its negative ones (P, F), over the counted tokens."""
    share_PN = torch.zeros(len(tasks), len(pooled.count_N))
    for share_N, task in zip(share_PN, tasks, strict=True):
        positive, negative = task.rows_B[task.positive_B], task.rows_B[~task.positive_B]
        share_N.index_add_(0, positive, torch.full((len(positive),), 1 / len(positive)))
        share_N.index_add_(0, negative, torch.full((len(negative),), -1 / len(negative)))
    return (share_PN / pooled.count_N) @ pooled.sum_NF


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


@dataclass(frozen=True)
class Problem:
    """Texts, and the tasks over them, one per probe. `draw(split, probe, generator)` is a task; without a generator
    it is always the same one.
    """

    name: str
    texts: dict[str, list[str]]  # train, test
    probes: int
    draw: Callable[[str, int, torch.Generator | None], Task]

    def tasks(self, split: str, generator: torch.Generator | None = None) -> list[Task]:
        return [self.draw(split, probe, generator) for probe in range(self.probes)]


@dataclass(frozen=True)
class Basis:
    """Of a problem and a layer, what no SAE changes."""

    rows: dict[str, Rows]  # train, test
    mean_ND: Tensor  # of the test texts
    probes: Probes


@dataclass
class Scored:
    """An SAE, and what was found of it: for each problem its scores (R,) by name, and what else is kept."""

    W_dec_FD: Tensor
    generator: torch.Generator | None
    scores: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    scores_without_leak: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    n: Counter[str] = field(default_factory=Counter)
    flags: list[str] = field(default_factory=list)
    leaking: int = 0


@dataclass(frozen=True)
class Ablation(Metric):
    """What SCR and TPP share: texts, probes on them, latents that matter to a probe, and accuracies without these.

    The latents of each text are summed and kept in float32: for one problem (at most 10,000 training texts) and one
    SAE at a time, 0.7 GB at 16k latents. What else is kept grows with the thresholds only.
    """

    dataset_names: tuple[str, ...] = ()
    thresholds: tuple[int, ...] = THRESHOLDS
    train_set_size: int = 4000  # texts of one task, half of them positive
    test_set_size: int = 1000
    context: int = 128
    rng: str = "paired"

    category: ClassVar[str]

    @abstractmethod
    def problems(self, name: str, data: Path | None) -> Iterator[Problem]:
        """Those of one dataset."""

    @abstractmethod
    def effects(self, difference_PF: Tensor, align_FP: Tensor) -> Tensor:
        """How much each latent matters to each probe (P, F)."""

    @abstractmethod
    def scores(self, readout: Readout, effect_PF: Tensor, draw: Draw, resample: Resample, mode: str) -> Scores:
        """Every score (R,) by name, what else is to be kept, and flags."""

    def settings(self, bench: Bench) -> dict[str, Any]:
        texts = {name: pinned(name, bench.data) for name in self.dataset_names}
        return {**super().settings(bench), "texts": texts}

    @torch.no_grad()
    def measure(self, bench: Bench, subjects: Sequence[Subject], progress: Progress) -> list[Outcome]:
        begun = [self.begin(bench, subject) for subject in subjects]
        able = [(subject, one) for subject, one in zip(subjects, begun, strict=True) if isinstance(one, Scored)]
        layers = sorted({subject.layer for subject, _ in able})
        for name in self.dataset_names if able else ():
            for problem in self.problems(name, bench.data):
                bases = self.bases(bench, problem, layers, progress)
                resample = Resample.of(len(problem.texts["test"]))
                for number, (subject, one) in enumerate(able):
                    self.add(bench, problem, bases[subject.layer], subject.sae, resample, one)
                    progress(number + 1, len(able), problem.name)
        return [self.result(one) if isinstance(one, Scored) else one for one in begun]

    def begin(self, bench: Bench, subject: Subject) -> Scored | SaeError:
        try:
            W_dec_FD = decoder_of(subject.sae, bench.model.config.hidden_size, bench.model.device)
            check_thresholds(self.thresholds, len(W_dec_FD), self.name)
        except SaeError as error:
            return error
        return Scored(W_dec_FD, torch.Generator().manual_seed(SEED) if self.rng == "saebench" else None)
