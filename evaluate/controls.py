"""Controls (arXiv 2602.14111): SAEs that are trained like the runs they control for, except that one part keeps its
random initial weights.

The recipes of controls are in train/variants/controls.py, and workflows/controls.py trains controls. This module
decides which control belongs to which run, and turns the controls trained by `sae evaluate --controls` into reference
rows.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..common.errors import UsageError
from ..common.files import digest_of, sae_home
from ..common.precision import recorded_precision
from ..common.schemas import RunRecord
from ..train.sae import load_sae, outline_sae, read_run_record, read_sae_record
from .metrics.base import EvalTarget, RowSet
from .rows import EvalGroup, EvalRow, hook_suffix

RECIPES = ("frozen-decoder", "soft-frozen-decoder", "frozen-encoder")
BASES = ("batchtopk", "topk")  # recipes that a control can be built from (its option `base`); the first is the default
SHARED = ("layer", "site", "d_sae", "steps", "batch_size", "order_seed", "cache")  # equal in a run and its control


def controls_folder() -> Path:
    """The folder in which `sae evaluate --controls` stores the controls that it trains, as ordinary run folders."""
    return sae_home() / "activations" / "evaluation" / "controls"


def conditions_of(folder: Path) -> dict[str, Any] | None:
    """The conditions shared by a run and its controls: rows and their order, width, L0, steps, batch size, precision.

    None for a run that cannot have controls here: an imported run, a run trained with --stream (its rows are gone), or
    a run whose L0 is unknown.

    Raises DamagedError if run.json was damaged.
    """
    record = read_run_record(folder)
    if record is None or "ring" in record or any(name not in record for name in SHARED):
        return None
    l0, precision = trained_l0(folder, record), recorded_precision(record)
    if l0 is None:
        return None
    shared = {name: record[name] for name in SHARED}  # type: ignore[literal-required]
    return {**shared, "l0": l0, **({} if precision == "float32" else {"precision": precision})}


def base_of(record: RunRecord | None) -> str:
    """The recipe that a control is built from. For any other run, the recipe that its controls are built from: the
    run's own recipe if possible, else batchtopk."""
    if record is None:
        return BASES[0]
    if record["variant"] in RECIPES:
        return record.get("options", {}).get("base", BASES[0])
    return record["variant"] if record["variant"] in BASES else BASES[0]


def trained_l0(folder: Path, record: RunRecord) -> float | None:
    """The L0 of a run: its --l0, k or l0 if set, else the last L0 in its log, rounded to an integer."""
    options = record.get("resolved", {})
    for asked in (record.get("l0"), options.get("k"), options.get("l0")):
        if asked is not None:
            return float(asked)
    try:
        lines = (folder / "metrics.jsonl").read_bytes().splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        try:
            return float(min(max(round(json.loads(line)["l0"]), 1), record["d_sae"]))
        except (ValueError, LookupError, TypeError):  # the line was cut off when the process was killed
            continue
    return None


def conditions_digest(conditions: Mapping[str, Any] | None) -> str:
    """A digest that is equal for a run and its controls; "" if the conditions are unknown."""
    return digest_of(dict(conditions)) if conditions else ""


def control_rows(group: EvalGroup, folders: Sequence[Path], outlines: bool = False) -> list[EvalRow]:
    """Reference rows for those trained controls in `folders` that belong to runs of the group.

    The results of controls are stored with the results of the other references. If `outlines` is true, the weights of
    the controls are not read.

    Raises UsageError for a folder that does not contain a trained control, and DamagedError for a damaged control.
    """
    row_sets = group.row_sets
    rows = [
        control_row(group, folder, one, row_set, outlines) for folder, one, row_set in matching_controls(group, folders)
    ]
    names = distinct_names([row.name for row in rows], [row.record["conditions"] for row in rows])
    for row, name in zip(rows, names, strict=True):
        hook = row.target.hook
        row.name = name if len(row_sets) == 1 else f"{name}-L{hook.layer:02d}{hook_suffix(hook)}"
    return rows


def matching_controls(group: EvalGroup, folders: Sequence[Path]) -> list[tuple[Path, dict[str, Any], RowSet]]:
    """The trained controls in `folders` that belong to any run of the group, as (folder, conditions, row set).

    Raises the same errors as `control_rows`.
    """
    conditions = {folder: control_conditions(folder) for folder in folders}
    return [
        (folder, one, row_set)
        for row_set in group.row_sets
        for folder, one in conditions.items()
        if any(row.target.row_set == row_set and row.conditions == conditions_digest(one) for row in group.rows)
    ]


def control_conditions(folder: Path) -> dict[str, Any]:
    """The conditions of a trained control. Raises UsageError if the folder is not a trained control."""
    conditions = conditions_of(folder)
    if conditions is None or read_sae_record(folder).get("origin", {}).get("variant") not in RECIPES:
        raise UsageError(
            f"{folder} is not a control. Give folders of runs of {', '.join(RECIPES)}, as returned by "
            "`sae.train_controls`."
        )
    return conditions


def control_row(
    group: EvalGroup, folder: Path, conditions: Mapping[str, Any], row_set: RowSet, outline: bool
) -> EvalRow:
    """The reference row for one trained control at one hook."""
    (hook, norm_limit), sae = row_set, outline_sae(folder) if outline else load_sae(folder, group.ctx.device)
    saved, base = read_sae_record(folder), base_of(read_run_record(folder))
    of_base = {} if base == BASES[0] else {"base": base}
    name = "-".join([saved["origin"]["variant"], *of_base.values(), f"{conditions['l0']:g}"])
    record = {
        "reference": name, **hook.record, "d_sae": saved["d_sae"], "text": group.cache.fingerprint,
        **group.ctx.model_identity, **group.ctx.change.identity, "sha256": saved["sha256"], "conditions": conditions,
        **of_base, **({} if norm_limit is None else {"norm_limit": norm_limit}),
    }  # fmt: skip
    digest = digest_of(record)
    target = EvalTarget(sae, hook, reference=True, norm_limit=norm_limit)
    results = group.ctx.artifacts.folder / "references" / f"{name}-L{hook.layer}{hook_suffix(hook)}-{digest[:8]}"
    return EvalRow(
        name, target, results, record, digest, conditions=conditions_digest(conditions), is_control=True, base=base,
        sae_folder=folder,
    )  # fmt: skip


def distinct_names(names: Sequence[str], conditions: Sequence[Mapping[str, Any]]) -> list[str]:
    """Distinct names of controls. If several controls have the same recipe and L0, their names also contain the width
    or, if this is not enough, a digest."""
    by_width = [f"{name}-n{one['d_sae']}" for name, one in zip(names, conditions, strict=True)]
    by_digest = [f"{name}-{conditions_digest(one)[:6]}" for name, one in zip(by_width, conditions, strict=True)]
    name_counts, width_counts = Counter(names), Counter(by_width)
    return [
        name if name_counts[name] == 1 else wider if width_counts[wider] == 1 else longest
        for name, wider, longest in zip(names, by_width, by_digest, strict=True)
    ]
