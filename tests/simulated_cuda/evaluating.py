"""An evaluation on the simulated GPU, to compare with the same evaluation on the CPU."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sae.evaluate.plan import EvaluateConfig
from sae.evaluate.run import evaluate

from .functions import simulated_gpu
from .ledger import watch
from .training import differences


def measure(folder: Path, runs: Sequence[Path], **config: Any) -> dict[str, Any]:
    """Measure the metrics of copies of the same runs on both devices.

    Returns the numbers that differ (`apart`), the count of all numbers, the errors, and how often the host waited at
    each line.
    """
    found = {}
    for device in ("cpu", "cuda"):
        os.environ["SAE_HOME"] = str(folder / device)
        copies = [Path(shutil.copytree(run, folder / device / "runs" / run.name)) for run in runs]
        asked = EvaluateConfig(runs=copies, device=device, references=False, **{"dtype": "float32", **config})
        if device == "cpu":
            found[device] = numbers(evaluate(asked))
        else:
            with simulated_gpu(), watch() as seen:
                found[device] = numbers(evaluate(asked))
    waits: dict[str, int] = {}
    for entry in seen.entries:
        waits[str(entry)] = waits.get(str(entry), 0) + 1
    (expected, errors), (measured, others) = found["cpu"], found["cuda"]
    return {
        "apart": differences(expected, measured), "numbers": len(flat(expected)), "errors": errors | others,
        "waits": waits, "queued": seen.queued, "metrics": sorted({name.split("/")[1] for name in flat(expected)}),
    }  # fmt: skip


def numbers(rows: Sequence[Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return run -> metric -> category -> name -> number, and the errors."""
    values = {
        row.name: {
            metric: {
                category: {name: value for name, value in part.items() if isinstance(value, int | float)}
                for category, part in result.metrics.items()
            }
            for metric, result in row.results.items()
        }
        for row in rows
    }
    errors = {f"{row.name} {metric}": str(error) for row in rows for metric, error in row.errors.items()}
    return values, errors


def flat(tree: dict[str, Any], prefix: str = "") -> list[str]:
    return [
        name
        for key, value in tree.items()
        for name in (flat(value, f"{prefix}{key}/") if isinstance(value, dict) else [f"{prefix}{key}"])
    ]
