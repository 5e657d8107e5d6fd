"""`sae cache`: list, inspect, verify, repair and delete activation caches."""

import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from .console import bar, cli_command, echo
from .printing import ask, print_line

cache_app = typer.Typer(no_args_is_help=True, help="List, inspect, verify, repair and delete activation caches.")
Place = Annotated[
    str,
    typer.Argument(
        metavar="CACHE",
        help="A cache: its folder, such as one under activations/, or its address, such as s3://bucket/pile.",
    ),
]
Address = Annotated[
    str | None, typer.Argument(help="List the caches at or directly below this address instead, such as s3://bucket.")
]


@cache_app.command("list")
@cli_command
def list_(address: Address = None) -> None:
    """List every cache under activations/ with its model, arrays and number of rows."""
    from ..cache.catalog import list_caches
    from ..cache.object_store import check_slashes
    from ..cache.store_catalog import list_stored_caches
    from ..common.files import sae_home

    check_slashes(address)
    caches: Mapping[Any, Any] = list_caches() if address is None else list_stored_caches(address)
    if not caches:
        print_line(f"no caches under {address or sae_home() / 'activations'}; create one with `sae harvest`")
    for folder, cache in caches.items():
        if isinstance(cache, Exception):
            print_line(f"{folder}   cannot be opened: {cache}")
        else:
            print_line(f"{folder}   {cache.model}, {cache.state}, {cache.rows:,} rows")


@cache_app.command()
@cli_command
def info(folder: Place) -> None:
    """Print what a cache contains and check that its files exist with the recorded sizes. Reads no activations."""
    from ..cache.opening import open_cache

    started = time.monotonic()
    cache = open_cache(folder)
    for line in cache.describe():
        print_line(line)
    cache.check_sizes()
    print_line(
        f"files    {len(cache.manifest['files']):,}, all present with the recorded sizes, checked in "
        f"{time.monotonic() - started:.2f} s; `sae cache verify` checks their content"
    )


@cache_app.command()
@cli_command
def verify(folder: Place) -> None:
    """Read every record and every byte of a cache and verify the checksums."""
    from ..cache.opening import open_cache
    from ..common.formatting import format_count

    cache = open_cache(folder)
    n_files = len(cache.manifest["files"])
    with bar("verify", "files") as progress:
        for number, _ in enumerate(cache.verify(), 1):
            progress(number, n_files)
    print_line(f"{folder}: {format_count(n_files, 'file')}, all checksums match")


@cache_app.command()
@cli_command
def repair(
    folder: Place,
    model: Annotated[str | None, typer.Option(help="The model's new location, if it has moved.")] = None,
    dataset: Annotated[str | None, typer.Option(help="The dataset's new location, if it has moved.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Read every byte of a cache and re-harvest the windows with missing or damaged files."""
    from ..common.formatting import format_count
    from ..harvest.progress import HarvestProgress
    from ..harvest.repair import repair as repair_cache

    with bar("repair", "") as progress:
        repaired = repair_cache(
            folder, HarvestProgress(progress, progress.say), model=model, dataset=dataset, device=device
        )
    for message in repaired:
        echo(message)
    print_line(
        f"{folder}: {format_count(len(repaired), 'file')} repaired" if repaired else f"{folder}: no damage found"
    )


@cache_app.command()
@cli_command
def rm(folder: Place, yes: Annotated[bool, typer.Option("--yes", help="Delete without asking.")] = False) -> None:
    """Delete a cache, after asking for confirmation."""
    from ..cache.object_store import check_slashes, is_url, open_store
    from ..cache.removal import remove_cache, require_cache_folder
    from ..cache.store_catalog import remove_stored_cache, stored_files
    from ..common.errors import Interrupted
    from ..common.files import folder_bytes
    from ..common.formatting import format_bytes

    check_slashes(folder)
    if is_url(folder):
        store = open_store(folder)
        size, remove = sum(stored_files(store).values()), partial(remove_stored_cache, store)
    else:
        require_cache_folder(Path(folder))
        size, remove = folder_bytes(Path(folder)), partial(remove_cache, Path(folder))
    try:
        if not yes and not ask(f"Delete {folder} ({format_bytes(size)})?"):
            echo("nothing was deleted")
            return
    except typer.Abort:  # Ctrl-C, or stdin is closed
        raise Interrupted("Nothing was deleted. Use --yes to delete without confirmation.") from None
    print_line(f"{folder} deleted, {format_bytes(remove())} freed")
