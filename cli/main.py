"""The command line: parses, delegates, prints. `sae --help` imports neither torch nor any of our folders."""

from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from .cache import cache_app
from .compare import compare
from .config import config_app
from .config_file import ORIGINS
from .console import cli_command, echo
from .convert import export, import_
from .dashboard import dashboard, inspect
from .env import env
from .evaluate import next_evaluate, run_evaluate, runs_text
from .harvest import run_harvest
from .options import STREAM, Caches, Device, Layers, Sites, StreamTokens, Tokens
from .reproduce import reproduce
from .train import run_train

app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_show_locals=False, rich_markup_mode="rich", add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Harvest a language model's activations, train sparse autoencoders on them, evaluate the result.",
)  # fmt: skip
app.add_typer(cache_app, name="cache")
app.add_typer(config_app, name="config")


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        from importlib.metadata import version as installed

        typer.echo(installed("sae-pipeline"))
        raise typer.Exit


@app.command()
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


@app.command()
@cli_command
def train(
    variant: Annotated[
        list[str] | None,
        typer.Option("--variant", help="A recipe (`sae variants`). Repeats: all are trained on one pass."),
    ] = None,
    layer: Layers = None,
    site: Annotated[str, typer.Option(help="resid_post, mlp_out or attn_z.")] = "resid_post",
    seed: Annotated[list[int] | None, typer.Option("--seed", help="Repeats.")] = None,
    cache: Caches = None,
    model: Annotated[
        str | None, typer.Option(help="Choose the cache by its model; with --stream, the model to harvest.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Default: one epoch of the cache.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Tokens in a batch. Default: the recipe's.")] = None,
    width: Annotated[
        str | None, typer.Option(help="Latents: 2304, 16k, or 8x for eight times d_in. Default: the recipe's.")
    ] = None,
    l0: Annotated[
        list[float] | None, typer.Option("--l0", help="Latents a token, for any recipe. Repeats: a run for each.")
    ] = None,
    literal: Annotated[
        bool, typer.Option("--literal", help="The paper's letter, also where it is void, and its constants unscaled.")
    ] = False,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="option=value or variant.option=value. Repeats.")
    ] = None,
    resume: Annotated[list[Path] | None, typer.Option(help="Go on with a run folder. Repeats.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where run folders go. Default: runs/.")] = None,
    order_seed: Annotated[int, typer.Option(help="Order of the batches, shared by all variants.")] = 0,
    log_every: Annotated[int, typer.Option(min=1, help="Steps.")] = 50,
    checkpoint_every: Annotated[int, typer.Option(min=1, help="Steps.")] = 1000,
    log: Annotated[
        list[str] | None, typer.Option(help="tensorboard, wandb or trackio, besides metrics.jsonl. Repeats.")
    ] = None,
    compiled: Annotated[
        bool,
        typer.Option("--compile", help="torch.compile the steps: another run, in its last bits. Not faster on a CPU."),
    ] = False,
    stream: Annotated[
        bool, typer.Option("--stream", help="Harvest while training, and keep only a ring of activations on the disk.")
    ] = False,
    tokens: StreamTokens = None,
    ring: Annotated[
        int | None,
        typer.Option(rich_help_panel=STREAM, help="Windows on the disk at most, an even number. Default: 4."),
    ] = None,
    dataset: Annotated[str | None, typer.Option(rich_help_panel=STREAM, help="As in `sae harvest`.")] = None,
    context: Annotated[
        int | None, typer.Option(rich_help_panel=STREAM, help="Tokens in a context. Default: 128.")
    ] = None,
    window: Annotated[
        int | None, typer.Option(rich_help_panel=STREAM, help="Rows in a window. Default: 262,144.")
    ] = None,
    device: Device = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
) -> None:
    """Cache -> runs: train recipes, layers and seeds together on one pass over the cache, or with --stream over a text."""
    from ..common.errors import UsageError
    from ..train.plan import TrainConfig

    if not variant and not resume:
        raise UsageError(
            "Say what to train: --variant batchtopk, or several; `sae variants` lists them. Or --resume runs/..."
        )
    request = TrainConfig(
        variants=variant or (), layers=layer or (12,), site=site, seeds=seed or (0,), caches=cache or (), model=model, steps=steps, batch_size=batch_size, width=width,
        l0=l0 or (), literal=literal, options=set_ or (), order_seed=order_seed, resume=resume or (), out=out, device=device, log_every=log_every, checkpoint_every=checkpoint_every, log=log or (), compiled=compiled,
        origins=ORIGINS.get({}),
    )  # fmt: skip
    of_stream = {"tokens": tokens, "ring": ring, "dataset": dataset, "context": context, "window": window}
    given = {name: value for name, value in of_stream.items() if value is not None}
    if stream:
        from ..workflows.stream import run_stream

        runs = run_stream(request, given, dry_run)
    elif given:
        raise UsageError(
            f"{', '.join(f'--{name}' for name in given)} can only be given with --stream. A cache has its own."
        )
    else:
        runs = run_train(request, dry_run)
    if not dry_run:
        echo(f"next     sae evaluate {runs_text([run.folder for run in runs])}")


@app.command()
@cli_command
def evaluate(
    runs: Annotated[list[Path], typer.Argument(help="Run folders; those of one cache share every pass of the model.")],
    suite: Annotated[str, typer.Option(help="quick, full, or metrics by name: core,...")] = "quick",
    tokens: Tokens = None,
    mode: Annotated[
        str, typer.Option(help="Definitions: 0.6.0 (SAEBench now) or 2024-12 (behind the papers).")
    ] = "0.6.0",
    model: Annotated[str | None, typer.Option(help="Refuse runs of another model.")] = None,
    cache: Annotated[
        Path | None,
        typer.Option(
            help="Whose held-out text is read, of the runs' model. Default: the cache that they were trained on."
        ),
    ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="metric.option=value. Repeats.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder with datasets: <name on the Hub>/<split>.jsonl or .parquet.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Measure again what was measured.")] = False,
    references: Annotated[
        bool, typer.Option(help="Add rows for the identity, zero, a PCA and a random dictionary.")
    ] = True,
    dtype: Annotated[str, typer.Option(help="What the model computes in: auto, bfloat16, float32.")] = "auto",
    device: Device = "auto",
    json_: Annotated[bool, typer.Option("--json", help="Print the rows as JSON on stdout.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
) -> None:
    """Runs -> numbers: splice each SAE into the model and measure what it costs, on held-out text."""
    from ..evaluate.plan import EvaluateConfig

    request = EvaluateConfig(
        runs=runs, suite=suite, tokens=tokens, mode=mode, model=model, cache=cache, options=set_ or [], data=data, force=force,
        references=references, device=device, dtype=dtype,
    )  # fmt: skip
    rows = run_evaluate(request, json_, dry_run)
    if rows and (command := next_evaluate(request)):
        echo(f"next     {command}")


app.command()(compare)
app.command()(reproduce)
app.command()(dashboard)
app.command()(inspect)
app.command("export")(export)
app.command("import")(import_)


@app.command()
@cli_command
def variants() -> None:
    """The recipes, their papers and their options."""
    from ..train import variants as _  # noqa: F401
    from ..train.recipe import RECIPES
    from ..train.variant import Optimization

    for recipe in RECIPES.values():
        typer.echo(f"{recipe.name}   {recipe.paper} {recipe.equations}".rstrip())
        typer.echo(f"    {recipe.summary}")
        options = ", ".join(f"{k}={v}" for k, v in recipe.options.items())
        typer.echo(f"    width {recipe.width:g}x, batch {recipe.batch_size}; --set {options}")
        if recipe.literal is not None:
            letter = ", ".join(f"{k}={v} ({why})" for k, (v, why) in recipe.literal.items())
            typer.echo(f"    --literal {letter or 'changes nothing: the defaults are the letter'}")
    shared = ", ".join(f"{k}={v}" for k, v in vars(Optimization()).items())
    typer.echo(f"every recipe also takes --set {shared}")


@app.command()
@cli_command
def demo(
    tokens: Tokens = None,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of 1,024 tokens.")] = 900,
) -> None:
    """The three stages on the embedded model and text, with nothing to download: harvest, train, evaluate, table."""
    from ..common.errors import UsageError
    from ..harvest import mini
    from ..harvest.plan import HarvestConfig as Harvest

    tokens = 200_000 if tokens is None else tokens
    if tokens < 2000:
        raise UsageError(f"--tokens {tokens} is too little to train on: give 2000 or more.")
    cache = run_harvest(Harvest(model=mini.NAME, tokens=tokens))
    from ..train.plan import TrainConfig as Train

    # At the paper's 0.1 % of pairs `decorrelation` does not lower the mean correlation here; docs/log.md has the numbers.
    runs = run_train(
        Train(
            variants=("relu", "topk", "batchtopk", "decorrelation"), layers=(12,), caches=(cache.folder,), steps=steps,
            batch_size=1024, width="4x", options=("decorrelation.fraction=0.05", "decorrelation.strength=0.2"),
        )
    )  # fmt: skip
    echo("note     decorrelation ran with fraction=0.05 and strength=0.2; its default is the paper's 0.1 % of pairs")
    from ..evaluate.plan import EvaluateConfig as Evaluate

    run_evaluate(Evaluate(runs=[run.folder for run in runs], suite="core", tokens=tokens // 12))
    first = next(quote(str(run.folder)) for run in runs if run.recipe.name == "topk")
    echo(f"next     sae dashboard {first}     (its latents, as a page)")
    echo(f"         sae evaluate {quote(str(runs[0].folder.parent))}/*     (absorption, probing, SCR and TPP, too)")
    echo(
        f"         sae train --variant jumprelu --layer 5 --cache {quote(str(cache.folder))}     (`sae variants` lists more)"
    )
    echo("         sae harvest --layer 12     (Gemma-2-2B: accept its licence, then `hf auth login`)")


app.command()(env)
