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
    """Raise UnavailableError if a run cannot be resumed on a device, which does not compute as the run was started."""
    if reason := reason_against(precision, device):
        raise UnavailableError(
            f"{folder} was started with products in {precision} and goes on with these alone, but {reason}. Resume it "
            "on a device that has them, or start a new run."
        )


def find_folder(out: Path, name: str, unnamed: str, precision: str) -> Path:
    """The folder of a new run in `out`: `name`.

    Runs of earlier versions keep theirs, which is called as if the precision decided nothing (`unnamed`).
    """
    earlier = read_run_record(out / unnamed)
    return out / (unnamed if earlier is not None and recorded_precision(earlier) == precision else name)


def explain_other_precision(folder: Path, record: Mapping[str, Any], precision: str | None) -> str:
    """Why the run that an earlier version left in the folder of a new one is another; "" if it has the precision."""
    recorded = recorded_precision(record)
    if precision in (recorded, None):
        return ""
    return (
        f"{folder} is of an earlier version, whose runs on a GPU have products in {recorded}, and not in {precision}. "
        f"To go on with it, give --precision {recorded} on a device that has it. For a new run, give another --out."
    )
