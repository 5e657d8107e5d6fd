"""`sae compare`: several runs side by side."""

from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from .console import cli_command, echo, show_table

ENDINGS = (".html", ".csv", ".json")
FEW = 8  # runs that are named once more


@cli_command
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run folders that were evaluated.")],
    out: Annotated[
        list[Path] | None,
        typer.Option(help="Write it: .html is a page with plots, .csv and .json every number. Repeats."),
    ] = None,
    plots: Annotated[
        Path | None, typer.Option(help="Folder for the plots by matplotlib, as .svg and .png, for papers.")
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(help="A system of the table: what the others have more, paired by seed, with intervals."),
    ] = None,
    mix: Annotated[
        bool, typer.Option("--mix", help="Also runs of other models, layers, texts or settings; says what differs.")
    ] = False,
    references: Annotated[
        bool, typer.Option(help="Beside them the identity, zero, a PCA and a random dictionary, where measured.")
    ] = True,
) -> None:
    """Evaluated runs -> one table, frontiers over L0, curves of training. Seeds of one recipe become mean and sd."""
    import json

    from ..common.errors import UsageError
    from ..common.files import atomic_write, make_folder
    from ..common.formatting import format_count
    from ..evaluate import compare as comparing

    for path in out or []:
        if path.suffix not in ENDINGS:
            raise UsageError(f"--out {path}: the ending says what is written. Give one of {', '.join(ENDINGS)}.")
    found = comparing.compare_runs(runs, mix, references)
    beside = None if against is None else comparing.paired_table(found, against)
    for difference in found.differences:
        echo(f"differs  {difference}")
    show_table(
        f"{format_count(len(found.runs), 'run')}, {format_count(len(found.systems), 'system')}",
        *comparing.comparison_table(found),
    )
    if beside is not None:
        show_table(f"against {against}, paired by seed", *beside)
    for path in out or []:
        if path.suffix == ".csv":
            atomic_write(path, comparing.to_csv(found).encode())
        elif path.suffix == ".json":
            atomic_write(path, json.dumps(comparing.to_records(found), indent=2).encode())
        else:
            from ..evaluate.pages.comparison import comparison_page
            from ..evaluate.pages.page import write_page

            write_page(path, comparison_page(found, against))
        echo(f"written  {path}")
    if plots is not None:
        from ..evaluate.pages.plots import save_chart

        make_folder(plots)
        for chart in [*comparing.frontiers(found), *comparing.training_curves(found)]:
            stem = "-".join("".join(c if c.isalnum() else " " for c in chart.title.lower()).split())
            for ending in ("svg", "png"):
                save_chart(chart, plots / f"{stem}.{ending}")
        echo(f"written  {plots}/*.svg and *.png")
    if not out:
        same = "the same command" if len(runs) > FEW else f"sae compare {' '.join(quote(str(run)) for run in runs)}"
        echo(f"next     {same} --out compare.html")
