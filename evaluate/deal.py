"""Assign SAEs to the ranks of one command. Reads only records: no model is loaded and no weights are read.

A unit is a run, all seeds of a system (for a metric that reads them together), or a set of reference rows. Units are
ordered by hook and divided into consecutive shares so that the longest share takes as little time as possible. Each
rank then reads the model's activations at few hooks.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..cache.hooks import Hook
from ..common.bisection import smallest_bound
from ..common.formatting import format_bytes, format_count, format_duration
from ..harvest.architectures import parameter_count
from .context import EvalContext
from .controls import matching_controls
from .metrics.base import EvalTarget, Metric
from .plan import EvaluatePlan
from .rows import EvalGroup, EvalRow, placed

REFERENCES = "references"  # reference rows that need no training: identity, zero, PCA, random dictionary
REFERENCE_ROWS = 4
RATE = {"cpu": 2e10, "cuda": 2e13}  # multiplications and additions that one core or one GPU performs per second
# metric -> multiplications and additions for one SAE with default options: (per weight of the encoder, constant).
# The numbers of the first four metrics were measured on gemma-2-mini (docs/explanation/several-processes.md). Those of
# the other metrics are estimated from their number of rows.
OPERATIONS = {
    "core": (0.0, 0.0),  # see seconds_of
    "absorption": (5e4, 3e10),
    "sparse_probing_stdlib": (2e5, 1e10),
    "stability": (6e5, 0.0),
    "sparse_probing": (8e6, 2e11),
}
UNKNOWN = (2e6, 1e11)


@dataclass(frozen=True)
class Unit:
    """Work that is assigned to one rank as a whole.

    Attributes:
        runs: the run folders; for reference rows, one of the runs compared with them.
        metrics: the names of the metrics.
        beside: "" for the runs themselves, REFERENCES for untrained references, or the folder of a control.
        seconds: the estimated time; only the proportions are reliable.
    """

    runs: tuple[Path, ...]
    metrics: tuple[str, ...]
    beside: str = ""
    seconds: float = 0.0


Share = tuple[Unit, ...]  # the units that one rank measures


def deal_work(plan: EvaluatePlan, count: int) -> list[Share]:
    """The share of each of `count` ranks. Raises UsageError for a folder that is not a control."""
    units = [unit for group in plan.groups for unit in ordered_units(plan, group)]
    shares = split(units, count)
    systems = [unit for group in plan.groups for unit in system_units(plan, group)]
    for unit in sorted(systems, key=lambda unit: -unit.seconds):  # stable
        loads = [sum(one.seconds for one in share) for share in shares]
        held = [sum(len({*one.runs} & {*unit.runs}) for one in share if not one.beside) for share in shares]
        rank = min(range(count), key=lambda rank: (loads[rank], -held[rank]))
        shares[rank] = (*shares[rank], unit)
    return shares


def ordered_units(plan: EvaluatePlan, group: EvalGroup) -> list[Unit]:
    """The units of a group, ordered by hook; at each hook, the longest come first."""
    together = [metric for metric in plan.metrics if not metric.independent_seeds]
    alone = [metric for metric in plan.metrics if metric.name in group.settings and metric not in together]
    measurable = [metric for metric in plan.metrics if metric.name in group.settings]
    units: list[tuple[Hook, Unit]] = []
    for row in group.rows:
        if due := [metric for metric in alone if row in group.pending(metric.name)]:
            units.append((row.target.hook, unit_of(group, [row], due)))
    first_row = {
        row_set: next(row for row in group.rows if row.target.row_set == row_set) for row_set in group.row_sets
    }
    has_work = any(group.pending(metric.name) for metric in measurable)
    for row_set, row in first_row.items():
        beside = [(REFERENCES, REFERENCE_ROWS)] if plan.config.references else []
        beside += [
            (str(folder), 1) for folder, _, of in matching_controls(group, plan.config.controls) if of == row_set
        ]
        for name, rows in beside:
            unit = unit_of(group, [row] * rows, measurable if has_work else [], name)
            units.append((row_set.hook, unit))
    return [unit for _, unit in sorted(units, key=lambda one: (one[0], -one[1].seconds))]


def system_units(plan: EvaluatePlan, group: EvalGroup) -> Iterator[Unit]:
    """For each metric that reads all seeds of a system together, a unit for each system of a group."""
    for metric in plan.metrics:
        if metric.independent_seeds or metric.name not in group.settings:
            continue
        pending = group.pending(metric.name)
        for system, row_set in dict.fromkeys((row.target.system, row.target.row_set) for row in pending):
            rows = [row for row in group.rows if (row.target.system, row.target.row_set) == (system, row_set)]
            yield unit_of(group, rows, [metric])


def unit_of(group: EvalGroup, rows: Sequence[EvalRow], metrics: Sequence[Metric], beside: str = "") -> Unit:
    seconds = sum(seconds_of(metric, group.ctx, row.target) for metric in metrics for row in rows)
    runs = dict.fromkeys(row.folder for row in rows if row.folder)
    return Unit(tuple(runs), tuple(metric.name for metric in metrics), beside, seconds)


def seconds_of(metric: Metric, ctx: EvalContext, target: EvalTarget) -> float:
    """The approximate time in seconds of a metric for one SAE, without the work that is shared by all SAEs."""
    per_weight, others = OPERATIONS.get(metric.name, UNKNOWN)
    weights = target.sae.d_in * target.sae.d_sae  # type: ignore[attr-defined]
    operations = per_weight * weights + others
    if metric.name == "core":  # for each SAE, the unembedding and the blocks after the hook run again
        config, tokens = ctx.model_config, int(ctx.contexts.length.sum())
        unembedding = config.vocab_size * config.hidden_size
        blocks = max(parameter_count(config) - unembedding, 0)
        after = blocks * (1 - (target.layer + 1) / config.num_hidden_layers)
        operations += 2 * tokens * (after + unembedding + 2 * weights)
    return operations / RATE[ctx.device.split(":")[0]]


def split(units: Sequence[Unit], count: int) -> list[Share]:
    """Consecutive shares of the units. The longest share is as short as possible; no share is empty unless there are
    too few units."""
    seconds = [unit.seconds for unit in units]
    longest, whole = max(seconds, default=0.0), sum(seconds)
    shares = cut(units, count, smallest_bound(longest, whole, lambda limit: len(cut(units, count, limit)) <= count))
    return [*shares, *[()] * (count - len(shares))]


def cut(units: Sequence[Unit], count: int, limit: float) -> list[Share]:
    """Consecutive shares of at most `limit` seconds each; at least `count` of them if there are enough units."""
    shares: list[list[Unit]] = []
    load = 0.0
    for place, unit in enumerate(units):
        left = len(units) - place
        if not shares or load + unit.seconds > limit or left <= count - len(shares):
            shares.append([])
            load = 0.0
        shares[-1].append(unit)
        load += unit.seconds
    return [tuple(share) for share in shares]


# --- as lines of a plan -----------------------------------------------------------------------------------------------


def describe_deal(plan: EvaluatePlan, shares: Sequence[Share]) -> list[str]:
    """The lines of a plan that describe each rank's work, approximate time and memory."""
    rows = {row.folder: (group, row) for group in plan.groups for row in group.rows}
    lines = [f"deal     {format_count(len(rows), 'SAE')} to {len(shares)} processes, by width and metrics"]
    for rank, share in enumerate(shares):
        lines.append(f"rank {rank:<3} {describe_share(share, rows) if share else 'nothing'}")
    return lines


def describe_share(share: Share, rows: Mapping[Path | None, tuple[EvalGroup, EvalRow]]) -> str:
    held = dict.fromkeys(folder for unit in share if not unit.beside for folder in unit.runs)
    hooks = Counter(placed(rows[folder][1].target.hook) for folder in held)
    parts = [f"{format_count(number, 'SAE')} {place}" for place, number in hooks.items()]
    beside = Counter("reference rows" if unit.beside == REFERENCES else "a control" for unit in share if unit.beside)
    parts += [f"{number} x {what}" if number > 1 else what for what, number in beside.items()]
    memory = sum(sae_bytes(rows[folder][1].target) for folder in held)
    memory += max(model_bytes(rows[unit.runs[0]][0].ctx) for unit in share)
    seconds = sum(unit.seconds for unit in share)
    return f"{', '.join(parts)}, about {format_duration(seconds)}, {format_bytes(memory)} for the model and these SAEs"


def sae_bytes(target: EvalTarget) -> int:
    return sum(x.numel() * x.element_size() for x in target.sae.state_dict().values())  # type: ignore[attr-defined]


def model_bytes(ctx: EvalContext) -> int:
    return parameter_count(ctx.model_config) * getattr(torch, ctx.model_identity["llm_dtype"]).itemsize
