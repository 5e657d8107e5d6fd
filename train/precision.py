"""The precision of matrix products: the plan's line about it, and the search for existing runs that have it."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..common.errors import UnavailableError
from ..common.precision import default_precision, reason_against, recorded_precision
from .activation_functions import KeepTopK
from .memory import BuildableRun, untrained_variant
from .sae import read_run_record
from .sparse_ops import SPARSE_FROM, sparse_is_faster


def describe_precision(precision: str | None) -> str | None:
    """The plan's line about the precision of matrix products; None if it is float32 or not set."""
    if precision in (None, "float32"):
        return None
    return f"products in {precision}; weights, moments and sums are in float32"


def describe_products(runs: Iterable[BuildableRun], device: str) -> list[str]:
    """For a GPU, the plan's lines that say which runs use sparse products, and why (`sparse_is_faster`)."""
    lines = []
    for run in runs:
        sae, precision = untrained_variant(run, "meta").sae, run.config.precision or default_precision(device)
        match list(sae.activation):
            case [KeepTopK() as kept] if run.config.accumulate == 1 or not kept.over_batch:
                kind = torch.device(device).type
                way = "sparse" if sparse_is_faster(sae.d_sae, kept.k, kind, precision) else "dense"
                border = SPARSE_FROM[kind][precision]
                lines.append(
                    f"products of {run.recipe.name} are {way}: width / k is {sae.d_sae / kept.k:,.0f}, and in "
                    f"{precision} sparse products are estimated to be faster from a ratio of {border:,.0f}"
                )
    return list(dict.fromkeys(lines))


def require_precision(folder: Path, precision: str, device: str) -> None:
    """Raise UnavailableError if a device lacks the precision that a run was started with."""
    if reason := reason_against(precision, device):
        raise UnavailableError(
            f"{folder} was started with products in {precision} and can only continue with them, but {reason}. Resume "
            "the run on a device that supports this precision, or start a new run."
        )


def find_folder(out: Path, name: str, unnamed: str, precision: str) -> Path:
    """The folder of a run: `name` inside `out`, or `unnamed` if an earlier version began the run there.

    Earlier versions chose names that do not contain the precision. Such runs keep their folders.
    """
    earlier = read_run_record(out / unnamed)
    return out / (unnamed if earlier is not None and recorded_precision(earlier) == precision else name)


def explain_other_precision(folder: Path, record: Mapping[str, Any], precision: str | None) -> str:
    """An error message if the run in `folder`, begun by an earlier version, has another precision; otherwise ""."""
    recorded = recorded_precision(record)
    if precision in (recorded, None):
        return ""
    return (
        f"{folder} was started by an earlier version, which computed products on a GPU in {recorded}, not {precision}. "
        f"To continue it, give --precision {recorded} on a device that has it. For a new run, give another --out."
    )
