"""Several runs side by side, from the result files that `sae evaluate` left: a table, frontiers, curves of training.

Nothing is measured here and no weights are read. Runs that differ in nothing but their seed are one *system*: the mean
over them, with their standard deviation. Numbers of other models, layers, texts or settings are not put beside each
other unless asked for, and then it is said what differs.
"""

import contextlib
import csv
import io
import json
import math
import statistics
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..common.errors import UsageError, did_you_mean
from ..common.files import read_json
from .charts import Chart, Series
from .metrics.base import MetricColumn, MetricResult
from .metrics.registry import METRICS
from .results import read_result_file
from .tables import column_heading, digest_without_seed, format_with_spread, metric_value, paired_difference

L0 = ("core", "l0")
SUMMARY_COLUMNS = (  # metric and number: the columns of the table, and what is drawn over L0
    L0,
    ("core", "kl_div_score"),
    ("core", "ce_loss_score"),
    ("core", "fve"),
    ("core", "frac_alive"),
    ("core", "mean"),
    ("absorption", "mean_full_absorption_score"),
    ("absorption", "mean_absorption_score"),  # of 2024-12
    *((metric, f"sae_top_{k}_test_accuracy") for metric in ("sparse_probing", "sparse_probing_stdlib") for k in (1, 5)),
    *((metric, "scr_metric_threshold_20") for metric in ("scr", "scr_stdlib")),
    *((metric, "tpp_threshold_20_total_metric") for metric in ("tpp", "tpp_stdlib")),
    ("unlearning", "unlearning_score"),
    ("autointerp", "autointerp_score"),
)
CURVE_TITLES = {
    "explained_variance": "variance unexplained",
    "l0": "L0",
    "dead": "dead",
    "loss": "loss",
}  # as logged, as shown
LOG_SCALE_CURVES = ("explained_variance", "loss")
PUBLISHED = Path(__file__).parent / "published.toml"


@dataclass(frozen=True)
class ComparedRun:
    """A run as its files tell it: sae.json's origin, run.json, and the result of each metric with its settings."""

    name: str
    folder: Path
    origin: dict[str, Any]
    run: dict[str, Any]
    results: dict[str, MetricResult]
    settings: dict[str, dict[str, Any]]
    reference: bool = False

    @property
    def target(self) -> "ComparedRun":  # as `notes` asks a row of an evaluation
        return self

    def value(self, metric: str, number: MetricColumn) -> float | None:
        return metric_value(self, metric, number) if metric in self.results else None


@dataclass(frozen=True)
class ComparedSystem:
    """Runs of one recipe, options and layer; of several seeds, or one."""

    label: str
    runs: Sequence[ComparedRun] = field(repr=False)

    @property
    def seeds(self) -> dict[Any, ComparedRun]:
        """The run of each seed. Of one seed trained again the last one: it is no other draw. A run without a seed is one."""
        return {run.run.get("seed", run.name): run for run in self.runs}

    def mean_and_spread(self, metric: str, number: MetricColumn) -> tuple[float, float] | None:
        """The mean and sd over seeds; of one seed its number and half its 95 % interval over the text, or 0."""
        measured = [(run, value) for run in self.seeds.values() if (value := run.value(metric, number)) is not None]
        values = [value for _, value in measured]
        if len(values) > 1:
            return statistics.mean(values), statistics.stdev(values)
        if not values:
            return None
        low, high = measured[0][0].results[metric].intervals.get(number.category, {}).get(number.name) or (None, None)
        return values[0], 0.0 if low is None or high is None else (high - low) / 2


@dataclass(frozen=True)
class Comparison:
    systems: Sequence[ComparedSystem]
    references: Sequence[ComparedSystem]
    differences: Sequence[str]  # sentences

    @property
    def runs(self) -> list[ComparedRun]:
        return [run for system in self.systems for run in system.runs]

    @property
    def columns(self) -> list[tuple[str, MetricColumn]]:
        """Of SUMMARY, what at least one run has."""
        found = [(m, n) for m, name in SUMMARY_COLUMNS for n in METRICS[m].columns if n.name == name]
        return [(m, n) for m, n in found if any(run.value(m, n) is not None for run in self.runs)]


def compare_runs(folders: Sequence[Path], mix: bool = False, references: bool = True) -> Comparison:
    """Read the runs' results. Raises UsageError for runs without any, and, unless `mix`, for those that differ in more
    than what was trained."""
    if not folders:
        raise UsageError("Name the runs to compare: sae compare runs/...")
    runs = [read_run(folder) for folder in dict.fromkeys(folders)]
    if empty := [str(run.folder) for run in runs if not run.results]:
        raise UsageError(f"{', '.join(empty)}: nothing was measured there yet. Run: sae evaluate {' '.join(empty)}")
    differences = find_differences(runs)
    if differences and not mix:
        raise UsageError(
            "These runs cannot be read beside each other:\n"
            + "\n".join(differences)
            + "\nCompare them apart, or with --mix."
        )
    beside = (
        [ComparedSystem(run.name, [run]) for run in read_references(runs)] if references and not differences else []
    )
    return Comparison(group_by_system(runs), beside, differences)


def read_run(folder: Path) -> ComparedRun:
    if not (folder / "sae.json").exists():
        raise UsageError(f"{folder} holds no trained SAE (no sae.json). Give run folders: sae compare runs/...")
    origin = read_json(folder / "sae.json", "origin")["origin"]
    run = read_json(folder / "run.json") if (folder / "run.json").exists() else {}
    return ComparedRun(folder.resolve().name, folder, origin, run, *read_results(folder))


def read_results(folder: Path) -> tuple[dict[str, MetricResult], dict[str, dict[str, Any]]]:
    """Each metric's result file, and its settings."""
    paths = {name: folder / "evaluations" / f"{name}.json" for name in METRICS}
    there = {name: path for name, path in paths.items() if path.exists()}
    results = {name: read_result_file(path, METRICS[name]) for name, path in there.items()}
    return results, {name: read_json(path, "eval_config")["eval_config"] for name, path in there.items()}


def read_references(runs: Sequence[ComparedRun]) -> list[ComparedRun]:
    """The identity, zero, PCA and random dictionaries that were measured on the runs' text and layer."""
    from ..common.files import sae_home

    layer = runs[0].origin.get("layer")
    settings = {metric: shared for run in runs for metric, shared in run.settings.items()}
    found = []
    for folder in sorted((sae_home() / "activations" / "evaluation" / "references").glob(f"*-L{layer}-*")):
        results, theirs = read_results(folder)
        fits = [m for m in results if m in settings and without_weights(theirs[m]) == without_weights(settings[m])]
        if fits:
            name = folder.name.split(f"-L{layer}-")[0]
            found.append(ComparedRun(name, folder, {}, {}, {m: results[m] for m in fits}, theirs, reference=True))
    return found


def without_weights(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings without the SAE's own digest."""
    return {name: value for name, value in settings.items() if name != "weights"}


def find_differences(runs: Sequence[ComparedRun]) -> list[str]:
    """One sentence for each thing, other than the training, that not all runs have the same."""
    found = []
    for name in ("model", "layer", "site"):
        values = {str(sae_location(run)[name]): run for run in runs}
        if len(values) > 1:
            found.append(f"{name}: " + ", ".join(f"{value} ({run.name})" for value, run in values.items()))
    for metric in METRICS:
        measured = [run for run in runs if metric in run.settings]
        for key in sorted({key for run in measured for key in without_weights(run.settings[metric])}):
            values = {json.dumps(run.settings[metric].get(key)): run for run in measured}
            if len(values) > 1:
                shown = ", ".join(f"{value[:24]} ({run.name})" for value, run in values.items())
                found.append(f"{metric}, {key}: {shown}")
    return found


def sae_location(run: ComparedRun) -> dict[str, Any]:
    """Where the SAE stands: the model's name, the layer and the site."""
    name = run.origin.get("model", {}).get("name")
    return {"model": name, "layer": run.origin.get("layer"), "site": run.origin.get("site", "resid_post")}


def group_by_system(runs: Sequence[ComparedRun]) -> list[ComparedSystem]:
    """Runs that differ in their seed alone, together; labels say what tells the systems apart."""
    groups: dict[str, list[ComparedRun]] = {}
    for run in runs:
        groups.setdefault(
            digest_without_seed(run.run if "seed" in run.run else {"folder": str(run.folder)}), []
        ).append(run)
    firsts = [group[0].run for group in groups.values()]
    several = {
        name for name in ("layer", "d_sae", "l0", "steps") if len({str(first.get(name)) for first in firsts}) > 1
    }
    labels = [system_label(group[0], several) for group in groups.values()]
    return [
        ComparedSystem(label if labels.count(label) == 1 else f"{label} {group[0].name[-6:]}", group)
        for label, group in zip(labels, groups.values(), strict=True)
    ]


def system_label(run: ComparedRun, several: set[str]) -> str:
    """The variant, the options that were set, and which of layer, width, L0 and steps it has where those differ."""
    if not run.run:
        return run.name
    kept = [
        f"{name}={run.run[name]:g}"
        for name in ("layer", "d_sae", "l0", "steps")
        if name in several and run.run.get(name) is not None
    ]
    options = [f"{name}={value}" for name, value in run.run.get("options", {}).items()]
    return " ".join([run.run.get("variant", run.name), *kept, *options])


def comparison_table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Heads, and a line for each system and then each reference."""
    columns = comparison.columns
    heads = ["system", *(metric_heading(metric, number) for metric, number in columns)]
    lines = []
    for system in [*comparison.systems, *comparison.references]:
        seeds = f" ({len(system.seeds)} seeds)" if len(system.seeds) > 1 else ""
        found = [system.mean_and_spread(metric, number) for metric, number in columns]
        cells = [format_with_spread(*at, n.format) if at else "" for at, (_, n) in zip(found, columns, strict=True)]
        lines.append([system.label + seeds, *cells])
    return heads, lines


def paired_table(comparison: Comparison, against: str) -> tuple[list[str], list[list[str]]]:
    """What each system has more than the one labelled `against`, in runs of the same seed: the mean difference, and half
    its 95 % interval by Student's t. Raises UsageError when there is no such system, or no two seeds in common."""
    base = next((system for system in comparison.systems if system.label == against), None)
    labels = [system.label for system in comparison.systems]
    if base is None:
        raise UsageError(f"There is no system {against} here{did_you_mean(against, labels)}")
    first = base.seeds
    lines = []
    for system in comparison.systems:
        pairs = [(run, first[seed]) for seed, run in system.seeds.items() if seed in first]
        if system is not base and len(pairs) > 1:
            cells = [
                paired_difference([p for p in pairs if m in p[0].results and m in p[1].results], m, n)
                for m, n in comparison.columns
            ]
            lines.append([f"{system.label} ({len(pairs)} seeds)", *cells])
    if not lines:
        raise UsageError(
            f"No system has two seeds in common with {against}; train more with --seed 0 --seed 1 --seed 2."
        )
    return [f"minus {against}", *(metric_heading(metric, number) for metric, number in comparison.columns)], lines


def metric_heading(metric: str, number: MetricColumn) -> str:
    """The number's head, under the name of its metric where its own does not say it."""
    named = {"absorption": "absorption", "sparse_probing": "probing", "sparse_probing_stdlib": "stdlib probing"}
    over = named.get(metric, "stdlib" if metric.endswith("_stdlib") else "")
    return f"{over}\n{column_heading(number)}" if over else column_heading(number)


def to_records(comparison: Comparison) -> list[dict[str, Any]]:
    """Every number of every run, flat, by metric.category.name; with what the run is."""
    about = ("variant", "layer", "seed", "d_sae", "l0", "steps")
    return [
        {"system": system.label, "run": run.name, **{name: run.run.get(name) for name in about}}
        | {
            f"{m}.{c}.{n}": v
            for m, r in run.results.items()
            for c, group in r.metrics.items()
            for n, v in group.items()
        }
        for system in comparison.systems
        for run in system.runs
    ]


def to_csv(comparison: Comparison) -> str:
    lines = to_records(comparison)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for line in lines for name in line)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def frontiers(comparison: Comparison) -> list[Chart]:
    """Each column over L0: a series for each recipe, through its systems in the order of L0; references as points."""
    l0 = next(n for n in METRICS[L0[0]].columns if n.name == L0[1])
    families = list(
        dict.fromkeys(series_name(system, comparison) for system in [*comparison.systems, *comparison.references])
    )
    charts = []
    for metric, number in comparison.columns:
        if (metric, number.name) == L0:
            continue
        lines: dict[str, list[tuple[float, float, float, str]]] = {}
        for system in [*comparison.systems, *comparison.references]:
            x, y = system.mean_and_spread("core", l0), system.mean_and_spread(metric, number)
            if x and y and x[0] > 0:
                name = series_name(system, comparison)
                lines.setdefault(name, []).append((x[0], *y, f"{system.label}: L0 {x[0]:.1f}, {y[0]:.4g}"))
        series = [frontier_series(name, sorted(points), families.index(name)) for name, points in lines.items()]
        title = metric_heading(metric, number).split("\n0")[0].replace("\n", " ")
        charts.append(Chart(title, "L0", title, series + published_series(comparison, metric, number), x_log=True))
    return charts


def frontier_series(name: str, points: Sequence[tuple[float, float, float, str]], look: int) -> Series:
    x, y, spread, labels = zip(*points, strict=True)
    return Series(name, x, y, "both" if len(points) > 1 else "points", spread, labels, look)


def series_name(system: ComparedSystem, comparison: Comparison) -> str:
    """The systems that one line goes through: those of a recipe and width, PCA of all ranks, random dictionaries of all L0."""
    if system.runs[0].reference:
        return system.label.split("-")[0]
    run = system.runs[0].run
    widths = {one.run.get("d_sae") for one in comparison.runs}
    wide = f" {run['d_sae']}" if len(widths) > 1 and run.get("d_sae") else ""
    return f"{run.get('variant', system.label)}{wide}"


def published_series(comparison: Comparison, metric: str, number: MetricColumn) -> list[Series]:
    """What others measured at the same place of the same model, where a number of the chart's kind was published."""
    here = (*sae_location(comparison.runs[0]).values(), metric, number.name)
    found = []
    for one in tomllib.loads(PUBLISHED.read_text())["series"]:
        if (one["model"], one["layer"], "resid_post", one["metric"], one["number"]) == here:
            labels = [f"{one['name']}, published: L0 {x}, {y}" for x, y in one["points"]]
            found.append(Series(f"{one['name']} (published)", *zip(*one["points"], strict=True), "both", labels=labels))
    return found


def training_curves(comparison: Comparison) -> list[Chart]:
    """What training logged, over tokens: a line for each run. Of the explained variance what is missing to 1."""
    logs = {run.name: read_metrics_log(run.folder) for run in comparison.runs}
    charts = []
    for name, title in CURVE_TITLES.items():
        series = []
        for look, (run, log) in enumerate(logs.items()):
            points = [(line["tokens"], line[name]) for line in log if "tokens" in line and name in line]
            y = [1 - value if name == "explained_variance" else value for _, value in points]
            series.append(Series(run, [tokens for tokens, _ in points], y, "line", look=look))
        if any(one.x for one in series):
            charts.append(Chart(title, "tokens", title, series, y_log=name in LOG_SCALE_CURVES))
    return charts


def read_metrics_log(folder: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl, and of each what is a number; one that a kill cut off is left out."""
    path = folder / "metrics.jsonl"
    found = []
    for text in path.read_text(errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError, ArithmeticError, RecursionError):
            line = json.loads(text)
            numbers = line.items() if isinstance(line, dict) else ()
            found.append({name: float(value) for name, value in numbers if type(value) in (int, float)})
    return [line for line in found if math.isfinite(line.get("step", math.nan))]
