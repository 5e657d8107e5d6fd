"""Options that several verbs share."""

from pathlib import Path
from typing import Annotated

import typer


def tokens_of(text: str) -> int:
    """A count with a unit: 10M, 2e8, 1.5B, 500k."""
    try:
        unit = {"k": 1e3, "m": 1e6, "b": 1e9}.get(text[-1:].lower())
        return int(float(text[:-1]) * unit) if unit else int(float(text))
    except (ValueError, OverflowError):
        raise typer.BadParameter(f"{text} is no number of tokens: write 10M, 2e8 or 500000") from None


Tokens = Annotated[int | None, typer.Option("--tokens", parser=tokens_of, metavar="N", help="Such as 10M.")]
STREAM = "With --stream, of the harvest"
StreamTokens = Annotated[
    int | None, typer.Option("--tokens", parser=tokens_of, metavar="N", help="Such as 10M.", rich_help_panel=STREAM)
]
Layers = Annotated[
    list[int] | None, typer.Option("--layer", help="Zero-based block; the residual stream after it. Repeats.")
]
Caches = Annotated[
    list[Path] | None,
    typer.Option(
        "--cache",
        help="Needed only when several match. Repeats: they are read as one. With --stream, the folder of the ring.",
    ),
]
Sites = Annotated[list[str] | None, typer.Option("--site", help="resid_post, mlp_out or attn_z. Repeats.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
