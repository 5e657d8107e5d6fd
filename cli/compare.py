"""`sae compare`: a table and plots of several evaluated runs."""

from pathlib import Path
from typing import Annotated

import typer

from ..common.escaping import quote
from .console import cli_command, echo, show_table

SUFFIXES = (".html", ".csv", ".json")
MAX_REPEATED_RUNS = 8  # if there are more runs, the suggested next command does not list them


@cli_command
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run folders that were evaluated.")],
    out: Annotated[
        list[Path] | None,
        typer.Option(
            help="File to write: .html is a page with plots, .csv and .json hold every number. Can be repeated."
        ),
    ] = None,
    plots: Annotated[
        Path | None, typer.Option(help="Folder for plots made with matplotlib, as .svg and .png, for papers.")
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            help="A system in the table: test the other systems against it and show the smallest detectable difference."
        ),
    ] = None,
    margin: Annotated[
        list[str] | None,
        typer.Option(help="number=margin: the largest difference that --against calls equivalent. Can be repeated."),
    ] = None,
    mix: Annotated[
        bool,
        typer.Option("--mix", help="Allow runs of different models, layers, texts or settings; list what differs."),
    ] = False,
    references: Annotated[
        bool, typer.Option(help="Add the identity, zero, a PCA and a random dictionary, where they were measured.")
    ] = True,
) -> None:
    """Compare evaluated runs in a table, with L0 frontiers and training curves. Seeds become mean and sd."""
    import json

    from ..common.errors import UsageError
    from ..common.files import atomic_write
    from ..common.formatting import format_count
    from ..common.packages import import_extra
    from ..evaluate.against import compare_against
    from ..evaluate.compare import (
        SUMMARY_METRICS,
        compare_runs,
        comparison_table,
        detectable_line,
        records_as_csv,
        to_csv,
        to_records,
    )
    from ..evaluate.tables import notes

    for path in out or []:
        if path.suffix not in SUFFIXES:
            raise UsageError(f"--out {path}: unknown file type. The name must end in one of {', '.join(SUFFIXES)}.")
    if plots is not None:
        import_extra("plots", "--plots")
    comparison = compare_runs(runs, mix, references)
    if margin and against is None:
        raise UsageError("--margin needs --against: name the system to compare with, such as --against topk.")
    paired = None if against is None else compare_against(comparison, against, margin or [])
    if paired is not None:  # so that the table and the notes give the same verdict on a pair
        comparison = comparison.with_control_notes(paired.verdicts)
    for difference in comparison.differences:
        echo(f"differs  {difference}")
    counts = f"{format_count(len(comparison.runs), 'run')}, {format_count(len(comparison.systems), 'system')}"
    heads, lines = comparison_table(comparison)
    show_table(counts, heads, [*lines, *filter(None, [detectable_line(comparison)])])
    if comparison.masked_note:
        echo(f"masked   {comparison.masked_note}")
    if paired is not None:
        show_table(paired.title, *paired.table())
    for note in [*(paired.notes if paired else ()), *notes(comparison.rows, SUMMARY_METRICS)]:
        echo(f"note     {note}")
    for path in out or []:
        beside = path.with_name(f"{path.stem}-against{path.suffix}")
        if path.suffix == ".csv":
            atomic_write(path, to_csv(comparison).encode())
            if paired:
                atomic_write(beside, records_as_csv(paired.records()).encode())
        elif path.suffix == ".json":
            atomic_write(path, json.dumps(to_records(comparison), indent=2).encode())
            if paired:
                atomic_write(beside, json.dumps(paired.records(), indent=2).encode())
        else:
            from ..evaluate.pages.comparison import comparison_page
            from ..evaluate.pages.page import write_page

            write_page(path, comparison_page(comparison, paired))
        echo(f"written  {path}{f' and {beside.name}' if paired and path.suffix != '.html' else ''}")
    if plots is not None:
        from ..evaluate.compare_charts import frontiers, training_curves
        from ..evaluate.pages.plots import save_charts

        save_charts([*frontiers(comparison), *training_curves(comparison)], plots)
        echo(f"written  {plots}/*.svg and *.png")
    if not out:
        words = " ".join(quote(run) for run in runs) + flags(against, margin or [], mix=mix, references=references)
        command = f"sae compare {words}" if len(runs) <= MAX_REPEATED_RUNS else "the same command with"
        echo(f"next     {command} --out compare.html")


def flags(against: str | None, margins: list[str], *, mix: bool, references: bool) -> str:
    """The flags that determine what is compared, as text to append to a printed command that repeats the comparison."""
    words = [] if against is None else ["--against", quote(against)]
    words += [word for one in margins for word in ("--margin", quote(one))]
    words += ["--mix"] * mix + ["--no-references"] * (not references)
    return "".join(f" {word}" for word in words)
