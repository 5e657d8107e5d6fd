"""What `sae train` prints: its plan, its progress, what came of it."""

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from .config_file import ORIGINS
from .console import bar, cli_command, echo, show_table
from .options import STREAMING, Caches, Device, Layers, StreamTokens


def run_train(request: Any, dry_run: bool = False, carry_out: Any = None, beside: Any = None) -> list[Any]:
    """The runs. `beside`: folders and the bytes that something else writes there meanwhile."""
    from ..common.formatting import format_count
    from ..train.loggers import Loggers
    from ..train.plan import group_by_pass, plan_training
    from ..train.run import TrainProgress, run_training

    runs = plan_training(request, beside or {})
    for run in runs:
        s = run.config
        echo(
            f"train    {run.recipe.name} {s.d_in} -> {s.d_sae}, {run.hook}, seed {run.seed}: {s.steps:,} steps x {s.batch_size:,} tokens -> {run.folder}"
        )
    for note in dict.fromkeys(note for run in runs for note in run.notes):
        echo(f"note     {note}")
    todo = [run for run in runs if not run.done]
    if todo:
        show_size([run.planned for run in todo], todo[0].folder.parent)
    if dry_run:
        if todo:
            together = group_by_pass(todo) if request.ring is None else [todo]  # behind a harvest all are there at once
            show_time([[run.planned for run in stream] for stream in together], request.device)
        if begun := [run for run in todo if (run.folder / "checkpoints").exists()]:
            echo(f"note     {format_count(len(begun), 'run')} of them began before; the time is of all steps")
        if any(run.compiled for run in todo):
            echo("note     the time is without --compile, whose first step takes minutes and the others less")
        return runs
    started = time.monotonic()
    latest: dict[str, dict[str, float]] = {}
    with bar("train", "steps") as shown, Loggers(request.log, runs) as loggers:

        def step(number: int, steps: int, metrics: dict[str, dict[str, float]]) -> None:
            latest.update(metrics)
            loggers.log(metrics)
            first = next(iter(metrics.values()), {})
            shown(
                number, steps, ", ".join(f"{head} {text}" for head, text in zip(TRAINED, summary(first), strict=True))
            )
            if len(runs) > 1:
                shown.table(["run", *TRAINED], [[name, *summary(found)] for name, found in latest.items()])

        (carry_out or run_training)(runs, request, TrainProgress(step, shown.say))
    if latest:
        lines = [[name, *summary(found)] for name, found in latest.items()]
        show_table("trained (means over the last logged steps)", ["run", *TRAINED], lines)
        waited = max(found["waited_for_data"] for found in latest.values())
        echo(f"done     in {time.monotonic() - started:.0f} s, of which training waited {waited:.1f} s for data")
    return runs


TRAINED = ("loss", "L0", "EV", "dead")


def summary(found: dict[str, float]) -> list[str]:
    """The metrics of a run under the heads of TRAINED."""
    if not found:
        return ["-"] * len(TRAINED)
    return [f"{found['loss']:.4g}", f"{found['l0']:.1f}", f"{found['explained_variance']:.3f}", f"{found['dead']:.1%}"]


def show_size(planned: Any, folder: Any) -> None:
    """What the runs that are planned will leave on the disk, as a line."""
    from ..common.files import free_space
    from ..common.formatting import format_bytes, format_count
    from ..train.estimate import run_bytes

    size = format_bytes(sum(run_bytes(one).folder for one in planned))
    echo(
        f"size     up to {size} in {format_count(len(planned), 'run folder')}; {format_bytes(free_space(folder))} free"
    )


def show_time(group_by_pass: Any, device: str) -> None:
    """What the training of streams, each of runs that share a pass, takes on the device: memory and time, as lines."""
    from ..common.device import resolve_device
    from ..common.errors import UnavailableError
    from ..common.formatting import format_bytes, format_duration
    from ..train.estimate import run_bytes, training_seconds

    device = resolve_device(device)
    memory = max(sum(run_bytes(one).state for one in stream) for stream in group_by_pass)
    echo(
        f"memory   {format_bytes(memory)} of weights and AdamW's moments on {device}, and what a step needs beside them"
    )
    try:
        seconds = training_seconds([planned for stream in group_by_pass for planned in stream], device)
    except UnavailableError as error:
        echo(f"time     {error}")
        return
    echo(
        f"time     about {format_duration(seconds)} of training on {device}, by the time of a few steps of each recipe"
    )


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
    paper_exact: Annotated[
        bool,
        typer.Option(
            "--paper-exact",
            help="Use the paper's settings and constants verbatim, even where they have no effect.",
        ),
    ] = False,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="option=value or variant.option=value. Repeats.")
    ] = None,
    resume: Annotated[list[Path] | None, typer.Option(help="Go on with a run folder. Repeats.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where run folders go. Default: runs/.")] = None,
    shuffle_seed: Annotated[
        int, typer.Option("--shuffle-seed", help="Seed of the batch order, shared by all variants.")
    ] = 0,
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
        typer.Option(rich_help_panel=STREAMING, help="Windows on the disk at most, an even number. Default: 4."),
    ] = None,
    dataset: Annotated[str | None, typer.Option(rich_help_panel=STREAMING, help="As in `sae harvest`.")] = None,
    context: Annotated[
        int | None, typer.Option(rich_help_panel=STREAMING, help="Tokens in a context. Default: 128.")
    ] = None,
    window: Annotated[
        int | None, typer.Option(rich_help_panel=STREAMING, help="Rows in a window. Default: 262,144.")
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
        l0=l0 or (), paper_exact=paper_exact, options=set_ or (), shuffle_seed=shuffle_seed, resume=resume or (), out=out, device=device, log_every=log_every, checkpoint_every=checkpoint_every, log=log or (), compiled=compiled,
        origins=ORIGINS.get({}),
    )  # fmt: skip
    of_stream = {"tokens": tokens, "ring": ring, "dataset": dataset, "context": context, "window": window}
    given = {name: value for name, value in of_stream.items() if value is not None}
    if stream:
        from .stream import run_stream

        runs = run_stream(request, given, run_train, dry_run)
    elif given:
        raise UsageError(
            f"{', '.join(f'--{name}' for name in given)} can only be given with --stream. A cache has its own."
        )
    else:
        runs = run_train(request, dry_run)
    if not dry_run:
        from ..common.formatting import shell_paths

        echo(f"next     sae evaluate {shell_paths([run.folder for run in runs])}")
