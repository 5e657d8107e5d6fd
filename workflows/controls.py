"""Train the controls of runs, for `sae evaluate --controls` (train/variants/controls.py; arXiv 2602.14111).

A control is trained once for the rows, width, L0, steps, batch size and order of batches of the runs that it controls
for, with seed 0, as an ordinary run in `activations/evaluation/controls/`: a second command finds it there, and resumes
one that was interrupted.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..cache.catalog import find_by_fingerprint
from ..common.errors import SaeError, UsageError
from ..common.formatting import format_count
from ..evaluate.controls import RECIPES, conditions_digest, conditions_of, controls_folder
from ..train.plan import Run, TrainConfig, TrainPlan, plan_training
from ..train.run import TrainProgress, run_training
from ..train.sae import read_run_record, read_sae_record


@dataclass(frozen=True)
class ControlsPlan:
    """The controls of some runs. Nothing has been trained yet.

    Attributes:
        train: the controls, finished or not; None if no run can have any.
        count: how many runs they control for.
        notes: sentences about runs without controls.
    """

    train: TrainPlan | None = None
    count: int = 0
    notes: Sequence[str] = field(default_factory=tuple)

    @property
    def runs(self) -> list[Run]:
        return self.train.runs if self.train else []

    @property
    def folders(self) -> tuple[Path, ...]:
        return tuple(run.folder for run in self.runs)

    def describe(self) -> list[str]:
        """The lines of a plan: what is trained, for how many runs, at what cost, and where it is kept."""
        lines = [f"note     {note}" for note in self.notes]
        if self.train is None:
            return lines
        due, done = len(self.train.unfinished), len(self.runs) - len(self.train.unfinished)
        counts = [f"{due} to train" if due else "", f"{done} already trained" if done else ""]
        lines.append(
            f"controls {' and '.join(filter(None, counts))}, for {format_count(self.count, 'run')}; "
            f"kept in {controls_folder()}"
        )
        return [*lines, *(self.train.describe(time=True) if due else ())]


def plan_controls(runs: Sequence[str | os.PathLike[str]], device: str = "auto") -> ControlsPlan:
    """Plan the controls of finished runs: the three recipes for each distinct set of conditions.

    A run that is a control itself has none. Folders that cannot be read are left to the evaluation, which says why.

    Raises:
        UnavailableError: the controls do not fit on the disk, or the device does not exist.
        DamagedError: a record of a control was damaged.
    """
    wanted: dict[str, tuple[dict[str, Any], list[Path]]] = {}
    notes, count = [], 0
    for folder in dict.fromkeys(Path(run) for run in runs):
        try:
            if read_sae_record(folder).get("origin", {}).get("variant") in RECIPES:
                continue
            conditions = conditions_of(folder)
            caches = None if conditions is None else training_caches(folder)
        except SaeError:
            continue
        if conditions is None or caches is None:
            notes.append(f"{folder.name} gets no controls: {reason_without(folder, conditions)}")
            continue
        count += 1
        wanted.setdefault(conditions_digest(conditions), (conditions, caches))
    plans = [plan_training(control_config(one, caches, device)) for one, caches in wanted.values()]
    if not plans:
        return ControlsPlan(notes=notes)
    return ControlsPlan(TrainPlan(plans[0].config, [run for plan in plans for run in plan.runs]), count, notes)


def control_config(conditions: Mapping[str, Any], caches: Sequence[Path], device: str) -> TrainConfig:
    """What to train for runs with these conditions."""
    return TrainConfig(
        variants=RECIPES,
        layers=(conditions["layer"],),
        site=conditions["site"],
        caches=caches,
        steps=conditions["steps"],
        batch_size=conditions["batch_size"],
        width=str(conditions["d_sae"]),
        l0=(conditions["l0"],),
        shuffle_seed=conditions["order_seed"],
        out=controls_folder(),
        device=device,
    )


def training_caches(folder: Path) -> list[Path] | None:
    """The folders of the caches that a run was trained on, also of one that has moved to activations/; None if gone."""
    record, origin = read_run_record(folder), read_sae_record(folder).get("origin", {})
    assert record is not None  # it has conditions
    folders = [Path(cache) for cache in record["cache_folders"]]
    if len(folders) > 1:
        return folders if all((cache / "zarr.json").exists() for cache in folders) else None
    found = find_by_fingerprint(origin.get("fingerprint"), folders[0])
    return None if found is None else [found.folder]


def reason_without(folder: Path, conditions: Mapping[str, Any] | None) -> str:
    """Why a finished run gets no controls, as the end of a sentence."""
    if conditions is not None:
        return "the cache that it was trained on was not found. Move it back, or to activations/."
    record = read_run_record(folder)
    if record is None or "imported_from" in record:
        return "it was imported, so the rows and steps of its training are not known."
    if "ring" in record:
        return "it was trained with --stream, whose activations are gone."
    return "its L0 is not known: run.json has no --l0, k or l0, and metrics.jsonl no L0."


def train_controls(
    runs: Sequence[str | os.PathLike[str]], *, device: str = "auto", progress: TrainProgress | None = None
) -> list[Run]:
    """Train the controls of finished runs, or find those that are trained, for `sae.evaluate_saes(controls=...)`.

    Example:
        >>> runs = sae.train_saes("topk", cache="activations/...", l0=32)
        >>> rows = sae.evaluate_saes(runs, controls=sae.train_controls(runs))

    Args:
        runs: run folders, or runs of `train_saes`.
        device: "auto", "cpu", "cuda" or "cuda:N".
        progress: callbacks; None is silent.

    Returns:
        The controls: `frozen-decoder`, `soft-frozen-decoder` and `frozen-encoder` for each distinct set of conditions.

    Raises:
        UsageError: none of the runs can have controls.
        Interrupted: after Ctrl-C or SIGTERM, with checkpoints written.
    """
    plan = plan_controls(runs, device)
    if plan.train is None:
        raise UsageError("\n".join(plan.notes) or "None of these is a finished run that can have controls.")
    run_training(plan.train, progress or TrainProgress())
    return plan.runs
