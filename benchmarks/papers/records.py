"""The records of finished jobs: one small JSON file each, in records/<id of the job>.json.

A record is valid as long as its digest equals the digest of its job. Jobs are looked up in the order of the design,
since the digests of later jobs contain rates and L0 that follow from earlier records. Records that are no longer valid
stay in the folder, are listed as outdated, and are replaced when their job is run again.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jobs import HERE, Job, resolve

from sae.common.files import atomic_write, digest_of
from sae.evaluate.metrics.registry import METRICS
from sae.train.recipe import RECIPES
from sae.train.step_version import STEP_VERSION

RECORDS = HERE / "records"
METRICS_USED = ("core", "absorption", "sae_probes", "stability")
SETTINGS = ("tokens", "test_documents", "tuning_documents")  # the entries of [fixed] that every job depends on

State = Literal["done", "failed", "outdated", "open", "waiting", "not needed"]


def settings_of(job: Job) -> tuple[str, ...]:
    """The entries of [fixed] that the evaluation of a job depends on."""
    if job.part == "stability":
        return SETTINGS
    if job.part == "tune":
        return (*SETTINGS, "tuning_tokens")
    return (*SETTINGS, "test_tokens", "absorption_words", *(("probe_texts", "datasets") if job.probes else ()))


def job_digest(design: Mapping[str, Any], job: Job, valid: Mapping[str, Mapping[str, Any]]) -> str:
    """A digest of everything that determines the result of a resolved job: the design and the versions of the code. The
    digest of a stability job also covers the digests of the runs that it compares, whose records are in `valid`.
    """
    recipe = RECIPES.get(job.recipe)
    return digest_of({
        "revision": design["revision"],
        "job": {name: list(value) if isinstance(value, tuple) else value for name, value in job.identity().items()},
        "settings": {name: design["fixed"][name] for name in settings_of(job)},
        "step_version": STEP_VERSION,
        "definitions": {name: METRICS[name].definition for name in METRICS_USED},
        "defaults": {} if recipe is None else {name: repr(value) for name, value in recipe.options.items()},
        "runs": [valid[one]["digest"] for one in job.runs],
    })[:16]  # fmt: skip


@dataclass(frozen=True)
class Known:
    """A job of the design and the state of its record.

    Attributes:
        job: with rate and L0 where they are known.
        why: why the job is waiting or not needed.
    """

    job: Job
    state: State
    digest: str = ""
    why: str = ""


def record_path(folder: Path, job: Job) -> Path:
    return folder / f"{job.id}.json"


def read_record(path: Path) -> dict[str, Any] | None:
    """The content of a record; None if the file is missing or is not a record, for example because it was truncated."""
    try:
        record = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return record if isinstance(record, dict) and "digest" in record else None


def write_record(folder: Path, job: Job, content: Mapping[str, Any]) -> Path:
    path = record_path(folder, job)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, (json.dumps(content, indent=None, separators=(",", ":")) + "\n").encode())
    return path


def survey(
    design: Mapping[str, Any], jobs: Sequence[Job], folder: Path
) -> tuple[list[Known], dict[str, dict[str, Any]]]:
    """The state of every job, and the valid records by the id of their job."""
    known: dict[str, Known] = {}
    valid: dict[str, dict[str, Any]] = {}
    found = {job.id: record for job in jobs if (record := read_record(record_path(folder, job)))}
    left = list(jobs)
    while left:  # jobs that waited for a record of a later job are resolved again
        waiting = []
        for job in left:
            resolved = resolve(design, job, valid)
            if isinstance(resolved, str):
                known[job.id] = Known(job, "not needed" if resolved.startswith("same") else "waiting", why=resolved)
                if known[job.id].state == "waiting":
                    waiting.append(job)
                continue
            digest, record = job_digest(design, resolved, valid), found.get(job.id)
            state: State = "open" if record is None else "outdated"
            if record is not None and record["digest"] == digest:
                valid[job.id], state = record, "failed" if "failed" in record else "done"
            known[job.id] = Known(resolved, state, digest)
        if len(waiting) == len(left):
            break
        left = waiting
    return [known[job.id] for job in jobs], valid


def texts_of(valid: Mapping[str, Mapping[str, Any]]) -> dict[str, set[str]]:
    """For each model, the digests of the training texts in its records. If there are several, the runs must not be
    compared."""
    found: dict[str, set[str]] = {}
    for job, record in valid.items():
        if "caches" in record:
            found.setdefault(job.split("/")[0], set()).add(record["caches"]["train"])
    return found
