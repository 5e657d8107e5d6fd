"""Result files: runs/<name>/evaluations/<metric>.json, with SAEBench's field names."""

import contextlib
import copy
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..common.errors import DamagedError
from ..common.files import digest_of, make_folder, os_error, read_json, write_json
from .metrics.base import JsonPath, Metric, MetricResult


def result_file(folder: Path, metric: Metric) -> Path:
    return folder / "evaluations" / f"{metric.name}.json"


def write_result(
    folder: Path, metric: Metric, settings: Mapping[str, Any], result: MetricResult, run: Mapping[str, Any]
) -> None:
    """One file per run and metric, with SAEBench's envelope. As in its files, -1 stands for a number that does not exist;
    since a number can be -1 too, `absent` says where.
    """
    ours = {"metrics": result.metrics, "details": result.details}
    absent = list(find_leaves(None, ours))
    theirs = replace_leaves(ours, absent, ABSENT)
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
        "eval_result_unstructured": {name: getattr(result, name) for name in UNSTRUCTURED_KEYS} | {"absent": absent},
    }
    path = result_file(folder, metric)
    try:
        archive_other_settings(folder, metric, settings)
    except OSError as error:
        raise os_error(error, path) from error
    write_json(path, envelope)


ABSENT = -1.0


UNSTRUCTURED_KEYS = ("intervals", "n", "flags", "extra")


RESULT_KEYS = ("eval_config", "eval_result_metrics", "eval_result_details", "eval_result_unstructured")


def read_result(folder: Path, metric: Metric, settings: Mapping[str, Any]) -> MetricResult | None:
    """The result of an earlier evaluation with the same settings, if there is one; it is then the metric's file again,
    where that can be written.

    Raises DamagedError for a file that holds no result.
    """
    path, aside = result_file(folder, metric), archived_file(folder, metric, settings)
    if path.exists() and archived_file(folder, metric, read_json(path, *RESULT_KEYS)["eval_config"]) == aside:
        return read_result_file(path, metric)
    if not aside.exists():
        return None
    found = read_result_file(aside, metric)
    with contextlib.suppress(OSError):
        archive_other_settings(folder, metric, settings)
        aside.replace(path)
    return found


def read_result_file(path: Path, metric: Metric | type[Metric]) -> MetricResult:
    """What a result file holds. Raises DamagedError for one that holds none."""
    found = read_json(path, *RESULT_KEYS)
    try:
        more = {name: found["eval_result_unstructured"][name] for name in UNSTRUCTURED_KEYS}
        theirs = {"metrics": found["eval_result_metrics"], "details": found["eval_result_details"]}
        absent = found["eval_result_unstructured"].get("absent")
        ours = replace_leaves(theirs, list(find_leaves(ABSENT, theirs)) if absent is None else absent, None)
        metrics = {
            c: {n: v if v is None else float(v) for n, v in group.items()} for c, group in ours["metrics"].items()
        }
        details, more["n"] = [{**entry} for entry in ours["details"]], {**more["n"]}
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise DamagedError(f"{path} holds no result of {metric.name}. Remove it and evaluate again.") from error
    return MetricResult(metrics, details, **more)


def archived_file(folder: Path, metric: Metric, settings: Mapping[str, Any]) -> Path:
    """Where the result of these settings stands once one of other settings has taken its place."""
    return folder / "evaluations" / "earlier" / f"{metric.name}-{digest_of(settings)[:8]}.json"


def archive_other_settings(folder: Path, metric: Metric, settings: Mapping[str, Any]) -> None:
    """Make room for a result of these settings: one of others was perhaps hours of work, and is kept."""
    path = result_file(folder, metric)
    with contextlib.suppress(DamagedError):  # there is none, or nothing in it that could be kept
        aside = archived_file(folder, metric, read_json(path, *RESULT_KEYS)["eval_config"])
        if aside != archived_file(folder, metric, settings):
            make_folder(aside.parent)
            with contextlib.suppress(FileNotFoundError):  # another process has just done so
                path.replace(aside)


def find_leaves(leaf: float | None, tree: Any) -> Iterator[JsonPath]:
    """Where a leaf stands."""
    branches = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, branch in branches:
        if isinstance(branch, (dict, list)):
            yield from ([key, *rest] for rest in find_leaves(leaf, branch))
        elif branch is leaf if leaf is None else branch == leaf:
            yield [key]


def replace_leaves(tree: Any, places: Sequence[JsonPath], leaf: float | None) -> Any:
    """A copy of the tree with this leaf at some places."""
    tree = copy.deepcopy(tree)
    for *branches, last in places:
        at = tree
        for key in branches:
            at = at[key]
        at[last] = leaf
    return tree
