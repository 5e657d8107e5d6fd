"""Pair the runs of two systems for a test: by seed, else by the units of the text that both were measured on.

docs/statistics.md says what each way can tell.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from .metrics.base import MetricColumn, UnitValues
from .metrics.registry import METRICS
from .rows import MeasuredRun
from .statistics import PairedDifferences

SEED = "seed"
RunBySeed = Mapping[Any, MeasuredRun]


class Pairing(NamedTuple):
    """The paired differences of a number, or why there are none, as the end of a sentence."""

    differences: PairedDifferences | None
    reason: str = ""


def metric_value(row: MeasuredRun, metric: str, column: MetricColumn) -> float | None:
    """A number of a row, without outlier rows where there were any; None if it was not measured."""
    result = row.results.get(metric)
    return None if result is None else result.sound.metrics.get(column.category, {}).get(column.name)


def pair_systems(system: RunBySeed, other: RunBySeed, metric: str, column: MetricColumn) -> Pairing:
    """The differences system - other of one number.

    - Two seeds or more in common: one difference for each.
    - `other` is a reference, which has no seed: the difference of each seed from it, as it is one fixed SAE.
    - One run each, or one seed in common: these two runs, one difference for each document, data set or letter.
    """
    if not METRICS[metric].independent_seeds:
        return Pairing(None, "it belongs to all seeds together")
    ours, theirs = (
        {seed: value for seed, run in runs.items() if (value := metric_value(run, metric, column)) is not None}
        for runs in (system, other)
    )
    if not ours or not theirs:
        return Pairing(None, "not measured in both")
    shared = [seed for seed in ours if seed in theirs]
    if len(shared) > 1:
        return Pairing(PairedDifferences([ours[seed] - theirs[seed] for seed in shared], SEED))
    if len(ours) > 1 and all(run.is_reference for run in other.values()):
        (fixed,) = theirs.values()
        return Pairing(PairedDifferences([value - fixed for value in ours.values()], SEED))
    if not shared and len(ours) * len(theirs) > 1:
        return Pairing(None, "no seed in common")
    own_seed, other_seed = next(iter(shared or ours)), next(iter(shared or theirs))
    return pair_runs(system[own_seed], other[other_seed], metric, column)


def pair_runs(run: MeasuredRun, other: MeasuredRun, metric: str, column: MetricColumn) -> Pairing:
    """The differences run - other of one number on the units that both were measured on."""
    ours, theirs = run_values(run, metric, column), run_values(other, metric, column)
    if not ours.unit:
        return Pairing(None, "one seed, and no values by unit")
    if not ours.values or not theirs.values:
        return Pairing(None, f"one seed, and a result without values by {ours.unit}: measure it again with --force")
    values = [value - theirs.values[name] for name, value in ours.values.items() if name in theirs.values]
    if len(values) < 2:
        return Pairing(None, f"one seed, and fewer than two of the same {ours.unit}")
    return Pairing(PairedDifferences(values, ours.unit))


def run_values(run: MeasuredRun, metric: str, column: MetricColumn) -> UnitValues:
    """The unit of a number, and its value by unit; no values if their mean is not the number."""
    value = metric_value(run, metric, column)
    if value is None:
        return UnitValues(METRICS[metric].unit, {})
    unit, values = METRICS[metric].values_by_unit(run.results[metric].sound, column)
    unit = unit or METRICS[metric].unit
    if not values or not math.isclose(sum(values.values()) / len(values), value, rel_tol=1e-4, abs_tol=1e-6):
        return UnitValues(unit, {})
    return UnitValues(unit, values)


def describe_pairs(differences: PairedDifferences) -> str:
    """How much was paired: "3 seeds", "1,024 groups of documents"."""
    first, _, rest = differences.unit.partition(" of ")
    plural = f"{first}s of {rest}" if rest else f"{first}s"
    return f"{differences.pairs:,} {plural}"
