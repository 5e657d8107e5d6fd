"""`sae export` and `sae import`: SAEs to and from other libraries, and the Hub."""

from pathlib import Path
from shlex import quote
from typing import Annotated, Any

import typer

from .console import bar, cli_command, echo


@cli_command
def export(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    to: Annotated[str, typer.Option(help="saelens, gemma-scope, dictionary-learning, sparsify, or hub.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder to write, empty or new. Default: exports/<to> in the run.")
    ] = None,
    approximate: Annotated[
        str | None,
        typer.Option(help="Where the format cannot hold it: write the nearest topk, jumprelu or relu, and measure it."),
    ] = None,
    cache: Annotated[Path | None, typer.Option(help="Rows to check on. Default: the run's own cache.")] = None,
    repo: Annotated[str | None, typer.Option(help="With --to hub: owner/name.")] = None,
    private: Annotated[bool, typer.Option("--private", help="With --to hub: a repository that only you see.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="With --to hub: do not ask.")] = False,
) -> None:
    """A run -> the files of another library: raw activations in, everything folded, checked against the run."""
    from ..common.errors import UsageError

    if to == "hub":
        from ..train.formats.hub import upload_sae

        if repo is None or out is not None:
            raise UsageError("--to hub takes --repo owner/name, and no --out.")
        with bar("check", "rows") as shown:
            options: dict[str, Any] = {
                "private": private,
                "approximate": approximate,
                "cache": cache,
                "progress": shown,
            }
            url = upload_sae(run, repo, agree=agree(yes, shown), say=shown.say, **options)
        echo(f"done     {url}")
        return
    if repo is not None or private or yes:
        raise UsageError("--repo, --private and --yes belong to --to hub.")
    from ..train.formats.export import export_sae

    with bar("check", "rows") as shown:
        made = export_sae(run, to, out, approximate=approximate, cache=cache, progress=shown)
    for note in made.notes:
        echo(f"note     {note}")
    echo(f"checked  {made.check}")
    for path in made.files:
        echo(f"file     {path} ({path.stat().st_size:,} bytes)")


def agree(yes: bool, shown: Any) -> Any:
    """A question that --yes answers; without a terminal to ask on, it is refused. The bar `shown` makes room for it."""
    import sys

    from ..common.errors import UsageError

    def asked(question: str) -> bool:
        if yes:
            return True
        if not sys.stdin.isatty():
            raise UsageError(
                "Nobody is there to be asked, and nothing left this machine. --yes uploads without a question."
            )
        shown.progress.stop()
        try:
            return typer.confirm(question, err=True)
        except typer.Abort:
            return False

    return asked


@cli_command
def import_(
    path: Annotated[
        str, typer.Argument(help="A folder of another library's files, or hf://owner/repo\\[@revision]/path.")
    ],
    model: Annotated[str | None, typer.Option(help="Hub id or folder. Needed only when the files do not say.")] = None,
    layer: Annotated[int | None, typer.Option(help="Zero-based block; needed only when the files do not say.")] = None,
    cache: Annotated[
        Path | None, typer.Option(help="A cache of its model, to check and to evaluate on. Default: the only one.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Where the run folder goes. Default: runs/.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run folder.")] = None,
) -> None:
    """The files of SAELens, Gemma Scope, dictionary_learning or sparsify -> a run folder. Runs no code in them."""
    with bar("check", "rows") as shown:
        options = {"model": model, "layer": layer, "cache": cache, "out": out, "name": name, "progress": shown}
        if path.startswith("hf://"):
            from ..train.formats.hub import import_from_hub

            made = import_from_hub(path, say=shown.say, **options)
        else:
            from ..train.formats.import_ import import_sae

            made = import_sae(path, **options)
    for note in made.notes:
        echo(f"note     {note}")
    echo(f"checked  {made.check}")
    echo(
        f"found    {made.format}: {made.sae.d_in} -> {made.sae.d_sae}, {made.sae.origin['hook_name']} of {made.sae.origin['model']['name']}"
    )
    echo(f"run      {made.folder}")
    if made.cache is None:
        echo(
            f"note     No cache of it is here, and none is recorded. To evaluate: sae harvest --model {quote(made.sae.origin['model']['name'])} --layer {made.sae.origin['layer']}"
        )
    echo(f"next     sae evaluate {quote(str(made.folder))}")
