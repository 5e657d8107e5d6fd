"""What linear probes read from texts, and what they read once latents are ablated: what SCR and TPP share.

SAEBench ablates by x' = x - x_hat + decode(f with some latents set to 0), at every position of the padded text. The
decoder is affine, so a probe on the mean of x' over a text reads

    w x_mean + b - sum over ablated i of F_i (w . d_i),    F_i = (sum of f_i over all positions) / (counted tokens)

and nothing has to be decoded: each text is encoded once, whatever is ablated. What `encode` makes of a zero row leaks in
at BOS and at padding, as it does in SAEBench.

Shape suffixes: N texts, B texts of a task, D d_in, F latents, P probes, R replicates of a bootstrap.
"""

import sys
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ...common.errors import SaeError, UsageError
from ...common.files import digest_of
from ..context import EvalContext
from ..datasets.labelled import Texts, dataset_version
from .base import EvalTarget, Metric, MetricResult, Outcome, Progress, SAELike
from .batched_probes import PROBE_SETTINGS, LinearProbes, train_probes
from .bootstrap import BootstrapWeights, bootstrap_interval
from .pooled_activations import PooledLatents, pool_latents
from .probe_readout import ProbeReadout, affine_decoder, mean_latent_differences
from .probes import LabelledRows, ProbeTask, make_generator, read_labelled_rows

THRESHOLDS = (2, 5, 10, 20, 50, 100, 500)  # latents ablated


def check_thresholds(thresholds: Sequence[int], d_sae: int, metric: str) -> None:
    """Raises UsageError when an SAE has fewer latents than are to be ablated."""
    if (most := max(thresholds)) > d_sae:
        fit = ",".join(str(n) for n in thresholds if n <= d_sae) or str(d_sae)
        raise UsageError(
            f"{metric} ablates up to {most} latents, and this SAE has {d_sae}. "
            f"Give thresholds that fit: --set {metric}.thresholds={fit}."
        )


DrawTask = Callable[[int], ProbeTask]  # the next task of a probe


@dataclass(frozen=True)
class AblationProblem:
    """Texts by split and class, and tasks over the texts of a split: `draw(split, probe, generator)`, one per probe."""

    name: str
    texts: Texts
    probes: tuple[str, ...]
    draw: Callable[[str, int, torch.Generator], ProbeTask]

    def fixed(self, split: str) -> list[ProbeTask]:
        """Always the same ones, one per probe."""
        return [self.draw(split, p, make_generator("paired", self.name, split, p)) for p in range(len(self.probes))]


class AblationBasis(NamedTuple):
    """What no SAE changes of a problem, after one layer."""

    labelled: LabelledRows
    mean_ND: Tensor  # of the test texts
    probes: LinearProbes


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
        draw: DrawTask,
        resample: BootstrapWeights,
        mode: str,
    ) -> AblationScores:
        """What `draw` gives are the tasks to measure ablations on."""

    def settings(self, ctx: EvalContext) -> dict[str, Any]:
        texts = {name: dataset_version(name, ctx.data) for name in self.datasets}
        return {**super().settings(ctx), "texts": texts}

    def check(self) -> None:
        """Raises UsageError for settings that make no sense."""
        make_generator(self.rng)
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
                resample = BootstrapWeights.of([len(texts) for texts in problem.texts["test"].values()], problem.name)
                for number, (target, found) in enumerate(able):
                    self.add(ctx, problem, bases[target.layer], resample, target.sae, found)
                    progress(number + 1, len(able), f"SAEs on {problem.name}")
        return [self.result(found) if isinstance(found, AblationState) else found for found in begun]

    def begin(self, ctx: EvalContext, target: EvalTarget) -> AblationState | SaeError:
        try:
            W_dec_FD = affine_decoder(target.sae, ctx.model.config.hidden_size, ctx.model.device)
            check_thresholds(self.thresholds, len(W_dec_FD), self.name)
        except SaeError as error:
            return error
        return AblationState(W_dec_FD, make_generator(self.rng) if self.rng == "saebench" else None)

    def bases(
        self, ctx: EvalContext, problem: AblationProblem, layers: Sequence[int], progress: Progress
    ) -> dict[int, AblationBasis]:
        """The texts' rows and the probes on them, from the shelf or made."""
        tasks = {split: problem.fixed(split) for split in problem.texts}
        known = read_labelled_rows(ctx, layers, problem.name, problem.texts, progress, self.context)
        pinned = {
            **ctx.model_identity, "skip": ctx.special_ids, "context": self.context, "probe": PROBE_SETTINGS, "problem": problem.name,
            "texts": digest_of(problem.texts), "tasks": digest_of([task.rows.tolist() for split in tasks.values() for task in split]),
        }  # fmt: skip
        found = {}
        for number, (layer, labelled) in enumerate(known.items()):
            mean = {split: part.x_ND for split, part in labelled.split(labelled.rows.mean_ND()).items()}

            def make(mean: dict[str, Tensor] = mean) -> dict[str, Tensor]:
                draws = [make_generator("paired", problem.name, "probe", probe) for probe in problem.probes]
                made = train_probes(mean["train"], tasks["train"], mean["test"], tasks["test"], draws)
                return {"weight": made.weight_PD, "bias": made.bias_P}

            kept = ctx.artifacts.get_or_compute("probes", {**pinned, "layer": layer}, make)
            found[layer] = AblationBasis(labelled, mean["test"], LinearProbes(kept["weight"], kept["bias"]))
            progress(number + 1, len(layers), f"probes of {problem.name}")
        return found

    def add(
        self,
        ctx: EvalContext,
        problem: AblationProblem,
        basis: AblationBasis,
        resample: BootstrapWeights,
        sae: SAELike,
        found: AblationState,
    ) -> None:
        """Measure one SAE on one problem."""
        pooled = pool_latents(sae, basis.labelled.rows, ctx.model.device)
        sums, counts = basis.labelled.split(pooled.sum_NF), basis.labelled.split(pooled.count_N)
        train, test = (
            PooledLatents(sums[split].x_ND, counts[split].x_ND, pooled.zero_F) for split in ("train", "test")
        )

        def draws(split: str, stream: torch.Generator | None) -> DrawTask:
            fixed = problem.fixed(split)
            return lambda probe: problem.draw(split, probe, stream) if stream else fixed[probe]

        readout = ProbeReadout.of(basis.probes, basis.mean_ND, test, found.W_dec_FD, self.context)
        of_train = draws("train", found.stream)
        difference_PF = mean_latent_differences(train, [of_train(probe) for probe in range(len(problem.probes))])
        effect_PF = self.effects(difference_PF, readout.align_FP)
        if bool(pooled.zero_F.any()):
            dry = ProbeReadout.of(
                basis.probes, basis.mean_ND, replace(test, zero_F=0 * test.zero_F), found.W_dec_FD, self.context
            )
            of_test, once = (
                draws("test", found.stream and found.stream.clone_state()),
                BootstrapWeights(resample.times_RN[:1]),
            )
            found.without_leak[problem.name] = self.scores(problem, dry, effect_PF, of_test, once, ctx.mode).values
        scores = self.scores(problem, readout, effect_PF, draws("test", found.stream), resample, ctx.mode)
        found.scores[problem.name], found.extra[problem.name] = scores.values, scores.extra
        found.flags += [f"{problem.name}: {flag}" for flag in scores.flags]
        found.texts += len(basis.mean_ND)
        found.effective = min(found.effective, int((effect_PF != 0).sum(1).min()))

    def result(self, found: AblationState) -> MetricResult:
        """Means over the problems that have a score."""
        values = average_scores(found.scores)
        metrics = {self.category: {name: float(score_R[0]) for name, score_R in values.items()}}
        flags = list(found.flags)
        if found.effective < max(self.thresholds):
            flags.append(
                f"Only {found.effective} latents have an effect on one of the probes; more are not ablated there."
            )
        if found.without_leak:
            dry = {name: float(score_R[0]) for name, score_R in average_scores(found.without_leak).items()}
            metrics["without_leak"] = dry
            shown = {number.name for number in self.columns} & dry.keys()
            most = max((abs(dry[name] - metrics[self.category][name]) for name in shown), default=0.0)
            flags.append(
                "Some latents fire on a zero row, so ablating them changes BOS and padding too, as in SAEBench; without that "
                f"(category without_leak) the scores of the table change by up to {most:.3f}."
            )
        details = [
            {"dataset_name": name, **{score: float(score_R[0]) for score, score_R in scores.items()}}
            for name, scores in found.scores.items()
        ]
        intervals = {self.category: {name: bootstrap_interval(score_R) for name, score_R in values.items()}}
        n = {"problems": len(found.scores), "test_texts": found.texts}
        return MetricResult.of(metrics, details, intervals=intervals, n=n, flags=flags, extra=found.extra)


def average_scores(scores: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of each score over the problems that have it."""
    names = dict.fromkeys(name for values in scores.values() for name in values)
    return {name: torch.stack([v[name] for v in scores.values() if name in v]).mean(0) for name in names}
