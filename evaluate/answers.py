"""The first questions about an SAE: is it better than simple baselines, is it stable across seeds, is it the best?

Each of the five answers comes with its numbers and 95 % intervals, or with the command that computes the missing
numbers. The tests follow docs/reference/statistics.md; Holm's correction is applied to all of them together, as if they
formed one table.
"""

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from ..common.escaping import quote
from ..common.formatting import format_count
from .against import HEADS, AgainstLine, pair_line, with_finding
from .compare import ComparedSystem, summary_columns
from .compared_runs import ComparedRun
from .control_notes import best_control
from .control_shares import Share, Systems, controls_of, find_share
from .frontier import FRONTIER_NUMBERS, PUBLISHED_NUMBER, Number, best_rival, find_column, published_at
from .metrics.base import MetricResult
from .neighbours import RunsBeside, more_seeds_command
from .rows import core_numbers, is_pca
from .statistics import PairedComparison, default_margin, judge, prediction_interval

CORE_NUMBERS = (find_column("core", "fve"), find_column("core", "kl_div_score"))
TABLE_HEADS = ["against", *HEADS[1:]]
PCA, CONTROL, SEED, STABLE, FRONTIER = (
    "Better than PCA?",
    "Better than a frozen control?",
    "Better than another seed?",
    "Stable across seeds?",
    "On the frontier?",
)
EXPLAINED = {
    PCA: "A PCA with as many components as the SAE has latents per token, fitted on the same activations.",
    CONTROL: "An SAE of the same width and L0, trained for as many steps, whose decoder or encoder keeps its random "
    "initial weights.",
    SEED: "The runs that differ from this one only by seed.",
    STABLE: "PW-MCC: the mean similarity between the latents and their one-to-one matches in the SAE of another seed.",
    FRONTIER: "No other SAE with the same number of latents per token, or fewer, is better.",
}


@dataclass(frozen=True)
class Answer:
    """A question with its answer.

    Attributes:
        verdict: a few words.
        numbers: sentences, or parts of a sentence, with the numbers behind the verdict.
        is_good: whether the verdict speaks for the SAE; None if it speaks neither for nor against it.
        remedy: a sentence about missing numbers, shown before `command`.
        command: the command that computes the missing numbers.
    """

    question: str
    verdict: str
    numbers: Sequence[str] = ()
    is_good: bool | None = None
    remedy: str = ""
    command: str = ""


class Report(NamedTuple):
    """The answers, and every comparison behind them. Each comparison names the other SAE."""

    answers: list[Answer]
    lines: list[AgainstLine]

    def table(self) -> tuple[list[str], list[list[str]]]:
        return TABLE_HEADS, [line.cells() for line in self.lines]


def answer_questions(near: RunsBeside) -> Report:
    """The five answers about a run, in the order of the page."""
    run = near.run
    pca = nearest_pca(run, near.references)
    lines = {
        PCA: lines_against(run, pca, CORE_NUMBERS) if pca else [],
        CONTROL: control_lines(near),
        SEED: lines_against(run, near.seeds[0], CORE_NUMBERS) if len(near.seeds) == 1 else [],
        FRONTIER: frontier_lines(near),
    }
    every = [line for some in lines.values() for line in some]
    found = judge([PairedComparison(line.pairing.differences, line.column.better, line.margin) for line in every])
    judged = iter([with_finding(line, one, None) for line, one in zip(every, found, strict=True)])
    lines = {question: [next(judged) for _ in some] for question, some in lines.items()}
    answers = [
        answer_pca(near, pca, lines[PCA]),
        answer_control(near, lines[CONTROL]),
        answer_seed(near, lines[SEED]),
        answer_stable(near),
        answer_frontier(near, lines[FRONTIER]),
    ]
    return Report(answers, [line for some in lines.values() for line in some])


# --- comparisons ------------------------------------------------------------------------------------------------------


def alone(run: ComparedRun) -> ComparedSystem:
    return ComparedSystem(run.name, [run])


def lines_against(run: ComparedRun, other: ComparedRun, numbers: Sequence[Number]) -> list[AgainstLine]:
    """One line for each number that both runs have. Each line has the name of the other run."""
    margins = [default_margin(column.floor, column.ceiling) for _, column in numbers]
    found = [
        pair_line(alone(run), alone(other), metric, column, margin)
        for (metric, column), margin in zip(numbers, margins, strict=True)
    ]
    return [replace(line, system=other.name) for line in found if line is not None]


def control_lines(near: RunsBeside) -> list[AgainstLine]:
    """For each summary number, a comparison of the run with the control that has the best value of this number."""
    controls, lines = controls_beside(near), []
    by_name = {one.name: one for one in (*near.references, *near.controls)}
    for metric, column in summary_columns():
        if best := best_control(near.run.name, alone(near.run).run_by_seed, controls, metric, column):
            lines += lines_against(near.run, by_name[best.control], [(metric, column)])
    return lines


def controls_beside(near: RunsBeside) -> Systems:
    """The run's controls, each as a system of its own. They are looked up among the run's references and the runs
    beside it."""
    return controls_of(
        alone(near.run).run_by_seed, {one.name: {one.name: one} for one in (*near.references, *near.controls)}
    )


def frontier_lines(near: RunsBeside) -> list[AgainstLine]:
    """For KL score and for EV, a comparison of the run with the best of the other runs whose L0 is not above its own.
    The run's other seeds are left out."""
    lines = []
    for number in FRONTIER_NUMBERS:
        if rival := best_rival(alone(near.run), map(alone, near.others), *number):
            lines += lines_against(near.run, rival.runs[0], [number])
    return lines


def nearest_pca(run: ComparedRun, references: Sequence[ComparedRun]) -> ComparedRun | None:
    """The PCA whose L0 (its number of components) is nearest to the run's L0."""
    own = core_numbers(run)
    measured = [
        (abs(math.log(own[0] / found[0])), one)
        for one in references
        if is_pca(one) and (found := core_numbers(one)) and found[0] > 0 and own and own[0] > 0
    ]
    return min(measured, key=lambda pair: pair[0])[1] if measured else None


# --- answers ----------------------------------------------------------------------------------------------------------


def answer_pca(near: RunsBeside, pca: ComparedRun | None, lines: Sequence[AgainstLine]) -> Answer:
    if core_numbers(near.run) is None:
        return not_measured(PCA, "Core has not been measured.", evaluate_command(near.run, "core"))
    if pca is None or not lines:
        return not_measured(PCA, "No PCA was measured on this text.", evaluate_command(near.run, "core"))
    verdict, is_good = conclude(lines)
    answer = Answer(PCA, verdict, name_others(lines, "compared with"), is_good)
    if any(line.l0_matters for line in lines):
        remedy = "This PCA has a different L0. Evaluate the SAE alone to get a PCA with the same L0:"
        return replace(answer, remedy=remedy, command=evaluate_command(near.run, "core"))
    return with_untested(answer, near.run, lines)


def answer_control(near: RunsBeside, lines: Sequence[AgainstLine]) -> Answer:
    run = near.run
    if run.is_control:
        return Answer(CONTROL, "it is a control itself")
    if not run.conditions:
        return Answer(
            CONTROL, "not known", ["It can have no control: the rows, steps or L0 of its training are unknown."]
        )
    if not lines:
        suite = ",".join(one for one in run.results if one != "stability") or "core"
        command = f"{evaluate_command(run, suite)} --controls"
        return not_measured(CONTROL, "No control was measured on this text.", command)
    verdict, is_good = conclude(lines)
    by_number = {(line.metric, line.column): line for line in lines}
    shown = [by_number[number] for number in CORE_NUMBERS if number in by_number]
    found = [(share.part, line) for line in lines if line.metric != "core" and (share := share_of(near, line))]
    shown += [max(found, key=lambda pair: pair[0])[1]] if found else []
    numbers = []
    for line, text in zip(shown, name_others(shown, "compared with"), strict=True):
        share = share_of(near, line)
        numbers.append(text if share is None else f"{text}; the control reaches {share} of it")
    return with_untested(Answer(CONTROL, verdict, numbers, is_good), run, shown)


def share_of(near: RunsBeside, line: AgainstLine) -> Share | None:
    """The share of the run's number that the control in this line reaches: (control - floor) / (run - floor)."""
    return find_share(alone(near.run).run_by_seed, controls_beside(near)[line.system], line.metric, line.column)


def answer_seed(near: RunsBeside, lines: Sequence[AgainstLine]) -> Answer:
    """With one other seed, the difference; with several, whether the run lies in the range expected for another
    seed."""
    if lines:
        verdict, is_good = conclude(lines)
        more = "One other seed does not show how much seeds differ. Train more, then evaluate them together."
        command = more_seeds_command(near.run)
        numbers = name_others(lines, "compared with")
        return Answer(SEED, verdict, numbers, is_good, more if command else "", command)
    numbers, sides = [], []
    for metric, column in CORE_NUMBERS:
        own, measured = near.run.value(metric, column), [one.value(metric, column) for one in near.seeds]
        others = [value for value in measured if value is not None]
        if own is not None and len(others) > 1:
            low, high = prediction_interval(others)
            sides.append((own > high) - (own < low))
            form = column.format
            numbers.append(
                f"{column.heading} {own:{form}}, {len(others)} other seeds {statistics.mean(others):{form}} ± "
                f"{statistics.stdev(others):{form}} (sd); another seed is expected at {low:{form}} to {high:{form}}"
            )
    if not numbers:
        return missing_seeds(SEED, near, "core")
    if not any(sides):
        return Answer(SEED, "like the other seeds", numbers)
    is_good = True if min(sides) >= 0 else False if max(sides) <= 0 else None
    return Answer(
        SEED,
        {True: "above the other seeds", False: "below the other seeds", None: "above and below"}[is_good],
        numbers,
        is_good,
    )


def answer_stable(near: RunsBeside) -> Answer:
    result = near.run.results.get("stability")
    if result is None:
        return missing_seeds(STABLE, near, "stability")
    metrics = result.sound.metrics.get("stability", {})
    others = result.n.get("other_seeds", 0)
    in_all = metrics.get("recurring_in_all")
    found = f"in each of {others} other seeds"
    if in_all is not None:  # missing in results of earlier versions
        found = f"on average over {others} other seeds, {in_all:.0%} in all of them"
    numbers, at_chance = [found if others > 1 else "in the other seed"], []
    for what in ("decoder", "activation"):
        value, null = metrics.get(f"{what}_pw_mcc"), metrics.get(f"{what}_pw_mcc_null")
        if value is not None:
            chance = "" if null is None else f", random {null:.3f}"
            numbers.append(f"{what} PW-MCC {value:.3f}{interval_of(result, f'{what}_pw_mcc')}{chance}")
            ceiling = (result.sound.intervals.get("stability", {}).get(f"{what}_pw_mcc_null") or [null, null])[1]
            at_chance += [] if ceiling is None or value > ceiling else [f"{what} PW-MCC"]
    recurring = metrics.get("recurring")
    if recurring is None:
        return Answer(STABLE, "not known", numbers[1:])
    verdict = f"{recurring:.0%} of latents recur"
    if at_chance:
        return Answer(STABLE, f"{verdict}; {' and '.join(at_chance)} not above chance", numbers, False)
    return Answer(STABLE, verdict, numbers)


def answer_frontier(near: RunsBeside, lines: Sequence[AgainstLine]) -> Answer:
    run, ours = near.run, core_numbers(near.run)
    if ours is None:
        return not_measured(FRONTIER, "Core has not been measured.", evaluate_command(run, "core"))
    published = describe_published(run)
    numbers = name_others(lines, "the best other run of at most this L0 is")
    numbers += [published] if published else []
    at = f"at L0 {ours[0]:.1f}"
    if not lines:
        some = f"none of {format_count(len(near.others), 'other run')} in its folder has this L0 or a lower one"
        beside = some if near.others else "no other run in its folder was measured with the same settings"
        if numbers:
            return Answer(FRONTIER, f"not known {at}", [*numbers, beside])
        found = [beside, "no published SAEs of this model and layer are known"]
        if near.others:  # all of them were measured, so nothing is missing
            return Answer(FRONTIER, f"not known {at}", found)
        folder = quote(run.folder.parent)
        return Answer(
            FRONTIER, f"not known {at}", found, None,
            "Evaluate the runs in its folder together:", f"sae evaluate {folder}/*/ --suite core",
        )  # fmt: skip
    verdicts = Counter(line.finding.verdict for line in lines)
    behind, tested = verdicts["worse"], len(lines) - verdicts["not tested"]
    if not tested:
        return with_untested(Answer(FRONTIER, f"not tested {at}", numbers), run, lines)
    if behind:
        return Answer(FRONTIER, f"behind {at}" if behind == len(lines) else f"partly behind {at}", numbers, False)
    if verdicts["not distinguishable"]:
        return Answer(FRONTIER, f"not distinguishable from the best {at}", numbers)
    return Answer(FRONTIER, f"on it {at}", numbers, True)


def describe_published(run: ComparedRun) -> str:
    """The rank of the run among published SAEs of its model and layer; "" if none is published at its L0."""
    on_all_rows = alone(run.on_all_rows())
    own, published = on_all_rows.mean_and_spread(*PUBLISHED_NUMBER), published_at(on_all_rows, *PUBLISHED_NUMBER)
    if own is None or not published:
        return ""
    best, form, less = published[0], PUBLISHED_NUMBER[1].format, sum(one.value < own[0] for one in published)
    return (
        f"{PUBLISHED_NUMBER[1].heading} {own[0]:{form}} is above {less} of {len(published)} published SAEs "
        f"at this L0 (measured on other text; the best is {best.value:{form}}, {best.name})"
    )


# --- words ------------------------------------------------------------------------------------------------------------


def conclude(lines: Sequence[AgainstLine]) -> tuple[str, bool | None]:
    """One verdict on several numbers, and whether it speaks for the SAE."""
    found = Counter(line.finding.verdict for line in lines)
    better, worse, every = found["better"], found["worse"], len(lines) - found["not tested"]
    if not every:
        return "not tested", None
    at = ", at another L0" if any(line.l0_matters for line in lines) else ""
    if better == every:
        return f"yes{at}", True
    if worse == every:
        return f"no, worse{at}", False
    if better or worse:
        parts = [f"better in {better}" if better else "", f"worse in {worse}" if worse else ""]
        return f"{' and '.join(filter(None, parts))} of {every}{at}", False if worse else None
    verdicts = {verdict for verdict in found if verdict != "not tested"}
    return f"{verdicts.pop() if len(verdicts) == 1 else 'not distinguishable'}{at}", None


def describe(line: AgainstLine) -> str:
    """A system's number, its difference from the other system's number, and the interval of this difference, such as
    "EV 0.731, +0.079 (+0.075 to +0.083)"."""
    form, paired = line.column.format, line.pairing.differences
    own, other = line.values
    text = f"{line.number.rstrip(' ↑↓')} {own:{form}}"
    if paired is None or not paired.has_spread:
        return f"{text} against {other:{form}}"
    low, high = paired.interval
    return f"{text}, {line.difference:+{form}} ({low:+{form}} to {high:+{form}})"


def name_others(lines: Sequence[AgainstLine], before: str) -> list[str]:
    """The lines as text. A line names the system that the run is compared with, unless the previous line names the same
    one."""
    names = [line.system for line in lines]
    return [
        describe(line) if number and names[number - 1] == line.system else f"{before} {line.system}: {describe(line)}"
        for number, line in enumerate(lines)
    ]


def interval_of(result: MetricResult, name: str) -> str:
    low, high = result.sound.intervals.get("stability", {}).get(name) or (None, None)
    return "" if low is None or high is None else f" ({low:.3f} to {high:.3f})"


def with_untested(answer: Answer, run: ComparedRun, lines: Sequence[AgainstLine]) -> Answer:
    """The answer. If a result of an earlier version could not be tested, the answer also gives a command that repeats
    the measurement."""
    if not any("--force" in line.pairing.reason for line in lines):
        return answer
    suite = ",".join(dict.fromkeys(line.metric for line in lines))
    controls = " --controls" if answer.question == CONTROL else ""
    remedy = "An earlier version measured some of these results and stored too little for a test. Measure them again:"
    return replace(answer, remedy=remedy, command=f"{evaluate_command(run, suite)} --force{controls}")


def evaluate_command(run: ComparedRun, suite: str) -> str:
    return f"sae evaluate {quote(run.folder)} --suite {suite}"


def not_measured(question: str, remedy: str, command: str) -> Answer:
    return Answer(question, "not measured", remedy=remedy, command=command)


def missing_seeds(question: str, near: RunsBeside, suite: str) -> Answer:
    """The answer if a number that requires other seeds is missing. The answer says whether other seeds exist, can be
    trained, or cannot be trained."""
    run, folders = near.run, near.seed_folders
    if len(folders) > 1:
        there = (
            f"There {'is' if len(folders) == 2 else 'are'} {format_count(len(folders) - 1, 'other seed')} in its folder"
        )
        command = f"sae evaluate {' '.join(map(quote, folders))} --suite {suite}"
        return not_measured(question, f"{there}. Evaluate all of them together:", command)
    if command := more_seeds_command(run):
        suite = "" if suite == "core" else f" with --suite {suite}"
        remedy = f"There is no other seed in its folder. Train some, then evaluate them together{suite}."
        return not_measured(question, remedy, command)
    return Answer(question, "not known", ["Too little is known about its training to repeat it with another seed."])
