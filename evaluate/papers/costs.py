"""The time of a recipe's training step, measured by benchmarks/bench_train.py, and the verdict on a claim about it.

step_times.json has a table of medians and quartiles in milliseconds for each measured width. Times depend on the
machine and on our implementation, which differs from the paper's, so no claim counts as reproduced or contradicted
because of the size of a ratio.
"""

import json
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from .claims import Claim, Paper, PaperSystem
from .verdict import Judgement, judge_direction, judge_equality

STEP_TIMES = Path(__file__).parent / "step_times.json"


class StepTime(NamedTuple):
    """The time of a step in milliseconds: the median over rounds (`middle`), with the quartiles (`low`, `high`). It
    includes the work that mechanisms do only at some steps."""

    low: float
    middle: float
    high: float


class Cost(NamedTuple):
    """The ratio of two step times, its range from the quartiles of both, and where it was measured."""

    ratio: float
    low: float
    high: float
    source: str


@cache
def step_time_tables() -> list[dict[str, Any]]:
    return json.loads(STEP_TIMES.read_text(encoding="utf-8"))["tables"]


def nearest_table(paper: Paper, tables: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of the tables of step times, the one whose ratio d_sae / d_in is nearest to the paper's. If several are equally
    near, the one with the largest d_in is used."""
    width = paper.setup.d_sae / paper.setup.d_in

    def distance(table: dict[str, Any]) -> tuple[float, int]:
        return abs(math.log(table["d_sae"] / table["d_in"] / width)), -table["d_in"]

    return min(tables, key=distance)


def step_time(system: PaperSystem, table: dict[str, Any]) -> StepTime | None:
    """The step time of a system's slowest recipe; None if one of its recipes was not measured."""
    times = [table["ms"].get(recipe) for recipe in system.recipes]
    if not times or None in times:
        return None
    low, middle, high, periodic = max(times, key=lambda time: time[1] + time[3])
    return StepTime(low + periodic, middle + periodic, high + periodic)


def measured_cost(claim: Claim, paper: Paper, tables: Sequence[dict[str, Any]] | None = None) -> Cost | None:
    """The step time of the claim's system as a multiple of the other system's; None if either was not measured."""
    if not claim.against:
        return None
    table = nearest_table(paper, step_time_tables() if tables is None else tables)
    own, other = (step_time(paper.systems[name], table) for name in (claim.system, claim.against))
    if own is None or other is None:
        return None
    source = (
        f"{own.middle:.1f} ms against {other.middle:.1f} ms a step on {table['machine']}, {table['date']}, "
        f"d_in {table['d_in']:,}, {table['d_sae']:,} latents, {table['batch_size']:,} tokens, default options"
    )
    return Cost(own.middle / other.middle, own.low / other.high, own.high / other.low, source)


def judge_cost(claim: Claim, cost: Cost | None) -> Judgement:
    """The verdict on a claim about step times. The range between the quartiles is used as the interval; see `judge`."""
    if claim.copy_of:
        return Judgement("copy", f"of {claim.copy_of}")
    if cost is None:
        return Judgement("not measured", "step_times.json lacks a recipe" if claim.against else "")
    interval = 100 * (cost.low - 1), 100 * (cost.high - 1)  # in %, like a margin
    if claim.says == "equal":
        return judge_equality(claim, interval, on_paper_model=False)
    found = judge_direction(claim, interval)
    return found if found.verdict != "not comparable" else Judgement("not comparable", "the quartiles overlap")
