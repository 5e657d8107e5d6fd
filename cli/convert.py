"""`sae export` and `sae import`: convert SAEs to and from the formats of other libraries, and upload them to and
download them from the Hugging Face Hub.
"""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..common.escaping import quote
from .console import Bar, bar, cli_command, echo, show_table
from .printing import ask, print_line

if TYPE_CHECKING:
    from ..train.formats.import_ import ImportResult

HUB = "With --to hub"
OVERRIDES = "If the files do not contain it, or to override them"
LIST = "Listing SAEs"


@cli_command
def export(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    to: Annotated[str, typer.Option(help="saelens, gemma-scope, dictionary-learning, sparsify or hub.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder to write, new or empty. Default: exports/<to> in the run folder.")
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(help="Cache with rows to verify on. Default: the cache that the run was trained on."),
    ] = None,
    approximate: Annotated[
        str | None,
        typer.Option(help="Approximate an SAE that the format cannot store, with topk, jumprelu or relu."),
    ] = None,
    repo: Annotated[str | None, typer.Option(rich_help_panel=HUB, help="Repository to upload to: owner/name.")] = None,
    private: Annotated[
        bool, typer.Option("--private", rich_help_panel=HUB, help="Make a new repository private.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", rich_help_panel=HUB, help="Upload without asking.")] = False,
) -> None:
    """Write a run in the format of another library, and verify the written files."""
    from ..common.errors import UsageError

    if to == "hub":
        if repo is None or out is not None:
            raise UsageError("--to hub needs --repo owner/name and does not accept --out.")
        from ..train.formats.upload import upload_sae

        with bar("verify", "rows") as shown:
            url = upload_sae(
                run,
                repo,
                private=private,
                approximate=approximate,
                cache=cache,
                confirm=lambda question: yes or confirm(question, shown),
                say=shown.say,
                progress=shown,
            )
        echo(f"done     {url}")
        return
    if repo is not None or private or yes:
        raise UsageError("--repo, --private and --yes need --to hub.")
    from ..train.formats.export import export_sae

    with bar("verify", "rows") as shown:
        exported = export_sae(run, to, out, approximate=approximate, cache=cache, progress=shown)
    for note in exported.notes:
        echo(f"note     {note}")
    echo(f"checked  {exported.check}")
    for path in exported.files:
        echo(f"file     {path} ({path.stat().st_size:,} bytes)")


def confirm(question: str, shown: Bar) -> bool:
    """Ask on the terminal, while the bar is hidden. Raises UsageError if there is no terminal to ask on."""
    from ..common.errors import UsageError

    if not sys.stdin.isatty():
        raise UsageError("No terminal to ask for confirmation; nothing was uploaded. Use --yes to upload anyway.")
    shown.progress.stop()
    try:
        return ask(question)
    except typer.Abort:
        return False


@cli_command
def import_(
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH", help="Folder with another library's files, or hf://owner/repo\\[@revision]/folder."
        ),
    ],
    cache: Annotated[
        Path | None,
        typer.Option(
            help="Cache of the SAE's model, to verify and evaluate on. Default: the only one that matches.",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Where to create the run folder. Default: runs/.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run folder.")] = None,
    model: Annotated[str | None, typer.Option(rich_help_panel=OVERRIDES, help="Id on the Hub, or a folder.")] = None,
    layer: Annotated[
        int | None,
        typer.Option(min=0, rich_help_panel=OVERRIDES, help="Zero-based block; selects an SAE if there are several."),
    ] = None,
    list_: Annotated[
        bool,
        typer.Option(
            "--list",
            rich_help_panel=LIST,
            help="Show the SAEs of a repository (owner/repo, hf://owner/repo/folder) or folder. --layer filters them.",
        ),
    ] = False,
    width: Annotated[str | None, typer.Option(rich_help_panel=LIST, help="Only this many latents: 16k.")] = None,
    site: Annotated[str | None, typer.Option(rich_help_panel=LIST, help="Only this site: resid_post.")] = None,
    json_: Annotated[bool, typer.Option("--json", rich_help_panel=LIST, help="Print JSON on stdout.")] = False,
) -> None:
    """Create a run from the files of another library. Executes no code from them."""
    from ..common.errors import UsageError

    if list_:
        if (cache, out, name, model) != (None, None, None, None):
            raise UsageError("--list imports nothing and does not accept --cache, --out, --name or --model.")
        show_release(path, layer=layer, site=site, width=width, as_json=json_)
        return
    if width is not None or site is not None or json_:
        raise UsageError("--width, --site and --json need --list.")
    from ..train.formats.import_ import import_sae
    from ..workflows.published import check_hook

    with bar("verify", "rows") as shown:
        imported = import_sae(
            path,
            model=model,
            layer=layer,
            cache=cache,
            out=out,
            name=name,
            check_hook=check_hook,
            say=shown.say,
            progress=shown,
        )
    for line in describe_import(imported):
        echo(line)


def show_release(text: str, *, layer: int | None, site: str | None, width: str | None, as_json: bool) -> None:
    """Print the content of a release: a table of SAEs or groups of SAEs, the release's other content, and the next
    command.
    """
    from ..common.formatting import format_count
    from ..train.formats.listing import MAX_ROWS, list_release

    with bar("read configs", "files") as shown:
        release = list_release(text, layer=layer, site=site, width=width, progress=shown)
    refused = ", ".join(format_count(count, kind) for kind, count in sorted(release.refused.items()))
    if as_json:
        record = {"release": release.name, "commit": release.commit, "saes": release.records()}
        print_line(json.dumps({**record, "refused": release.refused}, indent=2))
        return
    commit = f" at {release.commit[:12]}" if release.commit else ""
    if release.saes:
        show_table(f"{format_count(len(release.saes), 'SAE')} in {release.name}{commit}", *release.table())
    else:
        echo(f"note     No SAE in {release.name}{commit} matches.")
    if refused:
        echo(f"note     Not SAEs and not importable: {refused}.")
    if len(release.saes) > MAX_ROWS:
        echo(f"next     sae import --list {quote(text)} --layer N --width 16k   (one row for each SAE)")
    elif release.saes:
        echo(f"next     sae evaluate {quote(release.address(release.saes[0]))}")


def describe_import(imported: "ImportResult") -> list[str]:
    from ..cache.catalog import harvest_command
    from ..cache.hooks import Hook

    sae = imported.sae
    model, hook_name = sae.origin["model"]["name"], sae.origin["hook_name"]
    lines = [f"note     {note}" for note in imported.notes]
    lines.append(f"checked  {imported.check}")
    lines.append(f"found    {imported.format}: {sae.d_in} -> {sae.d_sae}, {hook_name} of {model}")
    lines.append(f"run      {imported.folder}")
    evaluate = f"sae evaluate {quote(imported.folder)}"
    if imported.candidates:
        evaluate += f" --cache {quote(imported.candidates[0])}"
    elif imported.cache is None:
        harvest = harvest_command(model, Hook.from_record(sae.origin), sae.origin.get("context"))
        lines.append(f"note     There is no cache of this model and layer. Before evaluating, run: {harvest}")
    lines.append(f"next     {evaluate}")
    return lines
