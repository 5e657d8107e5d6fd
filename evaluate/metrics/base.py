"""The interface of every metric: `Metric` takes an `EvalContext` and `EvalTarget`s, and returns `MetricResult`s.

Each metric is a file in this folder and is listed in registry.py. A metric runs the model only once over its text, for
any number of SAEs.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar, NamedTuple, Protocol, Self

from torch import Tensor

from ...cache.hooks import Hook
from ...common.errors import SaeError, UsageError
from ...train.sae import SAE
from ..context import EvalContext

MODES = ("0.6.0", "2024-12")  # SAEBench's current definitions, and the definitions behind the five papers' numbers
MANY_OUTLIERS = 0.01  # share of outlier rows above which a flag is added
OUTLIERS = "outlier_rows"  # key of the number of outlier rows in `MetricResult.n`; absent if there are none
MASKED = "masked_"  # prefix of categories without outlier rows: masked_sparsity in addition to sparsity


class SAELike(Protocol):
    """Anything that encodes and decodes activations (..., d_in) can be evaluated."""

    def encode(self, x: Tensor, /) -> Tensor: ...

    def decode(self, f: Tensor, /) -> Tensor: ...


def encode_finite(sae: SAELike, x_TD: Tensor) -> Tensor:
    """The latents (T, F) in float32. Raises SaeError for NaN and infinity, which probes cannot read."""
    f_TF = sae.encode(x_TD.float()).float()
    # If any latent is not finite, the sum is not finite either, and checking the sum is much faster. A sum of finite
    # latents can overflow, too, so the latents themselves are checked before an error is raised.
    if not f_TF.sum().isfinite() and not f_TF.isfinite().all():
        rows = int((~f_TF.isfinite().all(-1)).sum())
        raise SaeError(
            f"The SAE's latents are NaN or infinite at {rows:,} of {len(f_TF):,} rows, so it cannot be "
            "measured. Its weights or its precision are unsuitable for these activations."
        )
    return f_TF


def reconstruct(sae: SAELike, f: Tensor, x: Tensor) -> Tensor:
    """The reconstruction of x from its latents f. To decode f, an SAE that layer-normalizes each token also needs x."""
    return sae.decode(f, x) if isinstance(sae, SAE) and sae.layer_norm else sae.decode(f)


class RowSet(NamedTuple):
    """The activations that are read: those at `hook` whose norm is at most `norm_limit`, or all if `norm_limit` is
    None."""

    hook: Hook
    norm_limit: float | None = None

    def record(self, outliers: int) -> dict[str, Any]:
        """The entries that describe this row set in an artifact's key. The limit is included only if it caused rows to
        be left out (`outliers` > 0)."""
        return self.hook.record | ({"norm_limit": self.norm_limit} if outliers else {})


@dataclass(frozen=True)
class EvalTarget:
    """An SAE to evaluate, and the hook whose activations it reads.

    The reconstruction of the SAE replaces the activations at the counted tokens and, if `everywhere` is true, at BOS
    and padding as well. `reference` marks a baseline row (identity, zero, PCA, random dictionary) that other rows are
    compared with.

    Counted tokens whose activations have a norm over `norm_limit` are outlier rows (see cache.outliers), such as
    attention sinks. The model keeps its own activations at outlier rows, and no metric counts these rows. If
    `norm_limit` is None, there are no outlier rows.

    Targets of the same `system` differ only by seed; `system` is "" for a reference or an imported SAE. `name` and
    `weights` (a digest) are copied from the target's row.
    """

    sae: SAELike
    hook: Hook
    everywhere: bool = False
    reference: bool = False
    norm_limit: float | None = None
    system: str = ""
    name: str = ""
    weights: str = ""

    @property
    def row_set(self) -> RowSet:
        return RowSet(self.hook, self.norm_limit)

    @property
    def layer(self) -> int:
        return self.hook.layer


class Progress(Protocol):
    """Called as a metric advances. If `done` is smaller than in the previous call, a new stage of the work begins."""

    def __call__(self, done: int, total: int, note: str = "") -> None: ...


@dataclass(frozen=True)
class MetricColumn:
    """One column in the table of a metric: where its numbers are in `MetricResult.metrics`, and how to read them."""

    heading: str
    category: str
    name: str
    format: str = ".4f"
    better: str = ""  # "up", "down", or "" if neither is better
    floor: float | None = None  # smallest value; where higher is better, the value at chance or for a useless SAE
    ceiling: float | None = None  # largest value; where lower is better, the worst
    shared: bool = True  # whether shares of controls are computed; if true, an SAE without features is at the floor


@dataclass(frozen=True)
class MetricResult:
    """A metric's results for one SAE.

    `metrics` maps category -> name -> number, with None for an undefined number. `details` has one entry per latent,
    letter or dataset. `intervals` has the same keys as `metrics`; its values are 95 % intervals [low, high]. `n`
    contains the numbers of measured tokens, texts and so on. `flags` are sentences that warn about misleading numbers.
    `extra` is anything else that a metric stores.

    All of these fields cover all rows, as in SAEBench. `masked` is the same result without the outlier rows (see
    `EvalTarget.norm_limit`); it is None if there are no outlier rows, because the two results are then equal.
    """

    metrics: dict[str, dict[str, float | None]]
    details: list[dict[str, Any]] = field(default_factory=list)
    intervals: dict[str, dict[str, list[float | None]]] = field(default_factory=dict)
    n: dict[str, int] = field(default_factory=dict)
    flags: list[str] = field(default_factory=list)
    extra: Any = None
    masked: "MetricResult | None" = None

    @property
    def sound(self) -> "MetricResult":
        """The result that tables, pages and comparisons show: the one without outlier rows."""
        return self.masked or self

    @property
    def notes(self) -> list[str]:
        """The flags of `sound`, and one sentence about each number in `metrics` whose SAEBench name is misleading."""
        return [*self.sound.flags, *misnamed_numbers(self.metrics)]

    def without_outliers(self, outliers: int, rows: int) -> "MetricResult":
        """This result, with a record that `outliers` rows were left out and `rows` rows were counted."""
        if not outliers:
            return self
        return replace(
            self, n=self.n | {OUTLIERS: outliers}, flags=[*self.flags, *outlier_flags(outliers, outliers + rows)]
        )

    def with_masked(self, masked: "MetricResult") -> "MetricResult":
        """This result over all rows, together with the result without outlier rows."""
        return replace(self, n=self.n | {OUTLIERS: masked.n[OUTLIERS]}, masked=masked)

    @property
    def named_metrics(self) -> dict[str, dict[str, float | None]]:
        """`metrics`, and the categories of `masked` under the names masked_<category>."""
        return self.metrics | {f"{MASKED}{category}": group for category, group in self._masked_metrics.items()}

    @property
    def _masked_metrics(self) -> dict[str, dict[str, float | None]]:
        return self.masked.metrics if self.masked else {}

    @classmethod
    def of(
        cls, metrics: Mapping[str, Mapping[str, float | None]], details: list[dict[str, Any]] | None = None, **more: Any
    ) -> Self:
        """A result in which NaN and infinity are replaced by None, so that it equals the same result read from its
        file."""
        return cls(*nan_to_none([metrics, details or []]), **nan_to_none(more))


class UnitValues(NamedTuple):
    """The values of a number, one for each unit by which two SAEs can be paired, such as a document or a data set.

    Attributes:
        unit: the name of the unit in the singular; "" if there are no units.
        values: name of a unit -> value. The number is the mean of these values.
    """

    unit: str
    values: Mapping[str, float]


Outcome = MetricResult | SaeError  # an error explains why this metric cannot measure the SAE


@dataclass(frozen=True)
class Metric(ABC):
    """A metric is a dataclass: its fields are the options of `--set <name>.<option>=<value>`.

    Increase `definition` whenever the computed numbers change; earlier results are then measured again.
    """

    name: ClassVar[str]  # name of the suite entry and of the result file
    type_id: ClassVar[str]  # SAEBench's `eval_type_id`
    saebench_rows: ClassVar[bool] = True  # whether to measure SAEBench's numbers too if there are outlier rows
    title: ClassVar[str]  # the heading of its table
    columns: ClassVar[tuple[MetricColumn, ...]]  # the columns of its table
    definition: ClassVar[int] = 1
    # How two SAEs are paired (docs/reference/statistics.md): each entry of `MetricResult.details` is one `unit`, whose
    # name is the value at `unit_key`.
    unit: ClassVar[str] = ""  # such as "data set"; "" if the entries differ between SAEs
    independent_seeds: ClassVar[bool] = True  # False: a run's result depends on the other seeds measured with it
    unit_key: ClassVar[str] = "dataset_name"
    unit_names: ClassVar[Mapping[str, str]] = {}  # column's name -> name in an entry, if the names differ

    knows_what_is_kept: ClassVar[bool] = False  # whether `kept_bytes` excludes bytes that are already cached
    caveat: ClassVar[str] = ""  # a known weakness of the metric, with its source; shown wherever its numbers are shown

    @classmethod
    def values_by_unit(cls, result: MetricResult, column: MetricColumn) -> UnitValues:
        """A column's number for each unit, such as each data set. Tests that compare two SAEs use these values."""
        name = cls.unit_names.get(column.name, column.name)
        entries = result.details if cls.unit else []
        values = {str(entry.get(cls.unit_key)): entry.get(name) for entry in entries}
        return UnitValues(cls.unit, {key: float(v) for key, v in values.items() if isinstance(v, (int, float))})

    def settings(self, ctx: EvalContext) -> dict[str, Any]:
        """Everything that determines the result, except the SAE. Metrics that read a dataset add its digest.

        Raises SaeError if the dataset is not available.
        """
        return {**asdict(self), "definition": self.definition, **ctx.settings}

    def settings_of(self, target: EvalTarget, targets: Sequence[EvalTarget]) -> dict[str, Any]:
        """Further settings that determine the result of `target`, such as the other `targets`.

        Raises SaeError if the metric needs other targets that are missing.
        """
        return {}

    def check(self) -> None:  # noqa: B027  (most metrics have nothing to check)
        """Raise SaeError for a problem that would make `measure` fail, such as invalid options or an unreachable
        judge."""

    def describe_cost(self, ctx: EvalContext, saes: int) -> list[str]:
        """Lines of the plan about costs other than time; `saes` is the number of SAEs to measure."""
        return []

    def kept_bytes(self, ctx: EvalContext, targets: Sequence[EvalTarget]) -> int:
        """An upper bound on the bytes of activations that are added to the artifact cache when `targets` are
        measured. Does not need the model.

        If `knows_what_is_kept` is true, bytes that are already in the cache are not counted.
        """
        return 0

    @abstractmethod
    def measure(self, ctx: EvalContext, targets: Sequence[EvalTarget], progress: Progress) -> list[Outcome]:
        """Evaluate all targets on the same text. Returns one outcome for each; raises SaeError if none can be measured.

        Outlier rows are left out. If the text has outlier rows, `n["outlier_rows"]` of a result is the number of them.
        """

    def measure_both(self, ctx: EvalContext, targets: Sequence[EvalTarget], progress: Progress) -> list[Outcome]:
        """Like `measure`, but if rows were left out, the result covers all rows, and its `MetricResult.masked` is the
        result without outlier rows.

        If the text has no outlier rows for an SAE, this SAE is measured only once. If `measure` itself returns both
        results, all SAEs are measured only once.
        """
        outcomes = self.measure(ctx, targets, progress)
        masked = {
            i: outcome
            for i, outcome in enumerate(outcomes)
            if isinstance(outcome, MetricResult) and outcome.n.get(OUTLIERS) and outcome.masked is None
        }
        if masked and self.saebench_rows:
            everything = [replace(targets[i], norm_limit=None) for i in masked]
            for (i, without), outcome in zip(masked.items(), self.measure(ctx, everything, progress), strict=True):
                outcomes[i] = outcome if isinstance(outcome, SaeError) else outcome.with_masked(without)
        return outcomes


def misnamed_numbers(metrics: Mapping[str, Mapping[str, float | None]]) -> list[str]:
    """A sentence for each of these numbers whose SAEBench name does not match its formula.

    The sentence names the number to use instead. Results of earlier versions get the same sentences.
    """
    quality = metrics.get("reconstruction_quality", {})
    named, sound = quality.get("explained_variance"), quality.get("fve")
    if named is None or sound is None:
        return []
    formula = (
        "SAEBench 0.6.0's formula, whose denominator is not the variance: it is not 0 for an SAE that returns the mean "
        "of the text, and it can exceed 1"
        if "explained_variance_legacy" in quality
        else "SAEBench's formula of 2024, a mean of ratios in which the tokens nearest to the mean have the "
        "largest weight"
    )
    return [
        f"explained_variance ({named:.4f}) is {formula}. Use fve ({sound:.4f}) instead: 1 - squared error / squared "
        "distance from the mean, 0 for the mean and 1 for a perfect SAE."
    ]


def outlier_flags(outliers: int, rows: int) -> list[str]:
    """A flag if many rows were left out as outliers."""
    if outliers <= MANY_OUTLIERS * rows:
        return []
    return [
        f"{outliers:,} of {rows:,} rows ({outliers / rows:.1%}) are left out as outliers because of their "
        "norm. These are more than a few attention sinks, and the SAE is judged only on the other rows. To "
        "count all rows, pass --max-norm none."
    ]


def nan_to_none(tree: Any) -> Any:
    """Replace the NaN and infinities in nested dictionaries and lists by None."""
    if isinstance(tree, dict):  # inlined: a wide SAE has a hundred thousand numbers, and a call for each would be slow
        return {k: v if type(v) is float and math.isfinite(v) else nan_to_none(v) for k, v in tree.items()}
    if isinstance(tree, list):
        return [nan_to_none(v) for v in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


JsonPath = list[str | int]  # the path to a value in nested dictionaries and lists, as keys and indices


def check_mode(mode: str) -> None:
    """Raise UsageError unless `mode` is one of MODES."""
    if mode not in MODES:
        raise UsageError(
            f"--mode {mode} is unknown. Expected {MODES[0]} (SAEBench's current definitions) or {MODES[1]} "
            "(the definitions behind the papers' numbers)."
        )
