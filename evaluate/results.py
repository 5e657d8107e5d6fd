"""Result files: <run>/evaluations/<metric>.json, with SAEBench's field names."""

import contextlib
import copy
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..common.errors import DamagedError, UnavailableError
from ..common.evaluation_schemas import RESULT_RECORD, ResultFile
from ..common.files import atomic_write, digest_of, read_file
from ..common.locks import held_if_possible
from ..train.sae import require_result_of
from .metrics.base import MASKED, JsonPath, Metric, MetricResult, misnamed_numbers

ABSENT = -1.0  # SAEBench's value for a number that does not exist
UNSTRUCTURED_KEYS = ("intervals", "n", "flags", "extra")


def result_file(folder: Path, metric: Metric) -> Path:
    return folder / "evaluations" / f"{metric.name}.json"


def write_result(
    folder: Path, metric: Metric, settings: Mapping[str, Any], result: MetricResult, record: Mapping[str, Any]
) -> None:
    """Write a result in SAEBench's envelope; `record` is the contents of sae.json.

    A result with other settings is copied to `evaluations/earlier/` first. As in SAEBench's files, -1 is written for a
    number that does not exist. Because a number can also be -1, `absent` lists the paths of the numbers that do not
    exist.

    Numbers computed without outlier rows are in additional categories masked_<category>. The other parts of a result
    that is computed without outlier rows are under "masked" in eval_result_unstructured.
    """
    values = {"metrics": result.named_metrics, "details": result.details}
    absent = list(find_leaves(None, values))
    written = replace_leaves(values, absent, ABSENT)
    envelope = {
        "eval_type_id": metric.type_id,
        "eval_config": dict(settings),
        "eval_id": str(uuid.uuid4()),
        "datetime_epoch_millis": int(time.time() * 1000),
        "eval_result_metrics": written["metrics"],
        "eval_result_details": written["details"],
        "sae_bench_commit_hash": f"sae-pipeline {version('sae-pipeline')}",
        "sae_lens_id": "custom_sae",
        "sae_lens_release_id": folder.name,
        "sae_lens_version": "none",
        "sae_cfg_dict": dict(record),
        "eval_result_unstructured": unstructured_part(result, metric.caveat) | {"absent": absent},
    }
    with replacing_results(folder):
        archive_other_settings(folder, metric, settings)
        RESULT_RECORD.write(result_file(folder, metric), envelope)


def unstructured_part(result: MetricResult, caveat: str = "") -> dict[str, Any]:
    """The parts of a result for which SAEBench has no fields."""
    part = {name: getattr(result, name) for name in UNSTRUCTURED_KEYS}
    if notes := [*misnamed_numbers(result.metrics), *filter(None, [caveat])]:
        part["notes"] = notes
    if result.masked:
        part["masked"] = unstructured_part(result.masked) | {"details": result.masked.details}
    return part


def read_result(
    folder: Path, metric: Metric, settings: Mapping[str, Any], sae: Mapping[str, Any] | None = None
) -> MetricResult | None:
    """The result of an earlier evaluation with the same settings, or None.

    If the result was archived, it is copied back to the metric's file, provided that the folder is writable. If `sae`
    is given, it is the content of sae.json, and the result must have been measured on that SAE.

    Raises DamagedError for a file that is not a result, was damaged, or belongs to another SAE.
    """
    path, archived = result_file(folder, metric), archived_file(folder, metric, settings)
    if path.exists():
        record = read_result_record(path, metric)
        if archived_file(folder, metric, record["eval_config"]) == archived:
            require_result_of(sae or {}, record, path)
            return result_of(record, path)
    if not archived.exists():
        return None
    record = read_result_record(archived, metric)
    require_result_of(sae or {}, record, archived)
    if archived_file(folder, metric, record["eval_config"]) != archived:
        raise DamagedError(
            f"The settings in {archived} do not match the digest in its name. The file was damaged or renamed. "
            f"{RESULT_RECORD.remedy}"
        )
    result = result_of(record, archived)
    with contextlib.suppress(UnavailableError), replacing_results(folder):
        archive_other_settings(folder, metric, settings)
        atomic_write(path, read_file(archived))
    return result


def read_result_record(path: Path, metric: Metric | type[Metric]) -> ResultFile:
    """The content of a result file. Raises DamagedError if it was damaged or is a result of another metric."""
    record = RESULT_RECORD.read(path)
    if record["eval_type_id"] != metric.type_id:
        raise DamagedError(
            f"{path} is a result of {record['eval_type_id']}, not of {metric.name}. The file was renamed. "
            f"{RESULT_RECORD.remedy}"
        )
    return record


def result_of(record: ResultFile, path: Path) -> MetricResult:
    """The result in a result file. Raises DamagedError if its parts contradict each other."""
    unstructured: Any = record["eval_result_unstructured"]
    written = {"metrics": record["eval_result_metrics"], "details": record["eval_result_details"]}
    absent = unstructured.get("absent")
    try:
        values = replace_leaves(written, list(find_leaves(ABSENT, written)) if absent is None else absent, None)
        metrics = {
            category: {name: value if value is None else float(value) for name, value in group.items()}
            for category, group in values["metrics"].items()
        }
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise DamagedError(
            f"{path}: `absent` in eval_result_unstructured does not match the numbers. {RESULT_RECORD.remedy}"
        ) from error
    if (rest := unstructured.get("masked")) is None:
        return make_result(metrics, values["details"], unstructured)
    names = {category for category in metrics if category.startswith(MASKED)}
    masked = make_result({name.removeprefix(MASKED): metrics.pop(name) for name in names}, rest["details"], rest)
    return replace(make_result(metrics, values["details"], unstructured), masked=masked)


def make_result(metrics: dict[str, Any], details: list[Any], unstructured: Mapping[str, Any]) -> MetricResult:
    rest = {name: unstructured[name] for name in UNSTRUCTURED_KEYS}
    return MetricResult(metrics, [{**entry} for entry in details], **rest | {"n": {**rest["n"]}})


def archived_file(folder: Path, metric: Metric, settings: Mapping[str, Any]) -> Path:
    """The file in which the result with these settings is archived when a result with other settings replaces it."""
    return folder / "evaluations" / "earlier" / f"{metric.name}-{digest_of(settings)[:8]}.json"


def archive_other_settings(folder: Path, metric: Metric, settings: Mapping[str, Any]) -> None:
    """If the folder has a result that was measured with other settings, copy it to the archive before it is replaced,
    because it may have taken hours to measure.

    The result is copied rather than moved, and the copy stays in the archive after it has been copied back. Several
    processes can therefore archive and restore results at the same time without losing any. Raises UnavailableError if
    the copy cannot be written.
    """
    path = result_file(folder, metric)
    with contextlib.suppress(DamagedError):  # there is no result, or the file is not a result and can be overwritten
        data = read_file(path)
        archived = archived_file(folder, metric, RESULT_RECORD.parse(data, path)["eval_config"])
        if archived != archived_file(folder, metric, settings):
            atomic_write(archived, data)


def replacing_results(folder: Path) -> AbstractContextManager[None]:
    """Hold the lock for replacing the results of a run, so that no result is replaced before it is archived."""
    return held_if_possible(folder / "evaluations" / ".lock")


def find_leaves(leaf: float | None, tree: Any) -> Iterator[JsonPath]:
    """The paths of all leaves with this value in a tree of dictionaries and lists."""
    branches = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, branch in branches:
        if isinstance(branch, (dict, list)):
            yield from ([key, *rest] for rest in find_leaves(leaf, branch))
        elif branch is leaf if leaf is None else branch == leaf:
            yield [key]


def replace_leaves(tree: Any, paths: Sequence[JsonPath], leaf: float | None) -> Any:
    """A copy of the tree with `leaf` at these paths."""
    tree = copy.deepcopy(tree)
    for *branches, last in paths:
        node = tree
        for key in branches:
            node = node[key]
        node[last] = leaf
    return tree
