"""Compare every system with one chosen system: differences, tests, and the effect of L0 alone.

The rules are those of docs/reference/statistics.md.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from ..common.errors import UsageError, did_you_mean
from ..common.files import digest_of
from ..common.formatting import format_count
from ..common.precision import recorded_precision
from .compare import L0, ComparedSystem, Comparison
from .control_notes import KnownVerdicts
from .metrics.base import MetricColumn
from .metrics.registry import METRICS
from .paired import SEED, Pairing, describe_pairs, pair_systems
from .statistics import LEVEL, POWER, Finding, PairedComparison, default_margin, judge
from .tables import format_detectable, number_name

SYSTEM_KEYS = (  # keys of run.json that, like the options, must be equal in systems that differ only in L0
    "variant", "layer", "site", "order_seed", "d_sae", "steps", "batch_size", "literal", "cache", "compiled",
)  # fmt: skip
L0_OPTIONS = ("k", "l0", "l1", "penalty")  # options that set the L0 of a recipe, as --l0 does
LIKE_L0 = 1.1  # without a slope, L0 values up to this ratio count as equal
HEADS = ["system", "number", "difference", "95 % interval", "over", "p (Holm)", "smallest detectable", "verdict"]


class L0Slope(NamedTuple):
    """The slope of a number over log L0, and the first words of a sentence that names the source of the slope."""

    per_log: float
    source: str


Slopes = Mapping[tuple[str, MetricColumn], L0Slope | None]


@dataclass(frozen=True)
class AgainstLine:
    """The comparison of one number between a system and the base.

    Attributes:
        values: the system's value of the number and the base's value, each a mean over seeds.
        l0: the L0 of the system and of the base, if both were measured.
        l0_shift: the difference that the two L0 values alone would explain, according to the slope; None without a
            slope.
        is_control: whether the system is a control: an SAE in which one part kept its random initial weights.
        l0_matters: whether `l0_shift` is large enough to be detected, or is at least half of the difference; without a
            slope, whether the two L0 values differ by over 10 %.
    """

    system: str
    metric: str
    column: MetricColumn
    values: tuple[float, float]
    pairing: Pairing
    margin: float | None
    finding: Finding
    l0: tuple[float, float] | None = None
    l0_shift: float | None = None
    l0_matters: bool = False
    is_control: bool = False

    @property
    def number(self) -> str:
        return number_name(self.metric, self.column)

    @property
    def difference(self) -> float:
        """The mean of the paired differences; if nothing was paired, the difference of the means."""
        paired = self.pairing.differences
        return paired.mean if paired else self.values[0] - self.values[1]

    @property
    def verdict(self) -> str:
        if not self.column.better:
            return ""
        found, words = self.finding, [str(self.finding.verdict)]
        if found.verdict == "equivalent":
            words.append(f"within ±{self.margin:g}")
        elif found.small:
            words.append(f"by less than {self.margin:g}")
        elif found.verdict == "not tested":
            reason = self.pairing.reason or "every difference is the same"
            words.append(f"({reason})")
        if self.is_control and found.verdict in ("better", "equivalent"):
            words.append("(a control)")
        return " ".join(words) + (", at another L0" if self.l0_matters else "")

    def cells(self) -> list[str]:
        paired, form, found = self.pairing.differences, "+" + self.column.format, self.finding
        low_high = paired.interval if paired and paired.has_spread else None
        return [
            self.system,
            self.number,
            format(self.difference, form),
            f"{low_high[0]:{form}} to {low_high[1]:{form}}" if low_high else "",
            describe_pairs(paired) if paired else "",
            "" if found.p_value is None else format_p_value(found.p_value),
            format_detectable(found.detectable, self.column),
            self.verdict,
        ]

    def record(self, base: str) -> dict[str, Any]:
        """The line as one flat dictionary; None for values that do not exist."""
        paired, found = self.pairing.differences, self.finding
        low, high = paired.interval if paired and paired.has_spread else (None, None)
        return {
            "system": self.system,
            "against": base,
            "number": f"{self.metric}.{self.column.category}.{self.column.name}",
            "better": self.column.better,
            "value": self.values[0],
            "against_value": self.values[1],
            "difference": self.difference,
            "low": low,
            "high": high,
            "unit": paired.unit if paired else None,
            "pairs": paired.pairs if paired else 0,
            "p_holm": found.p_value,
            "margin": self.margin,
            "p_equivalence_holm": found.equivalence_p_value,
            "smallest_detectable": found.detectable,
            "verdict": self.verdict,
            "l0": self.l0 and self.l0[0],
            "against_l0": self.l0 and self.l0[1],
            "moved_by_l0": self.l0_shift,
        }


def format_p_value(p: float) -> str:
    return "<.0001" if p < 1e-4 else f"{p:.4f}".removeprefix("0")


@dataclass(frozen=True)
class Against:
    """The table of differences from `base`, and notes about it."""

    base: str
    lines: Sequence[AgainstLine]
    notes: Sequence[str]

    @property
    def verdicts(self) -> KnownVerdicts:
        """The verdict on each pair, to be repeated in notes about the same pair."""
        return {(line.system, self.base, line.metric, line.column): line.finding.verdict for line in self.lines}

    @property
    def title(self) -> str:
        tests = sum(line.finding.p_value is not None for line in self.lines)
        return (
            f"against {self.base}: {format_count(tests, 'comparison')}, p-values corrected together (Holm, level "
            f"{LEVEL:g}); the smallest detectable difference is found with probability {POWER:g}"
        )

    def table(self) -> tuple[list[str], list[list[str]]]:
        """The headings, and one line for each number of each system."""
        return list(HEADS), [line.cells() for line in self.lines]

    def records(self) -> list[dict[str, Any]]:
        return [line.record(self.base) for line in self.lines]


def compare_against(comparison: Comparison, against: str, margins: Sequence[str] = ()) -> Against:
    """The differences between every system and the one labeled `against`, which can be a reference.

    `margins` are strings "number=margin". These margins replace the default equivalence margin, 1 % of a number's
    range.

    Raises UsageError if `against` or a number in `margins` does not exist, or if there is no other system.
    """
    named = {system.label: system for system in [*comparison.references, *comparison.systems]}
    if against not in named:
        raise UsageError(f"There is no system {against}{did_you_mean(against, list(named))}")
    base, given = named[against], parse_margins(margins, comparison.columns)
    others = [system for system in comparison.systems if system is not base]
    if not others:
        raise UsageError(f"There is nothing to compare {against} with: name the runs of another system.")
    slopes = {(metric, column): l0_slope(comparison, metric, column) for metric, column in comparison.columns}
    unjudged = [
        pair_line(system, base, metric, column, given.get(column.name, default_margin(column.floor, column.ceiling)))
        for system in others
        for metric, column in comparison.columns
    ]
    lines = [line for line in unjudged if line is not None]
    findings = judge([PairedComparison(line.pairing.differences, line.column.better, line.margin) for line in lines])
    judged = [
        with_finding(line, found, slopes[line.metric, line.column]) for line, found in zip(lines, findings, strict=True)
    ]
    notes = [*base_notes(base), *unit_notes(judged), *l0_notes(judged, against, slopes)]
    return Against(against, judged, notes)


def parse_margins(texts: Sequence[str], columns: Sequence[tuple[str, MetricColumn]]) -> dict[str, float]:
    """Number -> margin. Raises UsageError for a number that no column shows or a margin that is not positive."""
    margins, names = {}, [column.name for _, column in columns]
    for text in texts:
        name, _, value = text.partition("=")
        if name not in names:
            raise UsageError(f"--margin {text}: the table has no number {name}{did_you_mean(name, names)}")
        try:
            margins[name] = float(value)
        except ValueError:
            margins[name] = math.nan
        if not 0 < margins[name] < math.inf:
            raise UsageError(f"--margin {text}: give number=margin with a margin above 0, such as {name}=0.01.")
    return margins


def pair_line(
    system: ComparedSystem, base: ComparedSystem, metric: str, column: MetricColumn, margin: float | None
) -> AgainstLine | None:
    """One line of the table, without the result of its test; None if the number was not measured in both systems."""
    values = [one.mean_and_spread(metric, column) for one in (system, base)]
    if values[0] is None or values[1] is None:
        return None
    pairing = pair_systems(system.run_by_seed, base.run_by_seed, metric, column)
    l0s = [one.mean_and_spread(*l0_column()) for one in (system, base)]
    l0 = (l0s[0][0], l0s[1][0]) if l0s[0] and l0s[1] and l0s[0][0] > 0 and l0s[1][0] > 0 else None
    return AgainstLine(
        system.label, metric, column, (values[0][0], values[1][0]), pairing, margin, Finding("not tested"), l0,
        is_control=system.runs[0].is_control,
    )  # fmt: skip


def with_finding(line: AgainstLine, found: Finding, slope: L0Slope | None) -> AgainstLine:
    """The line with `finding`, `l0_shift` and `l0_matters` filled in. `l0_matters` says whether the two L0 values alone
    could explain or hide the difference in the number."""
    shift, matters = None, False
    if line.l0 and line.column.better:
        ratio = line.l0[0] / line.l0[1]
        if slope is None:
            matters = not 1 / LIKE_L0 <= ratio <= LIKE_L0
        else:
            shift = slope.per_log * math.log(ratio)
            is_difference = found.verdict in ("better", "worse", "not tested")
            matters = bool(shift) and (
                (found.detectable is not None and abs(shift) >= found.detectable)
                or (is_difference and abs(shift) >= abs(line.difference) / 2)
            )
    return replace(line, finding=found, l0_shift=shift, l0_matters=matters)


def l0_column() -> tuple[str, MetricColumn]:
    metric, name = L0
    return metric, next(column for column in METRICS[metric].columns if column.name == name)


def l0_slope(comparison: Comparison, metric: str, column: MetricColumn) -> L0Slope | None:
    """The slope of a number as a function of log L0, estimated from systems that differ only in their L0.

    The slope is fitted by least squares, with one intercept per group of systems that differ only in their L0, so that
    other differences between systems do not count as effects of L0. None if no group has two systems whose L0 differ by
    more than 10 %.
    """
    points: dict[str, list[tuple[float, float]]] = defaultdict(list)
    names = {}
    for system in comparison.systems:
        record = system.runs[0].record
        l0, value = system.mean_and_spread(*l0_column()), system.mean_and_spread(metric, column)
        if record.get("variant") and l0 and value and l0[0] > 0:
            group = digest_without_l0(record)
            points[group].append((l0[0], value[0]))
            names[group] = record["variant"]
    usable = {
        key: some for key, some in points.items() if len(some) > 1 and max(some)[0] > LIKE_L0 * min(some)[0]
    }  # fmt: skip
    if not usable:
        return None
    x = np.concatenate([(logs := np.log([l0 for l0, _ in some])) - logs.mean() for some in usable.values()])
    y = np.concatenate([(of := np.array([value for _, value in some])) - of.mean() for some in usable.values()])
    sources = "; ".join(
        f"{names[key]} at L0 {', '.join(f'{l0:.3g}' for l0, _ in sorted(some))}" for key, some in usable.items()
    )
    what = f"slope over log L0 of {sources}" if len(x) > 2 else f"difference between two systems, {sources},"
    return L0Slope(float(x @ y / (x @ x)), f"The {what} predicts")


def digest_without_l0(record: Mapping[str, Any]) -> str:
    """A digest that is equal for systems that differ only in their L0; `record` is the content of run.json."""
    options = {name: value for name, value in record.get("options", {}).items() if name not in L0_OPTIONS}
    return digest_of([*(record.get(key) for key in SYSTEM_KEYS), recorded_precision(record), options])


def base_notes(base: ComparedSystem) -> list[str]:
    """Notes about the system that all others are compared with."""
    if not base.runs[0].is_control:
        return []
    return [
        f"{base.label} is a control: a part of it kept its random initial weights. A number in which a system is "
        "not better than this control does not show learned features."
    ]


def unit_notes(lines: Sequence[AgainstLine]) -> list[str]:
    """Notes on the limits of these comparisons. The limits depend on what was paired: seeds, or units of the text such
    as documents."""
    units = {line.pairing.differences.unit for line in lines if line.pairing.differences is not None}
    notes = []
    if by_text := sorted(units - {SEED}):
        notes.append(
            f"The differences are paired by {', '.join(by_text)}, with one run of each system. A verdict holds for "
            "these two SAEs on other text of this kind; one seed cannot show whether their recipes differ."
        )
    few = sorted(
        {one.pairs for line in lines if (one := line.pairing.differences) and one.unit == SEED and one.pairs < 3}
    )
    if few:
        notes.append(
            "Two seeds leave one degree of freedom, so only very large differences can be found. Train "
            "three or more seeds."
        )
    return notes


def l0_notes(lines: Sequence[AgainstLine], base: str, slopes: Slopes) -> list[str]:
    """Sentences about each system whose L0 differs so much from the base's that this can explain or hide other
    differences.

    A system gets one sentence for each slope that was used for its numbers.
    """
    notes = []
    by_system: dict[str, list[AgainstLine]] = defaultdict(list)
    for line in lines:
        if line.l0_matters:
            by_system[line.system].append(line)
    for system, some in by_system.items():
        assert some[0].l0 is not None
        own, other = some[0].l0
        at = f"{system} has L0 {own:.1f}, {base} {other:.1f}"
        by_source: dict[str, list[str]] = defaultdict(list)
        for line in some:
            if (slope := slopes[line.metric, line.column]) is not None:
                by_source[slope.source].append(f"{line.number} {line.l0_shift:+{line.column.format}}")
        notes += [
            f"{at}. {source} {', '.join(moved)} from this difference in L0 alone: enough to be detected, or "
            "at least half of the measured difference. Compare at equal L0 (sae train --l0)."
            for source, moved in by_source.items()
        ]
        if sum(map(len, by_source.values())) < len(some):
            notes.append(
                f"{at}: they differ by more than 10 %, and no two systems here differ only in L0, so the "
                "effect of L0 on the numbers is unknown. Compare at equal L0 (sae train --l0)."
            )
    return notes
