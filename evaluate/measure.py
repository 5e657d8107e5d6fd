"""Measure the rows of a group. For each metric, the model runs once for all rows that have no result yet."""

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields, replace

from ..common.errors import DamagedError, SaeError, UnavailableError, first_line
from ..common.files import digest_of
from ..common.memory import out_of_memory, release
from ..train.sae import SAE, load_sae
from .compare import summary_columns
from .context import EvalContext
from .control_notes import control_notes
from .metrics.base import EvalTarget, Metric, Outcome, Progress, RowSet
from .plan import EvaluatePlan, read_earlier_results
from .reference_saes import reference_targets
from .results import write_result
from .rows import EvalGroup, EvalRow, hook_suffix
from .tables import seed_verdicts, systems_of

# Called with a metric's name before the metric is measured. Returns a context manager that yields the function to which
# the metric reports its progress.
ProgressFactory = Callable[[str], AbstractContextManager[Progress]]


@contextlib.contextmanager
def no_progress_bar(title: str) -> Iterator[Progress]:
    yield lambda done, total, note="": None


def measure_all(
    plan: EvaluatePlan,
    group: EvalGroup,
    due: Mapping[str, Sequence[EvalRow]],
    references: Sequence[EvalRow],
    progress: ProgressFactory,
) -> None:
    """Measure every metric for its rows in `due` (keyed by the metric's name) and for the reference rows."""
    for metric in plan.metrics:
        if metric.name in group.settings:
            read_earlier_results(metric, group, references, plan.config.force)
            measure(metric, group, [*due.get(metric.name, ()), *references], progress)


def use_precision(rows: Sequence[EvalRow], precision: str) -> None:
    """Replace the SAE of each row by a copy that has the same weights but computes its matrix products in
    `precision`."""
    for row in rows:
        if isinstance(row.target.sae, SAE):
            sae = copy.copy(row.target.sae)
            sae.precision = precision
            row.target = replace(row.target, sae=sae)


def loaded(row: EvalRow, device: str, precision: str) -> EvalTarget:
    """The target of a row. If the plan contains the SAE without its weights (`outline_sae`), the SAE is loaded.

    Raises DamagedError if the SAE's files have changed since they were written.
    """
    sae = row.target.sae
    if not isinstance(sae, SAE) or not sae.W_enc.is_meta:
        return row.target
    assert row.sae_folder is not None
    sae = load_sae(row.sae_folder, device)
    sae.precision = precision
    return replace(row.target, sae=sae)


def loaded_targets(rows: Sequence[EvalRow], ctx: EvalContext) -> Iterator[EvalTarget]:
    """The targets of rows, with one SAE in memory at a time. A damaged SAE is left out."""
    for row in rows:
        try:
            target = loaded(row, ctx.device, ctx.precision)
        except DamagedError:
            continue
        yield target


def add_control_notes(rows: Sequence[EvalRow]) -> None:
    """Set `control_notes` of the rows: sentences that compare each system with its controls. All runs of a system get
    the same notes."""
    systems = systems_of(rows)
    found = control_notes(systems, summary_columns(), seed_verdicts(rows))
    for label, runs in systems.items():
        for row in runs.values():
            row.control_notes = found.get(label, [])


def reference_rows_if_possible(
    plan: EvaluatePlan, group: EvalGroup, row_sets: Sequence[RowSet] | None = None
) -> list[EvalRow]:
    """Like `reference_rows`. If disk space or memory is insufficient, returns no rows and adds a note to the plan."""
    try:
        return reference_rows(group, row_sets)
    except Exception as error:
        if not (isinstance(error, UnavailableError) or out_of_memory(error)):
            raise
        # Such an error occurs, for example, if the folder is read-only or a PCA does not fit into memory.
        plan.notes.append(f"The reference rows (identity, zero, PCA, random dictionary) are left out: {error}")
        return []


def reference_rows(group: EvalGroup, wanted: Sequence[RowSet] | None = None) -> list[EvalRow]:
    """Reference rows for the row sets in `wanted` (default: all row sets of the group). The results of reference rows
    are kept in the artifact cache."""
    ctx, cache, rows = group.ctx, group.cache, []
    training_text = ctx.change.apply(cache.contexts(held_out=False))
    row_sets = group.row_sets
    for hook, norm_limit in row_sets if wanted is None else wanted:
        targets = loaded_targets([row for row in group.rows if row.target.row_set == (hook, norm_limit)], ctx)
        limit = {} if norm_limit is None else {"norm_limit": norm_limit}
        site = hook_suffix(hook)
        for name, target in reference_targets(ctx, training_text, RowSet(hook, norm_limit), targets).items():
            d_sae = getattr(target.sae, "d_sae", None)
            record = {
                "reference": name, **hook.record, "d_sae": d_sae, "text": cache.fingerprint, **ctx.model_identity,
                **ctx.change.identity, **limit,
            }  # fmt: skip
            digest = digest_of(record)
            folder = ctx.artifacts.folder / "references" / f"{name}-L{hook.layer}{site}-{digest[:8]}"
            shown = name if len(row_sets) == 1 else f"{name}-L{hook.layer:02d}{site}"
            rows.append(EvalRow(shown, target, folder, record, digest))
    return rows


def describe_running_out(metric: Metric, group: EvalGroup, error: BaseException) -> str:
    """Sentences that say which device ran out of memory, and with which options a metric needs less memory."""
    sizes = [name for name in ("batch_contexts", "tokens") if name in {field.name for field in fields(metric)}]
    smaller = [f"a smaller --set {metric.name}.{name}" for name in sizes]
    ways = [*smaller, "fewer runs in one command", "--no-references", "a smaller model (--dtype bfloat16)"]
    return (
        f"{group.ctx.device} is out of memory ({first_line(error).rstrip('.')}). Results of other metrics are kept; "
        f"measure {metric.name} again with {', '.join(ways[:-1])} or {ways[-1]}."
    )


def measure(metric: Metric, group: EvalGroup, rows: Sequence[EvalRow], progress: ProgressFactory) -> None:
    """Measure one metric, in one pass, for all rows that do not have its result yet."""
    pending = group.pending(metric.name, rows)
    if not pending:
        return
    together = [row.target for row in group.measured_with(metric, pending)]
    outcomes: Sequence[Outcome]
    try:
        with progress(metric.name) as report:
            outcomes = metric.measure_both(group.ctx, together, report)[: len(pending)]
    except SaeError as error:
        outcomes = [error] * len(pending)
    except Exception as error:
        if not out_of_memory(error):
            raise
        failure = UnavailableError(describe_running_out(metric, group, error))
        release(error, group.ctx.device)  # frees the memory for the next metric
        outcomes = [failure] * len(pending)
    for row, outcome in zip(pending, outcomes, strict=True):
        if isinstance(outcome, SaeError):
            row.errors[metric.name] = outcome
            continue
        row.results[metric.name] = outcome
        if row.folder:
            try:
                write_result(row.folder, metric, group.settings_of(metric, row), outcome, row.record)
            except SaeError as error:  # such as a full disk: the result is still shown
                row.errors[metric.name] = error
