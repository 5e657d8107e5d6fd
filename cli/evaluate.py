"""What `sae evaluate` prints: its plan, its progress, what came of it."""

import json
import time
from pathlib import Path
from shlex import quote
from typing import Annotated, Any

import typer

from .console import bar, cli_command, echo, show_table
from .options import Device, Tokens


def run_evaluate(request: Any, as_json: bool = False, dry_run: bool = False) -> list[Any]:
    from ..evaluate.plan import plan_evaluation, unfinished_runs
    from ..evaluate.run import run_evaluation
    from ..evaluate.tables import notes, tables

    started = time.monotonic()
    planned = plan_evaluation(request)
    for folder in unfinished_runs(request.runs):
        echo(f"skipped  {folder} is not trained to its end: sae train --resume {quote(str(folder))}")
    foreseen = show_plan(planned)
    if dry_run:
        if planned.refused:
            raise typer.Exit(1)
        return []
    rows = run_evaluation(planned, lambda metric: bar(f"evaluate {metric}", ""))
    if as_json:
        typer.echo(json.dumps([row.flat() for row in rows], indent=2))
    else:
        for title, heads, lines in tables(rows):
            show_table(title, heads, lines)
        for note in [*planned.notes, *notes(rows)]:
            echo(f"note     {note}")
    unforeseen = failures(rows) - foreseen
    for metric, sentence in sorted(unforeseen):
        echo(f"not run  {metric}: {sentence}")
    above = ", ".join(sorted({metric for metric, _ in foreseen}))
    echo(
        f"done     in {time.monotonic() - started:.0f} s; runs/*/evaluations/*.json hold everything"
        f"{f'. Not run, as said above: {above}' if above else ''}{left_out(planned)}"
    )
    if unforeseen or planned.refused or (foreseen and not lenient(planned)):
        raise typer.Exit(1)
    return rows


def lenient(planned: Any) -> bool:
    """Whether all that was foreseen not to run is what a suite takes if the machine has it."""
    from ..common.errors import UnavailableError
    from ..evaluate.metrics.registry import SUITES

    errors = [error for row in planned.rows for error in row.failed.values()]
    return planned.config.suite in SUITES and all(isinstance(error, UnavailableError) for error in errors)


def failures(rows: Any) -> set[tuple[str, str]]:
    """Metric and sentence, each once."""
    return {(m, str(error)) for row in rows if not row.target.reference for m, error in row.failed.items()}


def left_out(planned: Any) -> str:
    count = len(planned.refused)
    return f". {count} run{'s were' if count > 1 else ' was'} left out, as said above" if count else ""


def show_plan(planned: Any) -> set[tuple[str, str]]:
    """What will be measured, on what and where it goes, as lines; returns what is known not to run."""
    from ..common.files import folder_bytes, free_space
    from ..common.formatting import format_bytes

    for sentence in dict.fromkeys(map(str, planned.refused.values())):
        names = [folder.name for folder, error in planned.refused.items() if str(error) == sentence]
        unnamed = [name for name in names if name not in sentence]
        echo(f"refused  {sentence}" + (f" ({', '.join(unnamed)})" if unnamed else ""))
    for group in planned.groups:
        ctx = group.ctx
        layers = sorted({row.target.layer for row in group.rows})
        behind = ", ".join(
            f"{sum(row.target.layer == layer for row in group.rows)} after layer {layer}" for layer in layers
        )
        beside = "; beside them identity, zero, a PCA and a random dictionary" if planned.config.references else ""
        echo(f"runs     {behind}{beside}")
        identity = ctx.model_identity
        echo(
            f"model    {identity['model']} at {identity['revision'][:12]}, computed in {identity['llm_dtype']} on {ctx.device}"
        )
        tokens = int(ctx.contexts.length.sum())
        echo(f"text     {tokens:,} held-out tokens in {len(ctx.contexts):,} contexts of {group.cache.folder}")
    for metric in planned.metrics:
        kept = sum(metric.name in row.results for row in planned.rows)
        todo = sum(len(group.todo(metric.name)) for group in planned.groups)
        counts = [f"{todo} to measure" if todo else "", f"{kept} kept from before" if kept else ""]
        if any(counts):
            echo(f"metric   {metric.name}: {', '.join(filter(None, counts))}")
    foreseen = failures(planned.rows)
    for metric, sentence in sorted(foreseen):
        echo(f"not run  {metric}: {sentence}")
    if any(group.todo(metric.name) for group in planned.groups for metric in planned.metrics):
        artifacts = planned.artifacts.folder
        there = folder_bytes(artifacts)
        echo(
            f"writes   evaluations/<metric>.json of each run; what no SAE changes is kept in {artifacts} "
            f"({format_bytes(there)} now, {format_bytes(free_space(artifacts))} free)"
        )
    return foreseen


def next_evaluate(request: Any) -> str:
    """The command that measures more of the same runs, of which autointerp without a judge gives the prompts; or none."""
    suite = {"quick": "full", "full": "autointerp", "autointerp": ""}.get(request.suite, "quick")
    if not suite:
        return ""
    kept = {"mode": (request.mode, "0.6.0"), "cache": (request.cache, None), "data": (request.data, None), "device": (request.device, "auto"), "dtype": (request.dtype, "auto")}  # fmt: skip
    flags = [f" --{name} {quote(str(given))}" for name, (given, default) in kept.items() if given != default]
    return f"sae evaluate {runs_text(request.runs)} --suite {suite}{''.join(flags)}"


def runs_text(runs: Any) -> str:
    """The runs as words of a command: those of a whole folder by a star."""
    parents = {Path(run).parent for run in runs}
    if len(parents) == 1 and len(runs) > 2:
        parent = parents.pop()
        if {path for path in parent.iterdir() if not path.name.startswith(".")} == set(map(Path, runs)):
            return f"{quote(str(parent))}/*"
    return " ".join(quote(str(run)) for run in runs)


@cli_command
def evaluate(
    runs: Annotated[list[Path], typer.Argument(help="Run folders; those of one cache share every pass of the model.")],
    suite: Annotated[str, typer.Option(help="quick, full, or metrics by name: core,...")] = "quick",
    tokens: Tokens = None,
    mode: Annotated[
        str, typer.Option(help="Definitions: 0.6.0 (SAEBench now) or 2024-12 (behind the papers).")
    ] = "0.6.0",
    model: Annotated[str | None, typer.Option(help="Refuse runs of another model.")] = None,
    cache: Annotated[
        Path | None,
        typer.Option(
            help="Whose held-out text is read, of the runs' model. Default: the cache that they were trained on."
        ),
    ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="metric.option=value. Repeats.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder with datasets: <name on the Hub>/<split>.jsonl or .parquet.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Measure again what was measured.")] = False,
    references: Annotated[
        bool, typer.Option(help="Add rows for the identity, zero, a PCA and a random dictionary.")
    ] = True,
    dtype: Annotated[str, typer.Option(help="What the model computes in: auto, bfloat16, float32.")] = "auto",
    device: Device = "auto",
    json_: Annotated[bool, typer.Option("--json", help="Print the rows as JSON on stdout.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
) -> None:
    """Runs -> numbers: splice each SAE into the model and measure what it costs, on held-out text."""
    from ..evaluate.plan import EvaluateConfig

    request = EvaluateConfig(
        runs=runs, suite=suite, tokens=tokens, mode=mode, model=model, cache=cache, options=set_ or [], data=data, force=force,
        references=references, device=device, dtype=dtype,
    )  # fmt: skip
    rows = run_evaluate(request, json_, dry_run)
    if rows and (command := next_evaluate(request)):
        echo(f"next     {command}")
