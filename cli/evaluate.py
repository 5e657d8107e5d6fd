"""`sae evaluate`: measure trained SAEs on held-out text."""

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .console import QUIET, bar, cli_command, echo, show_table
from .options import DTYPES, PRECISIONS, Device, Tokens, parse_max_norm
from .printing import print_line
from .train import execute

if TYPE_CHECKING:
    from ..evaluate.plan import EvaluatePlan
    from ..evaluate.rows import EvalRow
    from ..train.plan import TrainPlan
    from ..workflows.controls import ControlsPlan

INPUTS = "Model and data"  # a group of flags in the help


@cli_command
def evaluate(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...",
            help="Run folders, or published SAEs, which are imported first: hf://owner/repo/folder, or a folder of "
            "another library's files. Runs trained on the same cache share the model's passes.",
        ),
    ],
    suite: Annotated[
        str, typer.Option(help="quick, full, or names of metrics separated by commas: core,absorption.")
    ] = "quick",
    tokens: Tokens = None,
    mode: Annotated[
        str, typer.Option(help="Definitions of the metrics: 0.6.0 (current SAEBench) or 2024-12 (as in the papers).")
    ] = "0.6.0",
    model: Annotated[
        str | None,
        typer.Option(
            help="Reject runs of any other model. Also sets the folder of a model that has moved, and the model of a "
            "published SAE whose files do not name it.",
            rich_help_panel=INPUTS,
        ),
    ] = None,
    layer: Annotated[
        int | None,
        typer.Option(min=0, help="The layer of a published SAE whose files do not name it.", rich_help_panel=INPUTS),
    ] = None,
    cache: Annotated[
        str | None,
        typer.Option(
            metavar="PATH|URL",
            help="Cache whose held-out text is read: a folder, or an address such as s3://bucket/pile. Default: the "
            "cache that each run was trained on.",
            rich_help_panel=INPUTS,
        ),
    ] = None,
    max_norm: Annotated[
        float | None,
        typer.Option(
            parser=parse_max_norm,
            metavar="N|none",
            help="Leave out rows whose norm exceeds this multiple of the median. Default: as in training.",
            rich_help_panel=INPUTS,
        ),
    ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="metric.option=value. Can be repeated.")] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Folder with datasets: <name on the Hub>/<split>.jsonl or .parquet.", rich_help_panel=INPUTS),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Recompute results that already exist.")] = False,
    references: Annotated[
        bool, typer.Option(help="Add rows for the identity, zero, a PCA and a random dictionary.")
    ] = True,
    controls: Annotated[
        bool,
        typer.Option(
            "--controls",
            help="Train frozen controls of the runs, once: with a random decoder, with a decoder that stays near its "
            "initialization, and with a random encoder. They are based on topk for topk runs and on batchtopk for "
            "other runs. Add their rows, and the share of each number that a control reaches.",
        ),
    ] = False,
    dtype: Annotated[
        str,
        typer.Option(
            callback=DTYPES, help="Precision of the model: auto, bfloat16 or float32.", rich_help_panel=INPUTS
        ),
    ] = "auto",
    precision: Annotated[
        str,
        typer.Option(
            callback=PRECISIONS,
            help="Precision of the SAEs' matrix products: float32, tf32 or bfloat16.",
            rich_help_panel=INPUTS,
        ),
    ] = "float32",
    device: Device = "auto",
    json_: Annotated[bool, typer.Option("--json", help="Print the rows as JSON on stdout.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
) -> None:
    """Splice trained SAEs into the language model and measure them on held-out text."""
    from ..cache.object_store import folder_or_url
    from ..common.process_group import current_process_group
    from ..evaluate.plan import EvaluateConfig, plan_evaluation
    from ..workflows.controls import ControlsPlan, plan_controls
    from ..workflows.published import PublishedConfig, find_or_import

    ranks, place = current_process_group(), folder_or_url(cache)
    with bar("verify", "rows") as shown:
        published = PublishedConfig(model=model, layer=layer, cache=place, dry_run=dry_run)
        found = ranks.first(lambda: find_or_import(runs, published, shown.say, shown))
    if not found.folders:
        ranks.everywhere(found.raise_refusals)
        return  # a dry run for SAEs that are not imported yet
    controlled = plan_controls(found.folders, device) if controls else ControlsPlan()
    config = EvaluateConfig(
        runs=found.folders,
        suite=suite,
        tokens=tokens,
        mode=mode,
        model=model,
        cache=place,
        max_norm=max_norm,
        options=set_ or [],
        data=data,
        force=force,
        references=references,
        controls=controlled.folders,
        device=device,
        dtype=dtype,
        precision=precision,
    )
    refused = {Path(text): error for text, error in found.refused.items()}
    plan = ranks.everywhere(lambda: plan_evaluation(config, refused))
    if code := run_evaluate(plan, controlled, as_json=json_, dry_run=dry_run):
        raise typer.Exit(code)
    if not dry_run and (command := plan.next_command()):
        echo(f"next     {command}")


def run_evaluate(
    plan: "EvaluatePlan", controls: "ControlsPlan | None" = None, *, as_json: bool = False, dry_run: bool = False
) -> int:
    """Print a plan, train the controls, run the plan with a progress bar, and print its tables.

    Returns the exit code. With several launched processes, the first one sends the exit code to the others after it
    has printed the tables.
    """
    from ..common.process_group import current_process_group
    from ..evaluate.run import run_evaluation

    started = time.monotonic()
    for line in [*plan.describe(), *(controls.describe() if controls else ()), *ranks_lines(plan)]:
        echo(line)
    if dry_run:
        return 1 if plan.refused or (controls and controls.problems) else 0
    are_missing = bool(controls and controls.problems)
    if controls and controls.train and controls.train.unfinished:
        are_missing |= not train_all(controls.train, table=not as_json)  # with --json, only the rows go to stdout
        plan.config = replace(plan.config, controls=controls.trained_folders)
    rows = run_evaluation(plan, lambda metric: bar(f"evaluate {metric}", ""), all_rows=not QUIET)
    code = plan.exit_code(rows) or int(are_missing)
    try:
        if not QUIET:
            show_rows(plan, rows, as_json)
            for line in plan.summary(rows, time.monotonic() - started):
                echo(line)
    finally:  # the others wait: a launcher stops all processes as soon as one ends with an error
        code = current_process_group().gather(code)[0]
    return code


def ranks_lines(plan: "EvaluatePlan") -> list[str]:
    """Lines about what each launched process will measure. Controls that are not trained yet are assigned later."""
    from ..common.process_group import rank_and_count
    from ..evaluate.deal import deal_work, describe_deal

    count = rank_and_count()[1]
    if count == 1 or QUIET:
        return []
    trained = [folder for folder in plan.config.controls if (folder / "sae.json").exists()]
    planned = replace(plan, config=replace(plan.config, controls=trained))
    return describe_deal(planned, deal_work(planned, count))


def show_rows(plan: "EvaluatePlan", rows: "Sequence[EvalRow]", as_json: bool) -> None:
    """Print rows as tables with notes, or as JSON."""
    from ..evaluate.tables import notes, tables

    if as_json:
        print_line(json.dumps([row.flat() for row in rows], indent=2))
        return
    for title, heads, lines in tables(rows):
        show_table(title, heads, lines)
    for note in [*plan.notes, *notes(rows)]:
        echo(f"note     {note}")


def train_all(controls: "TrainPlan", *, table: bool) -> bool:
    """Train the controls; returns whether all are trained. If some fail, prints why, and keeps the trained controls."""
    import torch

    from ..common.errors import Interrupted, SaeError

    try:
        execute(controls, table=table)
    except Interrupted:
        raise
    except (SaeError, MemoryError, torch.OutOfMemoryError) as error:
        failed = [run for run in controls.runs if run.problem]  # their errors were printed when they occurred
        said = failed or getattr(error, "is_reported", False)
        why = "it failed to train, for the reason above" if said else str(error)
        for run in failed or controls.unfinished:
            echo(f"not run  control {run.name}: {why}")
        return False
    return True
