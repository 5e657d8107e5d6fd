"""Runs and references, read from their files, for comparisons and pages. No weights are read."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from ..cache.hooks import Hook
from ..common.errors import DamagedError, SaeError, UsageError, warn_left_out
from ..common.evaluation_schemas import RESULT_RECORD
from ..common.files import digest_of, sae_home
from ..train.sae import read_run_record, read_sae_record, require_result_of
from .control_shares import is_control_of
from .controls import BASES, RECIPES, base_of, conditions_digest, conditions_of, distinct_names
from .metrics.base import MetricColumn, MetricResult
from .metrics.registry import METRICS
from .paired import metric_value
from .results import read_result_record, result_of
from .rows import hook_suffix


@dataclass(frozen=True)
class ComparedRun:
    """A run, read from its files.

    Attributes:
        origin: `origin` of sae.json.
        record: run.json; empty for an imported SAE.
        results: metric -> result.
        settings: metric -> the settings it was measured with.
        notes: sentences that compare its numbers with the references and its target L0.
        conditions: a digest that is equal for a run and its controls; "" if the run cannot have controls.
        is_control: whether the run is a control; a control can be a run or a reference.
        base: the recipe that a control is built from; for any other run, the recipe that its controls are built from.
        control_notes: sentences that compare its system with its controls.
    """

    name: str
    folder: Path
    origin: dict[str, Any]
    record: dict[str, Any]
    results: dict[str, MetricResult]
    settings: dict[str, dict[str, Any]]
    is_reference: bool = False
    notes: Sequence[str] = ()
    conditions: str = ""
    is_control: bool = False
    base: str = ""
    control_notes: Sequence[str] = ()

    @property
    def target_l0(self) -> float | None:
        l0 = self.record.get("l0")
        return float(l0) if isinstance(l0, (int, float)) else None

    def value(self, metric: str, column: MetricColumn) -> float | None:
        return metric_value(self, metric, column)

    @property
    def masks_rows(self) -> bool:
        """Whether outlier rows were left out of any number of the run."""
        return any(result.masked for result in self.results.values())

    def on_all_rows(self) -> "ComparedRun":
        """The same run with SAEBench's numbers, which are computed over all rows, including outlier rows."""
        return replace(self, results={name: replace(one, masked=None) for name, one in self.results.items()})


def read_run(folder: Path, metrics: Iterable[str] = tuple(METRICS)) -> ComparedRun:
    """Read a run, with its results for `metrics`."""
    if not (folder / "sae.json").exists():
        raise UsageError(f"{folder} holds no trained SAE (no sae.json). Give run folders: sae compare runs/...")
    sae, run = read_sae_record(folder), read_run_record(folder)
    origin: dict[str, Any] = {**sae.get("origin", {})}
    results, settings, _ = read_results(folder, sae, metrics)
    return ComparedRun(
        folder.resolve().name, folder, origin, {**run} if run else {}, results, settings,
        conditions=conditions_digest(conditions_of(folder)), is_control=origin.get("variant") in RECIPES,
        base=base_of(run),
    )  # fmt: skip


class RunResults(NamedTuple):
    """The result of each metric, the settings of each result, and the SAE that was measured, as the results describe
    it: the content of its sae.json, or the record of a reference."""

    results: dict[str, MetricResult]
    settings: dict[str, dict[str, Any]]
    described: dict[str, Any]


def read_results(
    folder: Path, sae: Mapping[str, Any] | None = None, metrics: Iterable[str] = tuple(METRICS)
) -> RunResults:
    """The result of each of `metrics`, and its settings. `sae` is the content of sae.json; None for a reference.

    Raises DamagedError for a result that was damaged or belongs to another SAE or reference.
    """
    results, settings, described = {}, {}, {}
    for name in metrics:
        metric, path = METRICS[name], folder / "evaluations" / f"{name}.json"
        if path.exists():
            record = read_result_record(path, metric)
            if sae is not None:
                require_result_of(sae, record, path)
            elif not folder.name.endswith(digest_of(record["sae_cfg_dict"])[:8]):
                raise DamagedError(f"{path} is a result of another reference. {RESULT_RECORD.remedy}")
            results[name], settings[name] = result_of(record, path), record["eval_config"]
            described = record["sae_cfg_dict"]
    return RunResults(results, settings, described)


def read_references(
    runs: Sequence[ComparedRun], read: Callable[[Path], RunResults] = read_results
) -> list[ComparedRun]:
    """The references measured on the same text and hook as the runs. Controls of other runs are left out.

    `read` returns the results in a folder.
    """
    hook = Hook.from_record({"layer": None, **runs[0].origin})
    end = f"-L{hook.layer}{hook_suffix(hook)}-"
    settings = {metric: shared for run in runs for metric, shared in run.settings.items()}
    references = []
    for folder in sorted((sae_home() / "activations" / "evaluation" / "references").glob(f"*{end}{'[0-9a-f]' * 8}")):
        try:
            results, reference_settings, described = read(folder)
        except SaeError as error:
            warn_left_out(folder, error)
            continue
        matching = {
            metric: result
            for metric, result in results.items()
            if metric in settings and without_weights(reference_settings[metric]) == without_weights(settings[metric])
        }
        if matching:
            name, conditions = folder.name.split(end)[0], described.get("conditions", {})
            references.append(
                ComparedRun(
                    name,
                    folder,
                    {},
                    conditions,
                    matching,
                    reference_settings,
                    is_reference=True,
                    conditions=conditions_digest(conditions),
                    is_control=bool(conditions),
                    base=described.get("base", BASES[0]),
                )  # fmt: skip
            )
    return name_controls([one for one in references if not one.is_control or is_wanted(one, runs)])


def is_wanted(control: ComparedRun, runs: Sequence[ComparedRun]) -> bool:
    return any(is_control_of(control, run) for run in runs)


def name_controls(references: Sequence[ComparedRun]) -> list[ComparedRun]:
    """The references, with distinct names for controls that have the same recipe and L0."""
    controls = [one for one in references if one.is_control]
    names = distinct_names([one.name for one in controls], [one.record for one in controls])
    named = [replace(one, name=name) for one, name in zip(controls, names, strict=True)]
    return [*(one for one in references if not one.is_control), *named]


def without_weights(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings without the digests of the SAE and of the other seeds with which it was compared.

    `paired_latents` is left out too: it is recorded for wide SAEs only and does not affect comparability.
    """
    return {name: value for name, value in settings.items() if name not in ("weights", "seeds", "paired_latents")}
