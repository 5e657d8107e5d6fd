"""Compare a paper's claims with the measured numbers, in one reading of the paper. Only runs that pass the gates
count."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import mean, stdev

from ...common.errors import UsageError
from ..metrics.base import OUTLIERS, MetricResult
from ..tables import without_empty_columns
from .claims import FIELD, STEP_TIME, TRAINING_LOG, Claim, Paper, PaperSystem, Reading, Substitution
from .costs import judge_cost, measured_cost
from .mechanisms import idle_mechanism, inactive_mechanism
from .runs import SystemRun
from .verdict import (
    CONFIDENCE,
    EQUIVALENCE,
    WORST_FIRST,
    Conditions,
    Judgement,
    Verdict,
    combine_judgements,
    confidence_interval,
    differences,
    judge,
    measured_value,
    withhold,
)

NO_RUN_PASSES = "all of its runs fail a gate"
STAND_INS = ("sparse_probing", "scr")  # metrics with a variant `_stdlib`, which needs no dataset from the Hub
L0 = Claim(id="l0", where="", quote="", metric="core.sparsity.l0")
LOGGED_L0 = Claim(id="l0", where="", quote="", metric="training.l0")


@dataclass(frozen=True)
class ClaimResult:
    """A claim, the measured values and their difference as text, and the verdict.

    `counted` is False for restatements and for copies of another row's number.
    """

    claim: Claim
    measured: str
    seeds: int
    verdict: Verdict
    notes: Sequence[str]
    difference: str = ""
    counted: bool = True


@dataclass(frozen=True)
class PaperReport:
    """The verdicts on a paper's claims, in one reading of the paper."""

    paper: Paper
    runs: Sequence[SystemRun]
    rows: Sequence[ClaimResult]
    on_paper_model: bool
    reading: Reading

    @property
    def counts(self) -> dict[Verdict, int]:
        """The number of claims with each verdict, worst first. A claim and its restatements count once."""
        verdicts = [row.verdict for row in self.rows if row.counted]
        return {verdict: verdicts.count(verdict) for verdict in reversed(WORST_FIRST) if verdict in verdicts}

    @property
    def notes(self) -> dict[str, list[str]]:
        """Each note on a verdict -> the ids of the claims that it applies to. Notes that only say that a claim restates
        another one are left out."""
        notes: dict[str, list[str]] = {}
        for row in self.rows:
            for note in row.notes:
                if note not in describe_restatement(row.claim):
                    notes.setdefault(note, []).append(row.claim.id)
        return notes

    @property
    def outlier_rows(self) -> int:
        """The largest number of outlier rows in any run's results. The runs' numbers include them, as in SAEBench."""
        return max((r.n.get(OUTLIERS, 0) for run in self.runs for r in run.run.results.values()), default=0)

    @property
    def excluded(self) -> list[tuple[str, str]]:
        """The runs that fail a gate, and why."""
        return [(run.run.name, "; ".join(failed)) for run in self.distinct_runs if (failed := run.failed_gates())]

    @property
    def distinct_runs(self) -> list[SystemRun]:
        """The runs without repetition. A run can belong to several systems, for example to `run-01` and `runs` in paper
        000."""
        return list({run.run.folder: run for run in self.runs}.values())

    @property
    def below_peak(self) -> str:
        """A sentence about runs that end within the paper's printed warm-up; "" if there are none."""
        within = [run for run in self.distinct_runs if run.is_within_warmup and not run.failed_gates()]
        if not within:
            return ""
        shares = [f"{share:.0%}" for share in sorted(run.peak_share for run in within)]
        return (
            f"The paper prints a warm-up of {within[0].warmup:,} steps, longer than {len(within)} of these runs: their "
            f"learning rate reached {' to '.join(dict.fromkeys([shares[0], shares[-1]]))} of its peak."
        )


def build_report(
    paper: Paper, runs: Sequence[SystemRun], on_paper_model: bool, reading: str | None = None
) -> PaperReport:
    """Every claim of the paper, in order, with a verdict under the reading of the paper that the runs were trained
    with.

    This trains and measures nothing, so a report can be rebuilt from the same folders at any time. Runs that fail a
    gate are treated as if they had not been measured.

    Raises:
        UsageError: the paper's file does not define a reading called `reading`.
    """
    used = find_reading(paper, on_paper_model, reading)
    runs = [replace(run, printed_warmup=paper.setup.warmup if used.is_papers else None) for run in runs]
    sound = [run for run in runs if not run.failed_gates()]
    rows = [claim_result(claim, paper, sound, on_paper_model, used) for claim in paper.claims]
    failed = {run.system for run in runs} - {run.system for run in sound}
    rows = [replace(row, notes=[*row.notes, NO_RUN_PASSES]) if row.claim.system in failed else row for row in rows]
    return PaperReport(paper, runs, rows, on_paper_model, used)


def find_reading(paper: Paper, on_paper_model: bool, name: str | None) -> Reading:
    """The reading of the paper called `name`. Without a name: the first one if the model is the paper's, else
    `field`."""
    name = name or (paper.readings[0].name if on_paper_model else FIELD)
    for reading in paper.readings:
        if reading.name == name:
            return reading
    raise UsageError(
        f"Paper {paper.number} has no reading {name}. Choose from {', '.join(one.name for one in paper.readings)}."
    )


Values = dict[int, float]  # seed -> the metric


def claim_result(
    claim: Claim, paper: Paper, runs: Sequence[SystemRun], on_paper_model: bool, reading: Reading
) -> ClaimResult:
    """The verdict on a claim, based on all layers and recipes of its systems, with the measured numbers and notes."""
    if claim.metric == STEP_TIME:
        return cost_result(claim, paper, reading)
    judgements: list[Judgement] = []
    measured: list[tuple[Values, Values]] = []  # values of the system, and of the other system
    layers, idle = layers_of(claim, runs, on_paper_model), []
    for layer in layers:
        at_layer = [run for run in runs if run.layer == layer]
        inactive = inactive_mechanism(claim, paper, at_layer)
        idle.append(inactive or (idle_mechanism(claim.system, paper, at_layer) if claim.system else ""))
        for recipe in recipes_of(claim.system, paper):
            for other_recipe in recipes_of(claim.against, paper) if claim.against else [""]:
                pair = (claim.system, recipe), (claim.against, other_recipe)
                own = values_by_seed(claim, *pair[0], at_layer, on_paper_model)
                other = values_by_seed(claim, *pair[1], at_layer, on_paper_model) if claim.against else {}
                conditions = Conditions(
                    on_paper_model,
                    paper.inconsistent(claim),
                    bool(reading.substitutions(claim)),
                    bool(inactive),
                    l0_of_both(pair, at_layer, on_paper_model) if claim.against else None,
                    printed_l0_ratio(claim, paper),
                )
                judgements.append(judge(claim, {claim.system: own, claim.against: other}, conditions))
                if own:
                    measured.append((own, other))
    if not judgements:
        judgements = [judge(claim, {}, Conditions(on_paper_model, paper.inconsistent(claim)))]
    found = combine_judgements(judgements)
    shown = [(list(own.values()), list(other.values())) for own, other in measured]
    notes = [found.reason] if found.reason else []
    if measured:
        notes += notes_on_runs(claim, runs, layers, on_paper_model) + list(dict.fromkeys(filter(None, idle)))
    notes += describe_substitutions(reading.substitutions(claim)) if measured else []
    return ClaimResult(
        claim,
        format_measured(claim, shown),
        min((len(own) for own, _ in measured), default=0),
        found.verdict,
        [*notes, *describe_claim(claim)],
        format_difference(claim, measured),
        paper.is_counted(claim),
    )


def cost_result(claim: Claim, paper: Paper, reading: Reading) -> ClaimResult:
    """The row of a claim about the time of a training step."""
    cost, substituted = measured_cost(claim, paper), reading.substitutions(claim)
    found = withhold(claim, judge_cost(claim, cost), Conditions(on_paper_model=False, substituted=bool(substituted)))
    if paper.inconsistent(claim):
        found = Judgement("paper inconsistent")
    measured = f"{cost.ratio:.3g} x" if cost else ""
    spread = f"{cost.low:.3g} to {cost.high:.3g} x between quartiles" if cost else ""
    notes = [*([found.reason] if found.reason else []), *([cost.source] if cost else [])]
    notes += describe_substitutions(substituted) if cost else []
    notes += describe_claim(claim)
    return ClaimResult(claim, measured, 0, found.verdict, notes, spread, paper.is_counted(claim))


def describe_substitutions(substituted: Sequence[Substitution]) -> list[str]:
    """For the row of a measured claim, one note for each of the paper's equations that was replaced."""
    return [f"not as printed: {one.what.removesuffix('.')}. {one.why}" for one in substituted]


def notes_on_runs(claim: Claim, runs: Sequence[SystemRun], layers: Sequence[int], on_paper_model: bool) -> list[str]:
    """Notes on the ways in which measured numbers are not exactly what is claimed: they may be from other layers or
    another dataset, or a mean over steps."""
    notes = []
    if set(layers) != set(claim.layers):
        relation = "of" if set(layers) < set(claim.layers) else "instead of"
        notes.append(f"layer {', '.join(map(str, layers))} {relation} {', '.join(map(str, claim.layers))}")
    if uses_stand_in(claim.metric, runs, on_paper_model):
        notes.append("measured on the standard-library substitute of the dataset")
    if claim.metric.startswith(f"{TRAINING_LOG}.") and claim.at == "first":
        first = max(int(run.log[0].get("step", 1)) for run in runs)
        if first > 1:
            notes.append(f"the mean of the first {first:,} steps, because these runs did not log single steps")
    return notes


def describe_claim(claim: Claim) -> list[str]:
    """Notes on a claim, taken from its entry in the paper's NNN.toml."""
    return [*describe_restatement(claim), *filter(None, [claim.why])]


def describe_restatement(claim: Claim) -> list[str]:
    return [f"the same comparison as {claim.restates}"] if claim.restates else []


def l0_of_both(
    pair: tuple[tuple[str, str], tuple[str, str]], runs: Sequence[SystemRun], on_paper_model: bool
) -> tuple[float, float] | None:
    """The mean L0 of each of two systems, given as (system, recipe). Both come from the metric core or, if that is
    missing for one of them, from the last steps of training."""
    for claim in (L0, LOGGED_L0):
        own, other = (values_by_seed(claim, *one, runs, on_paper_model) for one in pair)
        if own and other:
            return mean(own.values()), mean(other.values())
    return None


def printed_l0_ratio(claim: Claim, paper: Paper) -> float | None:
    """The ratio of the L0 that the paper prints for the claim's system to the L0 that it prints for the other system.
    None if the paper does not print both L0 values, or contradicts itself about them."""
    printed = {}
    for one in paper.claims:
        if one.metric != L0.metric or one.value is None or paper.inconsistent(one):
            continue
        if one.is_change:
            if (one.system, one.against) == (claim.system, claim.against) and one.unit in ("%", "x"):
                return one.value if one.unit == "x" else 1 + one.value / 100
            continue
        printed[one.system] = one.value
        if one.against_value is not None:
            printed[one.against] = one.against_value
    own, other = printed.get(claim.system), printed.get(claim.against)
    return own / other if own is not None and other else None


def layers_of(claim: Claim, runs: Sequence[SystemRun], on_paper_model: bool) -> list[int]:
    """Those of the claim's layers at which SAEs were trained. If there are none, and the model is not the paper's, all
    layers at which SAEs were trained."""
    trained = sorted({run.layer for run in runs})
    claimed = [layer for layer in trained if layer in claim.layers]
    return claimed if claimed or on_paper_model else trained


def recipes_of(system: str, paper: Paper) -> Sequence[str]:
    """The recipes of a system. For the language model itself, the only recipe is "", which matches any run."""
    return paper.systems[system].recipes or ("",) if system else ()


def values_by_seed(
    claim: Claim, system: str, recipe: str, runs: Sequence[SystemRun], on_paper_model: bool
) -> dict[int, float]:
    """Seed -> the claim's metric, in the runs of a system and recipe; if `recipe` is empty, in any run."""
    values: dict[int, float] = {}
    for run in runs:
        if (recipe and (run.system, run.recipe) != (system, recipe)) or run.seed in values:
            continue
        value = measured_value(claim, results_with_stand_ins(run, on_paper_model), run.log)
        if value is not None:
            values[run.seed] = value
    return values


def results_with_stand_ins(run: SystemRun, on_paper_model: bool) -> dict[str, MetricResult]:
    """The run's results. On another model, the variant `_stdlib` replaces a metric that was not measured."""
    results = dict(run.run.results)
    if not on_paper_model:
        for name in STAND_INS:
            if name not in results and f"{name}_stdlib" in results:
                results[name] = results[f"{name}_stdlib"]
    return results


def uses_stand_in(metric: str, runs: Sequence[SystemRun], on_paper_model: bool) -> bool:
    """Whether any run's number comes from the variant `_stdlib` of the metric."""
    name = metric.split(".")[0]
    if on_paper_model or name not in STAND_INS:
        return False
    return any(name not in run.run.results and f"{name}_stdlib" in run.run.results for run in runs)


def format_measured(claim: Claim, shown: Sequence[tuple[Sequence[float], Sequence[float]]]) -> str:
    """The mean and sd over seeds, also for the other system if there is one. For several recipes or layers, the range
    of means."""
    if not shown:
        return ""
    relative = claim.unit == "%" and (claim.is_change or claim.says)  # % of the other system's number
    scale = 100 if claim.unit in ("%", "pp") and not relative else 1
    sign = " %" if scale == 100 else ""

    def mean_and_sd(values: Sequence[float]) -> str:
        spread = f" ± {scale * stdev(values):.2g}" if len(values) > 1 else ""
        return f"{scale * mean(values):.4g}{spread}{sign}"

    if len(shown) == 1:
        system, other = shown[0]
        return mean_and_sd(system) + (f" and {mean_and_sd(other)}" if other else "")
    means = [scale * mean(values) for values, _ in shown]
    return f"{min(means):.4g} to {max(means):.4g}{sign} over {len(shown)}"


def format_difference(claim: Claim, measured: Sequence[tuple[Values, Values]]) -> str:
    """The mean difference between the two systems over seeds, with the interval that decides the verdict. For several
    recipes or layers, the range of means. If the claim states a multiple (x), the difference is also given as a
    multiple."""
    level = EQUIVALENCE if claim.says == "equal" else CONFIDENCE
    in_unit = claim.is_change or claim.says
    unit = {"%": " %", "pp": " pp", "x": " x"}.get(claim.unit, "") if in_unit else ""
    start, form = (1, ".3g") if unit == " x" else (0, "+.3g")  # `differences` returns multiples minus 1
    texts, means = [], []
    for own, other in measured:
        pairs = [(own[seed], other[seed]) for seed in sorted(own.keys() & other.keys())]
        changes = [start + change for change in differences(claim, pairs)]
        if not changes:
            continue
        means.append(mean(changes))
        interval = confidence_interval(changes, level)
        spread = f" ({interval[0]:{form}} to {interval[1]:{form}}, {level:.0%})" if interval else " (one seed)"
        texts.append(f"{mean(changes):{form}}{unit}{spread}")
    return f"{min(means):{form}} to {max(means):{form}}{unit} over {len(means)}" if len(texts) > 1 else "".join(texts)


def shown_layer(report: PaperReport) -> int:
    """The layer that figures show: of the layers in our runs, the first that the paper also uses, or else the first."""
    layers = sorted({run.layer for run in report.runs})
    return next((layer for layer in layers if layer in report.paper.setup.layers), layers[0] if layers else 0)


def runs_by_system(report: PaperReport) -> dict[str, list[SystemRun]]:
    """The runs at the shown layer, by system; for a system with several recipes, by recipe.

    A system is left out if its runs also belong to a system with several recipes, so that no run is shown twice.
    """
    layer, systems = shown_layer(report), report.paper.systems
    united = {run.run.name for run in report.runs if len(systems[run.system].recipes) > 1}
    groups: dict[str, list[SystemRun]] = {}
    for run in report.runs:
        several = len(systems[run.system].recipes) > 1
        if run.layer == layer and (several or run.run.name not in united):
            groups.setdefault(run.recipe if several else run.system, []).append(run)
    return groups


def metric_values(metric: str, runs: Sequence[SystemRun], on_paper_model: bool) -> list[float]:
    """One value of a metric for each run that passes the gates and has the metric. `metric` is named as in claims."""
    claim = Claim(id="", where="", quote="", metric=metric)
    sound = [run for run in runs if not run.failed_gates()]
    values = [measured_value(claim, results_with_stand_ins(run, on_paper_model), run.log) for run in sound]
    return [value for value in values if value is not None and math.isfinite(value)]


def unreported_table(report: PaperReport) -> tuple[list[str], list[list[str]]]:
    """Headings, and a line for each measurement that the paper mentions without a number, with our mean and sd."""
    groups = runs_by_system(report)
    lines = []
    for one in report.paper.unreported:
        claim = Claim(id="", where="", quote="", metric=one.metric)
        values = [metric_values(one.metric, runs, report.on_paper_model) for runs in groups.values()]
        cells = [format_measured(claim, [(some, [])]) if some else "" for some in values]
        lines.append([one.what, one.metric, *cells])
    return without_empty_columns(["what", "metric", *groups], lines)


def describe_system(system: PaperSystem) -> str:
    """The recipes of a system and the options that it sets."""
    options = "".join(f" {name}={value}" for name, value in system.options.items())
    return (", ".join(system.recipes) or "the language model") + options
