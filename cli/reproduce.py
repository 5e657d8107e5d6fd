"""`sae reproduce`: train and evaluate a paper's systems, and show every claimed number next to the measured one."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..common.escaping import quote
from .console import cli_command, echo, show_table
from .options import MAX_SEED, Device, check_width, parse_tokens

if TYPE_CHECKING:
    from ..evaluate.papers.report import PaperReport
    from ..evaluate.plan import EvaluateConfig

SIZES = "Sizes (default: the paper's, or the reading's)"  # groups of flags in the help
EVALUATION = "Evaluation"


@cli_command
def reproduce(
    papers: Annotated[list[str], typer.Argument(help="000, 001, 002, 003, 004, or all.")],
    model: Annotated[
        str,
        typer.Option(help="The papers' model by default. On another model only the order of systems can be compared."),
    ] = "google/gemma-2-2b",
    layer: Annotated[
        list[int] | None, typer.Option("--layer", min=0, help="Default: each paper's layers. Can be repeated.")
    ] = None,
    seed: Annotated[
        list[int] | None,
        typer.Option("--seed", min=0, max=MAX_SEED, help="Default: each paper's three seeds. Can be repeated."),
    ] = None,
    reading: Annotated[
        str | None,
        typer.Option(
            help="How to interpret what the paper leaves open: evidence (the printed schedule, in the units that the "
            "paper's numbers suggest), literal (the printed schedule, every equation as printed) or field (this "
            "package's units and schedule). Paper 004 also has lambda_k; 003 lacks evidence. Default: "
            "evidence on the papers' model and field on others; always field for 003, because none of its numbers "
            "suggests any units and the penalty as printed had no visible effect."
        ),
    ] = None,
    cache: Annotated[Path | None, typer.Option(help="Train on this cache instead of harvesting.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for runs and pages. Default: reproduce/<model>.")] = None,
    device: Device = "auto",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print tokens, disk space, time and runs, and stop.")
    ] = False,
    steps: Annotated[int | None, typer.Option(min=1, rich_help_panel=SIZES, help="Training steps.")] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            rich_help_panel=SIZES,
            help="Tokens per batch. On another model, `--reading field` of 001 to 004 uses each recipe's default.",
        ),
    ] = None,
    width: Annotated[
        str | None,
        typer.Option(callback=check_width, rich_help_panel=SIZES, help="Number of latents, as for `sae train`."),
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(rich_help_panel=SIZES, help="Text to harvest, as for `sae harvest`.")
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=EVALUATION,
            help="As for `sae evaluate`. Default: full on the papers' model, otherwise quick and the claimed metrics.",
        ),
    ] = None,
    evaluate_tokens: Annotated[
        int | None,
        typer.Option(
            parser=parse_tokens, metavar="N", rich_help_panel=EVALUATION, help="Held-out tokens, as for `sae evaluate`."
        ),
    ] = None,
) -> None:
    """Train and evaluate a paper's systems and show each number that the paper claims next to the measured one.

    Anything that already exists is reused. To continue after an interruption, run the same command again; to add a
    seed, run it with one more --seed.
    """
    from ..common.process_group import current_process_group
    from ..workflows.reproduce import ReproduceConfig, Stages, plan_reproduction, run_reproduction
    from . import harvest, train

    config = ReproduceConfig(
        papers, model=model, layers=layer, seeds=seed, reading=reading, steps=steps, batch_size=batch_size, width=width,
        dataset=dataset, cache=cache, suite=suite, evaluate_tokens=evaluate_tokens, out=out, device=device,
    )  # fmt: skip
    plan = current_process_group().everywhere(lambda: plan_reproduction(config, echo))
    for line in plan.describe(time=dry_run):
        echo(line)
    if dry_run:
        return
    result = run_reproduction(plan, Stages(harvest.execute, train.execute, evaluate_runs, show_report))
    runs, page = quote(config.folder / "runs"), quote(config.folder / "all.html")
    echo(f"next     sae compare {runs}/* --mix --out {page}")
    if result.exit_code:
        raise typer.Exit(result.exit_code)


def evaluate_runs(config: "EvaluateConfig") -> int:
    """Evaluate runs and print what `sae evaluate` prints; returns the exit code of `sae evaluate`."""
    from ..common.process_group import current_process_group
    from ..evaluate.plan import plan_evaluation
    from .evaluate import run_evaluate

    return run_evaluate(current_process_group().everywhere(lambda: plan_evaluation(config)))


def show_report(report: "PaperReport", page: Path) -> None:
    """Print a paper's verdicts as a table, then their notes, counts and meanings, and the path of the page."""
    from ..evaluate.papers.verdict import MEANINGS

    heads = ["claim", "of", "claimed", "measured", "difference", "seeds", "verdict"]
    rows = [
        [
            row.claim.id,
            f"{row.claim.system} - {row.claim.against}" if row.claim.against else row.claim.system,
            row.claim.claimed,
            row.measured,
            row.difference,
            str(row.seeds or ""),
            row.verdict if row.counted or row.claim.copy_of else f"{row.verdict} (with {row.claim.restates})",
        ]
        for row in report.rows
    ]
    show_table(f"{report.paper.number} {report.paper.title}, reading {report.reading.name}", heads, rows)
    for note, claims in report.notes.items():
        echo(f"note     {claims[0]}{f' and {len(claims) - 1} more' if claims[1:] else ''}: {note}")
    for verdict, count in report.counts.items():
        echo(f"{count:>4} {verdict}: {MEANINGS[verdict]}.")
    if report.below_peak:
        echo(f"note     {report.below_peak}")
    echo(f"written  {page}")
