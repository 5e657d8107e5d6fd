"""`sae dashboard` and `sae inspect`: one run to look at, as a page and in the terminal."""

from pathlib import Path
from shlex import quote
from typing import Annotated, Any

import typer

from .console import bar, cli_command, echo
from .options import Device, parse_tokens

Run = Annotated[Path, typer.Argument(help="A run folder.")]
Tokens = Annotated[
    int | None,
    typer.Option("--tokens", parser=parse_tokens, metavar="N", help="Held-out tokens to read. Default: 100k, or all."),
]
BYTES_OF_A_LATENT, BYTES_OF_A_TOKEN = 900, 3  # of a page, about: what the plan says


@cli_command
def dashboard(
    run: Run,
    out: Annotated[Path | None, typer.Option(help="Default: dashboard.html in the run folder.")] = None,
    tokens: Tokens = None,
    latents: Annotated[
        int | None, typer.Option(help="At most so many latents, drawn at random, for a smaller file. Default: all.")
    ] = None,
    device: Device = "auto",
) -> None:
    """Run -> one HTML file: its numbers and curves, and every latent with where it fires and what it pushes."""
    from datetime import date

    from ..common.formatting import format_bytes
    from ..evaluate.latents.inspection import open_run
    from ..evaluate.pages.dashboard import check_page_path, sample_latents
    from ..evaluate.pages.dashboard import dashboard_page as make
    from ..evaluate.pages.page import write_page

    path = check_page_path(out or run / "dashboard.html")
    found = open_run(run, tokens, device)
    chosen = sample_latents(found.sae.d_sae, latents)
    size = BYTES_OF_A_LATENT * len(chosen) + BYTES_OF_A_TOKEN * found.tokens
    echo(
        f"dashboard {found.row.name}: {len(chosen):,} of {found.sae.d_sae:,} latents on {found.tokens:,} held-out tokens, "
        f"about {format_bytes(size)} -> {path}"
    )
    with bar("dashboard", "") as shown:
        page = make(found, chosen, date.today().isoformat(), shown)
    write_page(path, page)
    typer.echo(f"{path}   {format_bytes(path.stat().st_size)}; open it in a browser")
    echo(f"next     sae inspect {quote(str(run))} --latent {int(chosen[0])}     (a latent in the terminal)")


@cli_command
def inspect(
    run: Run,
    latent: Annotated[list[int] | None, typer.Option("--latent", help="Its number. Repeats.")] = None,
    prompt: Annotated[
        str | None, typer.Option(help="Show what fires on each token of it; with --latent, of those alone.")
    ] = None,
    tokens: Tokens = None,
    device: Device = "auto",
) -> None:
    """One run in the terminal: what single latents do, or which latents fire on a prompt."""
    from ..common.errors import UsageError
    from ..common.formatting import format_count
    from ..evaluate.latents.inspection import check_latents, open_run
    from ..evaluate.latents.stats import latent_stats
    from ..evaluate.pages.terminal import latent_summary, print_blocks, prompt_table

    latents = list(dict.fromkeys(latent or ()))
    if not latents and prompt is None:
        raise UsageError("Say what to look at: --latent 12 (repeats), or --prompt 'some text', or both.")
    found = open_run(run, tokens, device)
    check_latents(latents, found.sae.d_sae, found.row.name)
    printing: list[Any] = []
    if prompt is not None:
        printing.append(prompt_table(found, prompt, latents))
    if latents:
        from torch import tensor

        echo(f"inspect  {found.row.name}: {format_count(len(latents), 'latent')} on {found.tokens:,} held-out tokens")
        with bar("inspect", "") as shown:
            numbers = latent_stats(found.ctx, found.sae, found.hook, tensor(latents), shown)
        printing += [latent_summary(found, numbers, place) for place in range(len(latents))]
    print_blocks(printing)
    echo(f"next     sae dashboard {quote(str(run))}     (all latents, as a page)")
