"""Options that several commands share, and the headings under which --help lists options."""

import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated

import typer

UNITS = {"K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}  # of bytes


def parse_tokens(text: str) -> int:
    """A positive token count, with or without a unit: 10M, 2e8, 1.5B, 500k. Raises typer.BadParameter if invalid."""
    try:
        unit = {"k": 1e3, "m": 1e6, "b": 1e9}.get(text[-1:].lower())
        tokens = int(float(text[:-1]) * unit) if unit else int(float(text))
        if tokens < 1:
            raise ValueError
        return tokens
    except (ValueError, OverflowError):
        raise typer.BadParameter(f"invalid token count {text!r}; try 10M, 2e8 or 500000") from None


def parse_bytes(text: str | int) -> int:
    """A positive number of bytes, with or without a unit: 200GB, 1.5TB, 64MB. Raises typer.BadParameter if invalid."""
    number = str(text).strip().upper().removesuffix("B")
    try:
        size = int(float(number[:-1]) * UNITS[number[-1]]) if number[-1:] in UNITS else int(float(number))
        if size < 1:
            raise ValueError
        return size
    except (ValueError, OverflowError):
        raise typer.BadParameter(f"invalid size {text!r}; try 200GB or 1.5TB") from None


def parse_max_norm(text: str | float) -> float:
    """A positive multiple of the median norm, or infinity for "none". Raises typer.BadParameter for anything else."""
    try:
        multiple = math.inf if text == "none" else float(text)
        if not multiple > 0:
            raise ValueError
        return multiple
    except ValueError:
        raise typer.BadParameter(f"invalid multiple {text!r}; try 10, or none") from None


def parse_positive(text: str | float) -> float:
    """A positive, finite number. Raises typer.BadParameter for anything else."""
    try:
        if not 0 < (number := float(text)) < math.inf:
            raise ValueError
        return number
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a positive number") from None


def check_width(text: str | None) -> str | None:
    """The callback of --width. Raises typer.BadParameter if an SAE cannot have that width."""
    if text is not None:
        from ..common.errors import UsageError
        from ..train.parse import split_width

        try:
            split_width(text)
        except UsageError as error:
            raise typer.BadParameter(str(error)) from None
    return text


def one_of(*values: str) -> Callable[[str | None], str | None]:
    """A callback for an option with a fixed set of values. Raises typer.BadParameter for any other value."""

    def check(value: str | None) -> str | None:
        if value is not None and value not in values:
            *most, last = values
            raise typer.BadParameter(f"{value!r} is unknown: expected {', '.join(most)} or {last}")
        return value

    return check


def check_device(device: str) -> str:
    """The callback of --device. Raises typer.BadParameter for an invalid name, but not for a missing device."""
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", device):
        raise typer.BadParameter(f"{device!r} is unknown: expected auto, cpu, cuda or cuda:N")
    return device


def refuse_addresses(values: Iterable[object]) -> None:
    """Raise UsageError if an argument of type Path is an address: such arguments must be folders or files on a disk.
    Arguments that may be addresses have the type str.
    """
    from ..common.addresses import disk_path

    for value in values:
        for path in value if isinstance(value, list) else [value]:
            if isinstance(path, Path):
                disk_path(path)


def finite_or_none(multiple: float) -> float | None:
    """The value of `HarvestConfig.max_norm` for a value of --max-norm: None for infinity."""
    return None if multiple == math.inf else multiple


MAX_SEED = 2**63 - 1  # the largest seed that both torch and numpy accept
STREAMING = "Harvesting while training (with --stream)"  # a group of flags in the help

Tokens = Annotated[
    int | None, typer.Option("--tokens", parser=parse_tokens, metavar="N", help="Number of tokens, such as 10M.")
]
StreamTokens = Annotated[
    int | None,
    typer.Option(
        "--tokens", parser=parse_tokens, metavar="N", help="Number of tokens, such as 10M.", rich_help_panel=STREAMING
    ),
]
Layers = Annotated[
    list[int] | None,
    typer.Option("--layer", min=0, help="Zero-based block. Can be repeated."),
]
Caches = Annotated[
    list[str] | None,
    typer.Option(
        "--cache",
        metavar="PATH|URL",
        help="Activation cache: a folder, or an address such as s3://bucket/pile. Default: the only one under "
        "activations/ that fits. Can be repeated; several are read as one. With --stream, the folder for the windows "
        "being harvested.",
    ),
]
LocalCache = Annotated[
    int | None,
    typer.Option(
        "--local-cache",
        parser=parse_bytes,
        metavar="SIZE",
        help="For a cache at an address: the maximum disk space for pulled files, such as 200GB. Default: half of the "
        "free space.",
        rich_help_panel="Object stores",
    ),
]
LocalFolderPath = Annotated[
    Path | None,
    typer.Option(
        "--local-folder",
        help="For a cache at an address: the folder for pulled files, on a local disk. Default: activations/.pulled.",
        rich_help_panel="Object stores",
    ),
]
SITE_HELP = (
    "Which activations of the block: resid_post (its output), resid_pre, resid_mid, attn_out, attn_z, mlp_in, "
    "mlp_hidden or mlp_out"
)
MODULE_HELP = "Another module: 'model.layers.{layer}.mlp.gate_proj', its :output or :input. Can be repeated."
Sites = Annotated[list[str] | None, typer.Option("--site", help=f"{SITE_HELP}. Can be repeated.")]
Device = Annotated[str, typer.Option("--device", callback=check_device, help="auto, cpu, cuda or cuda:N.")]
PRECISIONS = one_of("float32", "tf32", "bfloat16")
DTYPES = one_of("auto", "bfloat16", "float32")
