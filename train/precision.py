"""The precision of a run's products: its line in the plan, and the runs that exist already."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..common.errors import UnavailableError
from ..common.precision import reason_against, recorded_precision
from .sae import read_run_record


def describe_precision(precision: str | None) -> str | None:
    """The line of a plan about products that are not in float32."""
    if precision in (None, "float32"):
        return None
    return f"products in {precision}; weights, moments and sums are in float32"


def require_precision(folder: Path, precision: str, device: str) -> None:
    """Raise UnavailableError if a device lacks the precision that a run was started with."""
    if reason := reason_against(precision, device):
        raise UnavailableError(
            f"{folder} was started with products in {precision} and can only continue with them, but {reason}. Resume "
            "it on a device that has them, or start a new run."
        )


def find_folder(out: Path, name: str, unnamed: str, precision: str) -> Path:
    """The folder of a new run in `out`: `name`.

    Runs of earlier versions keep their folder, whose name does not contain the precision (`unnamed`).
    """
    earlier = read_run_record(out / unnamed)
    return out / (unnamed if earlier is not None and recorded_precision(earlier) == precision else name)


def explain_other_precision(folder: Path, record: Mapping[str, Any], precision: str | None) -> str:
    """Why the run of an earlier version in a folder is not the new run; "" if it has the same precision."""
    recorded = recorded_precision(record)
    if precision in (recorded, None):
        return ""
    return (
        f"{folder} was started by an earlier version, which computed products on a GPU in {recorded}, not {precision}. "
        f"To continue it, give --precision {recorded} on a device that has it. For a new run, give another --out."
    )
