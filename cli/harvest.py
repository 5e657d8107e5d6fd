"""What `sae harvest` prints: its plan, its progress, what came of it."""

import os
import time
from pathlib import Path
from shlex import quote
from typing import Annotated, Any

import typer

from .cache import describe
from .config_file import ORIGINS
from .console import QUIET, bar, cli_command, echo
from .options import Device, Layers, Sites, Tokens


def run_harvest(request: Any, dry_run: bool = False) -> Any:
    """The cache; of a dry run the plan."""
    plan = show_harvest(request)
    return plan if dry_run else execute(plan)


def show_harvest(request: Any) -> Any:
    """The plan, as lines, too."""
    from ..common.files import free_space
    from ..common.formatting import format_bytes
    from ..harvest.plan import plan_harvest as resolve

    plan = resolve(request, echo)
    size = plan.tokens * plan.bytes_per_token
    show_source(plan)
    echo(
        f"size     {'' if plan.request.tokens else 'up to '}{plan.tokens:,} tokens x {plan.bytes_per_token:,} B = {format_bytes(size)}"
        f"{' before compression' if request.compress else ''}; {format_bytes(free_space(plan.folder))} free"
    )
    echo(f"time     {time_of(plan)}")
    echo(f"cache    {plan.folder}")
    return plan


def execute(plan: Any) -> Any:
    """The cache of a plan, with a bar meanwhile and what came of it as lines."""
    from ..harvest.plan import IMPLIED_VARIANCE
    from ..harvest.run import HarvestProgress, run_harvest

    started = time.monotonic()
    with bar("harvest", "tokens") as shown:
        cache = run_harvest(plan, HarvestProgress(shown, shown.say))
    for hook in plan.hooks:
        implied = IMPLIED_VARIANCE.get((cache.model, hook.layer)) if hook.site == "resid_post" else None
        expected = f" (the papers' numbers imply about {implied:g})" if implied else ""
        echo(f"{hook.array:8s} {describe(cache.statistics(hook.array))}{expected}")
    contexts = cache.contexts(held_out=False)
    special = int(contexts.length.sum()) - cache.rows
    unread = ", ".join(f"{count:,} {why} documents skipped" for why, count in plan.text.skipped.items() if count)
    echo(
        f"done     {cache.rows:,} rows of {len(contexts):,} contexts ({special:,} special tokens left out{', ' + unread if unread else ''}) "
        f"in {time.monotonic() - started:.0f} s; `sae cache verify` reads every byte again"
    )
    return cache


def time_of(plan: Any) -> str:
    """How long the model will take; of several processes the first asks for all."""
    from ..common.formatting import format_duration
    from ..harvest.plan import estimated_seconds

    if QUIET:
        return ""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    on = plan.device if processes == 1 else f"{processes} processes"
    return (
        f"about {format_duration(estimated_seconds(plan) / processes)} of the model on {on}, by the time of one block"
    )


def show_source(plan: Any) -> None:
    """What will be read and computed, as lines."""
    echo(f"model    {plan.source.name} at {plan.source.revision[:12]}, computed in {plan.dtype} on {plan.device}")
    for hook in plan.hooks:
        echo(f"hook     {hook.name} = {plan.modules[hook.array]}, {plan.widths[hook.array]} wide")
    held_out = "a tenth" if plan.identity["held_out"] == "by name" else f"{plan.request.held_out_share:.0%}"
    echo(f"text     {plan.text.name} at {plan.text.identity['revision'][:12]}, {held_out} of the documents held out")


@cli_command
def harvest(
    model: Annotated[str, typer.Option(help="Hub id, folder, or gemma-2-mini.")] = "google/gemma-2-2b",
    layer: Layers = None,
    site: Sites = None,
    dataset: Annotated[
        str | None, typer.Option(help="Hub id, .txt, .jsonl, .parquet or .arrow file or folder, or python-stdlib.")
    ] = None,
    tokens: Tokens = None,
    context: Annotated[int, typer.Option(help="Tokens in a context, BOS included.")] = 128,
    held_out: Annotated[
        float | None, typer.Option(help="Share of documents kept for evaluation. Default: 0.05.")
    ] = None,
    keep_special: Annotated[bool, typer.Option(help="Harvest the rows of BOS, EOS and pad too.")] = False,
    pack: Annotated[bool, typer.Option("--pack", help="Fill contexts with several documents each.")] = False,
    text_column: Annotated[str, typer.Option(help="The dataset's column of text, or of token ids.")] = "text",
    subset: Annotated[str | None, typer.Option(help="The Hub dataset's configuration, where it has several.")] = None,
    split: Annotated[str, typer.Option(help="The dataset's split.")] = "train",
    revision: Annotated[str | None, typer.Option(help="Commit of the model on the Hub.")] = None,
    dataset_revision: Annotated[str | None, typer.Option(help="Commit of the dataset on the Hub.")] = None,
    max_norm: Annotated[
        float | None, typer.Option(help="Mark rows whose norm is over so many medians: they get no weight in training.")
    ] = None,
    compress: Annotated[
        bool, typer.Option("--compress", help="About a third smaller on disk, slower to read.")
    ] = False,
    window: Annotated[int, typer.Option(help="Rows shuffled and written as one.")] = 262_144,
    batch_contexts: Annotated[int, typer.Option(min=1, help="Contexts in one pass of the model.")] = 32,
    storage_dtype: Annotated[
        str, typer.Option(help="bfloat16, or uint16 (the same bits) for readers without it.")
    ] = "bfloat16",
    dtype: Annotated[str, typer.Option(help="What the model computes in: auto, bfloat16, float32.")] = "auto",
    attention: Annotated[str, typer.Option(help="transformers' attention implementation.")] = "eager",
    seed: Annotated[int, typer.Option(help="Order of contexts and rows, choice of held-out documents.")] = 0,
    device: Device = "auto",
    out: Annotated[Path | None, typer.Option(help="Folder of the cache.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
) -> None:
    """Text -> cache: run the model once and write the residual stream after the layers asked for (5, 12 and 19)."""
    from ..harvest.plan import LAYERS, HarvestConfig

    request = HarvestConfig(
        model=model, revision=revision, layers=layer or LAYERS, sites=site or ("resid_post",), max_norm=max_norm, compress=compress, dataset=dataset, dataset_revision=dataset_revision, subset=subset, split=split,
        text_column=text_column, tokens=tokens, context=context, held_out=held_out, keep_special=keep_special, pack=pack, window=window,
        storage_dtype=storage_dtype, dtype=dtype, attention=attention, batch_contexts=batch_contexts, seed=seed, device=device, out=out,
        origins=ORIGINS.get({}),
    )  # fmt: skip
    cache = run_harvest(request, dry_run)
    if not dry_run:
        hook = cache.hooks[len(cache.hooks) // 2]
        echo(f"next     sae train --variant decorrelation {hook.flags} --cache {quote(str(cache.folder))}")
