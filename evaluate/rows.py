"""The rows of an evaluation: SAEs with their results, grouped by the cache whose text they are evaluated on."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ..cache.layout import Hook
from ..cache.reader import Cache
from ..common.errors import SaeError
from .context import EvalContext
from .metrics.base import EvalTarget, MetricResult


class MeasuredRun(Protocol):
    """Anything with a name and results: a row of an evaluation, or a run that is compared from its files."""

    @property
    def name(self) -> str: ...

    @property
    def results(self) -> Mapping[str, MetricResult]: ...

    @property
    def is_reference(self) -> bool: ...


@dataclass
class EvalRow:
    """One row of the tables: a run, an SAE object, or a reference such as the identity.

    Attributes:
        name: its name in tables.
        target: the SAE and its hook.
        folder: its results are in `evaluations/` there; None for an object, whose results are not written.
        record: the contents of sae.json, or a description of the reference.
        weights: digest of the weights, the activations and the hook.
        results: metric name -> result.
        errors: metric name -> why that metric has no result.
    """

    name: str
    target: EvalTarget
    folder: Path | None = None
    record: dict[str, Any] = field(default_factory=dict)
    weights: str = ""
    results: dict[str, MetricResult] = field(default_factory=dict)
    errors: dict[str, SaeError] = field(default_factory=dict)

    @property
    def is_reference(self) -> bool:
        return self.target.reference

    def settings(self, shared: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of a result of this row: those of its group, its weights, and the limit of outlier rows."""
        limit = self.target.norm_limit
        return {**shared, "weights": self.weights} | ({} if limit is None else {"norm_limit": limit})

    def flat(self) -> dict[str, Any]:
        """The row as one flat dictionary, for `pandas.DataFrame([row.flat() for row in rows])`.

        Keys are `name`, `layer`, `site` and `metric.category.number`, whose values are numbers or None;
        `metric.masked_category.number` is without outlier rows, where there were any. A metric that failed has its
        error message under the metric's name.
        """
        values = {
            f"{metric}.{category}.{name}": value
            for metric, result in self.results.items()
            for category, group in result.named_metrics.items()
            for name, value in group.items()
        }
        errors = {metric: str(error) for metric, error in self.errors.items()}
        return {"name": self.name, **self.target.hook._asdict(), **values, **errors}


@dataclass
class EvalGroup:
    """The rows of one cache: they share every pass of the model. `settings` has an entry per metric that can run."""

    cache: Cache
    ctx: EvalContext
    rows: list[EvalRow]
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)  # about the text that imported SAEs are evaluated on

    def pending(self, metric: str, rows: Sequence[EvalRow] | None = None) -> list[EvalRow]:
        """The rows (default: of this group) for which a metric has neither a result nor an error."""
        rows = self.rows if rows is None else rows
        return [row for row in rows if metric not in row.results and metric not in row.errors]


def placed(hook: Hook) -> str:
    """Where the SAEs of a hook are, in a sentence: "after layer 12" or "at mlp_out of layer 12"."""
    return f"after {hook}" if hook.site == "resid_post" else f"at {hook}"


def hook_suffix(hook: Hook) -> str:
    """What the name of a reference's folder says of its hook: "" for resid_post, "-mlp_out"."""
    return "" if hook.site == "resid_post" else f"-{hook.site}"


def failures(rows: Iterable[EvalRow]) -> set[tuple[str, str]]:
    """(metric, reason) for everything that has no result, except reference rows."""
    return {(m, str(error)) for row in rows if not row.is_reference for m, error in row.errors.items()}


def below_pca(rows: Sequence[EvalRow]) -> list[str]:
    """A sentence for each SAE that explains less variance than the PCA of about the same L0 on its rows."""
    sentences = []
    for row in rows:
        ours = core_numbers(row)
        if row.is_reference or ours is None:
            continue
        for other in rows:
            theirs = core_numbers(other) if other.is_reference and other.name.startswith("pca-") else None
            if theirs is None or other.target.row_set != row.target.row_set:
                continue
            if math.isclose(ours[0], theirs[0], rel_tol=0.1) and ours[1] < theirs[1]:
                sentences.append(
                    f"{row.name} explains {ours[1]:.3f} of the variance, less than the PCA of equal L0 ({other.name}: "
                    f"{theirs[1]:.3f}). Train it longer before comparing it with others."
                )
    return sentences


def core_numbers(row: EvalRow) -> tuple[float, float] | None:
    """L0 and EV of a row as its table shows them, if both were measured."""
    metrics = row.results["core"].sound.metrics if "core" in row.results else {}
    l0 = metrics.get("sparsity", {}).get("l0")
    explained = metrics.get("reconstruction_quality", {}).get("fve")
    return None if l0 is None or explained is None else (l0, explained)
