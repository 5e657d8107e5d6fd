"""Records of run folders that tests write, complete but for what a test is about, and changes to written ones."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sae.common.evaluation_schemas import RESULT_RECORD
from sae.common.records import RecordKind
from sae.common.schemas import RUN_RECORD, SAE_RECORD
from sae.evaluate.metrics.registry import METRICS

RUN = {
    "format": 1, "variant": "topk", "options": {}, "layer": 12, "site": "resid_post", "seed": 0, "order_seed": 0,
    "d_in": 6, "d_sae": 512, "steps": 10, "batch_size": 100, "cache": "0" * 64, "cache_folders": ["nowhere"],
    "resolved": {},
}  # fmt: skip
SAE = {
    "format": 1, "d_in": 6, "d_sae": 512, "pre_bias": True, "activation": [{"name": "relu"}], "sha256": "0" * 64,
    "origin": {},
}  # fmt: skip
RESULT = {
    "eval_id": "0", "datetime_epoch_millis": 0, "eval_config": {}, "eval_result_metrics": {}, "eval_result_details": [],
    "sae_bench_commit_hash": "", "sae_lens_id": "", "sae_lens_release_id": "", "sae_lens_version": "",
    "sae_cfg_dict": {}, "eval_result_unstructured": {"intervals": {}, "n": {}, "flags": [], "extra": None},
}  # fmt: skip


def write_run_record(folder: Path, **changes: Any) -> None:
    """Write run.json; None leaves a field out."""
    content = {name: value for name, value in {**RUN, **changes}.items() if value is not None}
    RUN_RECORD.write(folder / "run.json", content)


def write_sae_record(folder: Path, **changes: Any) -> None:
    SAE_RECORD.write(folder / "sae.json", {**SAE, **changes})


def write_result_record(folder: Path, metric: str, **changes: Any) -> None:
    record = {"eval_type_id": METRICS[metric].type_id, **RESULT, **changes}
    RESULT_RECORD.write(folder / "evaluations" / f"{metric}.json", record)


def change_record(kind: RecordKind, path: Path, change: Callable[[Any], Any] | Mapping[str, Any]) -> Any:
    """Change a record by a function or some new values, and write it with the digest of the new content."""
    content = kind.read(path)
    if isinstance(change, Mapping):
        content |= change
    else:
        change(content)
    kind.write(path, content)
    return content
