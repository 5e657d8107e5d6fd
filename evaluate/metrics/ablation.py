"""The common part of SCR and TPP: train probes on texts, rank latents by their effect on each probe, ablate latents,
and measure accuracies.

scr.py and tpp.py define the tasks of a dataset, the effect of a latent, and the scores. Ablation never decodes latents
(see probe_readout).

Shape suffixes: N texts, D d_in, F latents, P probes, R replicates of the bootstrap.
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
from ..datasets.labeled import Texts, dataset_version
from .base import EvalTarget, Metric, MetricResult, Outcome, Progress, RowSet, SAELike
from .batched_probes import PROBE_SETTINGS, LinearProbes, train_probes
from .bootstrap import BootstrapWeights, bootstrap_interval
from .pooled_activations import PooledLatents, pool_latents
from .probe_readout import ProbeReadout, affine_decoder, mean_latent_differences
from .probes import LabeledRows, ProbeTask, make_generator, read_labeled_rows

THRESHOLDS = (2, 5, 10, 20, 50, 100, 500)  # numbers of latents to ablate

DrawTask = Callable[[int], ProbeTask]  # returns the next task of a probe


@dataclass(frozen=True)
class AblationProblem:
    """Labeled texts, and one probe for each task on these texts. `draw(split, probe, generator)` returns the task of a
    probe."""

    name: str
    texts: Texts  # split -> class -> texts
    probes: tuple[str, ...]
    draw: Callable[[str, int, torch.Generator], ProbeTask]

    def fixed_tasks(self, split: str) -> list[ProbeTask]:
        """One task per probe, the same on every call."""
        return [self.draw(split, p, make_generator("paired", self.name, split, p)) for p in range(len(self.probes))]

    def task_source(self, split: str, generator: torch.Generator | None) -> DrawTask:
        """A function that returns the next task of a probe: drawn with `generator`, or fixed if `generator` is None."""
        fixed = self.fixed_tasks(split)
        return lambda probe: self.draw(split, probe, generator) if generator else fixed[probe]


class AblationBasis(NamedTuple):
    """The part of a problem that does not depend on the SAE, for one row set."""

    labeled: LabeledRows
    test_mean_ND: Tensor
    probes: LinearProbes


@dataclass
class AblationState:
    """The measurements of one SAE so far, keyed by problem."""

    metric: "Ablation"  # a copy with the thresholds that fit this SAE
    W_dec_FD: Tensor
    generator: torch.Generator | None  # with rng="saebench": used for all draws of this SAE
    left_out: tuple[int, ...] = ()  # thresholds above the SAE's width
    scores: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # problem -> name -> score (R,)
    without_leak: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # without encode(0) at padding
    extra: dict[str, Any] = field(default_factory=dict)
    flags: list[str] = field(default_factory=list)
    test_texts: int = 0
    rows: int = 0  # number of text rows
    outliers: int = 0  # rows that were left out
    fewest_effective: int = sys.maxsize  # smallest number of latents that affect a probe
    error: SaeError | None = None  # why this SAE cannot be measured


class AblationScores(NamedTuple):
    """The scores of one SAE on one problem."""

    values: dict[str, Tensor]  # name -> score (R,)
    extra: dict[str, Any]
    flags: list[str]


@dataclass(frozen=True)
class Ablation(Metric):
    """Intervals come from a bootstrap over the test texts of each class, with the same draws for every SAE.

    Memory: one row for each text, which is the sum of the latents over the tokens of the text. Only the rows of one SAE
    and one problem are in memory at a time: at most 12,500 rows of d_sae float32 values, or 0.8 GB at 16k latents.
    """

    datasets: tuple[str, ...] = ()
    thresholds: tuple[int, ...] = THRESHOLDS
    train_set_size: int = 4000  # texts of one task, half of them positive
    test_set_size: int = 1000
    context: int = 128
    rng: str = "paired"

    unit = "data set"
    category: ClassVar[str]  # category of the scores in the result

    @abstractmethod
    def problems(self, dataset: str, data: Path | None) -> Iterator[AblationProblem]:
        """The problems of one dataset. Raises SaeError if the texts are not available."""

    @abstractmethod
    def effects(self, difference_PF: Tensor, align_FP: Tensor) -> Tensor:
        """The effect of each latent on each probe (P, F). Latents are ranked by it."""

    @abstractmethod
    def scores(
        self,
        problem: AblationProblem,
        readout: ProbeReadout,
        effect_PF: Tensor,
        draw_task: DrawTask,
        bootstrap: BootstrapWeights,
        mode: str,
    ) -> AblationScores:
        """Ablate the latents with the largest effects and measure accuracies on the tasks that `draw_task` returns."""

    def settings(self, ctx: EvalContext) -> dict[str, Any]:
        texts = {name: dataset_version(name, ctx.data) for name in self.datasets}
        return {**super().settings(ctx), **ctx.text_settings, "texts": texts}

    @abstractmethod
    def count_texts(self, dataset: str) -> int:
        """The maximum number of texts in the problems of a dataset. Reads nothing."""

    def kept_bytes(self, ctx: EvalContext, targets: Sequence[EvalTarget]) -> int:
        texts = sum(map(self.count_texts, self.datasets))
        return texts * self.context * ctx.row_bytes({target.hook for target in targets})

    def check(self) -> None:
        """Raise UsageError for an option out of range."""
        make_generator(self.rng)
        if min(self.thresholds) < 1:
            raise UsageError(f"{self.name}.thresholds={','.join(map(str, self.thresholds))}: give 1 latent or more.")
        for option in ("train_set_size", "test_set_size"):
            if (size := getattr(self, option)) < 4:
                raise UsageError(f"{self.name}.{option}={size}: give 4 or more, so that each kind has a text.")

    @torch.no_grad()
    def measure(self, ctx: EvalContext, targets: Sequence[EvalTarget], progress: Progress) -> list[Outcome]:
        self.check()
        states = [self.initial_state(ctx, target) for target in targets]
        measurable = [
            (target, state) for target, state in zip(targets, states, strict=True) if isinstance(state, AblationState)
        ]
        for dataset in self.datasets if measurable else ():
            for problem in self.problems(dataset, ctx.data):
                row_sets = list(dict.fromkeys(target.row_set for target, _ in measurable))
                bases = self.bases(ctx, problem, row_sets, progress)
                bootstrap = BootstrapWeights.of([len(texts) for texts in problem.texts["test"].values()], problem.name)
                for number, (target, state) in enumerate(measurable):
                    if state.error is None:
                        try:
                            basis = bases[target.row_set]
                            state.metric.measure_problem(ctx, problem, basis, bootstrap, target.sae, state)
                        except SaeError as error:
                            state.error = error
                    progress(number + 1, len(measurable), f"SAEs on {problem.name}")
        return [state if isinstance(state, SaeError) else state.error or state.metric.result(state) for state in states]

    def initial_state(self, ctx: EvalContext, target: EvalTarget) -> AblationState | SaeError:
        """The empty state of an SAE, or the reason why it cannot be measured."""
        try:
            W_dec_FD = affine_decoder(target.sae, ctx.model.width(target.hook), ctx.model.device)
            metric = replace(self, thresholds=fitting_thresholds(self.thresholds, len(W_dec_FD), self.name))
        except SaeError as error:
            return error
        left_out = self.thresholds[len(metric.thresholds) :]
        generator = make_generator(self.rng) if self.rng == "saebench" else None
        return AblationState(metric, W_dec_FD, generator, left_out)

    def bases(
        self, ctx: EvalContext, problem: AblationProblem, row_sets: Sequence[RowSet], progress: Progress
    ) -> dict[RowSet, AblationBasis]:
        """For each row set, the rows of the texts and the probes on these rows, read from the artifact cache or
        computed."""
        tasks = {split: problem.fixed_tasks(split) for split in problem.texts}
        by_row_set = read_labeled_rows(ctx, row_sets, problem.name, problem.texts, progress, self.context)
        depends = {
            **ctx.model_identity,
            **ctx.text_settings,
            "skip": ctx.context_format.skip_record,
            "context": self.context,
            "probe": PROBE_SETTINGS,
            "problem": problem.name,
            "texts": digest_of(problem.texts),
            "tasks": digest_of([task.rows.tolist() for of_split in tasks.values() for task in of_split]),
        }
        bases = {}
        for number, (row_set, labeled) in enumerate(by_row_set.items()):
            mean = {split: features.x_ND for split, features in labeled.split(labeled.rows.mean_ND()).items()}

            def make(mean: dict[str, Tensor] = mean) -> dict[str, Tensor]:
                generators = [make_generator("paired", problem.name, "probe", probe) for probe in problem.probes]
                trained = train_probes(mean["train"], tasks["train"], mean["test"], tasks["test"], generators)
                return {"weight": trained.weight_PD, "bias": trained.bias_P}

            arrays = ctx.artifacts.get_or_compute("probes", {**depends, **row_set.record(labeled.outliers)}, make)
            bases[row_set] = AblationBasis(labeled, mean["test"], LinearProbes(arrays["weight"], arrays["bias"]))
            progress(number + 1, len(row_sets), f"probes of {problem.name}")
        return bases

    def measure_problem(
        self,
        ctx: EvalContext,
        problem: AblationProblem,
        basis: AblationBasis,
        bootstrap: BootstrapWeights,
        sae: SAELike,
        state: AblationState,
    ) -> None:
        """Measure one SAE on one problem and add the scores to its state."""
        rows = basis.labeled.rows
        pooled = pool_latents(sae, rows, ctx.model.device)
        sums, counts = basis.labeled.split(pooled.sum_NF), basis.labeled.split(pooled.count_N)
        train, test = (
            PooledLatents(sums[split].x_ND, counts[split].x_ND, pooled.zero_F) for split in ("train", "test")
        )

        def readout_of(test: PooledLatents) -> ProbeReadout:
            return ProbeReadout.of(basis.probes, basis.test_mean_ND, test, state.W_dec_FD, self.context)

        readout = readout_of(test)
        draw_train = problem.task_source("train", state.generator)
        difference_PF = mean_latent_differences(train, [draw_train(probe) for probe in range(len(problem.probes))])
        effect_PF = self.effects(difference_PF, readout.align_FP)
        if bool(pooled.zero_F.any()):
            without_leak = readout_of(replace(test, zero_F=0 * test.zero_F))
            # Uses a copy of the generator, so that the draws for the scores below do not change.
            draw_test = problem.task_source("test", state.generator and state.generator.clone_state())
            sample_only = BootstrapWeights(bootstrap.weight_RN[:1])
            scores = self.scores(problem, without_leak, effect_PF, draw_test, sample_only, ctx.mode)
            state.without_leak[problem.name] = scores.values
        draw_test = problem.task_source("test", state.generator)
        scores = self.scores(problem, readout, effect_PF, draw_test, bootstrap, ctx.mode)
        state.scores[problem.name], state.extra[problem.name] = scores.values, scores.extra
        state.flags += [f"{problem.name}: {flag}" for flag in scores.flags]
        state.test_texts += len(basis.test_mean_ND)
        state.rows, state.outliers = state.rows + len(rows.x_TD), state.outliers + rows.outliers
        state.fewest_effective = min(state.fewest_effective, int((effect_PF != 0).sum(1).min()))

    def result(self, state: AblationState) -> MetricResult:
        """The mean of each score over the problems that have it."""
        values = average_scores(state.scores)
        metrics = {self.category: {name: float(score_R[0]) for name, score_R in values.items()}}
        if state.without_leak:
            average = average_scores(state.without_leak)
            metrics["without_leak"] = {name: float(score_R[0]) for name, score_R in average.items()}
        details = [
            {"dataset_name": name, **{score: float(score_R[0]) for score, score_R in scores.items()}}
            for name, scores in state.scores.items()
        ]
        intervals = {self.category: {name: bootstrap_interval(score_R) for name, score_R in values.items()}}
        n = {"problems": len(state.scores), "test_texts": state.test_texts}
        flags = [*state.flags, *self.flags(state, metrics)]
        result = MetricResult.of(metrics, details, intervals=intervals, n=n, flags=flags, extra=state.extra)
        return result.without_outliers(state.outliers, state.rows)

    def flags(self, state: AblationState, metrics: dict[str, dict[str, float]]) -> Iterator[str]:
        if state.left_out:
            missing = ", ".join(map(str, state.left_out))
            yield f"No score at {missing} latents: this SAE has {len(state.W_dec_FD)}."
        if state.fewest_effective < max(self.thresholds):
            yield f"Only {state.fewest_effective} latents affect one of the probes, so no more are ablated for it."
        if state.without_leak:
            scores, without_leak = metrics[self.category], metrics["without_leak"]
            shown = {column.name for column in self.columns} & without_leak.keys()
            most = max((abs(without_leak[name] - scores[name]) for name in shown), default=0.0)
            yield (
                "Some latents fire on a zero row, so ablating them also changes BOS and padding, as in SAEBench. "
                f"Without this effect (category without_leak), the scores of the table differ by up to {most:.3f}."
            )


def fitting_thresholds(thresholds: Sequence[int], d_sae: int, metric: str) -> tuple[int, ...]:
    """The numbers of latents to ablate in an SAE of this width. Default thresholds above the width are dropped.

    Raises:
        UsageError: one of the thresholds that the user set is larger than `d_sae`, or the user set no thresholds and
            all default thresholds are larger than `d_sae`.
    """
    fit = tuple(n for n in thresholds if n <= d_sae)
    if len(fit) == len(thresholds) or (fit and tuple(thresholds) == THRESHOLDS):
        return fit
    raise UsageError(
        f"{metric} ablates up to {max(thresholds)} latents, but this SAE has {d_sae}. "
        f"Give thresholds that fit: --set {metric}.thresholds={','.join(map(str, fit)) or d_sae}."
    )


def average_scores(scores: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of each score over the problems that have it."""
    names = dict.fromkeys(name for values in scores.values() for name in values)
    return {name: torch.stack([v[name] for v in scores.values() if name in v]).mean(0) for name in names}
