"""The precision of a run's products: its line in the plan, and the runs that exist already."""

from pathlib import Path

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
    earlier = read_run_record(out / unnamed) if name != unnamed and (out / unnamed / "run.json").exists() else None
    same = earlier is not None and "precision" not in earlier and recorded_precision(earlier) == precision
    return out / (unnamed if same else name)
