"""`sae dashboard` and `sae inspect`: the latents of one run, as a page or in the terminal."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ..common.escaping import quote
from .console import bar, cli_command, echo
from .options import Device, parse_tokens
from .printing import print_line

RunFolder = Annotated[Path, typer.Argument(help="A run folder.")]
Tokens = Annotated[
    int | None,
    typer.Option("--tokens", parser=parse_tokens, metavar="N", help="Held-out tokens to read. Default: 100k, or all."),
]
Passage = Annotated[
    int,
    typer.Option(
        "--passage",
        min=1,
        metavar="N",
        help="Tokens in a passage; three quarters of them come before the token that the passage is shown for. "
        "Give the length of a context to see whole contexts.",
    ),
]

Model = Annotated[str | None, typer.Option(help="The model's new location, if it has moved since the harvest.")]


@cli_command
def dashboard(
    run: RunFolder,
    out: Annotated[Path | None, typer.Option(help="Default: dashboard.html in the run folder.")] = None,
    tokens: Tokens = None,
    latents: Annotated[
        int | None,
        typer.Option(min=1, help="Show only this many latents, drawn at random, for a smaller file. Default: all."),
    ] = None,
    passage: Passage = 64,
    device: Device = "auto",
    model: Model = None,
) -> None:
    """Write a run's numbers, curves and latents, with passages and logit effects, to one HTML file."""
    from datetime import date

    from ..common.formatting import format_bytes
    from ..evaluate.latents.inspection import open_run
    from ..evaluate.latents.passages import PassageWindow
    from ..evaluate.pages.dashboard import (
        check_page_path,
        check_window_memory,
        dashboard_page,
        estimate_page_bytes,
        sample_latents,
    )
    from ..evaluate.pages.page import write_page

    path, window = check_page_path(out or run / "dashboard.html"), PassageWindow.of(passage)
    opened = open_run(run, tokens, device, model=model)
    chosen = sample_latents(opened.sae.d_sae, latents)
    window = check_window_memory(window.limited_to(opened.ctx.contexts.ids.shape[1]), len(chosen))
    size = format_bytes(estimate_page_bytes(len(chosen), opened.tokens, window))
    echo(
        f"dashboard {opened.row.name}, {opened.where}: {len(chosen):,} of {opened.sae.d_sae:,} latents on "
        f"{opened.tokens:,} held-out tokens, about {size} -> {path}"
    )
    with bar("dashboard", "") as progress:
        page = dashboard_page(opened, chosen, date.today().isoformat(), progress, window)
    write_page(path, page)
    print_line(f"{path}   {format_bytes(path.stat().st_size)}; open it in a browser")
    echo(f"next     sae inspect {quote(run)} --latent {int(chosen[0])}     (a latent in the terminal)")


@cli_command
def inspect(
    run: RunFolder,
    latent: Annotated[
        list[int] | None, typer.Option("--latent", min=0, help="Number of a latent. Can be repeated.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="Show which latents fire on each token; with --latent, only those.")
    ] = None,
    tokens: Tokens = None,
    passage: Passage = 64,
    device: Device = "auto",
    model: Model = None,
) -> None:
    """Show single latents in the terminal, or the latents that fire on a prompt."""
    from ..common.errors import UsageError
    from ..common.formatting import format_count
    from ..evaluate.latents.inspection import check_latents, describe_outliers, open_run
    from ..evaluate.latents.passages import PassageWindow
    from ..evaluate.latents.stats import latent_stats
    from ..evaluate.pages.terminal import latent_summary, print_blocks, prompt_table

    latents, window = list(dict.fromkeys(latent or ())), PassageWindow.of(passage)
    if not latents and prompt is None:
        raise UsageError("Nothing to inspect: pass --latent 12 (repeatable), --prompt 'some text', or both.")
    opened = open_run(run, tokens, device, model=model)
    check_latents(latents, opened.sae.d_sae, opened.row.name)
    blocks: list[Any] = []
    if prompt is not None:
        blocks.append(prompt_table(opened, prompt, latents))
    what = f": {format_count(len(latents), 'latent')} on {opened.tokens:,} held-out tokens" if latents else ""
    echo(f"inspect  {opened.row.name}, {opened.where}{what}")
    if latents:
        from torch import tensor

        with bar("inspect", "") as progress:
            stats = latent_stats(
                opened.ctx, opened.sae, opened.hook, tensor(latents), progress, window, opened.norm_limit
            )
        if masked := describe_outliers(opened, stats):
            echo(f"masked   {masked}")
        blocks += [latent_summary(opened, stats, place) for place in range(len(latents))]
    print_blocks(blocks)
    echo(f"next     sae dashboard {quote(run)}     (all latents, as a page)")
