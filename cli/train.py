"""`sae train`: cache -> runs."""

import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .config_file import ORIGINS
from .console import bar, cli_command, echo, report, show_table
from .options import (
    MAX_SEED,
    MODULE_HELP,
    PRECISIONS,
    SITE_HELP,
    STREAMING,
    Caches,
    Layers,
    LocalCache,
    LocalFolderPath,
    StreamTokens,
    check_device,
    check_width,
    finite_or_none,
    one_of,
    parse_max_norm,
    parse_positive,
)

if TYPE_CHECKING:
    from ..train.plan import Run, TrainConfig, TrainPlan
    from ..train.progress import Overview, TrainProgress

DATA = "Data and batches"
STREAM_FLAGS = {"windows": "ring", "max_norm": "max-norm"}  # option of `plan_streaming` -> its flag, if it differs
RECORDS = "Checkpoints and logging"
MACHINE = "Machine"
COLUMNS = ("loss", "L0", "EV", "dead")  # of the table of runs
MUCH_WAITING = 0.1  # the bar shows the share of the time spent waiting if it is at least this
LOGGED = {"loss", "l0", "explained_variance", "dead", "waited_for_data"}  # metrics that are shown


@cli_command
def train(
    variant: Annotated[
        list[str] | None,
        typer.Option("--variant", help="Recipe to train (`sae variants`). Can be repeated; all share one pass."),
    ] = None,
    layer: Layers = None,
    cache: Caches = None,
    width: Annotated[
        str | None,
        typer.Option(
            callback=check_width,
            help="Number of latents: 2304, 16k, or 8x for eight times d_in. Default: the recipe's.",
        ),
    ] = None,
    l0: Annotated[
        list[float] | None,
        typer.Option(
            "--l0",
            parser=parse_positive,
            metavar="N",
            help="Target number of active latents per token, for any recipe. Can be repeated: one run per value.",
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps. Default: one epoch of the cache.")] = None,
    seed: Annotated[
        list[int] | None, typer.Option("--seed", min=0, max=MAX_SEED, help="Random seed. Can be repeated.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Option of a recipe: k=64, or topk.lr=1e-3. Can be repeated.")
    ] = None,
    paper_exact: Annotated[
        bool,
        typer.Option(
            "--paper-exact",
            help="Use the paper's settings for the recipe's own options, even where they have no effect. For the "
            "paper's learning-rate schedule, use `sae reproduce --reading literal` or --set.",
        ),
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for the run folders. Default: runs/.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    site: Annotated[str, typer.Option(help=f"{SITE_HELP}.", rich_help_panel=DATA)] = "resid_post",
    module: Annotated[list[str] | None, typer.Option("--module", help=MODULE_HELP, rich_help_panel=DATA)] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Choose the cache by its model. With --stream: model to harvest.", rich_help_panel=DATA),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Tokens per batch. Default: the recipe's.", rich_help_panel=DATA)
    ] = None,
    accumulate: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Compute each batch in N equal parts: takes less memory, with the same result up to rounding.",
            rich_help_panel=DATA,
        ),
    ] = None,
    shuffle_seed: Annotated[
        int,
        typer.Option(
            "--shuffle-seed",
            min=0,
            max=MAX_SEED,
            help="Seed of the batch order, which all runs share.",
            rich_help_panel=DATA,
        ),
    ] = 0,
    stream: Annotated[
        bool,
        typer.Option(
            "--stream",
            help="Harvest while training. Activations are deleted once they have been read.",
            rich_help_panel=STREAMING,
        ),
    ] = False,
    tokens: StreamTokens = None,
    ring: Annotated[
        int | None,
        typer.Option(
            min=2, help="Maximum (even) number of windows on the disk. Default: 4.", rich_help_panel=STREAMING
        ),
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="As in `sae harvest`.", rich_help_panel=STREAMING)] = None,
    context: Annotated[
        int | None, typer.Option(min=2, help="Tokens per context. Default: 128.", rich_help_panel=STREAMING)
    ] = None,
    bos: Annotated[
        str | None, typer.Option(help="As in `sae harvest`: auto, none or a token.", rich_help_panel=STREAMING)
    ] = None,
    window: Annotated[
        int | None, typer.Option(min=1, help="Rows per window. Default: 262,144.", rich_help_panel=STREAMING)
    ] = None,
    max_norm: Annotated[
        float | None,
        typer.Option(
            parser=parse_max_norm, metavar="N|none", help="As in `sae harvest`. Default: 10.", rich_help_panel=STREAMING
        ),
    ] = None,
    local_cache: LocalCache = None,
    local_folder: LocalFolderPath = None,
    resume: Annotated[
        list[Path] | None, typer.Option(help="Run folder to resume. Can be repeated.", rich_help_panel=RECORDS)
    ] = None,
    checkpoint_every: Annotated[
        int, typer.Option(min=1, help="Steps between checkpoints.", rich_help_panel=RECORDS)
    ] = 1000,
    log_every: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Steps between log lines. Default: a hundredth of the steps, at most 50.",
            rich_help_panel=RECORDS,
        ),
    ] = None,
    log: Annotated[
        list[str] | None,
        typer.Option(
            help="tensorboard, wandb or trackio, in addition to metrics.jsonl. Can be repeated.",
            rich_help_panel=RECORDS,
        ),
    ] = None,
    device: Annotated[
        str,
        typer.Option("--device", callback=check_device, help="auto, cpu, cuda or cuda:N.", rich_help_panel=MACHINE),
    ] = "auto",
    compiled: Annotated[
        bool,
        typer.Option(
            "--compile",
            help="Compile the training step. Results differ in the last bits. Not faster on a CPU.",
            rich_help_panel=MACHINE,
        ),
    ] = False,
    capture: Annotated[
        str,
        typer.Option(
            callback=one_of("auto", "off"),
            help="Run a step as one CUDA graph: auto (where possible) or off. The results are the same.",
            rich_help_panel=MACHINE,
        ),
    ] = "auto",
    precision: Annotated[
        str | None,
        typer.Option(
            callback=PRECISIONS,
            help="Precision of matrix products: float32, tf32 or bfloat16. Weights are always float32. Default: "
            "bfloat16 on a GPU, float32 on a CPU.",
            rich_help_panel=MACHINE,
        ),
    ] = None,
) -> None:
    """Train SAEs on a cache: several recipes, layers and seeds together, in one pass over the data."""
    from ..cache.object_store import folder_or_url
    from ..common.errors import UsageError
    from ..train.plan import TrainConfig

    if not variant and not resume:
        raise UsageError(
            "Nothing to train: give --variant batchtopk, or several (`sae variants` lists them), or --resume runs/..."
        )
    config = TrainConfig(
        variants=variant or (),
        layers=layer or (12,),
        site=site,
        modules=module or (),
        seeds=seed or (0,),
        caches=list(filter(None, map(folder_or_url, cache))) if cache else (),
        local_cache=local_cache,
        local_folder=local_folder,
        model=model,
        steps=steps,
        batch_size=batch_size,
        accumulate=accumulate,
        width=width,
        l0=l0 or (),
        paper_exact=paper_exact,
        options=set_ or (),
        shuffle_seed=shuffle_seed,
        resume=resume or (),
        out=out,
        device=device,
        log_every=log_every,
        checkpoint_every=checkpoint_every,
        log=log or (),
        compiled=compiled,
        capture=capture,
        precision=precision,
        origins=ORIGINS.get({}),
    )
    harvest_options = {"tokens": tokens, "windows": ring, "dataset": dataset, "context": context}
    harvest_options |= {"bos": bos, "window": window}
    stream_options: dict[str, Any] = {name: value for name, value in harvest_options.items() if value is not None}
    if max_norm is not None:
        stream_options["max_norm"] = finite_or_none(max_norm)
    if stream_options and not stream:
        flags = ", ".join(f"--{STREAM_FLAGS.get(name, name)}" for name in stream_options)
        raise UsageError(f"{flags} can only be given with --stream.")
    runs = run_streaming(config, stream_options, dry_run) if stream else run_train(config, dry_run)
    if not dry_run:
        from ..common.formatting import shell_paths
        from ..common.process_group import with_launcher

        command = f"sae evaluate {shell_paths([run.folder for run in runs])}"
        echo(f"next     {with_launcher(command)}")


def run_train(config: "TrainConfig", dry_run: bool = False) -> "list[Run]":
    """Make a plan, print it, and train unless it is a dry run. Returns the runs."""
    from ..common.process_group import current_process_group
    from ..train.plan import plan_training

    plan = current_process_group().everywhere(partial(plan_training, config))
    for line in plan.describe(time=dry_run):
        echo(line)
    if not dry_run:
        execute(plan)
    return plan.runs


def run_streaming(config: "TrainConfig", harvest_options: Mapping[str, Any], dry_run: bool) -> "list[Run]":
    """Like `run_train`, but for --stream: activations are harvested while the SAEs are trained."""
    from ..workflows import stream

    plan = stream.plan_streaming(config, **harvest_options)
    for line in plan.describe(time=dry_run):
        echo(line)
    if not dry_run:
        execute(plan.train, partial(stream.run_streaming, plan))
    return plan.train.runs


def execute(plan: "TrainPlan", run: "Callable[[TrainProgress], None] | None" = None, *, table: bool = True) -> None:
    """Train the runs of a plan, by calling `run` if it is given, and show a progress bar; if `table` is set, print the
    last metrics of the runs.
    """
    from ..cache.object_store import is_url
    from ..common.process_group import rank_and_count
    from ..train.loggers import Loggers
    from ..train.progress import TrainProgress
    from ..train.run import run_training

    started = time.monotonic()
    latest: dict[str, dict[str, float]] = {}
    waits = Waits(any(is_url(place) for run in plan.runs for place in run.cache_folders))
    with bar("train", "steps") as progress_bar, Loggers(plan.config.log, plan.runs) as loggers:

        def on_step(step: int, steps: int, metrics: dict[str, dict[str, float]]) -> None:
            loggers.log(metrics)
            if rank_and_count()[1] > 1:
                return  # the overview shows the runs of all processes
            latest.update(metrics)
            if len(plan.runs) > 1:
                progress_bar.table(["run", *COLUMNS], table_rows(latest))
            progress_bar(step, steps, progress_note(metrics, plan.runs, progress_bar.live) + waits.note(metrics))

        def on_overview(overview: "Overview") -> None:
            latest.update({name: line for name, line in overview.metrics.items() if LOGGED <= line.keys()})
            training = {name: line for name, line in latest.items() if name not in overview.finished}
            progress_bar.table(["run", *COLUMNS], table_rows(training))
            note = f"{len(overview.finished)} of {overview.runs} runs finished"
            progress_bar(overview.steps_done, overview.steps, note)

        progress = TrainProgress(
            on_step, progress_bar.say, progress_bar.say_problem, on_overview,
            end=partial(report, say=progress_bar.say_problem),
        )  # fmt: skip
        (run or partial(run_training, plan))(progress)
    if latest:
        from ..train.l0_control import missed_targets

        if table:
            show_table("trained (means over the last logged steps)", ["run", *COLUMNS], table_rows(latest))
        waited = max(metrics["waited_for_data"] for metrics in latest.values())
        echo(f"done     in {time.monotonic() - started:.0f} s, of which training waited {waited:.1f} s for data")
        for sentence in missed_targets({run.name: run.config.l0 for run in plan.runs}, latest):
            echo(f"note     {sentence}")


class Waits:
    """Reports how much of the time since the last log line was spent waiting for batches, if it was a large share."""

    def __init__(self, in_store: bool) -> None:
        self.what = "the store" if in_store else "data"
        self.at, self.waited = time.monotonic(), 0.0

    def note(self, metrics: Mapping[str, Mapping[str, float]]) -> str:
        """The text about waiting, shown next to the bar."""
        now, waited = time.monotonic(), max((line["waited_for_data"] for line in metrics.values()), default=self.waited)
        share = (waited - self.waited) / max(now - self.at, 1e-9)
        self.at, self.waited = now, waited
        return f", waits for {self.what} {min(share, 1):.0%} of the time" if share >= MUCH_WAITING else ""


def progress_note(metrics: Mapping[str, dict[str, float]], runs: "list[Run]", live: bool) -> str:
    """The metrics shown next to the bar: those of the only run, or the name and metrics of the first of several runs.

    Returns "" if there are several runs and the bar is live, because a table of all runs is then shown under the bar.
    """
    if not metrics or (live and len(runs) > 1):
        return ""
    name, numbers = next(iter(metrics.items()))
    text = ", ".join(f"{column} {value}" for column, value in zip(COLUMNS, format_metrics(numbers), strict=True))
    return text if len(runs) == 1 else f"{name}: {text}"


def table_rows(metrics: Mapping[str, dict[str, float]]) -> list[list[str]]:
    return [[name, *format_metrics(numbers)] for name, numbers in metrics.items()]


def format_metrics(metrics: Mapping[str, Any]) -> list[str]:
    """The metrics of a run, in the order of COLUMNS."""
    return [
        f"{metrics['loss']:.4g}",
        f"{metrics['l0']:.1f}",
        f"{metrics['explained_variance']:.3f}",
        f"{metrics['dead']:.1%}",
    ]
