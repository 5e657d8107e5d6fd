"""`sae harvest`: text -> cache. The printed lines come from harvest/description.py."""

import time
from typing import TYPE_CHECKING, Annotated

import typer

from ..common.escaping import quote
from .config_file import ORIGINS
from .console import bar, cli_command, echo
from .options import DTYPES, MODULE_HELP, Device, Layers, Sites, Tokens, finite_or_none, one_of, parse_max_norm

if TYPE_CHECKING:
    from ..cache.reader import Cache
    from ..harvest.config import HarvestConfig
    from ..harvest.plan import HarvestPlan

TEXT, CACHE, MODEL, TASKS = "Text", "Cache", "Model", "Several tasks"  # groups of options in --help


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
    out: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER|ADDRESS",
            help="Folder of the cache, or an address such as s3://bucket/pile. Default: a folder under activations/.",
        ),
    ] = None,
    device: Device = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    share: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=TASKS,
            help="Harvest only share I of N, such as 3/64, as one task of an array job. Tasks run in any order.",
            metavar="I/N",
        ),
    ] = None,
    prepare: Annotated[
        bool, typer.Option("--prepare", rich_help_panel=TASKS, help="Only cut the text into contexts, for all shares.")
    ] = False,
    held_out: Annotated[
        float | None,
        typer.Option(rich_help_panel=TEXT, help="Share of documents kept for evaluation. Default: 0.05."),
    ] = None,
    bos: Annotated[
        str,
        typer.Option(
            rich_help_panel=TEXT,
            help="First token of each context: auto (the one that the tokenizer adds, else <|endoftext|>, else its "
            "bos_token or eos_token unless it begins or ends a chat turn), none, or a token as text or id.",
        ),
    ] = "auto",
    keep_special: Annotated[
        bool, typer.Option(rich_help_panel=TEXT, help="Harvest the rows of BOS, EOS and pad too.")
    ] = False,
    skip_positions: Annotated[
        int,
        typer.Option(
            rich_help_panel=TEXT, help="Skip this many positions at the start of each context, including BOS."
        ),
    ] = 0,
    skip_token: Annotated[
        list[str] | None,
        typer.Option(rich_help_panel=TEXT, help="A token, as text or id, that is not harvested. Can be repeated."),
    ] = None,
    pack: Annotated[
        bool, typer.Option("--pack", rich_help_panel=TEXT, help="Fill each context with several documents.")
    ] = False,
    text_column: Annotated[
        str, typer.Option(rich_help_panel=TEXT, help="Column of the dataset that contains text or token ids.")
    ] = "text",
    chat_column: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=TEXT,
            help="Column that contains lists of messages (role, content) instead, for the tokenizer's chat template.",
        ),
    ] = None,
    roles: Annotated[
        list[str] | None,
        typer.Option(rich_help_panel=TEXT, help="Harvest only tokens of this role: assistant. Can be repeated."),
    ] = None,
    subset: Annotated[
        str | None, typer.Option(rich_help_panel=TEXT, help="Configuration of a dataset that has several.")
    ] = None,
    split: Annotated[
        str, typer.Option(rich_help_panel=TEXT, help="Split of the dataset. For a folder, all reads every file.")
    ] = "train",
    dataset_revision: Annotated[
        str | None, typer.Option(rich_help_panel=TEXT, help="Commit of the dataset on the Hub.")
    ] = None,
    seed: Annotated[
        int,
        typer.Option(
            rich_help_panel=TEXT, help="Seed for the order of contexts and rows and the choice of held-out documents."
        ),
    ] = 0,
    module: Annotated[list[str] | None, typer.Option("--module", rich_help_panel=MODEL, help=MODULE_HELP)] = None,
    revision: Annotated[str | None, typer.Option(rich_help_panel=MODEL, help="Commit of the model on the Hub.")] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            rich_help_panel=MODEL, help="PEFT adapter to merge into the model: a folder or Hub id. Repeatable."
        ),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(callback=DTYPES, rich_help_panel=MODEL, help="Precision of the model: auto, bfloat16 or float32."),
    ] = "auto",
    attention: Annotated[
        str, typer.Option(rich_help_panel=MODEL, help="Attention implementation of transformers.")
    ] = "eager",
    batch_contexts: Annotated[int, typer.Option(min=1, rich_help_panel=MODEL, help="Contexts in a forward pass.")] = 32,
    compiled: Annotated[
        bool,
        typer.Option(
            "--compile", rich_help_panel=MODEL, help="Compile the model's blocks; rows can differ by rounding."
        ),
    ] = False,
    window: Annotated[
        int, typer.Option(rich_help_panel=CACHE, help="Rows that are shuffled and written together.")
    ] = 262_144,
    compress: Annotated[
        bool, typer.Option("--compress", rich_help_panel=CACHE, help="About a quarter smaller on disk, slower to read.")
    ] = False,
    max_norm: Annotated[
        float,
        typer.Option(
            rich_help_panel=CACHE,
            parser=parse_max_norm,
            metavar="N|none",
            help="Exclude rows whose norm exceeds this multiple of the median from training and evaluation.",
        ),
    ] = 10.0,
    storage_dtype: Annotated[
        str,
        typer.Option(
            callback=one_of("bfloat16", "uint16"),
            rich_help_panel=CACHE,
            help="bfloat16, or uint16 (the same bits) for readers that lack bfloat16.",
        ),
    ] = "bfloat16",
) -> None:
    """Run a language model over text and write its activations to a cache (by default layers 5, 12 and 19)."""
    from ..harvest.share import HarvestShare

    if share is not None:
        HarvestShare.parse(share)  # before the imports, which take seconds
    from ..cache.object_store import folder_or_url
    from ..common.process_group import with_launcher
    from ..harvest.config import LAYERS, HarvestConfig

    config = HarvestConfig(
        model=model, revision=revision, adapters=adapter or (),
        layers=layer or LAYERS, sites=site or (() if module else ("resid_post",)),
        modules=module or (), dataset=dataset, dataset_revision=dataset_revision, subset=subset, split=split,
        text_column=text_column, chat_column=chat_column, roles=roles or (), tokens=tokens, context=context,
        held_out=held_out, bos=bos, keep_special=keep_special, skip_positions=skip_positions,
        skip_tokens=skip_token or (), pack=pack, window=window,
        storage_dtype=storage_dtype, compress=compress, max_norm=finite_or_none(max_norm), dtype=dtype,
        attention=attention, batch_contexts=batch_contexts, compiled=compiled, seed=seed, device=device,
        out=folder_or_url(out), share=share, prepare=prepare,
        origins=ORIGINS.get({}),
    )  # fmt: skip
    plan = show_harvest(config)
    if not dry_run:
        cache = execute(plan)
        if not plan.is_complete(cache):
            return  # other tasks still have windows to harvest
        hook = cache.hooks[len(cache.hooks) // 2]
        command = f"sae train --variant decorrelation {hook.cli_flags} --cache {quote(plan.address)}"
        echo(f"next     {with_launcher(command)}")


def show_harvest(config: "HarvestConfig") -> "HarvestPlan":
    """Plan a harvest and print the plan."""
    from ..harvest.description import describe_harvest
    from ..harvest.plan import plan_harvest

    plan = plan_harvest(config, echo)
    for line in describe_harvest(plan):
        echo(line)
    return plan


def execute(plan: "HarvestPlan") -> "Cache":
    """Run a plan with a progress bar and print its summary."""
    from ..harvest.description import summarize_harvest
    from ..harvest.progress import HarvestProgress
    from ..harvest.run import run_harvest

    started = time.monotonic()
    with bar(f"share {plan.share}" if plan.share else "harvest", "tokens") as progress_bar:
        cache = run_harvest(plan, HarvestProgress(progress_bar, progress_bar.say))
    if not plan.is_complete(cache):  # with --prepare, or while shares are missing; the harvest has printed what remains
        return cache
    for line in summarize_harvest(plan, cache, time.monotonic() - started):
        echo(line)
    return cache
