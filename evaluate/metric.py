"""What every metric is: a name, its settings, and a function from a bench and SAEs to results; and where results go.

A metric is one file of the same shape. It reads the bench's text once, whatever the number of SAEs.
"""

import math
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from ..cache.contexts import Contexts
from ..cache.errors import UsageError
from ..cache.files import read_json, write_json
from ..harvest.model import LanguageModel

MODES = ("0.6.0", "2024-12")  # SAEBench now, and the one behind the five papers' numbers


class Coder(Protocol):
    """What can be evaluated: anything that encodes and decodes raw activations (..., d_in)."""

    def encode(self, x: Tensor, /) -> Tensor: ...

    def decode(self, f: Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class Subject:
    """An SAE under evaluation, and the layer that it stands behind.

    It replaces the residual at the positions that count; with `everywhere`, at BOS and padding too.
    """

    sae: Coder
    layer: int
    everywhere: bool = False


@dataclass(frozen=True)
class Batch:
    """Contexts, padded on the right: their ids, which positions hold a token, and which of those count; each (N, S)."""

    ids: Tensor
    inside: Tensor
    kept: Tensor

    def parts(self, contexts: int) -> Iterator["Batch"]:
        """The same, `contexts` at a time, without the padding that is then superfluous."""
        for start in range(0, len(self.ids), contexts):
            rows = slice(start, start + contexts)
            longest = int(self.inside[rows].sum(1).max())
            yield Batch(self.ids[rows, :longest], self.inside[rows, :longest], self.kept[rows, :longest])


@dataclass(frozen=True)
class Bench:
    """The model and the held-out text; `skip` are the ids that no number is taken at (pad, eos, bos)."""

    model: LanguageModel
    contexts: Contexts
    skip: list[int]
    settings: dict[str, Any]  # the mode, and what pins model and text

    def batches(self, size: int, count: int) -> Iterator[Batch]:
        """At most `count` batches of `size` contexts."""
        for start in range(0, min(len(self.contexts), count * size), size):
            part = self.contexts.select(slice(start, start + size))
            ids = torch.from_numpy(part.ids.astype(np.int64))
            inside = torch.arange(ids.shape[1]) < torch.from_numpy(part.length.astype(np.int64))[:, None]
            kept = inside & ~torch.isin(ids, torch.tensor(self.skip, dtype=torch.int64))
            yield Batch(*(tensor.to(self.model.device) for tensor in (ids, inside, kept)))


@dataclass(frozen=True)
class Result:
    """Category -> name -> number, and one entry per latent, letter or dataset; -1 where a number does not exist."""

    metrics: dict[str, dict[str, float]]
    details: list[dict[str, Any]]

    @classmethod
    def of(cls, metrics: dict[str, dict[str, float]], details: list[dict[str, Any]]) -> Self:
        """NaN and infinity become -1, as in SAEBench's files: fresh and read results then look the same."""
        return cls(without_nan(metrics), without_nan(details))


class Metric(ABC):
    """Settings are the fields of a dataclass; `name` is the result file's, `type_id` SAEBench's."""

    name: str
    type_id: str

    @abstractmethod
    def measure(self, bench: Bench, subjects: Sequence[Subject], progress: Callable[[int, int], None]) -> list[Result]:
        """Evaluate every subject on the same text. UsageError when the bench cannot serve this metric."""


def result_file(folder: Path, metric: Metric) -> Path:
    return folder / "evaluations" / f"{metric.name}.json"


def write_result(
    folder: Path, metric: Metric, settings: Mapping[str, Any], result: Result, run: Mapping[str, Any]
) -> None:
    """One file per run and metric, with SAEBench's envelope."""
    envelope = {
        "eval_type_id": metric.type_id,
        "eval_config": dict(settings),
        "eval_id": str(uuid.uuid4()),
        "datetime_epoch_millis": int(time.time() * 1000),
        "eval_result_metrics": result.metrics,
        "eval_result_details": result.details,
        "sae_bench_commit_hash": f"sae-pipeline {version('sae-pipeline')}",
        "sae_lens_id": "custom_sae",
        "sae_lens_release_id": folder.name,
        "sae_lens_version": "none",
        "sae_cfg_dict": dict(run),
        "eval_result_unstructured": None,
    }
    write_json(result_file(folder, metric), envelope)


def read_result(folder: Path, metric: Metric, settings: Mapping[str, Any]) -> Result | None:
    """The result of an earlier evaluation with the same settings, if there is one."""
    path = result_file(folder, metric)
    if not path.exists():
        return None
    found = read_json(path)
    if found.get("eval_config") != settings:
        return None
    return Result(found["eval_result_metrics"], found["eval_result_details"])


def without_nan(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {k: without_nan(v) for k, v in tree.items()}
    if isinstance(tree, list):
        return [without_nan(v) for v in tree]
    return -1.0 if isinstance(tree, float) and not math.isfinite(tree) else tree


def check_mode(mode: str) -> None:
    if mode not in MODES:
        raise UsageError(
            f"--mode {mode} is unknown: {MODES[0]} (SAEBench now) or {MODES[1]} (behind the papers' numbers)."
        )
