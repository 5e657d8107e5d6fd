"""The records in a run folder: run.json, which describes the run, and metrics.jsonl, with a line per logged step."""

import json
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..cache.ring import RingCache
from ..common.environment import environment_record
from ..common.errors import DamagedError, LeftOutWarning
from ..common.files import atomic_write, os_error, parse_json
from ..common.formatting import format_count
from .plan import FORMAT, Run
from .step_version import STEP_VERSION
from .variant import Variant

LAST_LINES = 1 << 14  # bytes to read from the end of metrics.jsonl; enough for its last line


def run_record(run: Run, variant: Variant, device: str) -> dict[str, Any]:
    """The content of run.json."""
    return {
        "format": FORMAT,
        **run.identity(),
        "resolved": resolved_options(variant),
        "paper": run.recipe.paper,
        "cache_folders": run.cache_folders,
        **({"ring": run.cache.capacity} if isinstance(run.cache, RingCache) else {}),
        "step_version": STEP_VERSION,
        "asked": dict(run.requested),
        "device": device,
        **({"kernels": True} if variant.uses_kernels else {}),
        "environment": environment_record(),
        "threads": torch.get_num_threads(),
    }


def resolved_options(variant: Variant) -> dict[str, Any]:
    """Every option of a variant, whether given or default."""
    return {**variant.options, **asdict(variant.optimization)}


def append_metrics(folder: Path, metrics: dict[str, float]) -> None:
    """Add a line to metrics.jsonl."""
    path = folder / "metrics.jsonl"
    try:
        with path.open("a") as file:
            file.write(json.dumps(metrics) + "\n")
    except OSError as error:
        raise os_error(error, path) from error


def last_metrics(folder: Path) -> dict[str, float] | None:
    """The last complete line of metrics.jsonl, or None. Another process may be writing the file."""
    path = folder / "metrics.jsonl"
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - LAST_LINES))
            lines = file.read().split(b"\n")
    except OSError:
        return None
    whole = (line for line in reversed(lines) if step_of_line(line, path) is not None)
    return next(map(json.loads, whole), None)


def truncate_metrics(folder: Path, step: int) -> None:
    """Drop the lines after `step`, because those steps will be repeated.

    An incomplete last line is dropped too. Earlier lines that cannot be parsed are dropped with a warning that gives
    their number.
    """
    path = folder / "metrics.jsonl"
    if not path.exists():
        return
    lines = path.read_bytes().split(b"\n")
    steps = [step_of_line(line, path) for line in lines]
    if damaged := steps[:-1].count(None):
        warnings.warn(f"Left out: {format_count(damaged, 'line')} of {path} that cannot be parsed.", LeftOutWarning, 2)
    kept = [line + b"\n" for line, at in zip(lines, steps, strict=True) if at is not None and at <= step]
    atomic_write(path, *kept)


def step_of_line(line: bytes, path: Path) -> float | None:
    """The step of a line of metrics.jsonl; None if the line has no step."""
    try:
        step = parse_json(line, path)["step"]
    except (DamagedError, LookupError, TypeError):
        return None
    return step if type(step) in (int, float) else None
