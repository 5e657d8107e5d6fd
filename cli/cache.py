"""`sae cache`: look at the activation caches, check them, mend them, remove them."""

import time
from pathlib import Path
from typing import Annotated

import typer

from .console import bar, cli_command, echo

cache_app = typer.Typer(
    no_args_is_help=True, help="Look at the activation caches under activations/; check, mend, remove."
)
Folder = Annotated[Path, typer.Argument(help="A folder under activations/.")]


@cache_app.command("list")
@cli_command
def list_() -> None:
    """Every cache, with its model, arrays and rows."""
    from ..cache.reader import list_caches
    from ..common.files import sae_home

    found = list_caches()
    if not found:
        typer.echo(f"no caches under {sae_home() / 'activations'}; `sae harvest` makes one")
    for folder, cache in found.items():
        if isinstance(cache, Exception):
            typer.echo(f"{folder}   does not open: {cache}")
            continue
        typer.echo(f"{folder}   {cache.model}, {cache.state}, {cache.rows:,} rows")


@cache_app.command()
@cli_command
def info(folder: Folder) -> None:
    """What a cache holds, and whether its files are there at their sizes; reads no activations."""
    from ..cache.reader import open_cache, recorded_modules
    from ..cache.statistics import describe_statistics
    from ..common.formatting import format_bytes

    started = time.monotonic()
    cache = open_cache(folder)
    identity = cache.identity
    typer.echo(
        f"model    {cache.model} at {identity['model']['revision'][:12]}, computed in {identity['dtype']}, {identity['attention']} attention"
    )
    typer.echo(
        f"text     {identity['data']['name']} at {identity['data']['revision'][:12]}, contexts of {identity['context']}"
    )
    files = cache.manifest["files"]
    layout = cache.layout
    typer.echo(
        f"rows     {cache.rows:,} in {layout.windows:,} windows and {len(cache.chunk_rows):,} chunks an array, {layout.storage_dtype}"
        f"{', compressed' if layout.compress else ''}: {format_bytes(sum(record['bytes'] for record in files.values()))}"
    )
    modules = recorded_modules(folder)
    for hook in cache.hooks:
        name = f"{hook.name} = {modules[hook.array]}" if hook.array in modules else hook.name
        typer.echo(f"{hook.array:8s} {name}: {describe_statistics(cache.statistics(hook.array))}")
    cache.check_sizes()
    typer.echo(
        f"files    {len(files):,}, all there at their sizes, seen in {time.monotonic() - started:.2f} s; `sae cache verify` reads them"
    )


@cache_app.command()
@cli_command
def verify(folder: Folder) -> None:
    """Read every byte and compare it with its checksum."""
    from ..cache.reader import open_cache
    from ..common.formatting import format_count

    cache = open_cache(folder)
    with bar("verify", "files") as shown:
        for number, _ in enumerate(cache.verify(), 1):
            shown(number, len(cache.manifest["files"]))
    typer.echo(f"{folder}: {format_count(len(cache.manifest['files']), 'file')}, all as recorded")


@cache_app.command()
@cli_command
def repair(
    folder: Folder,
    model: Annotated[str | None, typer.Option(help="Where the model is now, if it was moved.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Where the text is now, if it was moved.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Read every byte, and harvest again the windows of what is missing or damaged."""
    from ..common.formatting import format_count
    from ..harvest.progress import HarvestProgress
    from ..harvest.repair import repair as mend

    with bar("repair", "") as shown:
        mended = mend(folder, HarvestProgress(shown, shown.say), model=model, dataset=dataset, device=device)
    for sentence in mended:
        echo(sentence)
    typer.echo(f"{folder}: {format_count(len(mended), 'file')} mended" if mended else f"{folder}: nothing to mend")


@cache_app.command()
@cli_command
def rm(folder: Folder, yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False) -> None:
    """Remove a cache; asks first."""
    from ..cache.reader import check_removable, remove_cache
    from ..common.errors import Interrupted
    from ..common.files import folder_bytes
    from ..common.formatting import format_bytes

    check_removable(folder)
    try:
        if not yes and not typer.confirm(f"Remove {folder} ({format_bytes(folder_bytes(folder))})?", err=True):
            echo("nothing was removed")
            return
    except typer.Abort:  # Ctrl-C, or nobody is there to answer
        raise Interrupted("Nothing was removed. --yes removes without a question.") from None
    typer.echo(f"{folder} removed, {format_bytes(remove_cache(folder))} freed")
