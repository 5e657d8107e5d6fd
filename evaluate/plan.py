"""Plan an evaluation: open the runs, find their text, and determine which results already exist.

Every error that can be found without loading a model is raised here, or recorded in the plan.
"""

import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..cache.context_format import ContextFormat
from ..cache.opening import open_place
from ..cache.outliers import check_max_norm
from ..cache.reader import Cache
from ..common.device import resolve_device, resolve_dtype
from ..common.errors import DamagedError, SaeError, UnavailableError, UsageError
from ..common.escaping import quote
from ..common.files import existing_parent, os_error, temporary_path
from ..common.formatting import format_bytes, format_count, shell_paths
from ..common.precision import resolve_precision
from ..common.process_group import rank_and_count
from ..harvest.architectures import check_sites, hook_width
from .artifacts import ArtifactCache, remove_stale_temporaries
from .context import EvalContext
from .inputs import artifact_cache, check_tokens, load_run, make_context, model_loader
from .metrics.base import Metric, check_mode
from .metrics.registry import SUITES, metrics_of_suite
from .norm_limits import describe_norm_limits
from .results import read_result
from .rows import EvalGroup, EvalRow, failures, placed
from .sae_text import describe_change, text_request

RESULT_BYTES, RESULT_BYTES_PER_LATENT = 1 << 20, 1024  # disk space that the results of a run can need
NEXT_SUITE = {"quick": "full", "full": "autointerp", "autointerp": ""}  # any other suite is followed by "quick"


@dataclass(frozen=True)
class EvaluateConfig:
    """The arguments of `sae evaluate`."""

    runs: Sequence[Path]
    suite: str = "quick"
    tokens: int | None = None  # None: as many as SAEBench reads, or all of the held-out text
    mode: str = "0.6.0"
    model: str | None = None
    cache: str | Path | None = None  # a folder or an address; None: the cache on which each run was trained
    max_norm: float | None = None  # mask rows over this multiple of the median norm; None: as in training; inf: no mask
    options: Sequence[str] = ()  # metric.option=value
    data: Path | None = None  # a folder to search for datasets before the Hub
    force: bool = False
    references: bool = True
    controls: Sequence[Path] = ()  # run folders of trained controls (workflows/controls.py)
    device: str = "auto"
    dtype: str = "auto"
    precision: str = "float32"  # of the SAEs' matrix multiplications


@dataclass
class EvaluatePlan:
    """The plan that `run_evaluation` carries out.

    Attributes:
        refused: runs that cannot be evaluated, and why.
        unfinished: runs that are skipped because their training is not finished.
        expected_failures: metrics that cannot run and why, as known before the run.
        notes: sentences to show after the tables.
    """

    config: EvaluateConfig
    metrics: list[Metric]
    groups: list[EvalGroup]
    artifacts: ArtifactCache
    refused: dict[Path, SaeError] = field(default_factory=dict)
    unfinished: list[Path] = field(default_factory=list)
    expected_failures: set[tuple[str, str]] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)

    @property
    def rows(self) -> list[EvalRow]:
        return [row for group in self.groups for row in group.rows]

    @property
    def has_work(self) -> bool:
        """Whether anything is left to measure."""
        return any(group.pending(metric.name) for group in self.groups for metric in self.metrics)

    def describe(self) -> list[str]:
        """The plan as lines: what cannot be evaluated, what runs on which text, and where results are written."""
        lines = [
            f"skipped  {one} has not finished training: sae train --resume {quote(one)}" for one in self.unfinished
        ]
        lines += [f"refused  {reason}" for reason in self._refusals()]
        for group in self.groups:
            lines += self._describe_group(group)
        for metric in self.metrics:
            done = sum(metric.name in row.results for row in self.rows)
            pending = sum(len(group.pending(metric.name)) for group in self.groups)
            counts = [f"{pending} to measure" if pending else "", f"{done} already measured" if done else ""]
            if any(counts):
                lines.append(f"metric   {metric.name}: {', '.join(filter(None, counts))}")
            for group in self.groups:
                if metric.name in group.settings and (rows := group.pending(metric.name)):
                    lines += metric.describe_cost(group.ctx, len(rows) + len(self.config.controls))
        lines += [f"not run  {metric}: {reason}" for metric, reason in sorted(self.expected_failures)]
        if self.has_work:
            kept = "".join(
                f"; {metric.name} {'adds' if metric.knows_what_is_kept else 'keeps'} up to {format_bytes(size)} there"
                for metric in self.metrics
                if (size := sum(group.kept_bytes(metric) for group in self.groups))
            )
            cached = f"data that do not depend on an SAE are cached in {self.artifacts.describe()}{kept}"
            lines.append(f"writes   evaluations/<metric>.json in each run; {cached}")
        return lines

    def _refusals(self) -> list[str]:
        """Each reason once, followed by the runs that it applies to, except runs that the reason itself names."""
        lines = []
        for reason in dict.fromkeys(map(str, self.refused.values())):
            names = [folder.name for folder, error in self.refused.items() if str(error) == reason]
            unnamed = [name for name in names if name not in reason]
            lines.append(reason + (f" ({', '.join(unnamed)})" if unnamed else ""))
        return lines

    def _describe_group(self, group: EvalGroup) -> list[str]:
        hooks = [row.target.hook for row in group.rows]
        counts = ", ".join(f"{hooks.count(hook)} {placed(hook)}" for hook in sorted(set(hooks)))
        kinds = ["identity, zero, a PCA and a random dictionary"] if self.config.references else []
        kinds += [format_count(len(self.config.controls), "control")] if self.config.controls else []
        references = f"; with rows for {' and '.join(kinds)}" if kinds else ""
        model, contexts = group.ctx.model_identity, group.ctx.contexts
        read = int(contexts.length.sum())
        return [
            f"runs     {counts}{references}",
            f"model    {group.ctx.model_name} at {model['revision'][:12]}, computed in {model['llm_dtype']} "
            f"on {group.ctx.device}",
            *([] if group.ctx.precision == "float32" else [f"SAEs     computed in {group.ctx.precision}"]),
            f"text     {read:,} held-out tokens in {len(contexts):,} contexts of {group.cache.place}"
            f"{whole_contexts(self.config.tokens, read, bool(group.ctx.change.identity))}",
            *(f"text     {note}" for note in group.notes),
            *describe_norm_limits(group.rows),
        ]

    def summary(self, rows: Sequence[EvalRow], seconds: float) -> list[str]:
        """The lines to print after a run that took `seconds`: unexpected failures, and where the results are."""
        lines = [f"not run  {metric}: {reason}" for metric, reason in sorted(self.unexpected_failures(rows))]
        done = f"done     in {seconds:.0f} s; all results are in evaluations/*.json of each run"
        if expected := sorted({metric for metric, _ in self.expected_failures}):
            done += f". Not run, for the reasons above: {', '.join(expected)}"
        if self.refused:
            done += f". Refused, for the reasons above: {format_count(len(self.refused), 'run')}"
        return [*lines, done]

    def unexpected_failures(self, rows: Iterable[EvalRow]) -> set[tuple[str, str]]:
        """Metrics that failed during the run, and why."""
        return failures(rows) - self.expected_failures

    def exit_code(self, rows: Sequence[EvalRow]) -> int:
        """0 if everything requested was measured, 3 if only damaged files prevented it, else 1.

        If a metric of a named suite needs data or packages that this machine lacks, that is not an error.
        """
        errors = [error for row in self.rows for error in row.errors.values()]
        failed = [*self.refused.values(), *(error for error in errors if not isinstance(error, UnavailableError))]
        if failed and all(isinstance(error, DamagedError) for error in failed):
            return DamagedError.exit_code
        if self.refused or self.unexpected_failures(rows):
            return 1
        optional = self.config.suite in SUITES and all(isinstance(error, UnavailableError) for error in errors)
        return 0 if optional or not self.expected_failures else 1

    def next_command(self) -> str:
        """The command for the next suite on the same runs; empty after the last suite.

        After `full`, the next suite is `autointerp`, which writes its prompts if there is no judge.
        """
        config = self.config
        suite = NEXT_SUITE.get(config.suite, "quick")
        if not suite:
            return ""
        flags = {"mode": "0.6.0", "cache": None, "data": None, "device": "auto", "dtype": "auto",
                 "precision": "float32"}  # and their defaults  # fmt: skip
        changed = {name: value for name in flags if (value := getattr(config, name)) != flags[name]}
        words = "".join(f" --{name} {quote(str(value))}" for name, value in changed.items())
        if config.max_norm is not None:
            words += f" --max-norm {'none' if math.isinf(config.max_norm) else f'{config.max_norm:g}'}"
        words += " --controls" if config.controls else ""
        return f"sae evaluate {shell_paths(config.runs)} --suite {suite}{words}"


def whole_contexts(asked: int | None, read: int, changed: bool) -> str:
    """A remark that follows the number of tokens if this is not the requested number; otherwise empty.

    `changed`: whether the contexts were changed to the first token and length that an imported SAE's files state.
    """
    if asked is None or asked == read:
        return ""
    if changed:
        return f" ({asked:,} requested; whole contexts are read; the SAE's files set their first token and length)"
    return f" ({asked:,} requested; {'whole contexts are read' if read > asked else 'there is no more held-out text'})"


def plan_evaluation(config: EvaluateConfig, refused: Mapping[Path, SaeError] | None = None) -> EvaluatePlan:
    """Open the runs, find their text, and read the results of earlier evaluations with the same settings.

    `EvaluatePlan.refused` contains the runs in `refused`, and all other runs that cannot be evaluated. If a metric
    cannot run, its error is in `EvalRow.errors`.

    Raises SaeError with all reasons if nothing can be measured and nothing was measured before, UsageError for
    contradictory arguments, and UnavailableError if a folder cannot be written or the disk is full.
    """
    metrics, device, dtype = resolve_config(config)
    if not config.runs:
        raise UsageError("Name the runs to evaluate: sae evaluate runs/...")
    plan = EvaluatePlan(config, metrics, [], artifact_cache(), dict(refused or {}))
    unfinished = unfinished_runs(config.runs)
    if len(unfinished) < len(config.runs):  # if all are unfinished, load_sae raises an error with a reason for each
        plan.unfinished = unfinished
    load = model_loader()
    for cache, rows in load_rows(plan, None if rank_and_count()[1] > 1 else device):  # a rank loads its SAEs later
        try:
            ctx = make_context(
                cache, mode=config.mode, tokens=config.tokens, data=config.data, device=device, dtype=dtype, load=load,
                model=config.model, origin=rows[0].record["origin"], precision=config.precision,
            )  # fmt: skip
        except SaeError as error:
            plan.refused |= dict.fromkeys((row.folder for row in rows if row.folder), error)
            continue
        group = EvalGroup(cache, ctx, rows, notes=text_notes(cache, ctx, rows))
        check_group(plan, group)
        if group.rows:
            plan.groups.append(group)
    raise_if_nothing_to_do(plan)
    plan.expected_failures = failures(plan.rows)
    if plan.has_work:
        try:
            check_writable(plan.artifacts.folder, 0)
        except UnavailableError as error:
            raise UnavailableError(
                f"{error} Data that do not depend on an SAE are cached there. Set SAE_HOME to use another folder."
            ) from error
        remove_stale_temporaries(plan.artifacts.folder)
    return plan


def resolve_config(config: EvaluateConfig) -> tuple[list[Metric], str, str]:
    """The metrics, device and dtype of a configuration. Raises UsageError if no SAE can be evaluated with it."""
    check_mode(config.mode)
    metrics = metrics_of_suite(config.suite, config.options)
    check_tokens(config.tokens)
    check_max_norm(config.max_norm)
    if config.data is not None and not config.data.is_dir():
        raise UsageError(
            f"--data {config.data} is not a folder. Give a folder that contains <name on the "
            "Hub>/<split>.jsonl or .parquet."
        )
    device = resolve_device(config.device)
    resolve_precision(config.precision, device)
    return metrics, device, resolve_dtype(config.dtype, device)


def load_rows(plan: EvaluatePlan, device: str | None) -> list[tuple[Cache, list[EvalRow]]]:
    """The runs as rows, grouped by the contexts on which they are evaluated. Fills in `plan.refused`."""
    config = plan.config
    groups: dict[tuple[str, Any], list[EvalRow]] = {}
    for folder, path in {run.resolve(): run for run in config.runs}.items():
        if path in plan.unfinished:
            continue
        try:
            row, cache = load_run(path, cache=config.cache, model=config.model, device=device, max_norm=config.max_norm)
        except SaeError as error:
            plan.refused[folder] = error
            continue
        groups.setdefault((cache.place, text_request(row.record["origin"])), []).append(row)
        if config.cache and row.record["origin"].get("fingerprint") not in (None, cache.fingerprint):
            plan.notes.append(
                f"{path} was trained on a different cache from {cache.place}, so it may have been trained on this text."
            )
    return [(open_place(place), rows) for (place, _), rows in groups.items()]


def text_notes(cache: Cache, ctx: EvalContext, rows: Sequence[EvalRow]) -> list[str]:
    """Sentences about the tokenizer, and about the contexts on which imported SAEs are evaluated."""
    form, context = ContextFormat.of(cache.identity, ctx.tokenizer), cache.identity["context"]
    return [*ctx.notes] + [
        line
        for row in rows
        for line in describe_change(row.name, row.record["origin"], ctx.change, form, context, ctx.tokenizer)
    ]


def unfinished_runs(runs: Sequence[Path]) -> list[Path]:
    """Run folders whose training has started but not finished."""
    return [run for run in runs if (run / "run.json").exists() and not (run / "sae.json").exists()]


def check_group(plan: EvaluatePlan, group: EvalGroup) -> None:
    """Remove a group's unusable rows, add them to `plan.refused`, and prepare the metrics of the other rows."""
    model_config, model = group.ctx.model_config, group.ctx.model_name
    layers = model_config.num_hidden_layers
    for row in list(group.rows):
        hook, d_in = row.target.hook, row.target.sae.d_in  # type: ignore[attr-defined]
        if not 0 <= hook.layer < layers:
            refuse_row(plan, group, row, DamagedError(
                f"{row.folder}/sae.json says layer {hook.layer}, but {model} has layers 0 to {layers - 1}. "
                "The file may have been edited; set its layer back to the original one."
            ))  # fmt: skip
            continue
        try:
            check_sites(model_config, [hook])
        except UsageError as error:
            refuse_row(plan, group, row, error)
            continue
        if d_in != (width := hook_width(hook, model_config)):
            refuse_row(plan, group, row, UsageError(
                f"{row.folder} takes activations of width {d_in}, but {model} has width {width} at {hook}. "
                "It belongs to another model."
            ))  # fmt: skip
    prepare_metrics(plan.metrics, group, plan.config.force)
    for row in list(group.rows):
        if row.folder and any(row in group.pending(metric.name) for metric in plan.metrics):
            d_sae = row.target.sae.d_sae  # type: ignore[attr-defined]
            try:
                check_writable(row.folder / "evaluations", RESULT_BYTES + RESULT_BYTES_PER_LATENT * d_sae)
            except SaeError as error:
                refuse_row(plan, group, row, error)
            else:
                remove_stale_temporaries(row.folder / "evaluations")


def prepare_metrics(metrics: Sequence[Metric], group: EvalGroup, force: bool) -> None:
    """For each metric that can run, set its settings and, unless `force` is true, read results with these settings."""
    for metric in metrics:
        try:
            group.settings[metric.name] = metric.settings(group.ctx)
        except SaeError as error:  # the metric needs data or packages that are missing
            record_failure(metric, group.rows, error)
            continue
        read_earlier_results(metric, group, group.rows, force)
        if pending := group.pending(metric.name):
            try:
                metric.check()
            except SaeError as error:
                record_failure(metric, pending, error)
                del group.settings[metric.name]


def record_failure(metric: Metric, rows: Sequence[EvalRow], error: SaeError) -> None:
    for row in rows:
        row.errors[metric.name] = error


def read_earlier_results(metric: Metric, group: EvalGroup, rows: Sequence[EvalRow], force: bool) -> None:
    """Fill in the earlier results of rows (unless `force` is true), and the errors of rows that cannot be measured."""
    for row in rows:
        try:
            settings = group.settings_of(metric, row)
            result = read_result(row.folder, metric, settings, row.record) if row.folder and not force else None
        except SaeError as error:
            row.errors[metric.name] = error
        else:
            if result:
                row.results[metric.name] = result


def refuse_row(plan: EvaluatePlan, group: EvalGroup, row: EvalRow, error: SaeError) -> None:
    group.rows.remove(row)
    if row.folder:
        plan.refused[row.folder] = error


def check_writable(folder: Path, needed: int) -> None:
    """Raise UnavailableError unless a folder is writable and `needed` bytes are free."""
    parent = existing_parent(folder)
    probe = temporary_path(parent / ".writable")
    try:
        probe.write_bytes(b"\0" * 4096)
        probe.unlink()
        free = shutil.disk_usage(parent).free
    except OSError as error:
        raise os_error(error, folder) from error
    if free < needed:
        raise UnavailableError(
            f"The disk is full: {folder} has {format_bytes(free)} free, and a result can need {format_bytes(needed)}. "
            "Free some space."
        )


def raise_if_nothing_to_do(plan: EvaluatePlan) -> None:
    """If nothing can be measured and nothing was measured before, raise all reasons as one error.

    If all reasons have the same exit code, the error has this exit code.
    """
    if any(metric.name not in row.errors for row in plan.rows for metric in plan.metrics):
        return
    errors = [*plan.refused.values(), *(error for row in plan.rows for error in row.errors.values())]
    kind = type(errors[0]) if len({error.exit_code for error in errors}) == 1 else SaeError
    raise kind("\n".join(dict.fromkeys(map(str, errors))))
