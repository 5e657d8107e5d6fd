"""What every metric is: a name, its settings, and a function from a bench and SAEs to results; and where results go.

A metric is one file of the same shape. Whatever the number of SAEs, it runs the model once over its text.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Protocol, Self

from torch import Tensor

from ...common.errors import SaeError, UsageError
from ..context import EvalContext

MODES = ("0.6.0", "2024-12")  # SAEBench now, and the one behind the five papers' numbers


class SAELike(Protocol):
    """What can be evaluated: anything that encodes and decodes raw activations (..., d_in)."""

    def encode(self, x: Tensor, /) -> Tensor: ...

    def decode(self, f: Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class EvalTarget:
    """An SAE under evaluation, and the layer that it stands behind.

    It replaces the residual at the positions that count; with `everywhere`, at BOS and padding too. A `reference` is
    there to read others against.
    """

    sae: SAELike
    layer: int
    everywhere: bool = False
    reference: bool = False


class Progress(Protocol):
    """What a metric tells about its work; a smaller `done` than before begins another stage of it."""

    def __call__(self, done: int, total: int, note: str = "") -> None: ...


@dataclass(frozen=True)
class MetricColumn:
    """One number of a metric as a reader needs it: where it stands in the result, and how to read it."""

    heading: str
    category: str
    name: str
    format: str = ".4f"
    better: str = ""  # "up" or "down"; "" for a number that is neither
    floor: float | None = None  # the least: where more is better, what chance or a useless SAE has
    ceiling: float | None = None  # the largest: where less is better, the worst


@dataclass(frozen=True)
class MetricResult:
    """Category -> name -> number, and one entry per latent, letter or dataset; None where a number does not exist.

    `intervals` has the shape of `metrics`: 95 %, [low, high]. `flags` are sentences about numbers that mean less than
    they seem to. `n` says what was counted. `extra` is whatever else a metric keeps.
    """

    metrics: dict[str, dict[str, float | None]]
    details: list[dict[str, Any]] = field(default_factory=list)
    intervals: dict[str, dict[str, list[float | None]]] = field(default_factory=dict)
    n: dict[str, int] = field(default_factory=dict)
    flags: list[str] = field(default_factory=list)
    extra: Any = None

    @classmethod
    def of(
        cls, metrics: Mapping[str, Mapping[str, float | None]], details: list[dict[str, Any]] | None = None, **more: Any
    ) -> Self:
        """NaN and infinity become None: fresh and read results then look the same."""
        return cls(*nan_to_none([metrics, details or []]), **nan_to_none(more))


Outcome = MetricResult | SaeError  # a subject that a metric cannot measure has a sentence in the place of its numbers


class Metric(ABC):
    """Settings are the fields of a dataclass; `name` is the result file's, `type_id` SAEBench's.

    `definition` is raised when what is computed changes: results of an earlier one are measured again.
    """

    name: ClassVar[str]
    type_id: ClassVar[str]
    title: ClassVar[str]  # over its table
    columns: ClassVar[tuple[MetricColumn, ...]]  # the columns of its table
    definition: ClassVar[int] = 1

    def settings(self, ctx: EvalContext) -> dict[str, Any]:
        """Everything but the SAE that decides a result. A metric that reads more than model and settings adds to it.

        Raises SaeError when that is not there.
        """
        return {**asdict(self), "definition": self.definition, **ctx.settings}  # type: ignore[call-overload]

    def check(self) -> None:  # noqa: B027  (most have nothing to check)
        """Raises SaeError at once for what would be refused after hours: settings, or a judge that does not answer."""

    @abstractmethod
    def measure(self, ctx: EvalContext, targets: Sequence[EvalTarget], progress: Progress) -> list[Outcome]:
        """Evaluate every subject on the same text. Raises SaeError when the bench cannot serve this metric."""


def nan_to_none(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {k: nan_to_none(v) for k, v in tree.items()}
    if isinstance(tree, list):
        return [nan_to_none(v) for v in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


JsonPath = list[str | int]  # in a tree of dictionaries and lists


def check_mode(mode: str) -> None:
    if mode not in MODES:
        raise UsageError(
            f"--mode {mode} is unknown: {MODES[0]} (SAEBench now) or {MODES[1]} (behind the papers' numbers)."
        )
