"""A paper's claims beside what was measured of its systems, with the gates that stand before any verdict."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean, stdev

from ..compare import ComparedRun, read_metrics_log
from ..metrics.base import MetricResult
from .claims import Claim, Paper, PaperSystem
from .verdict import Verdict, combine_verdicts, measured_value, verdict

MIN_ALIVE = 0.10  # share of latents that fire, at least: under it the numbers are those of a collapsed SAE
VARIANCE_TOLERANCE = 0.10  # by which the explained variance of held-out text may differ from that of the last steps
NO_RUN_PASSES = "none of its runs passes the gates"
STAND_INS = ("sparse_probing", "scr")  # metrics that have a `_stdlib` one, which reads no dataset of the Hub


@dataclass(frozen=True)
class SystemRun:
    """A run of one of the paper's systems, and why nothing can be said of it, if so."""

    system: str
    recipe: str
    run: ComparedRun
    log: Sequence[Mapping[str, float]]

    @property
    def layer(self) -> int:
        return self.run.run["layer"]

    @property
    def seed(self) -> int:
        return self.run.run["seed"]

    def broken(self) -> list[str]:
        """The gates that the run does not pass, in sentences."""
        record, core = self.run.run, self.run.results.get("core")
        wrong = []
        done = int(self.log[-1]["step"]) if self.log else 0
        if record["steps"] < 1 or done < record["steps"]:
            wrong.append(f"it made {done:,} of {record['steps']:,} steps")
        warmup = record.get("resolved", {}).get("warmup")
        if warmup is not None and warmup > done:
            wrong.append(f"its learning rate never came to its peak: {warmup:,} steps of warm-up")
        alive = core.metrics.get("misc_metrics", {}).get("frac_alive") if core is not None else None
        if alive is None and self.log and "dead" in self.log[-1]:  # the definitions of 2024-12 have none
            alive = 1 - self.log[-1]["dead"]
        if alive is not None and alive < MIN_ALIVE:
            wrong.append(f"{1 - alive:.0%} of its latents are dead")
        if core is not None:
            trained, found = self.log[-1].get("explained_variance") if self.log else None, explained_variance(core)
            if trained is not None and found is not None and abs(found - trained) > VARIANCE_TOLERANCE:
                wrong.append(f"it explains {found:.3f} of the held-out text's variance, and {trained:.3f} in training")
        return wrong


def explained_variance(core: MetricResult) -> float | None:
    """The share of variance that training logs, too: 1 - the summed squared error over the summed squared deviation."""
    return core.metrics.get("reconstruction_quality", {}).get("fve")


@dataclass(frozen=True)
class ClaimResult:
    """A claim, what was measured in its place, and the verdict."""

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
        found = [row.verdict for row in self.rows]
        return {one: found.count(one) for one in dict.fromkeys(found)}

    @property
    def broken(self) -> list[tuple[str, str]]:
        """Runs that do not pass the gates, and why."""
        return [(one.run.name, "; ".join(wrong)) for one in self.runs if (wrong := one.broken())]


def load_system_run(system: str, recipe: str, run: ComparedRun) -> SystemRun:
    return SystemRun(system, recipe, run, read_metrics_log(run.folder))


def build_report(paper: Paper, runs: Sequence[SystemRun], on_paper_model: bool) -> PaperReport:
    """Every claim of the paper, in its order. Runs that do not pass the gates count as not measured."""
    sound = [run for run in runs if not run.broken()]
    rows = [claim_result(claim, paper, sound, on_paper_model) for claim in paper.claims]
    gone = {run.system for run in runs} - {run.system for run in sound}
    rows = [replace(row, notes=[*row.notes, NO_RUN_PASSES]) if row.claim.system in gone else row for row in rows]
    return PaperReport(paper, runs, rows, on_paper_model)


def claim_result(claim: Claim, paper: Paper, runs: Sequence[SystemRun], on_paper_model: bool) -> ClaimResult:
    """The verdict over every layer and recipe of the claim's systems."""
    notes, verdicts, shown, seeds = [], [], [], []
    for layer in layers_of(claim, runs, on_paper_model):
        here = [run for run in runs if run.layer == layer]
        for own in recipes_of(claim.system, paper):
            for other in recipes_of(claim.against, paper) if claim.against else [""]:
                values = {
                    claim.system: values_by_seed(claim, claim.system, own, here, on_paper_model),
                    claim.against: values_by_seed(claim, claim.against, other, here, on_paper_model)
                    if claim.against
                    else {},
                }
                inconsistent = paper.inconsistent(claim)
                verdicts.append(verdict(claim, values, on_paper_model=on_paper_model, inconsistent=inconsistent))
                if found := list(values[claim.system].values()):
                    beside = list(values[claim.against].values()) if claim.against else []
                    shown.append((found, beside))
                    seeds.append(len(found))
    if not verdicts:
        verdicts = ["paper inconsistent" if paper.inconsistent(claim) else "not measured"]
    layers = layers_of(claim, runs, on_paper_model)
    if shown and set(layers) != set(claim.layers):
        instead = "of" if set(layers) < set(claim.layers) else "in the place of"
        notes.append(f"layer {', '.join(map(str, layers))} {instead} {', '.join(map(str, claim.layers))}")
    if shown and uses_stand_in(claim.metric, runs, on_paper_model):
        notes.append("on the stand-in of the standard library")
    if claim.why:
        notes.append(claim.why)
    return ClaimResult(claim, format_measured(claim, shown), min(seeds, default=0), combine_verdicts(verdicts), notes)


def layers_of(claim: Claim, runs: Sequence[SystemRun], on_paper_model: bool) -> list[int]:
    """The claim's layers that were trained; off the paper's model, where none was, those that were."""
    there = sorted({run.layer for run in runs})
    claimed = [layer for layer in there if layer in claim.layers]
    return claimed if claimed or on_paper_model else there


def recipes_of(system: str, paper: Paper) -> Sequence[str]:
    """Those of a system; of the language model by itself one that stands for any run."""
    return paper.systems[system].recipes or ("",) if system else ()


def values_by_seed(
    claim: Claim, system: str, recipe: str, runs: Sequence[SystemRun], on_paper_model: bool
) -> dict[int, float]:
    """The claim's metric in the runs of a system and recipe; without a recipe, of the model, in whichever run has it."""
    found: dict[int, float] = {}
    for run in runs:
        if (recipe and (run.system, run.recipe) != (system, recipe)) or run.seed in found:
            continue
        value = measured_value(claim, results_with_stand_ins(run, on_paper_model), run.log)
        if value is not None:
            found[run.seed] = value
    return found


def results_with_stand_ins(run: SystemRun, on_paper_model: bool) -> dict[str, MetricResult]:
    """The run's results; off the paper's model a stand-in takes the place of what was not measured."""
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
    """The mean and sd over seeds, beside the other system's where there is one; of several recipes or layers the range."""
    if not shown:
        return ""
    scale = 100 if claim.unit in ("%", "pp") and not (claim.unit == "%" and claim.is_change) else 1
    sign = " %" if scale == 100 else ""

    def spoken(values: Sequence[float]) -> str:
        spread = f" ± {scale * stdev(values):.2g}" if len(values) > 1 else ""
        return f"{scale * mean(values):.4g}{spread}{sign}"

    if len(shown) == 1:
        own, other = shown[0]
        return spoken(own) + (f" and {spoken(other)}" if other else "")
    means = [scale * mean(own) for own, _ in shown]
    return f"{min(means):.4g} to {max(means):.4g}{sign} over {len(shown)}"


# --- numbers by system ------------------------------------------------------------------------------------------------


def shown_layer(found: PaperReport) -> int:
    """The first layer that was run and that the paper has; where it has none of them, the first that was run."""
    there = sorted({run.layer for run in found.runs})
    return next((layer for layer in there if layer in found.paper.ran.layers), there[0] if there else 0)


def runs_by_system(found: PaperReport) -> dict[str, list[SystemRun]]:
    """The runs at the layer that is shown, by system; of a system of several recipes by recipe."""
    shown = shown_layer(found)
    groups: dict[str, list[SystemRun]] = {}
    for run in found.runs:
        if run.layer == shown:
            several = len(found.paper.systems[run.system].recipes) > 1
            groups.setdefault(run.recipe if several else run.system, []).append(run)
    return groups


def metric_values(metric: str, runs: Sequence[SystemRun], on_paper_model: bool) -> list[float]:
    """A metric as claims name it in each of the runs that pass the gates and have it."""
    claim = Claim(id="", where="", quote="", value=0.0, metric=metric)
    sound = [run for run in runs if not run.broken()]
    found = [measured_value(claim, results_with_stand_ins(run, on_paper_model), run.log) for run in sound]
    return [value for value in found if value is not None and math.isfinite(value)]


def unreported_table(found: PaperReport) -> tuple[list[str], list[list[str]]]:
    """What the paper measures without giving a number: heads, and a line each, with ours of every system, mean and sd."""
    groups = runs_by_system(found)
    lines = []
    for one in found.paper.unreported:
        claim = Claim(id="", where="", quote="", value=0.0, metric=one.metric)
        values = [metric_values(one.metric, runs, found.on_paper_model) for runs in groups.values()]
        cells = [format_measured(claim, [(some, [])]) if some else "" for some in values]
        lines.append([one.what, one.metric, *cells])
    return ["what", "metric", *groups], lines


def describe_system(system: PaperSystem) -> str:
    """A system as recipes and the options that it sets."""
    options = "".join(f" {name}={value}" for name, value in system.options.items())
    return (", ".join(system.recipes) or "the language model") + options
