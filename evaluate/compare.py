"""Compare runs from the result files that `sae evaluate` wrote. Nothing is measured and no weights are read.

Runs that differ only in their seed form one *system*, shown as mean and standard deviation. Runs of different models,
layers, texts or settings are compared only on request (`mix`), with a list of what differs. If a run has numbers with
and without outlier rows, the numbers without outlier rows are compared.
"""

import csv
import io
import json
import statistics
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from ..cache.models import model_label
from ..common.errors import UsageError
from ..common.escaping import escape_for_csv
from ..common.precision import recorded_precision
from .compared_pairs import note_of_pairs
from .compared_runs import ComparedRun, read_references, read_results, read_run, without_weights
from .control_notes import KnownVerdicts, control_notes
from .control_shares import share_cells, share_lines
from .metrics.base import OUTLIERS, MetricColumn
from .metrics.registry import METRICS
from .paired import RunBySeed, half_interval, pair_systems
from .rows import describe_notes, digest_without_seed, notes_beside
from .tables import format_detectable, format_with_spread, metric_heading, without_empty_columns

L0 = ("core", "l0")
SUMMARY_COLUMNS = (  # (metric, number): the columns of the table, each also plotted against L0
    L0,
    ("core", "kl_div_score"),
    ("core", "ce_loss_score"),
    ("core", "fve"),
    ("core", "frac_alive"),
    ("core", "mean"),
    ("absorption", "mean_full_absorption_score"),
    ("absorption", "mean_absorption_score"),  # in mode 2024-12
    *((metric, f"sae_top_{k}_test_accuracy") for metric in ("sparse_probing", "sparse_probing_stdlib") for k in (1, 5)),
    *(("sae_probes", f"sae_top_{k}_test_auc") for k in (1, 16)),
    ("unlearning", "unlearning_score"),
    ("stability", "decoder_pw_mcc"),
    ("stability", "recurring"),
    *((metric, "disentanglement_score") for metric in ("ravel", "ravel_facts")),
    ("autointerp", "autointerp_score"),
    *(("autointerp", f"{score}_balanced_accuracy") for score in ("detection", "fuzzing")),
)
SUMMARY_METRICS = frozenset(metric for metric, _ in SUMMARY_COLUMNS)
LABEL_KEYS = ("layer", "d_sae", "l0", "steps")  # keys of run.json that labels show if the systems differ in them


@dataclass(frozen=True)
class ComparedSystem:
    """Runs of one recipe with the same options and layer, one per seed."""

    label: str
    runs: Sequence[ComparedRun] = field(repr=False)

    def on_all_rows(self) -> "ComparedSystem":
        return replace(self, runs=[run.on_all_rows() for run in self.runs])

    @property
    def run_by_seed(self) -> dict[Any, ComparedRun]:
        """Seed -> run. A seed that was trained twice is not another sample, so only its last run counts. An imported
        SAE has no seed and counts as a single seed."""
        return {run.record.get("seed", run.name): run for run in self.runs}

    def mean_and_spread(self, metric: str, column: MetricColumn) -> tuple[float, float] | None:
        """The mean and sd over seeds. For a single seed, its value and half the width of the 95 % interval of that
        value (0 if there is no interval); this interval shows the uncertainty from the sample of text."""
        measured = [run for run in self.run_by_seed.values() if run.value(metric, column) is not None]
        values = [value for run in measured if (value := run.value(metric, column)) is not None]
        if len(values) > 1:
            return statistics.mean(values), statistics.stdev(values)
        return (values[0], half_interval(measured[0], metric, column)) if values else None


@dataclass(frozen=True)
class Comparison:
    systems: Sequence[ComparedSystem]
    references: Sequence[ComparedSystem]
    differences: Sequence[str]  # sentences
    beside: Mapping[str, RunBySeed] = field(default_factory=dict, repr=False)  # all references, shown or not, by label

    @property
    def runs(self) -> list[ComparedRun]:
        return [run for system in self.systems for run in system.runs]

    @property
    def rows(self) -> list[ComparedRun]:
        """The runs, and then the references."""
        return [run for system in [*self.systems, *self.references] for run in system.runs]

    @property
    def masked_note(self) -> str:
        """A sentence about outlier rows; empty if no run has any."""
        most = max((one.n.get(OUTLIERS, 0) for run in self.runs for one in run.results.values()), default=0)
        if not most:
            return ""
        return (
            f"Outlier rows are left out (up to {most:,} per run and metric); .csv and .json files also "
            "contain SAEBench's numbers, computed over all rows."
        )

    def on_all_rows(self) -> "Comparison":
        """The same comparison, but with each number computed over all rows, including outlier rows, as in SAEBench."""
        systems, references = ([one.on_all_rows() for one in some] for some in (self.systems, self.references))
        return replace(self, systems=systems, references=references)

    @property
    def columns(self) -> list[tuple[str, MetricColumn]]:
        """The summary columns for which at least one run has a number."""
        return [(m, one) for m, one in summary_columns() if any(run.value(m, one) is not None for run in self.runs)]

    def with_control_notes(self, known: KnownVerdicts) -> "Comparison":
        """The same comparison with a note for each system that is not better than its controls, as in `sae evaluate`.

        `known` contains the verdicts of a printed table. The notes repeat these verdicts
        (docs/reference/statistics.md).
        """
        compared = {system.label: system.run_by_seed for system in self.systems}
        found = control_notes({**self.beside, **compared}, summary_columns(), known)
        systems = [
            replace(one, runs=[replace(run, control_notes=found.get(one.label, [])) for run in one.runs])
            for one in self.systems
        ]
        return replace(self, systems=systems)


def summary_columns() -> list[tuple[str, MetricColumn]]:
    """(metric name, column) of each number that appears in tables of several runs."""
    return [(metric, one) for metric, name in SUMMARY_COLUMNS for one in METRICS[metric].columns if one.name == name]


def compare_runs(folders: Sequence[Path], mix: bool = False, references: bool = True) -> Comparison:
    """Read the results of runs and group the runs into systems.

    Raises UsageError if a run has no results, or if `mix` is false and the runs differ in more than their training.
    """
    if not folders:
        raise UsageError("Name the runs to compare: sae compare runs/...")
    runs = [read_run(folder) for folder in dict.fromkeys(folders)]
    if empty := [str(run.folder) for run in runs if not run.results]:
        raise UsageError(f"{', '.join(empty)} has not been evaluated. Run: sae evaluate {' '.join(empty)}")
    differences = find_differences(runs)
    if differences and not mix:
        raise UsageError(
            "These runs differ in more than their training, so their numbers are not comparable:\n"
            + "\n".join(differences)
            + "\nCompare them separately, or pass --mix."
        )
    read = cache(read_results)
    runs = [
        replace(
            run,
            notes=[
                *notes_beside(run, read_references([run], read)),
                *mixed_seeds(run, runs),
                *note_of_pairs(run.record),
            ],
        )
        for run in runs
    ]
    systems, beside = group_by_system(runs), {} if differences else name_references(read_references(runs, read))
    shown = [ComparedSystem(name, list(found.values())) for name, found in beside.items()] if references else []
    if differences:  # the systems do not share references: each system's own are read, but none is shown
        beside = name_references([one for system in systems for one in read_references(system.runs, read)])
    return Comparison(systems, shown, differences, beside).with_control_notes({})


def name_references(found: Sequence[ComparedRun]) -> dict[str, dict[Any, ComparedRun]]:
    """References by label. The label is the name of the reference, or of its folder where names are not unique."""
    by_folder = {one.folder: one for one in found}
    counts = Counter(one.name for one in by_folder.values())
    return {
        one.name if counts[one.name] == 1 else folder.name: {one.name: one} for folder, one in by_folder.items()
    }  # fmt: skip


def mixed_seeds(run: ComparedRun, runs: Sequence[ComparedRun]) -> list[str]:
    """A sentence for each metric that was measured over one set of seeds for this run and over a different set for
    another run of the same system."""
    notes = []
    for metric, settings in run.settings.items():
        if "seeds" not in settings or "seed" not in run.record:
            continue
        others = [
            one.name
            for one in runs
            if digest_without_seed(one.record) == digest_without_seed(run.record)
            and metric in one.settings
            and seeds_of(one.settings[metric]) != seeds_of(settings)
        ]
        if others:
            notes.append(
                f"{metric} of {run.name} was measured with different seeds from {metric} of {', '.join(others[:3])}"
                f"{f' and {len(others) - 3} more' if len(others) > 3 else ''}: their numbers are not comparable. "
                f"Give all seeds in one command: sae evaluate RUN... --suite {metric}"
            )
    return notes


def seeds_of(settings: Mapping[str, Any]) -> frozenset[str]:
    """The digests of the SAE and of the other seeds with which it was compared."""
    return frozenset([settings.get("weights", ""), *settings.get("seeds", ())])


def find_differences(runs: Sequence[ComparedRun]) -> list[str]:
    """A sentence for each respect in which the runs differ, apart from how they were trained."""
    differences = []
    for name in ("model", "layer", "site"):
        values = {str(sae_location(run)[name]): run for run in runs}
        if len(values) > 1:
            differences.append(f"{name}: " + ", ".join(f"{value} ({run.name})" for value, run in values.items()))
    for metric in METRICS:
        measured = [run for run in runs if metric in run.settings]
        # Norm limits of two caches differ a little. Runs are comparable if they mask the same number of rows.
        keys = {key for run in measured for key in without_weights(run.settings[metric])} - {"norm_limit"}
        counts = {run.results[metric].n.get(OUTLIERS, 0): run for run in measured}
        if len(counts) > 1:
            shown = ", ".join(f"{rows:,} ({run.name})" for rows, run in counts.items())
            differences.append(f"{metric}, masked rows: {shown}")
        for key in sorted(keys):
            values = {json.dumps(run.settings[metric].get(key)): run for run in measured}
            if len(values) > 1:
                shown = ", ".join(f"{value[:24]} ({run.name})" for value, run in values.items())
                differences.append(f"{metric}, {key}: {shown}")
    return differences


def sae_location(run: ComparedRun) -> dict[str, Any]:
    """Where the SAE reads: the model's name, the layer and the site."""
    model = run.origin.get("model")
    return {
        "model": model and model_label(model),
        "layer": run.origin.get("layer"),
        "site": run.origin.get("site", "resid_post"),
    }


def group_by_system(runs: Sequence[ComparedRun]) -> list[ComparedSystem]:
    """Group runs that differ only in their seed; labels name the differences between the systems."""
    groups: dict[str, list[ComparedRun]] = {}
    for run in runs:
        identity = run.record if "seed" in run.record else {"folder": str(run.folder)}
        groups.setdefault(digest_without_seed(identity), []).append(run)
    records = [group[0].record for group in groups.values()]
    shown_keys = [key for key in LABEL_KEYS if len({str(record.get(key)) for record in records}) > 1]
    shown_keys += ["precision"] if len({recorded_precision(record) for record in records if record}) > 1 else []
    labels = [system_label(group[0], shown_keys) for group in groups.values()]
    return [
        ComparedSystem(label if labels.count(label) == 1 else f"{label} {group[0].name[-6:]}", group)
        for label, group in zip(labels, groups.values(), strict=True)
    ]


def system_label(run: ComparedRun, keys: Sequence[str]) -> str:
    """The variant, the values of `keys`, and the options that were set."""
    if not run.record:
        return run.name
    values = [f"{key}={run.record[key]:g}" for key in keys if key in LABEL_KEYS and run.record.get(key) is not None]
    values += [recorded_precision(run.record)] if "precision" in keys else []
    options = [f"{name}={value}" for name, value in run.record.get("options", {}).items()]
    return " ".join([run.record.get("variant", run.name), *values, *options])


def comparison_table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """The headings and the lines: first one for each system, then one for each reference, then one for each control
    with the shares that it reaches."""
    headings, lines = system_table(comparison)
    return headings, [*lines, *share_lines(systems_and_references(comparison), comparison.columns)]


def system_table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Headings, then a line for each system, then a line for each reference."""
    columns = comparison.columns
    headings = ["system", *(metric_heading(metric, column) for metric, column in columns)]
    lines = []
    for system in [*comparison.systems, *comparison.references]:
        seeds = f" ({len(system.run_by_seed)} seeds)" if len(system.run_by_seed) > 1 else ""
        cells = []
        for metric, column in columns:
            value = system.mean_and_spread(metric, column)
            cells.append(format_with_spread(*value, column.format) if value else "")
        lines.append([system.label + seeds, *cells])
    return headings, lines


def share_table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """The headings, and a line for each pair of a system and a control. For each of the system's numbers, the line
    shows the share that the control reaches. Numbers for which no share can be computed are left out."""
    headings = ["system", "control", *(metric_heading(*number).partition(" ↑")[0] for number in comparison.columns)]
    return without_empty_columns(headings, share_cells(systems_and_references(comparison), comparison.columns))


def systems_and_references(comparison: Comparison) -> dict[str, RunBySeed]:
    return {system.label: system.run_by_seed for system in [*comparison.systems, *comparison.references]}


def detectable_line(comparison: Comparison) -> list[str]:
    """The smallest detectable difference between two systems, shown below the table; empty if nothing is paired.

    The smallest detectable difference is computed for each comparison of the first system with another, as in
    `--against` (docs/reference/statistics.md), and the largest of these differences is shown.
    """
    paired = {}
    first, *others = (system.run_by_seed for system in comparison.systems)
    for metric, column in comparison.columns:
        found = [pair_systems(other, first, metric, column).differences for other in others]
        paired[metric, column] = [one for one in found if one is not None and one.has_spread and column.better]
    tests = sum(map(len, paired.values()))
    if not tests:
        return []
    cells = [
        format_detectable(max(one.detectable(tests) for one in some), column) if some else ""
        for (_, column), some in paired.items()
    ]
    return ["smallest detectable difference", *cells]


def to_records(comparison: Comparison) -> list[dict[str, Any]]:
    """Every number of every run as one flat dictionary per run, keyed by metric.category.name.

    Numbers without outlier rows are under metric.masked_category.name. If any run has such numbers, every record gets
    them; for a run without outlier rows, they equal the numbers over all rows. `notes` are sentences about misleading
    numbers.
    """
    masked = {metric for run in comparison.runs for metric, result in run.results.items() if result.masked}
    return [
        {"system": system.label, "run": run.name}
        | {key: run.record.get(key) for key in ("variant", "layer", "seed", "d_sae", "l0", "steps")}
        | dict(flat_numbers(run, masked))
        | {"notes": describe_notes(run)}
        for system in comparison.systems
        for run in system.runs
    ]


def flat_numbers(run: ComparedRun, masked: Collection[str]) -> Iterator[tuple[str, float | None]]:
    """The numbers of a run. For the metrics in `masked`, they include the numbers without outlier rows."""
    for metric, result in run.results.items():
        if metric in masked and not result.masked:
            result = replace(result, masked=result)
        for category, group in result.named_metrics.items():
            for name, value in group.items():
                yield f"{metric}.{category}.{name}", value


def to_csv(comparison: Comparison) -> str:
    """The records of the runs as CSV."""
    return records_as_csv([record | {"notes": " ".join(record["notes"])} for record in to_records(comparison)])


def records_as_csv(records: Sequence[Mapping[str, Any]]) -> str:
    """Flat dictionaries as CSV. If a spreadsheet would read a value as a formula, `escape_for_csv` turns it into plain
    text."""
    text = io.StringIO()
    names = list(dict.fromkeys(name for record in records for name in record))
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(map(escape_for_csv, names))
    writer.writerows([escape_for_csv(record.get(name)) for name in names] for record in records)
    return text.getvalue()
