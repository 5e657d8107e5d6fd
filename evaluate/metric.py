"""What every metric is: a name, its settings, and a function from a bench and SAEs to results; and where results go.

A metric is one file of the same shape. Whatever the number of SAEs, it runs the model once over its text.
"""

import contextlib
import copy
import math
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

from torch import Tensor

from ..cache.errors import DamagedError, SaeError, UsageError
from ..cache.files import digest_of, make_folder, outside, read_json, write_json
from .bench import Bench

MODES = ("0.6.0", "2024-12")  # SAEBench now, and the one behind the five papers' numbers


class Coder(Protocol):
    """What can be evaluated: anything that encodes and decodes raw activations (..., d_in)."""

    def encode(self, x: Tensor, /) -> Tensor: ...

    def decode(self, f: Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class Subject:
    """An SAE under evaluation, and the layer that it stands behind.

    It replaces the residual at the positions that count; with `everywhere`, at BOS and padding too. A `reference` is
    there to read others against.
    """

    sae: Coder
    layer: int
    everywhere: bool = False
    reference: bool = False


class Progress(Protocol):
    """What a metric tells about its work; a smaller `done` than before begins another stage of it."""

    def __call__(self, done: int, total: int, note: str = "") -> None: ...


@dataclass(frozen=True)
class Number:
    """One number of a metric as a reader needs it: where it stands in the result, and how to read it."""

    heading: str
    category: str
    name: str
    form: str = ".4f"
    better: str = ""  # "up" or "down"; "" for a number that is neither
    floor: float | None = None  # the least: where more is better, what chance or a useless SAE has
    ceiling: float | None = None  # the largest: where less is better, the worst


@dataclass(frozen=True)
class Result:
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
        return cls(*without_nan([metrics, details or []]), **without_nan(more))


Outcome = Result | SaeError  # a subject that a metric cannot measure has a sentence in the place of its numbers


class Metric(ABC):
    """Settings are the fields of a dataclass; `name` is the result file's, `type_id` SAEBench's.

    `definition` is raised when what is computed changes: results of an earlier one are measured again.
    """

    name: ClassVar[str]
    type_id: ClassVar[str]
    title: ClassVar[str]  # over its table
    numbers: ClassVar[tuple[Number, ...]]  # the columns of its table
    definition: ClassVar[int] = 1

    def settings(self, bench: Bench) -> dict[str, Any]:
        """Everything but the SAE that decides a result. A metric that reads more than model and settings adds to it.

        Raises SaeError when that is not there.
        """
        return {**asdict(self), "definition": self.definition, **bench.settings}  # type: ignore[call-overload]

    def check(self) -> None:  # noqa: B027  (most have nothing to check)
        """Raises SaeError at once for what would be refused after hours: settings, or a judge that does not answer."""

    @abstractmethod
    def measure(self, bench: Bench, subjects: Sequence[Subject], progress: Progress) -> list[Outcome]:
        """Evaluate every subject on the same text. Raises SaeError when the bench cannot serve this metric."""


def result_file(folder: Path, metric: Metric) -> Path:
    return folder / "evaluations" / f"{metric.name}.json"


def write_result(
    folder: Path, metric: Metric, settings: Mapping[str, Any], result: Result, run: Mapping[str, Any]
) -> None:
    """One file per run and metric, with SAEBench's envelope. As in its files, -1 stands for a number that does not exist;
    since a number can be -1 too, `absent` says where.
    """
    ours = {"metrics": result.metrics, "details": result.details}
    absent = list(paths_of(None, ours))
    theirs = with_values(ours, absent, ABSENT)
    envelope = {
        "eval_type_id": metric.type_id,
        "eval_config": dict(settings),
        "eval_id": str(uuid.uuid4()),
        "datetime_epoch_millis": int(time.time() * 1000),
        "eval_result_metrics": theirs["metrics"],
        "eval_result_details": theirs["details"],
        "sae_bench_commit_hash": f"sae-pipeline {version('sae-pipeline')}",
        "sae_lens_id": "custom_sae",
        "sae_lens_release_id": folder.name,
        "sae_lens_version": "none",
        "sae_cfg_dict": dict(run),
        "eval_result_unstructured": {name: getattr(result, name) for name in UNSTRUCTURED} | {"absent": absent},
    }
    path = result_file(folder, metric)
    try:
        set_aside(folder, metric, settings)
    except OSError as error:
        raise outside(error, path) from error
    write_json(path, envelope)


ABSENT = -1.0
UNSTRUCTURED = ("intervals", "n", "flags", "extra")
RECORDED = ("eval_config", "eval_result_metrics", "eval_result_details", "eval_result_unstructured")


def read_result(folder: Path, metric: Metric, settings: Mapping[str, Any]) -> Result | None:
    """The result of an earlier evaluation with the same settings, if there is one; it is then the metric's file again,
    where that can be written.

    Raises DamagedError for a file that holds no result.
    """
    path, aside = result_file(folder, metric), earlier_file(folder, metric, settings)
    if path.exists() and earlier_file(folder, metric, read_json(path, *RECORDED)["eval_config"]) == aside:
        return result_of(path, metric)
    if not aside.exists():
        return None
    found = result_of(aside, metric)
    with contextlib.suppress(OSError):
        set_aside(folder, metric, settings)
        aside.replace(path)
    return found


def result_of(path: Path, metric: Metric | type[Metric]) -> Result:
    """What a result file holds. Raises DamagedError for one that holds none."""
    found = read_json(path, *RECORDED)
    try:
        more = {name: found["eval_result_unstructured"][name] for name in UNSTRUCTURED}
        theirs = {"metrics": found["eval_result_metrics"], "details": found["eval_result_details"]}
        absent = found["eval_result_unstructured"].get("absent")
        ours = with_values(theirs, list(paths_of(ABSENT, theirs)) if absent is None else absent, None)
        metrics = {
            c: {n: v if v is None else float(v) for n, v in group.items()} for c, group in ours["metrics"].items()
        }
        details, more["n"] = [{**entry} for entry in ours["details"]], {**more["n"]}
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise DamagedError(f"{path} holds no result of {metric.name}. Remove it and evaluate again.") from error
    return Result(metrics, details, **more)


def earlier_file(folder: Path, metric: Metric, settings: Mapping[str, Any]) -> Path:
    """Where the result of these settings stands once one of other settings has taken its place."""
    return folder / "evaluations" / "earlier" / f"{metric.name}-{digest_of(settings)[:8]}.json"


def set_aside(folder: Path, metric: Metric, settings: Mapping[str, Any]) -> None:
    """Make room for a result of these settings: one of others was perhaps hours of work, and is kept."""
    path = result_file(folder, metric)
    with contextlib.suppress(DamagedError):  # there is none, or nothing in it that could be kept
        aside = earlier_file(folder, metric, read_json(path, *RECORDED)["eval_config"])
        if aside != earlier_file(folder, metric, settings):
            make_folder(aside.parent)
            with contextlib.suppress(FileNotFoundError):  # another process has just done so
                path.replace(aside)


def without_nan(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {k: without_nan(v) for k, v in tree.items()}
    if isinstance(tree, list):
        return [without_nan(v) for v in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


Place = list[str | int]  # in a tree of dictionaries and lists


def paths_of(leaf: float | None, tree: Any) -> Iterator[Place]:
    """Where a leaf stands."""
    branches = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, branch in branches:
        if isinstance(branch, (dict, list)):
            yield from ([key, *rest] for rest in paths_of(leaf, branch))
        elif branch is leaf if leaf is None else branch == leaf:
            yield [key]


def with_values(tree: Any, places: Sequence[Place], leaf: float | None) -> Any:
    """A copy of the tree with this leaf at some places."""
    tree = copy.deepcopy(tree)
    for *branches, last in places:
        at = tree
        for key in branches:
            at = at[key]
        at[last] = leaf
    return tree


def check_mode(mode: str) -> None:
    if mode not in MODES:
        raise UsageError(
            f"--mode {mode} is unknown: {MODES[0]} (SAEBench now) or {MODES[1]} (behind the papers' numbers)."
        )
