"""What linear probes read from texts, and what they read once latents are ablated: what SCR and TPP share.

SAEBench ablates by x' = x - x_hat + decode(f with some latents set to 0), at every position of the padded text. The
decoder is affine, so a probe on the mean of x' over a text reads

    w x_mean + b - sum over ablated i of F_i (w . d_i),    F_i = (sum of f_i over all positions) / (counted tokens)

and nothing has to be decoded: each text is encoded once, whatever is ablated. What `encode` makes of a zero row leaks in
at BOS and at padding, as it does in SAEBench.

Shape suffixes: N texts, B texts of a task, D d_in, F latents, P probes, R replicates of a bootstrap.
"""

import math
import sys
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from ...common.errors import SaeError, UsageError
from ...common.files import digest_of
from ..context import EvalContext
from ..datasets.labelled import Texts, pinned
from .base import EvalTarget, Metric, Outcome, Progress, Result, SAELike
from .pooled_activations import PooledLatents, pool
from .probes import LabelledRows, ProbeTask, generator, read_labelled

THRESHOLDS = (2, 5, 10, 20, 50, 100, 500)  # latents ablated
PROBE = {"batch": 16, "epochs": 20, "lr": 1e-3, "l1": 1e-3}
REPLICATES = 400


@dataclass(frozen=True)
class TextProbes:
    """Linear probes: a positive logit says yes."""

    weight_PD: Tensor
    bias_P: Tensor

    def logits(self, x_ND: Tensor) -> Tensor:
        return x_ND @ self.weight_PD.T + self.bias_P


def train_probes(
    x_ND: Tensor,
    tasks: Sequence[ProbeTask],
    x_test_ND: Tensor,
    test_tasks: Sequence[ProbeTask],
    draws: Sequence[torch.Generator],
) -> TextProbes:
    """One probe per task, as `train_probe` makes them one by one, in one batched product; the tasks are of one size.

    Cross-entropy + 1e-3 |w|_1, AdamW, 20 epochs of batches of 16; of each probe the first epoch of the best accuracy on
    the test texts is kept. Draws from the generator of a probe: weight, bias, one order per epoch.
    """
    # Paper: SAEBench trains in the model's dtype, bfloat16 for Gemma; this is float32.
    rows_PB = torch.stack([task.rows for task in tasks])
    label_PB = torch.stack([task.label for task in tasks]).to(x_ND.dtype)
    bound = x_ND.shape[1] ** -0.5

    def start(width: int) -> Tensor:
        drawn = [torch.empty(width).uniform_(-bound, bound, generator=one) for one in draws]
        return torch.stack(drawn).to(x_ND.dtype).requires_grad_()

    weight_PD, bias_P1 = start(x_ND.shape[1]), start(1)
    optimizer = torch.optim.AdamW([weight_PD, bias_P1], lr=PROBE["lr"], weight_decay=0.01)
    best_P = torch.zeros(len(tasks), dtype=torch.float64)
    kept = TextProbes(weight_PD.detach().clone(), bias_P1.detach()[:, 0].clone())
    for _ in range(int(PROBE["epochs"])):
        order_PB = torch.stack([torch.randperm(rows_PB.shape[1], generator=one) for one in draws])
        for batch_Pb in order_PB.split(int(PROBE["batch"]), 1):
            with torch.enable_grad():
                x_PbD, label_Pb = x_ND[rows_PB.gather(1, batch_Pb)], label_PB.gather(1, batch_Pb)
                logit_Pb = (x_PbD @ weight_PD[:, :, None])[:, :, 0] + bias_P1
                loss_Pb = binary_cross_entropy_with_logits(logit_Pb, label_Pb, reduction="none")
                optimizer.zero_grad()
                (loss_Pb.mean(1).sum() + PROBE["l1"] * weight_PD.abs().sum()).backward()
            optimizer.step()
        now = TextProbes(weight_PD.detach(), bias_P1.detach()[:, 0])
        logit_NP = now.logits(x_test_ND)
        reached_P = torch.stack([correct(logit_NP[:, p], task).mean() for p, task in enumerate(test_tasks)])
        better_P = reached_P > best_P
        best_P[better_P] = reached_P[better_P]
        kept.weight_PD[better_P], kept.bias_P[better_P] = now.weight_PD[better_P], now.bias_P[better_P]
    return kept


def correct(logit_N: Tensor, task: ProbeTask) -> Tensor:
    """1 where the logit has the sign of its label, 0 elsewhere (B,), in float64."""
    return ((logit_N[task.rows] > 0) == (task.label > 0.5)).double()


@dataclass(frozen=True)
class BootstrapDraws:
    """How often each text is drawn (R, N): the first replicate has every text once, the others are a bootstrap's.

    So an accuracy is a vector (R,), every score made of accuracies is one too, and its first entry is the score.
    """

    times_RN: Tensor

    @classmethod
    def of(cls, counts: Sequence[int], *names: object, replicates: int = REPLICATES) -> Self:
        """Each class keeps its number of texts, which is by design. The same draws whatever the SAE, so differences
        between SAEs are paired; others for another problem, which `names` name, as its texts are others.
        """
        one = generator("paired", "bootstrap", *names)
        times = [torch.ones(1, sum(counts))]
        drawn = [torch.randint(count, (replicates, count), generator=one) for count in counts]
        times.append(torch.cat([torch.zeros(d.shape).scatter_add_(1, d, torch.ones(d.shape)) for d in drawn], 1))
        return cls(torch.cat(times).double())

    def accuracy(self, logit_N: Tensor, task: ProbeTask) -> Tensor:
        """(R,), rounded to float32 as SAEBench's are: that decides whether a difference of 0.001 is one."""
        times_RB = self.times_RN[:, task.rows]
        return (times_RB @ correct(logit_N, task) / times_RB.sum(1)).float().double()


def interval(score_R: Tensor) -> list[float]:
    """95 % of the bootstrap, of those of its replicates that have the score."""
    drawn_R = score_R[1:][score_R[1:].isfinite()]
    return torch.quantile(drawn_R, drawn_R.new_tensor([0.025, 0.975])).tolist() if len(drawn_R) else [math.nan] * 2


def differences(pooled: PooledLatents, tasks: Sequence[ProbeTask]) -> Tensor:
    """Mean latents of each task's positive texts minus those of its negative ones (P, F), over the counted tokens."""
    share_PN = torch.zeros(len(tasks), len(pooled.count_N))
    for share_N, task in zip(share_PN, tasks, strict=True):
        positive, negative = task.rows[task.label > 0.5], task.rows[task.label <= 0.5]
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
class ProbeReadout:
    """What probes read from each text, and what each latent adds to that."""

    logit_NP: Tensor
    latent_NF: Tensor  # over all positions, per counted token
    align_FP: Tensor  # w . d: what a probe reads of one unit of a latent

    @classmethod
    def of(cls, probes: TextProbes, mean_ND: Tensor, pooled: PooledLatents, W_dec: Tensor, context: int) -> Self:
        """`context` is what SAEBench pads texts to. A latent that fires on a zero row fires in all of the padding."""
        padded_N = context - pooled.count_N
        latent_NF = (pooled.sum_NF + padded_N[:, None] * pooled.zero_F) / pooled.count_N[:, None]
        return cls(probes.logits(mean_ND), latent_NF, W_dec @ probes.weight_PD.T)

    def ablated(self, latents: Tensor) -> Tensor:
        """The logits (N, P) without these latents."""
        return self.logit_NP - self.latent_NF[:, latents] @ self.align_FP[latents]


@torch.no_grad()
def decoder_of(sae: SAELike, d_in: int, device: torch.device) -> Tensor:
    """The decoder's matrix (F, D) on the CPU; that of an object without W_dec is what it makes of unit latents.

    Raises UsageError where decode is no affine function of the latents, which the read-out relies on.
    """
    d_sae = sae.encode(torch.zeros(1, d_in, device=device)).shape[-1]
    offset_D = sae.decode(torch.zeros(1, d_sae, device=device))[0]
    W_dec = getattr(sae, "W_dec", None)
    if W_dec is None:
        W_dec = sae.decode(torch.eye(d_sae, device=device)) - offset_D
    W_dec = W_dec.float()
    f_BF = torch.rand(4, d_sae, generator=torch.Generator().manual_seed(0)).to(device)
    decoded_BD = sae.decode(f_BF).float()
    error = (decoded_BD - (f_BF @ W_dec + offset_D)).abs().max()
    if not error <= 1e-2 * decoded_BD.abs().max():
        raise UsageError(
            "This SAE decodes by more than f W_dec + b, so what ablating a latent does to a probe cannot be read off "
            "W_dec. SCR and TPP measure SAEs with an affine decoder only."
        )
    return W_dec.cpu()


def check_thresholds(thresholds: Sequence[int], d_sae: int, metric: str) -> None:
    """Raises UsageError when an SAE has fewer latents than are to be ablated."""
    if (most := max(thresholds)) > d_sae:
        fit = ",".join(str(n) for n in thresholds if n <= d_sae) or str(d_sae)
        raise UsageError(
            f"{metric} ablates up to {most} latents, and this SAE has {d_sae}. "
            f"Give thresholds that fit: --set {metric}.thresholds={fit}."
        )


Draw = Callable[[int], ProbeTask]  # the next task of a probe


@dataclass(frozen=True)
class AblationProblem:
    """Texts by split and class, and tasks over the texts of a split: `draw(split, probe, generator)`, one per probe."""

    name: str
    texts: Texts
    probes: tuple[str, ...]
    draw: Callable[[str, int, torch.Generator], ProbeTask]

    def fixed(self, split: str) -> list[ProbeTask]:
        """Always the same ones, one per probe."""
        return [self.draw(split, p, generator("paired", self.name, split, p)) for p in range(len(self.probes))]


class AblationBasis(NamedTuple):
    """What no SAE changes of a problem, after one layer."""

    labelled: LabelledRows
    mean_ND: Tensor  # of the test texts
    probes: TextProbes


@dataclass
class AblationState:
    """An SAE, and by problem: its scores (R,) with and without what leaks in at padding, and details of them."""

    W_dec_FD: Tensor
    stream: torch.Generator | None  # that all draws of this SAE come from, if they do
    scores: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    without_leak: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    flags: list[str] = field(default_factory=list)
    texts: int = 0
    effective: int = sys.maxsize  # latents that have an effect on a probe, at least


class AblationScores(NamedTuple):
    """Each score (R,) by name; what else is kept of a problem; and sentences on scores that mean less than they seem."""

    values: dict[str, Tensor]
    extra: dict[str, Any]
    flags: list[str]


@dataclass(frozen=True)
class Ablation(Metric):
    """Probes on texts, the latents that matter to each of them, and accuracies without these.

    Intervals are a bootstrap over the test texts of each class, the same draws for every SAE. Memory: the texts of one problem (at
    most 12,500), of one SAE, summed over each text: (12,500, d_sae) in float32, 0.8 GB at 16k latents.
    """

    datasets: tuple[str, ...] = ()
    thresholds: tuple[int, ...] = THRESHOLDS
    train_set_size: int = 4000  # texts of one task, half of them positive
    test_set_size: int = 1000
    context: int = 128
    rng: str = "paired"

    category: ClassVar[str]

    @abstractmethod
    def problems(self, dataset: str, data: Path | None) -> Iterator[AblationProblem]:
        """Those of one dataset. Raises SaeError when its texts cannot be had."""

    @abstractmethod
    def effects(self, difference_PF: Tensor, align_FP: Tensor) -> Tensor:
        """How much each latent matters to each probe (P, F)."""

    @abstractmethod
    def scores(
        self,
        problem: AblationProblem,
        readout: ProbeReadout,
        effect_PF: Tensor,
        draw: Draw,
        resample: BootstrapDraws,
        mode: str,
    ) -> AblationScores:
        """What `draw` gives are the tasks to measure ablations on."""

    def settings(self, ctx: EvalContext) -> dict[str, Any]:
        texts = {name: pinned(name, ctx.data) for name in self.datasets}
        return {**super().settings(ctx), "texts": texts}

    def check(self) -> None:
        """Raises UsageError for settings that make no sense."""
        generator(self.rng)
        if min(self.thresholds) < 1:
            raise UsageError(f"{self.name}.thresholds={','.join(map(str, self.thresholds))}: give 1 latent or more.")
        for size in ("train_set_size", "test_set_size"):
            if (given := getattr(self, size)) < 4:
                raise UsageError(f"{self.name}.{size}={given} is less than 4, one text of each kind.")

    @torch.no_grad()
    def measure(self, ctx: EvalContext, targets: Sequence[EvalTarget], progress: Progress) -> list[Outcome]:
        self.check()
        begun = [self.begin(ctx, target) for target in targets]
        able = [
            (target, found) for target, found in zip(targets, begun, strict=True) if isinstance(found, AblationState)
        ]
        for dataset in self.datasets if able else ():
            for problem in self.problems(dataset, ctx.data):
                bases = self.bases(ctx, problem, sorted({target.layer for target, _ in able}), progress)
                resample = BootstrapDraws.of([len(texts) for texts in problem.texts["test"].values()], problem.name)
                for number, (target, found) in enumerate(able):
                    self.add(ctx, problem, bases[target.layer], resample, target.sae, found)
                    progress(number + 1, len(able), f"SAEs on {problem.name}")
        return [self.result(found) if isinstance(found, AblationState) else found for found in begun]

    def begin(self, ctx: EvalContext, target: EvalTarget) -> AblationState | SaeError:
        try:
            W_dec_FD = decoder_of(target.sae, ctx.model.config.hidden_size, ctx.model.device)
            check_thresholds(self.thresholds, len(W_dec_FD), self.name)
        except SaeError as error:
            return error
        return AblationState(W_dec_FD, generator(self.rng) if self.rng == "saebench" else None)

    def bases(
        self, ctx: EvalContext, problem: AblationProblem, layers: Sequence[int], progress: Progress
    ) -> dict[int, AblationBasis]:
        """The texts' rows and the probes on them, from the shelf or made."""
        tasks = {split: problem.fixed(split) for split in problem.texts}
        known = read_labelled(ctx, layers, problem.name, problem.texts, progress, self.context)
        pinned = {
            **ctx.identity, "skip": ctx.skip, "context": self.context, "probe": PROBE, "problem": problem.name,
            "texts": digest_of(problem.texts), "tasks": digest_of([task.rows.tolist() for split in tasks.values() for task in split]),
        }  # fmt: skip
        found = {}
        for number, (layer, labelled) in enumerate(known.items()):
            mean = {split: part.x_ND for split, part in labelled.split(labelled.rows.mean_ND()).items()}

            def make(mean: dict[str, Tensor] = mean) -> dict[str, Tensor]:
                draws = [generator("paired", problem.name, "probe", probe) for probe in problem.probes]
                made = train_probes(mean["train"], tasks["train"], mean["test"], tasks["test"], draws)
                return {"weight": made.weight_PD, "bias": made.bias_P}

            kept = ctx.artifacts.keep("probes", {**pinned, "layer": layer}, make)
            found[layer] = AblationBasis(labelled, mean["test"], TextProbes(kept["weight"], kept["bias"]))
            progress(number + 1, len(layers), f"probes of {problem.name}")
        return found

    def add(
        self,
        ctx: EvalContext,
        problem: AblationProblem,
        basis: AblationBasis,
        resample: BootstrapDraws,
        sae: SAELike,
        found: AblationState,
    ) -> None:
        """Measure one SAE on one problem."""
        pooled = pool(sae, basis.labelled.rows, ctx.model.device)
        sums, counts = basis.labelled.split(pooled.sum_NF), basis.labelled.split(pooled.count_N)
        train, test = (
            PooledLatents(sums[split].x_ND, counts[split].x_ND, pooled.zero_F) for split in ("train", "test")
        )

        def draws(split: str, stream: torch.Generator | None) -> Draw:
            fixed = problem.fixed(split)
            return lambda probe: problem.draw(split, probe, stream) if stream else fixed[probe]

        readout = ProbeReadout.of(basis.probes, basis.mean_ND, test, found.W_dec_FD, self.context)
        of_train = draws("train", found.stream)
        difference_PF = differences(train, [of_train(probe) for probe in range(len(problem.probes))])
        effect_PF = self.effects(difference_PF, readout.align_FP)
        if bool(pooled.zero_F.any()):
            dry = ProbeReadout.of(
                basis.probes, basis.mean_ND, replace(test, zero_F=0 * test.zero_F), found.W_dec_FD, self.context
            )
            of_test, once = (
                draws("test", found.stream and found.stream.clone_state()),
                BootstrapDraws(resample.times_RN[:1]),
            )
            found.without_leak[problem.name] = self.scores(problem, dry, effect_PF, of_test, once, ctx.mode).values
        scores = self.scores(problem, readout, effect_PF, draws("test", found.stream), resample, ctx.mode)
        found.scores[problem.name], found.extra[problem.name] = scores.values, scores.extra
        found.flags += [f"{problem.name}: {flag}" for flag in scores.flags]
        found.texts += len(basis.mean_ND)
        found.effective = min(found.effective, int((effect_PF != 0).sum(1).min()))

    def result(self, found: AblationState) -> Result:
        """Means over the problems that have a score."""
        values = average(found.scores)
        metrics = {self.category: {name: float(score_R[0]) for name, score_R in values.items()}}
        flags = list(found.flags)
        if found.effective < max(self.thresholds):
            flags.append(
                f"Only {found.effective} latents have an effect on one of the probes; more are not ablated there."
            )
        if found.without_leak:
            dry = {name: float(score_R[0]) for name, score_R in average(found.without_leak).items()}
            metrics["without_leak"] = dry
            shown = {number.name for number in self.numbers} & dry.keys()
            most = max((abs(dry[name] - metrics[self.category][name]) for name in shown), default=0.0)
            flags.append(
                "Some latents fire on a zero row, so ablating them changes BOS and padding too, as in SAEBench; without that "
                f"(category without_leak) the scores of the table change by up to {most:.3f}."
            )
        details = [
            {"dataset_name": name, **{score: float(score_R[0]) for score, score_R in scores.items()}}
            for name, scores in found.scores.items()
        ]
        intervals = {self.category: {name: interval(score_R) for name, score_R in values.items()}}
        n = {"problems": len(found.scores), "test_texts": found.texts}
        return Result.of(metrics, details, intervals=intervals, n=n, flags=flags, extra=found.extra)


def average(scores: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of each score over the problems that have it."""
    names = dict.fromkeys(name for values in scores.values() for name in values)
    return {name: torch.stack([v[name] for v in scores.values() if name in v]).mean(0) for name in names}
