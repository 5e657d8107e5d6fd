"""Sentences that compare systems with their controls, with the verdicts and tests of docs/reference/statistics.md.

The comparisons in these notes form a separate table: for each number that `sae compare` shows, it compares every system
with the one of its controls that has the best value of that number. If a printed table also contains a test of this
pair, the note repeats that table's verdict.
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from ..common.formatting import format_count
from .control_shares import NOT_OF_FEATURES, Columns, Systems, controls_of, numbers
from .metrics.base import MetricColumn
from .paired import RunBySeed, pair_systems
from .rows import NEAR_L0, core_numbers
from .statistics import PairedComparison, Verdict, default_margin, judge
from .tables import number_name

KnownVerdicts = Mapping[
    tuple[str, str, str, MetricColumn], Verdict
]  # (system, against, metric, column) -> verdict of a table
NAMED: Sequence[Verdict] = ("worse", "not distinguishable", "equivalent", "same in every pair")
OPPOSITE: Mapping[Verdict, Verdict] = {"better": "worse", "worse": "better"}


class BesideControl(NamedTuple):
    """A system's value of one number, its best control's value of it, and the verdict on their difference."""

    system: str
    control: str
    metric: str
    column: MetricColumn
    values: tuple[float, float]
    verdict: Verdict = "not tested"

    @property
    def is_higher(self) -> bool:
        """Whether the system has the better value, regardless of any test."""
        own, other = self.values
        return own > other if self.column.better == "up" else own < other

    def __str__(self) -> str:
        own, other = (format(value, self.column.format) for value in self.values)
        return f"{number_name(self.metric, self.column)} ({own}; {self.control} {other})"


def control_notes(systems: Systems, columns: Columns, known: KnownVerdicts) -> dict[str, list[str]]:
    """Label -> sentences for each system with controls. The sentences name the numbers for which the system equals a
    control or is not better than its best control, and the controls whose L0 differs from the system's.

    Args:
        systems: the systems and their controls, which are systems too.
        columns: the numbers to compare; numbers for which neither direction is better are left out.
        known: the verdicts of a printed table; the notes repeat these verdicts.
    """
    found = compare_with_controls(systems, columns, known)
    notes: dict[str, list[str]] = {}
    for label, runs in systems.items():
        beside = describe_beside([one for one in found if one.system == label])
        controls = controls_of(runs, systems)
        without_effect = same_as_controls(label, runs, controls, columns)
        if sentences := [*filter(None, [beside]), *without_effect, *unlike_l0(label, runs, controls)]:
            notes[label] = sentences
    return notes


def compare_with_controls(systems: Systems, columns: Columns, known: KnownVerdicts) -> list[BesideControl]:
    """For each number, compare every system with the one of its controls that has the best value of that number. The
    p-values of all these tests are corrected together, as in one table."""
    pairs, tests = [], []
    for label, runs in systems.items():
        controls = controls_of(runs, systems)
        for metric, column in columns:
            if best := best_control(label, runs, controls, metric, column):
                differences = pair_systems(runs, controls[best.control], metric, column).differences
                pairs.append(best)
                tests.append(PairedComparison(differences, column.better, default_margin(column.floor, column.ceiling)))
    return [
        one._replace(verdict=known_verdict(one, known) or finding.verdict)
        for one, finding in zip(pairs, judge(tests), strict=True)
    ]


def best_control(
    label: str, runs: RunBySeed, controls: Systems, metric: str, column: MetricColumn
) -> BesideControl | None:
    """The control whose mean over seeds is best for one number; None if there is nothing to compare."""
    own = numbers(runs, metric, column)
    measured = {name: statistics.mean(n) for name, some in controls.items() if (n := numbers(some, metric, column))}
    if not column.better or column.category in NOT_OF_FEATURES or not own or not measured:
        return None
    best = (max if column.better == "up" else min)(measured, key=measured.__getitem__)
    return BesideControl(label, best, metric, column, (statistics.mean(own), measured[best]))


def known_verdict(one: BesideControl, known: KnownVerdicts) -> Verdict | None:
    """The verdict on the system against the control, taken from a table that tests this pair in either order; None if
    there is no such table."""
    if found := known.get((one.system, one.control, one.metric, one.column)):
        return found
    turned = known.get((one.control, one.system, one.metric, one.column))
    return None if turned is None else OPPOSITE.get(turned, turned)


def describe_beside(found: Sequence[BesideControl]) -> str:
    """One sentence that names the numbers for which a system is not better than its best control; "" if there are none.

    A number that cannot be tested is named only if the control's value is better or equal.
    """
    tested = [one for one in found if one.verdict != "not tested"]
    named: dict[str, list[str]] = {verdict: [str(one) for one in tested if one.verdict == verdict] for verdict in NAMED}
    named["not tested, and no better,"] = [str(one) for one in found if one not in tested and not one.is_higher]
    parts = [f"{verdict} in {', '.join(some)}" for verdict, some in named.items() if some]
    if not parts:
        return ""
    if tested:
        better = sum(one.verdict == "better" for one in tested)
        parts.insert(0, f"better in {better} of {format_count(len(tested), 'tested number')}")
    return (
        f"{found[0].system} against its best control: {'; '.join(parts)}. A number that a control also "
        "reaches does not show learned features."
    )


def same_as_controls(label: str, runs: RunBySeed, controls: Systems, columns: Columns) -> Iterator[str]:
    """A sentence for each control that has the same value as the system in every number."""
    for name, some in controls.items():
        pairs = [
            (numbers(runs, *one), numbers(some, *one)) for one in columns if one[1].category not in NOT_OF_FEATURES
        ]
        both = [(ours, theirs) for ours, theirs in pairs if ours and theirs]
        if len(both) > 1 and all(ours == theirs for ours, theirs in both):
            yield (
                f"{name} has the same value as {label} in every number: its frozen part never had an effect in "
                "training, so it is not a control. Train both longer."
            )


def unlike_l0(label: str, runs: RunBySeed, controls: Systems) -> Iterator[str]:
    """A sentence for each control whose L0, measured on this text, differs from the system's by more than a tenth."""
    ours = mean_l0(runs)
    for name, some in controls.items():
        theirs = mean_l0(some)
        if ours and theirs and not theirs / NEAR_L0 <= ours <= theirs * NEAR_L0:
            yield (
                f"{name} has L0 {theirs:.1f} on this text and {label} {ours:.1f}: the shares include the effect of "
                "that difference."
            )


def mean_l0(runs: RunBySeed) -> float | None:
    measured = [found[0] for run in runs.values() if (found := core_numbers(run))]
    return statistics.mean(measured) if measured else None
