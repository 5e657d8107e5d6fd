"""Compare a paper's claims with what was measured. Runs must pass gates before they count."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean, stdev

from ..compare import ComparedRun
from ..compare_charts import read_metrics_log
from ..metrics.base import OUTLIERS, MetricResult
from ..tables import without_empty_columns
from .claims import Claim, Paper, PaperSystem
from .verdict import Verdict, combine_verdicts, measured_value, verdict

MIN_ALIVE = 0.10  # share of latents that fire; below it the SAE has collapsed
VARIANCE_TOLERANCE = 0.10  # by which explained variance on held-out text may differ from the last training steps
NO_RUN_PASSES = "all of its runs fail a gate"
STAND_INS = ("sparse_probing", "scr")  # metrics with a `_stdlib` variant, which needs no dataset from the Hub


@dataclass(frozen=True)
class SystemRun:
    """A run of one of the paper's systems; `log` is its metrics.jsonl."""

    system: str
    recipe: str
    run: ComparedRun
    log: Sequence[Mapping[str, float]]

    @property
    def layer(self) -> int:
        return self.run.record["layer"]

    @property
    def seed(self) -> int:
        return self.run.record["seed"]

    def failed_gates(self) -> list[str]:
        """Why nothing can be concluded from this run, as sentences; empty if it passes every gate."""
        record, core = self.run.record, self.run.results.get("core")
        last = self.log[-1] if self.log else {}
        failed = []
        done = int(last.get("step", 0))
        if record["steps"] < 1 or done < record["steps"]:
            failed.append(f"it made {done:,} of {record['steps']:,} steps")
        warmup = record.get("resolved", {}).get("warmup")
        if warmup is not None and warmup > done:
            failed.append(f"its learning rate never reached its peak: {warmup:,} warm-up steps")
        alive = core.sound.metrics.get("misc_metrics", {}).get("frac_alive") if core is not None else None
        if alive is None and "dead" in last:  # mode 2024-12 has no frac_alive
            alive = 1 - last["dead"]
        if alive is not None and alive < MIN_ALIVE:
            failed.append(f"{1 - alive:.0%} of its latents are dead")
        if core is not None:
            trained, held_out = last.get("explained_variance"), explained_variance(core)
            if trained is not None and held_out is not None and abs(held_out - trained) > VARIANCE_TOLERANCE:
                failed.append(
                    f"it explains {held_out:.3f} of the variance of held-out text, but {trained:.3f} in training"
                )
        return failed


def explained_variance(core: MetricResult) -> float | None:
    """1 - (sum of squared errors) / (sum of squared deviations from the mean), without outlier rows, as in training."""
    return core.sound.metrics.get("reconstruction_quality", {}).get("fve")


@dataclass(frozen=True)
class ClaimResult:
    """A claim, the measured value as text, and the verdict."""

    claim: Claim
    measured: str
    seeds: int
    verdict: Verdict
    notes: Sequence[str]


@dataclass(frozen=True)
class PaperReport:
    paper: Paper
    runs: Sequence[SystemRun]
    rows: Sequence[ClaimResult]
    on_paper_model: bool

    @property
    def counts(self) -> dict[Verdict, int]:
        verdicts = [row.verdict for row in self.rows]
        return {verdict: verdicts.count(verdict) for verdict in dict.fromkeys(verdicts)}

    @property
    def outlier_rows(self) -> int:
        """How many outlier rows the numbers of a run count at most, because SAEBench's definitions do."""
        return max((r.n.get(OUTLIERS, 0) for run in self.runs for r in run.run.results.values()), default=0)

    @property
    def excluded(self) -> list[tuple[str, str]]:
        """The runs that fail a gate, and why."""
        return [(run.run.name, "; ".join(failed)) for run in self.runs if (failed := run.failed_gates())]


def load_system_run(system: str, recipe: str, run: ComparedRun) -> SystemRun:
    return SystemRun(system, recipe, run, read_metrics_log(run.folder))


def build_report(paper: Paper, runs: Sequence[SystemRun], on_paper_model: bool) -> PaperReport:
    """Every claim of the paper with its verdict, in order. Runs that fail a gate count as not measured."""
    sound = [run for run in runs if not run.failed_gates()]
    rows = [claim_result(claim, paper, sound, on_paper_model) for claim in paper.claims]
    failed = {run.system for run in runs} - {run.system for run in sound}
    rows = [replace(row, notes=[*row.notes, NO_RUN_PASSES]) if row.claim.system in failed else row for row in rows]
    return PaperReport(paper, runs, rows, on_paper_model)


def claim_result(claim: Claim, paper: Paper, runs: Sequence[SystemRun], on_paper_model: bool) -> ClaimResult:
    """The verdict over every layer and recipe of the claim's systems."""
    inconsistent = paper.inconsistent(claim)
    verdicts: list[Verdict] = []
    measured: list[tuple[list[float], list[float]]] = []  # of the system, and of the other
    layers = layers_of(claim, runs, on_paper_model)
    for layer in layers:
        at_layer = [run for run in runs if run.layer == layer]
        for recipe in recipes_of(claim.system, paper):
            for other_recipe in recipes_of(claim.against, paper) if claim.against else [""]:
                system_values = values_by_seed(claim, claim.system, recipe, at_layer, on_paper_model)
                other_values: dict[int, float] = {}
                if claim.against:
                    other_values = values_by_seed(claim, claim.against, other_recipe, at_layer, on_paper_model)
                values = {claim.system: system_values, claim.against: other_values}
                verdicts.append(verdict(claim, values, on_paper_model=on_paper_model, inconsistent=inconsistent))
                if system_values:
                    measured.append((list(system_values.values()), list(other_values.values())))
    if not verdicts:
        verdicts = ["paper inconsistent" if inconsistent else "not measured"]
    notes = []
    if measured and set(layers) != set(claim.layers):
        relation = "of" if set(layers) < set(claim.layers) else "instead of"
        notes.append(f"layer {', '.join(map(str, layers))} {relation} {', '.join(map(str, claim.layers))}")
    if measured and uses_stand_in(claim.metric, runs, on_paper_model):
        notes.append("measured on the standard-library substitute of the dataset")
    if claim.why:
        notes.append(claim.why)
    seeds = min((len(values) for values, _ in measured), default=0)
    return ClaimResult(claim, format_measured(claim, measured), seeds, combine_verdicts(verdicts), notes)


def layers_of(claim: Claim, runs: Sequence[SystemRun], on_paper_model: bool) -> list[int]:
    """The claim's layers that were trained. On another model: all trained layers if there are none."""
    trained = sorted({run.layer for run in runs})
    claimed = [layer for layer in trained if layer in claim.layers]
    return claimed if claimed or on_paper_model else trained


def recipes_of(system: str, paper: Paper) -> Sequence[str]:
    """The recipes of a system; for the language model by itself "", which matches any run."""
    return paper.systems[system].recipes or ("",) if system else ()


def values_by_seed(
    claim: Claim, system: str, recipe: str, runs: Sequence[SystemRun], on_paper_model: bool
) -> dict[int, float]:
    """Seed -> the claim's metric, in the runs of a system and recipe; without a recipe, in any run."""
    values: dict[int, float] = {}
    for run in runs:
        if (recipe and (run.system, run.recipe) != (system, recipe)) or run.seed in values:
            continue
        value = measured_value(claim, results_with_stand_ins(run, on_paper_model), run.log)
        if value is not None:
            values[run.seed] = value
    return values


def results_with_stand_ins(run: SystemRun, on_paper_model: bool) -> dict[str, MetricResult]:
    """The run's results. On another model the `_stdlib` variant replaces a metric that was not measured."""
    results = dict(run.run.results)
    if not on_paper_model:
        for name in STAND_INS:
            if name not in results and f"{name}_stdlib" in results:
                results[name] = results[f"{name}_stdlib"]
    return results


def uses_stand_in(metric: str, runs: Sequence[SystemRun], on_paper_model: bool) -> bool:
    name = metric.split(".")[0]
    return not on_paper_model and name in STAND_INS and not any(name in run.run.results for run in runs)


def format_measured(claim: Claim, shown: Sequence[tuple[Sequence[float], Sequence[float]]]) -> str:
    """The mean and sd over seeds, with the other system's if there is one; the range over several recipes or layers."""
    if not shown:
        return ""
    scale = 100 if claim.unit in ("%", "pp") and not (claim.unit == "%" and claim.is_change) else 1
    sign = " %" if scale == 100 else ""

    def mean_and_sd(values: Sequence[float]) -> str:
        spread = f" ± {scale * stdev(values):.2g}" if len(values) > 1 else ""
        return f"{scale * mean(values):.4g}{spread}{sign}"

    if len(shown) == 1:
        system, other = shown[0]
        return mean_and_sd(system) + (f" and {mean_and_sd(other)}" if other else "")
    means = [scale * mean(values) for values, _ in shown]
    return f"{min(means):.4g} to {max(means):.4g}{sign} over {len(shown)}"


def shown_layer(report: PaperReport) -> int:
    """The layer of figures: the first trained layer that the paper has too, else the first trained one."""
    layers = sorted({run.layer for run in report.runs})
    return next((layer for layer in layers if layer in report.paper.setup.layers), layers[0] if layers else 0)


def runs_by_system(report: PaperReport) -> dict[str, list[SystemRun]]:
    """The runs at the shown layer by system; by recipe for a system with several recipes."""
    layer = shown_layer(report)
    groups: dict[str, list[SystemRun]] = {}
    for run in report.runs:
        if run.layer == layer:
            several = len(report.paper.systems[run.system].recipes) > 1
            groups.setdefault(run.recipe if several else run.system, []).append(run)
    return groups


def metric_values(metric: str, runs: Sequence[SystemRun], on_paper_model: bool) -> list[float]:
    """A metric, named as in claims, in each run that passes the gates and has it."""
    claim = Claim(id="", where="", quote="", value=0.0, metric=metric)
    sound = [run for run in runs if not run.failed_gates()]
    values = [measured_value(claim, results_with_stand_ins(run, on_paper_model), run.log) for run in sound]
    return [value for value in values if value is not None and math.isfinite(value)]


def unreported_table(report: PaperReport) -> tuple[list[str], list[list[str]]]:
    """Headings, and a line for each thing that the paper measures without a number: mean and sd of our systems."""
    groups = runs_by_system(report)
    lines = []
    for one in report.paper.unreported:
        claim = Claim(id="", where="", quote="", value=0.0, metric=one.metric)
        values = [metric_values(one.metric, runs, report.on_paper_model) for runs in groups.values()]
        cells = [format_measured(claim, [(some, [])]) if some else "" for some in values]
        lines.append([one.what, one.metric, *cells])
    return without_empty_columns(["what", "metric", *groups], lines)


def describe_system(system: PaperSystem) -> str:
    """The recipes of a system and the options that it sets."""
    options = "".join(f" {name}={value}" for name, value in system.options.items())
    return (", ".join(system.recipes) or "the language model") + options
