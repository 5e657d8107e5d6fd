"""Pair the runs of two systems for a test, either by seed or by the units of the text on which both were measured.

docs/reference/statistics.md explains what each way can show.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .metrics.base import MetricColumn, UnitValues
from .metrics.registry import METRICS
from .rows import MeasuredRun
from .statistics import PairedDifferences

SEED = "seed"
RunBySeed = Mapping[Any, MeasuredRun]


class PairedValues(NamedTuple):
    """For one number, the values of two systems on the units that both have. If they have no units in common, `reason`
    says why; it is worded as the end of a sentence."""

    ours: Sequence[float] = ()
    theirs: Sequence[float] = ()
    unit: str = ""
    reason: str = ""


class Pairing(NamedTuple):
    """For one number, the paired differences between two systems. If there are no pairs, `reason` says why; it is
    worded as the end of a sentence."""

    differences: PairedDifferences | None
    reason: str = ""


def metric_value(row: MeasuredRun, metric: str, column: MetricColumn) -> float | None:
    """One number of a measured run, computed without outlier rows if there were any; None if it was not measured."""
    result = row.results.get(metric)
    return None if result is None else result.sound.metrics.get(column.category, {}).get(column.name)


def half_interval(row: MeasuredRun, metric: str, column: MetricColumn) -> float:
    """Half the width of the 95 % interval of a number, which shows the uncertainty from the sample of text; 0 if the
    number has no interval."""
    low, high = row.results[metric].sound.intervals.get(column.category, {}).get(column.name) or (None, None)
    return 0.0 if low is None or high is None else (high - low) / 2


def pair_systems(system: RunBySeed, other: RunBySeed, metric: str, column: MetricColumn) -> Pairing:
    """For one number, the differences `system - other`, one for each pair of `pair_values`."""
    return differences_of(pair_values(system, other, metric, column))


def pair_runs(run: MeasuredRun, other: MeasuredRun, metric: str, column: MetricColumn) -> Pairing:
    """For one number, the difference `run - other` on each unit of the text that both runs were measured on."""
    return differences_of(pair_units(run, other, metric, column))


def differences_of(paired: PairedValues) -> Pairing:
    if not paired.unit:
        return Pairing(None, paired.reason)
    differences = [one - other for one, other in zip(paired.ours, paired.theirs, strict=True)]
    return Pairing(PairedDifferences(differences, paired.unit))


def pair_values(system: RunBySeed, other: RunBySeed, metric: str, column: MetricColumn) -> PairedValues:
    """For one number, the values of two systems, in pairs.

    - The systems have two or more seeds in common: one pair for each.
    - `other` is a reference, which has no seed: each seed is paired with this one SAE.
    - The systems have one run each, or one seed in common: these two runs are paired by document, data set or letter.
    """
    if not METRICS[metric].independent_seeds:
        return PairedValues(reason="the number belongs to all seeds together")
    ours, theirs = (
        {seed: value for seed, run in runs.items() if (value := metric_value(run, metric, column)) is not None}
        for runs in (system, other)
    )
    if not ours or not theirs:
        return PairedValues(reason="not measured in both")
    shared = [seed for seed in ours if seed in theirs]
    if len(shared) > 1:
        return PairedValues([ours[seed] for seed in shared], [theirs[seed] for seed in shared], SEED)
    if len(ours) > 1 and all(run.is_reference for run in other.values()):
        return PairedValues(list(ours.values()), [*theirs.values()] * len(ours), SEED)
    if not shared and len(ours) * len(theirs) > 1:
        return PairedValues(reason="no seed in common")
    own_seed, other_seed = next(iter(shared or ours)), next(iter(shared or theirs))
    return pair_units(system[own_seed], other[other_seed], metric, column)


def pair_units(run: MeasuredRun, other: MeasuredRun, metric: str, column: MetricColumn) -> PairedValues:
    """For one number, the values of two runs, paired by unit of the text. Units without a value in both are left
    out."""
    ours, theirs = run_values(run, metric, column), run_values(other, metric, column)
    if not ours.unit:
        return PairedValues(reason="one seed, and no values by unit")
    if not ours.values or not theirs.values:
        return PairedValues(
            reason=f"one seed, and a result without values by {ours.unit}: measure it again with --force"
        )
    names = [name for name in ours.values if name in theirs.values]
    if len(names) < 2:
        return PairedValues(reason=f"one seed, and fewer than two of the same {ours.unit}")
    return PairedValues([ours.values[name] for name in names], [theirs.values[name] for name in names], ours.unit)


def run_values(run: MeasuredRun, metric: str, column: MetricColumn) -> UnitValues:
    """The kind of unit by which a number can be paired, such as documents or letters, and the number's value for each
    unit. If the mean of these values is not the number itself, no values are returned."""
    value = metric_value(run, metric, column)
    if value is None:
        return UnitValues(METRICS[metric].unit, {})
    unit, values = METRICS[metric].values_by_unit(run.results[metric].sound, column)
    unit = unit or METRICS[metric].unit
    if not values or not math.isclose(sum(values.values()) / len(values), value, rel_tol=1e-4, abs_tol=1e-6):
        return UnitValues(unit, {})
    return UnitValues(unit, values)


def describe_pairs(differences: PairedDifferences) -> str:
    """The paired units as text: "3 seeds", "1,024 groups of documents"."""
    first, _, rest = differences.unit.partition(" of ")
    plural = f"{first}s of {rest}" if rest else f"{first}s"
    return f"{differences.pairs:,} {plural}"
