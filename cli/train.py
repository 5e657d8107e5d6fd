"""What `sae train` prints: its plan, its progress, what came of it."""

import time
from typing import Any

from .console import bar, echo, show_table


def run_train(request: Any, dry_run: bool = False, carry_out: Any = None, beside: Any = None) -> list[Any]:
    """The runs. `beside`: folders and the bytes that something else writes there meanwhile."""
    from ..common.formatting import format_count
    from ..train.loggers import Loggers
    from ..train.plan import group_by_pass, plan
    from ..train.run import TrainProgress, run_all

    runs = plan(request, beside or {})
    for run in runs:
        s = run.setting
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

        (carry_out or run_all)(runs, request, TrainProgress(step, shown.say))
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
    from ..train.estimate import bytes_of

    size = format_bytes(sum(bytes_of(one).folder for one in planned))
    echo(
        f"size     up to {size} in {format_count(len(planned), 'run folder')}; {format_bytes(free_space(folder))} free"
    )


def show_time(group_by_pass: Any, device: str) -> None:
    """What the training of streams, each of runs that share a pass, takes on the device: memory and time, as lines."""
    from ..common.device import best_device
    from ..common.errors import UnavailableError
    from ..common.formatting import format_bytes, format_duration
    from ..train.estimate import bytes_of, training_seconds

    device = best_device(device)
    memory = max(sum(bytes_of(one).state for one in stream) for stream in group_by_pass)
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
