"""Train control SAEs for given runs, for `sae evaluate --controls` (train/variants/controls.py; arXiv 2602.14111).

A control is trained once, with seed 0, and with the same rows, width, L0, steps, batch size and order of batches as the
runs that it is compared with. A control is an ordinary run in `activations/evaluation/controls/`, where later commands
find it, or resume it if it was interrupted. The recipe of a control is based on the recipe of the run if that is topk
or batchtopk, and otherwise on batchtopk.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..cache.catalog import find_by_fingerprint
from ..cache.object_store import is_url
from ..common.addresses import disk_path
from ..common.errors import SaeError, UsageError
from ..common.formatting import format_count
from ..evaluate.controls import BASES, RECIPES, base_of, conditions_digest, conditions_of, controls_folder
from ..train.plan import Run, TrainConfig, TrainPlan, plan_training
from ..train.progress import TrainProgress
from ..train.run import run_training
from ..train.sae import read_run_record, read_sae_record


class Wanted(NamedTuple):
    """The controls of a run of `variant`: based on the recipe `base`, with `conditions`, trained on `caches`."""

    variant: str
    base: str
    conditions: Mapping[str, Any]
    caches: Sequence[str | Path]


@dataclass(frozen=True)
class ControlsPlan:
    """The controls of some runs. Nothing has been trained yet.

    Attributes:
        train: the controls, finished or not; None if no run can have any.
        count: the number of runs that they are compared with.
        bases: the recipes that they are based on.
        notes: sentences about runs without controls, and about runs whose controls are based on another recipe.
        problems: why controls cannot be trained; the evaluation continues without them.
    """

    train: TrainPlan | None = None
    count: int = 0
    bases: Sequence[str] = ()
    notes: Sequence[str] = ()
    problems: Sequence[SaeError] = ()

    @property
    def runs(self) -> list[Run]:
        return self.train.runs if self.train else []

    @property
    def folders(self) -> tuple[Path, ...]:
        return tuple(run.folder for run in self.runs)

    @property
    def trained_folders(self) -> tuple[Path, ...]:
        """The folders of the controls that can be evaluated now."""
        return tuple(run.folder for run in self.runs if run.done)

    def describe(self) -> list[str]:
        """The lines of a plan: what is trained, for how many runs, at what cost, and where it is kept."""
        lines = [f"note     {note}" for note in self.notes]
        lines += [f"not run  controls: {problem}" for problem in self.problems]
        if self.train is None:
            return lines
        due, done = len(self.train.unfinished), len(self.runs) - len(self.train.unfinished)
        counts = [f"{due} to train" if due else "", f"{done} already trained" if done else ""]
        lines.append(
            f"controls {' and '.join(filter(None, counts))}, based on {' and '.join(self.bases)}, for "
            f"{format_count(self.count, 'run')}; kept in {controls_folder()}"
        )
        return [*lines, *(self.train.describe(time=True) if due else ())]


def plan_controls(runs: Sequence[str | os.PathLike[str]], device: str = "auto") -> ControlsPlan:
    """Plan the controls of finished runs: the three recipes for each distinct combination of conditions and base.

    A run that is itself a control gets no controls. Folders that cannot be read are left to the evaluation, which
    reports why. Controls that do not fit on the disk, or that have a damaged record, are among the plan's `problems`.
    """
    wanted: dict[str, Wanted] = {}
    count, notes, others, plans, problems = 0, [], [], [], []
    for folder in dict.fromkeys(disk_path(run) for run in runs):
        try:
            found = find_wanted(folder)
        except SaeError:
            continue
        if isinstance(found, str):
            notes.append(f"{folder.name} gets no controls: {found}")
        elif found:
            count += 1
            others += [found.variant] if found.variant != found.base else []
            wanted.setdefault(f"{found.base} {conditions_digest(found.conditions)}", found)
    if others:
        notes.append(
            f"controls are not based on {', '.join(dict.fromkeys(others))}: controls based on {BASES[0]} are used "
            "instead, so a difference between a run and its control can also come from their different recipes."
        )
    for one in wanted.values():
        try:
            plans.append(plan_training(control_config(one, device)))
        except SaeError as error:
            problems.append(error)
    if not plans:
        return ControlsPlan(count=count, notes=notes, problems=problems)
    train = TrainPlan(plans[0].config, [run for plan in plans for run in plan.runs])
    return ControlsPlan(train, count, list(dict.fromkeys(one.base for one in wanted.values())), notes, problems)


def find_wanted(folder: Path) -> Wanted | str | None:
    """The controls of a run, or the reason why it gets none, worded to complete a sentence.

    Returns None if the run is itself a control. Raises SaeError if the folder cannot be read.
    """
    if read_sae_record(folder).get("origin", {}).get("variant") in RECIPES:
        return None
    record, conditions = read_run_record(folder), conditions_of(folder)
    caches = None if conditions is None else training_caches(folder)
    if record is None or conditions is None or caches is None:
        return reason_without(folder, conditions)
    return Wanted(record["variant"], base_of(record), conditions, caches)


def control_config(wanted: Wanted, device: str) -> TrainConfig:
    """The training configuration of the controls."""
    conditions = wanted.conditions
    return TrainConfig(
        variants=RECIPES,
        layers=(conditions["layer"],),
        site=conditions["site"],
        caches=wanted.caches,
        steps=conditions["steps"],
        batch_size=conditions["batch_size"],
        width=str(conditions["d_sae"]),
        l0=(conditions["l0"],),
        options=() if wanted.base == BASES[0] else (f"base={wanted.base}",),
        shuffle_seed=conditions["order_seed"],
        out=controls_folder(),
        device=device,
        precision=conditions.get("precision", "float32"),
    )


def training_caches(folder: Path) -> list[str | Path] | None:
    """The paths or addresses of the caches that a run was trained on; None if one of these caches is missing.

    If the run was trained on only one cache, and it was moved, it is also found in activations/.
    """
    record, origin = read_run_record(folder), read_sae_record(folder).get("origin", {})
    assert record is not None  # a run that has conditions also has a record
    places: list[str | Path] = [place if is_url(place) else Path(place) for place in record["cache_folders"]]
    if len(places) > 1:
        is_there = (is_url(place) or (Path(place) / "zarr.json").exists() for place in places)
        return places if all(is_there) else None
    found = find_by_fingerprint(origin.get("fingerprint"), places[0])
    return None if found is None else [found.place]


def reason_without(folder: Path, conditions: Mapping[str, Any] | None) -> str:
    """The reason why a finished run gets no controls, worded to complete a sentence."""
    if conditions is not None:
        return "the cache that it was trained on was not found. Move it back, or to activations/."
    record = read_run_record(folder)
    if record is None or "imported_from" in record:
        return "it was imported, so the rows and steps of its training are not known."
    if "ring" in record:
        return "it was trained with --stream, which deleted its activations."
    return "its L0 is not known: run.json has no --l0, k or l0, and metrics.jsonl has no L0."


def train_controls(
    runs: Sequence[str | os.PathLike[str]], *, device: str = "auto", progress: TrainProgress | None = None
) -> list[Run]:
    """Train the controls of finished runs, or find existing ones, for `sae.evaluate_saes(controls=...)`.

    Examples:
        >>> runs = sae.train_saes("topk", cache="activations/...", l0=32)
        >>> rows = sae.evaluate_saes(runs, controls=sae.train_controls(runs))

    Args:
        runs: run folders, or runs of `train_saes`.
        device: "auto", "cpu", "cuda" or "cuda:N".
        progress: callbacks; None is silent.

    Returns:
        The controls: one `frozen-decoder`, one `soft-frozen-decoder` and one `frozen-encoder` for each distinct
        combination of conditions and base (topk or batchtopk).

    Raises:
        UsageError: none of the runs can have controls.
        SaeError: a control failed to train; raised after all other controls have finished.
        Interrupted: after Ctrl-C or SIGTERM, with checkpoints written.
    """
    plan = plan_controls(runs, device)
    if plan.problems:
        raise plan.problems[0]
    if plan.train is None:
        raise UsageError("\n".join(plan.notes) or "None of these is a finished run that can have controls.")
    run_training(plan.train, progress or TrainProgress())
    return plan.runs
