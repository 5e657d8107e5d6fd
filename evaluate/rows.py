"""The rows of an evaluation: SAEs with their results, grouped by the cache whose text they are evaluated on."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from ..cache.hooks import Hook
from ..cache.reader import Cache
from ..common.errors import SaeError
from ..common.files import digest_of
from ..common.l0_target import missed_l0
from ..common.precision import recorded_precision
from ..common.schemas import LATER_ENTRIES
from .context import EvalContext
from .metrics.base import EvalTarget, Metric, MetricResult, RowSet
from .metrics.registry import caveats

# Keys of run.json that do not affect the weights, or affect them only through rounding. Runs of one recipe can come
# from several commands, machines and versions.
IGNORED_KEYS = (
    "seed",
    "asked",
    "device",
    "environment",
    "versions",
    "threads",
    "cache_folders",
    "accumulate",
    "accumulate_since",
    "step_version",
    "step_version_since",
)
NEAR_L0 = 1.1  # a PCA counts as having an SAE's L0 if its rank is at most this many times that L0


class MeasuredRun(Protocol):
    """Anything with a name and results: a row of an evaluation, or a run whose results were read from files for a
    comparison."""

    @property
    def name(self) -> str: ...

    @property
    def results(self) -> Mapping[str, MetricResult]: ...

    @property
    def is_reference(self) -> bool: ...

    @property
    def target_l0(self) -> float | None:
        """The target L0 of its training, or None."""

    @property
    def conditions(self) -> str:
        """A digest that is equal for a run and its controls (`controls.conditions_digest`); "" if it cannot have
        controls."""

    @property
    def is_control(self) -> bool:
        """Whether one part of the SAE kept its random initial weights (evaluate/controls.py)."""

    @property
    def base(self) -> str:
        """The recipe that a control is built from; for any other run, the base of its controls (`controls.base_of`)."""

    @property
    def notes(self) -> Sequence[str]:
        """Sentences that compare its numbers with other runs (`notes_beside`). Notes about a single metric are flags in
        that metric's result."""

    @property
    def control_notes(self) -> Sequence[str]:
        """Sentences that compare its system with its controls (evaluate/control_notes.py)."""


@dataclass
class EvalRow:
    """One row of the tables: a run, an SAE object, or a reference such as the identity.

    Attributes:
        name: its name in tables.
        target: the SAE and its hook.
        folder: the folder with its results in `evaluations/`; None for an object, whose results are not written.
        sae_folder: the folder of its SAE; None for an object and for references that are not trained.
        record: the contents of sae.json, or a description of the reference.
        weights: digest of the weights, the activations and the hook.
        results: metric name -> result.
        errors: metric name -> why that metric has no result.
        target_l0: the target L0 of its training.
        conditions: a digest that is equal for a run and its controls; "" if it cannot have controls.
        is_control: whether the row is a control; a control can be a run or a reference.
        base: the base recipe of a control; for any other run, the base recipe of its controls.
        notes: sentences that compare its numbers with other rows, set when all rows are measured (`notes_beside`).
        control_notes: sentences that compare its system with its controls.
    """

    name: str
    target: EvalTarget
    folder: Path | None = None
    sae_folder: Path | None = field(default=None, kw_only=True)
    record: dict[str, Any] = field(default_factory=dict)
    weights: str = ""
    results: dict[str, MetricResult] = field(default_factory=dict)
    errors: dict[str, SaeError] = field(default_factory=dict)
    target_l0: float | None = None
    conditions: str = ""
    is_control: bool = False
    base: str = ""
    notes: Sequence[str] = ()
    control_notes: Sequence[str] = ()

    def __post_init__(self) -> None:
        self.target = replace(self.target, name=self.name, weights=self.weights)

    @property
    def is_reference(self) -> bool:
        return self.target.reference

    def settings(self, shared: Mapping[str, Any]) -> dict[str, Any]:
        """The settings with which this row is measured: `shared` (those of its group), the row's weights, and its norm
        limit."""
        limit = self.target.norm_limit
        return {**shared, "weights": self.weights} | ({} if limit is None else {"norm_limit": limit})

    def flat(self) -> dict[str, Any]:
        """The row as one flat dictionary, for `pandas.DataFrame([row.flat() for row in rows])`.

        Keys are `name`, `layer`, `site` and `metric.category.number`, whose values are numbers or None;
        `metric.masked_category.number` is the number without outlier rows, if there were any. If a metric failed, its
        error message is under the metric's name. `notes` is a list of sentences about misleading numbers; read it
        before the numbers.
        """
        values = {
            f"{metric}.{category}.{name}": value
            for metric, result in self.results.items()
            for category, group in result.named_metrics.items()
            for name, value in group.items()
        }
        errors = {metric: str(error) for metric, error in self.errors.items()}
        place = {"name": self.name, **self.target.hook._asdict()}
        return {**place, **values, **errors, "notes": describe_notes(self)}


@dataclass
class EvalGroup:
    """The rows of one cache, which share every pass of the model. `settings` has an entry per metric that can run."""

    cache: Cache
    ctx: EvalContext
    rows: list[EvalRow]
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)  # about the text on which imported SAEs are evaluated

    def pending(self, metric: str, rows: Sequence[EvalRow] | None = None) -> list[EvalRow]:
        """The rows (default: of this group) for which a metric has neither a result nor an error."""
        rows = self.rows if rows is None else rows
        return [row for row in rows if metric not in row.results and metric not in row.errors]

    def kept_bytes(self, metric: Metric) -> int:
        """About how many bytes of activations a metric adds to the artifact cache when it is measured."""
        pending = self.pending(metric.name) if metric.name in self.settings else []
        return metric.kept_bytes(self.ctx, [row.target for row in pending]) if pending else 0

    @property
    def row_sets(self) -> list[RowSet]:
        """The distinct row sets (`RowSet`) of the SAEs in the group, sorted by hook."""
        return list(dict.fromkeys(row.target.row_set for row in sorted(self.rows, key=lambda row: row.target.hook)))

    @property
    def targets(self) -> list[EvalTarget]:
        return [row.target for row in self.rows]

    def settings_of(self, metric: Metric, row: EvalRow) -> dict[str, Any]:
        """All settings with which a metric is measured for a row. Raises SaeError if the row cannot be measured in this
        group."""
        return row.settings(self.settings[metric.name]) | metric.settings_of(row.target, self.targets)

    def measured_with(self, metric: Metric, pending: Sequence[EvalRow]) -> list[EvalRow]:
        """The pending rows, then the rows that they are compared with and that already have results: other seeds of the
        same systems."""
        systems = set() if metric.independent_seeds else {row.target.system for row in pending}
        done = [row for row in self.rows if metric.name in row.results and row.target.system in systems]
        return [*pending, *done]


def digest_without_seed(record: Mapping[str, Any]) -> str:
    """A digest that is equal for runs that differ only in their seed; `record` is run.json, of any version."""
    known = {**record, "precision": recorded_precision(record)}
    entries = {name: value for name, value in without_later_entries(known).items() if name not in IGNORED_KEYS}
    for name in ("options", "resolved"):
        if name in entries:
            entries[name] = without_later_entries(entries[name])
    return digest_of(entries)


def without_later_entries(entries: Mapping[str, Any]) -> dict[str, Any]:
    """The entries, without those that have the value listed for them in LATER_ENTRIES. A run without such an entry
    counts as equal to a run in which the entry has this value."""
    return {k: v for k, v in entries.items() if k not in LATER_ENTRIES or v != LATER_ENTRIES[k]}


def placed(hook: Hook) -> str:
    """The location of a hook's SAEs, as part of a sentence: "after layer 12" or "at mlp_out of layer 12"."""
    return f"after {hook}" if hook.site == "resid_post" else f"at {hook}"


def hook_suffix(hook: Hook) -> str:
    """The part of a reference's folder name that shows the site of its hook: "" for resid_post, "-mlp_out" for mlp_out,
    and so on."""
    return "" if hook.site == "resid_post" else f"-{hook.site}"


def failures(rows: Iterable[EvalRow]) -> set[tuple[str, str]]:
    """(metric, reason) for everything without a result, except for reference rows."""
    return {(m, str(error)) for row in rows if not row.is_reference for m, error in row.errors.items()}


def describe_notes(row: MeasuredRun) -> list[str]:
    """All warnings about misleading numbers in a row, in the same words as in result files and in the output of
    --json."""
    if row.is_reference:
        return []
    of_metrics = [f"{metric}: {note}" for metric, result in row.results.items() for note in result.notes]
    return [*of_metrics, *caveats(row.results), *row.notes, *row.control_notes]


def add_notes(rows: Sequence[EvalRow]) -> None:
    """Set the notes of rows that were measured together. These notes compare each row with references on the same
    activations."""
    for row in rows:
        row.notes = notes_beside(row, [one for one in rows if one.target.row_set == row.target.row_set])


def notes_beside(row: MeasuredRun, references: Iterable[MeasuredRun]) -> list[str]:
    """Sentences that compare the numbers of an SAE with its target L0 and with the references on the same rows."""
    ours = core_numbers(row)
    if row.is_reference or ours is None:
        return []
    return [*missed_l0(row.name, ours[0], row.target_l0, held_out=True), *below_pca(row, references)]


def below_pca(row: MeasuredRun, references: Iterable[MeasuredRun]) -> list[str]:
    """If an SAE explains less variance than a PCA with no more components than the SAE's L0, a sentence that says so.

    The sentence names the best such PCA among `references`, which were measured on the same rows.
    """
    l0, explained = core_numbers(row) or (None, None)
    if l0 is None or explained is None:
        return []
    measured = [(numbers, one.name) for one in references if is_pca(one) and (numbers := core_numbers(one))]
    better = [(ev, rank, name) for (rank, ev), name in measured if rank <= NEAR_L0 * l0 and ev > explained]
    if not better:
        return []
    ev, rank, name = max(better)
    size = "equal" if l0 <= NEAR_L0 * rank else "smaller"
    return [
        f"{row.name} explains {explained:.3f} of the variance, less than the PCA of {size} L0 ({name}: {ev:.3f}). "
        "Train it longer before comparing it with others."
    ]


def is_pca(row: MeasuredRun) -> bool:
    return row.is_reference and row.name.startswith("pca-")


def core_numbers(row: MeasuredRun) -> tuple[float, float] | None:
    """L0 and EV of a row as its table shows them, if both were measured."""
    metrics = row.results["core"].sound.metrics if "core" in row.results else {}
    l0 = metrics.get("sparsity", {}).get("l0")
    explained = metrics.get("reconstruction_quality", {}).get("fve")
    return None if l0 is None or explained is None else (l0, explained)
