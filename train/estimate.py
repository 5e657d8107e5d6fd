"""Estimates made before training: disk space, device memory, and the time of the steps."""

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from ..common.device import empty_gpu_cache, resolve_device
from ..common.errors import UnavailableError, UsageError
from ..common.files import existing_parent, folder_bytes, free_space
from ..common.formatting import format_bytes, format_count, format_duration
from ..common.memory import available_memory
from .checkpoint import KEPT
from .loop import Trainer
from .memory import (
    BuildableRun,
    memory_bound,
    options_key,
    run_memory,
    state_bytes,
    tensor_bytes,
    untrained_variant,
)
from .passes import describe_memory
from .variant import RunConfig

TIMED_STEPS, TIMED_SECONDS = 5, 1.0  # a step is timed this many times, or until this much time has passed
OPERATIONS = 10  # minimum multiplications and additions in a step, per row and weight of W_enc
MAX_OPERATIONS = {"cpu": 2e11, "cuda": 1e14}  # limit for a timed step: a second or two
MAX_LATENTS = {"cpu": 3e7, "cuda": 3e9}  # elements of f_BF in a timed step
MEMORY_SHARE = 0.5  # share of the free memory that timing may use


class RunInFolder(BuildableRun, Protocol):
    @property
    def folder(self) -> Path: ...


class RunBytes(NamedTuple):
    """The size of a run's SAE, and of its training state (on the device, and again in each checkpoint), in bytes."""

    sae: int
    state: int  # weights, buffers, and AdamW's two moments of the weights that are trained

    @property
    def folder(self) -> int:
        """The maximum size of the run folder: the SAE and the checkpoints that are kept."""
        return self.sae + KEPT * self.state


def run_bytes(run: BuildableRun) -> RunBytes:
    variant = untrained_variant(run, "meta")
    return RunBytes(tensor_bytes(variant.sae)[0], state_bytes(variant))


def check_disk_space(runs: Iterable[RunInFolder], reserved: Mapping[Path, float] = {}) -> None:
    """Check that the runs fit on their disks together with the `reserved` bytes that will also be written there.

    Checkpoints that a run has already written are not counted again.

    Args:
        runs: the runs that are still to be trained.
        reserved: folder -> bytes that a harvest will write into it.

    Raises:
        UnavailableError: a disk has too little space; the message says how much is needed and how much is free.
        UsageError: there is a file in place of a run folder.
    """
    by_disk: dict[int, list[RunInFolder]] = {}
    for run in runs:
        by_disk.setdefault(disk_id(run.folder), []).append(run)
    for disk, on_disk in by_disk.items():
        sizes = [run_bytes(run) for run in on_disk]
        activations = sum(size for folder, size in reserved.items() if disk_id(folder) == disk)
        # A new checkpoint is written completely before an older one is removed. The run's SAE is written after the
        # last checkpoint.
        transient = max(size.state - size.sae for size in sizes)
        needed = sum(size.folder for size in sizes) - sum(checkpoint_bytes(run.folder) for run in on_disk) + transient
        place = existing_parent(on_disk[0].folder)
        if needed + activations > (free := free_space(place)):
            also = f" besides {format_bytes(activations)} of activations" if activations else ""
            raise UnavailableError(
                f"{format_count(len(on_disk), 'run')} of up to {format_bytes(max(size.folder for size in sizes))} each "
                f"will need {format_bytes(needed)}{also}, and the disk of {place} has {format_bytes(free)} free. "
                "Train fewer runs, use a smaller --width, or choose an --out on another disk."
            )


def disk_id(folder: Path) -> int:
    """The device number (st_dev) of the disk on which a folder lies or would be created."""
    place = existing_parent(folder)
    if not place.is_dir():
        raise UsageError(f"{place} is not a folder: a file is in its place. Choose a new folder with --out.")
    return place.stat().st_dev


def checkpoint_bytes(folder: Path) -> int:
    """The size of a run's checkpoints and half-written SAEs, in bytes.

    A finished SAE is not included, because resuming the run overwrites it.
    """
    partial = sum(path.stat().st_size for path in folder.glob("sae.safetensors.tmp-*"))
    return partial + folder_bytes(folder / "checkpoints")


def timed_rows(config: RunConfig, device: str) -> int:
    """How many rows of a batch to time: all of them, or as many as take one or two seconds."""
    kind = torch.device(device).type
    limit = min(MAX_OPERATIONS[kind] / OPERATIONS / config.d_in, MAX_LATENTS[kind]) / config.d_sae
    return max(1, min(config.batch_size, int(limit)))


def step_seconds(run: BuildableRun, device: str) -> float:
    """The time of one step, measured on random rows. If a batch would take seconds, only part of it is timed.

    Raises UnavailableError if timing would take more than half of the free memory.
    """
    config, rows = run.config, timed_rows(run.config, device)
    available = available_memory(device)
    # A trace takes longer than the steps, so the memory is traced only if the upper bound does not fit.
    if memory_bound(run) > MEMORY_SHARE * available:
        memory = run_memory(run, device, rows)
        if (needed := memory.state + memory.step) > MEMORY_SHARE * available:
            raise UnavailableError(
                f"not timed: a step of {run.recipe.name} takes {format_bytes(needed)}, "
                f"and {device} has {format_bytes(available)} of memory free"
            )
    trainer = Trainer(untrained_variant(run, device), config.steps, device, precision=config.precision)
    x_BD = torch.randn(rows, config.d_in, device=device).bfloat16()
    seconds = fastest_step(trainer, x_BD)
    if 1 < rows < config.batch_size:  # the optimizer's time does not grow with the rows
        one_row = fastest_step(trainer, x_BD[:1])
        seconds = one_row + max(seconds - one_row, 0.0) / (rows - 1) * (config.batch_size - 1)
    del trainer
    empty_gpu_cache(device)
    return seconds


def fastest_step(trainer: Trainer, x_BD: torch.Tensor) -> float:
    """The time of the fastest of a few steps."""
    times: list[float] = []
    while len(times) < 2 or (len(times) < TIMED_STEPS and sum(times) < TIMED_SECONDS):  # the first one is slower
        started = time.perf_counter()
        trainer.step(x_BD)
        int(trainer.i)  # waits for a GPU
        times.append(time.perf_counter() - started)
    return min(times)


def seconds_per_step(runs: Sequence[BuildableRun], device: str) -> list[float]:
    """For each run, the time of one step in seconds. Runs that differ only in seed and data are timed once.

    Raises UnavailableError as `step_seconds` does.
    """
    timed: dict[Any, float] = {}
    keys = [(run.recipe.name, options_key(run), run.config) for run in runs]
    for key, run in zip(keys, runs, strict=True):
        if key not in timed:
            timed[key] = step_seconds(run, device)
    return [timed[key] for key in keys]


def training_seconds(runs: Sequence[BuildableRun], device: str) -> float:
    """The time of all steps of the runs, which take turns on one device. Reading the batches is not included.

    Raises UnavailableError as `step_seconds` does.
    """
    times = seconds_per_step(runs, resolve_device(device))
    return sum(run.config.steps * seconds for run, seconds in zip(runs, times, strict=True))


def describe_size(runs: Sequence[BuildableRun], folder: Path) -> str:
    """The plan's line about disk space: how much the runs will take, and how much is free on the disk of `folder`."""
    size = format_bytes(sum(run_bytes(run).folder for run in runs))
    return f"size     up to {size} in {format_count(len(runs), 'run folder')}; {format_bytes(free_space(folder))} free"


def describe_time(passes: Sequence[Sequence[BuildableRun]], device: str, from_store: bool = False) -> list[str]:
    """The plan's lines about the memory and time that training needs on the device. Times a few steps per recipe.

    `passes` lists the runs that are on the device together, as `TrainPlan.passes` does. If `from_store` is set, one
    line gives the speed at which the store has to deliver the batches.
    """
    device, link = resolve_device(device), []
    try:
        times = [seconds_per_step(runs, device) for runs in passes]
        all_steps = [
            run.config.steps * seconds
            for runs, pass_times in zip(passes, times, strict=True)
            for run, seconds in zip(runs, pass_times, strict=True)
        ]
        duration = (
            f"about {format_duration(sum(all_steps))} of training on {device}, estimated by timing a few steps of each "
            "recipe"
        )
        if from_store:
            sizes = [2 * runs[0].config.batch_size * runs[0].config.d_in for runs in passes]
            rate = max(size / sum(pass_times) for size, pass_times in zip(sizes, times, strict=True))
            link = [f"link     training does not wait for a store if it delivers {format_bytes(rate)} per second"]
    except UnavailableError as error:
        duration = str(error)
    return [describe_memory(passes, device), f"time     {duration}", *link]
