"""Run a TrainPlan. Runs that read the same batches share one pass: each batch is read once and used by all of them."""

import contextlib
import itertools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..cache.concat import ConcatCache
from ..cache.object_store import check_slashes, is_url
from ..cache.planned import PlannedCache
from ..cache.reader import Cache
from ..cache.removal import kept_caches
from ..common.addresses import disk_path
from ..common.device import fix_cublas_workspace, keep_freed_memory, resolve_device
from ..common.errors import DamagedError, SaeError, UsageError, did_you_mean
from ..common.locks import writer_lock
from ..common.process_group import current_process_group
from ..common.schemas import RUN_RECORD, RunRecord
from .checkpoint import restore_checkpoint
from .checkpoint_writer import CheckpointWriter
from .compile import compile_step
from .memory import SAMPLE_ROWS
from .plan import Run, TrainConfig, TrainPlan, plan_training
from .progress import SILENT, TrainProgress
from .ranks import train_on_ranks
from .run_folder import run_record, truncate_metrics
from .run_trainer import RunTrainer
from .sae import read_run_record, run_digest
from .shared_pass import SharedPass, open_batches, shared_passes
from .signals import stop_on_signal
from .step_version import STEP_VERSION, describe_version_change
from .store_reading import expect, expect_nothing
from .stored_options import describe_changes, stored_options
from .variant import Variant

PathLike = str | os.PathLike[str]


def train_saes(
    variants: str | Sequence[str],
    *,
    cache: Cache | ConcatCache | PathLike | Sequence[PathLike] | None = None,
    layers: int | Sequence[int] = 12,
    seeds: int | Sequence[int] = 0,
    steps: int | None = None,
    width: int | str | None = None,
    l0: float | Sequence[float] | None = None,
    options: Mapping[str, Any] | Sequence[str] | None = None,
    out: PathLike | None = None,
    device: str = "auto",
    progress: TrainProgress | None = None,
    **more: Any,
) -> list[Run]:
    """Train SAEs on an activation cache, as `sae train` does, and return the finished runs.

    Every combination of variant, layer, L0 and seed is one run with its own folder; runs that read the same batches are
    trained together on one pass. Finished runs are not trained again, and interrupted ones are resumed. In a script
    that a launcher such as torchrun starts in several processes, every process has to call this function: each trains
    its share, and all return when every run is finished.

    Examples:
        >>> runs = sae.train_saes(["topk", "batchtopk"], cache="activations/...", options={"k": 64, "topk.lr": 1e-3})
        >>> s = runs[0].load()
        >>> rows = sae.evaluate_saes(runs, suite="core")

    Args:
        variants: the name of a recipe, or several; `sae variants` lists them.
        cache: an open cache, its folder or address, or a list of these, read as one cache. None: the only cache that
            contains the layer.
        layers: zero-based block indices. The SAEs are trained on the residual stream after these blocks.
        seeds: seeds of the initial weights.
        steps: optimization steps. None: one epoch of the cache.
        width: d_sae, as a number, "16k" or "8x" for eight times d_in. None: the recipe's width.
        l0: target latents per token, for any recipe. None: the recipe's default.
        options: options of the recipes, as {"k": 64, "topk.lr": 1e-3} or in the form of --set, ["k=64",
            "topk.lr=1e-3"].
        out: the folder in which the run folders are created. None: runs/.
        device: "auto", "cpu", "cuda" or "cuda:N".
        progress: callbacks; None is silent.
        more: other fields of `sae.train.plan.TrainConfig`: batch_size, site, paper_exact, shuffle_seed, log_every, ...

    Returns:
        A list of `Run`. A run can be passed wherever a path is accepted; `run.load()` loads its SAE, and `run.folder`
        is its folder.

    Raises:
        UsageError: an argument is wrong; the message lists every problem. Nothing has been written.
        UnavailableError: the runs do not fit on the disk, or the device does not exist.
        Interrupted: after Ctrl-C or SIGTERM, with checkpoints written.
        SaeError: a run was stopped because its loss was not finite. The other runs are finished. With several
            processes, one process raises an error for all of them, and the others raise ReportedElsewhere.
    """
    known = {f.name for f in fields(TrainConfig)} - {"variants", "caches"}
    for name in more:
        if name not in known:
            raise UsageError(f"train_saes has no argument {name!r}{did_you_mean(name, known)}")
    config = TrainConfig(
        variants=[variants] if isinstance(variants, str) else list(variants),
        caches=cache_folders(cache),
        layers=[layers] if isinstance(layers, int) else list(layers),
        seeds=[seeds] if isinstance(seeds, int) else list(seeds),
        steps=steps,
        width=None if width is None else str(width),
        l0=() if l0 is None else [l0] if isinstance(l0, int | float) else list(l0),
        options=options or (),
        out=None if out is None else disk_path(out),
        device=device,
        **more,
    )
    plan = current_process_group().everywhere(partial(plan_training, config))
    run_training(plan, progress or SILENT)
    return plan.runs


def cache_folders(cache: Cache | ConcatCache | PathLike | Sequence[PathLike] | None) -> list[str | Path]:
    if cache is None:
        return []
    if isinstance(cache, ConcatCache):
        return [one.place for one in cache.caches]
    if isinstance(cache, Cache):
        return [cache.place]
    if isinstance(cache, str | os.PathLike):
        cache = [cache]
    for place in cache:
        check_slashes(place)
    return [place if is_url(place) else Path(place) for place in cache]


def run_training(plan: TrainPlan, progress: TrainProgress = SILENT) -> None:
    """Train the unfinished runs of a plan, one pass after the other. Launched processes divide the runs among them.

    Raises:
        Interrupted: after Ctrl-C or SIGTERM, with checkpoints written.
        SaeError: a run failed; raised when all other runs are done.
        UsageError: the plan uses a cache that has not been harvested.
    """
    if isinstance(plan.config.source, PlannedCache):
        raise UsageError(f"{plan.config.source.folder} has not been harvested yet. Harvest it, then plan again.")
    device = resolve_device(plan.config.device)
    fix_cublas_workspace(device)
    keep_freed_memory()
    group = current_process_group(device)
    mention_finished(plan, progress)
    if group.count > 1:
        train_on_ranks(plan, group, progress, partial(train_runs, device=device, locked=True))
    else:
        with stop_on_signal() as should_stop:
            train_runs(plan, progress, should_stop, device=device)


def train_runs(
    plan: TrainPlan, progress: TrainProgress, should_stop: Callable[[], bool], *, device: str, locked: bool = False
) -> None:
    """Train the unfinished runs of a plan in this process. Locks the run folders unless `locked` is set."""
    passes = plan.passes
    places = (place for runs in passes for run in runs for place in run.cache_folders)
    with kept_caches(places, "sae train"), contextlib.ExitStack() as expected:
        expected.callback(expect_nothing, passes)
        for number, runs in enumerate(passes):
            expect(passes[number:], progress.say)
            with contextlib.ExitStack() as locks:
                for run in () if locked else runs:
                    locks.enter_context(writer_lock(run.folder, "sae train", progress.say))
                trainers = [prepare_trainer(run, device, progress) for run in runs]
                for trainer in trainers:
                    if not trainer.steps_done:
                        set_normalization(trainer, trainer.run.cache)
                with CheckpointWriter(device, plan.in_background) as writer:
                    capture = not plan.eager_because
                    train_passes(shared_passes(trainers, plan.config, progress, should_stop, writer, capture))
    raise_problems(plan)


def train_passes(passes: Sequence[SharedPass]) -> None:
    """Train all passes to the end. Runs that resume from different steps share a pass once they reach the same step."""
    for one, later in itertools.zip_longest(passes, passes[1:]):
        if later is None or one.max_steps <= later.steps_done:
            one.train(one.max_steps)
        else:
            one.train(later.steps_done)
            one.join(later)


def mention_finished(plan: TrainPlan, progress: TrainProgress) -> None:
    """Say which runs of a plan are trained already."""
    for run in plan.runs:
        if run.done:
            changed = f", with {describe_changes(run.changed)}" if run.changed else ""
            progress.say(f"{run.folder} is already trained{changed}.")


def raise_problems(plan: TrainPlan) -> None:
    if failed := [run for run in plan.runs if run.problem]:
        raise SaeError("\n".join(f"{run.folder}: {run.problem}" for run in failed))


def prepare_trainer(run: Run, device: str, progress: TrainProgress) -> RunTrainer:
    """Build a run's variant, and load its newest checkpoint if it has one.

    If there is no checkpoint (`steps_done` is 0), the caller still has to call `set_normalization`.
    """
    record = read_run_record(run.folder)
    run.stored = stored_options(record, run.folder)
    trainer = RunTrainer(run, build_variant(run).to(device), device)
    if record:
        if changed := trainer.variant.changed:
            progress.say(f"{run.name} keeps the options that it was started with: {describe_changes(changed)}.")
        if not run.requested.get("log_every"):  # keep the interval, because each log line is a mean over it
            trainer.log_every = record.get("asked", {}).get("log_every") or trainer.log_every
        trainer.digest = run_digest(record)
        trainer.steps_done = restore_checkpoint(trainer, run.folder, progress.say_problem, trainer.digest)
        if trainer.steps_done:
            progress.say(f"{run.name} resumes from step {trainer.steps_done}.")
            if (now := trainer.variant.uses_kernels) != record.get("kernels", False):
                how = ("with", "without") if now else ("without", "with")
                progress.say(
                    f"{run.name} was started {how[1]} the kernels of this package and continues {how[0]} them. Where "
                    "pre-activations are equal, it may select other latents, and sums are rounded differently."
                )
        if trainer.steps_done < run.steps and (version := trainer.restored_version) not in (None, STEP_VERSION):
            progress.say(f"{run.name}: {describe_version_change(run.recipe.name, version)}")
        record_changes(run, record, trainer.steps_done)
        truncate_metrics(run.folder, trainer.steps_done)
    elif any(run.folder.glob("checkpoints/step-*")):
        raise DamagedError(
            f"{run.folder} has checkpoints but no run.json, the file that describes a run. "
            "Restore run.json from a copy. If you have no copy, delete the folder: the same command then starts over."
        )
    else:
        content = run_record(run, trainer.variant, trainer.device)
        trainer.digest = run_digest(content)
        RUN_RECORD.write(run.folder / "run.json", content)
    if run.compiled and (reason := compile_step(trainer, run.config.batch_size)):
        progress.say(f"{run.name} is trained without --compile: {run.recipe.name} cannot be compiled here ({reason}).")
    return trainer


def record_changes(run: Run, record: RunRecord, steps_done: int) -> None:
    """If a resumed run changes its number of parts per batch or its step version, record the change in run.json."""
    content: dict[str, Any] = {**record}
    for name, now in (("accumulate", run.config.accumulate), ("step_version", STEP_VERSION)):
        since = f"{name}_since"
        changes = [[step, value] for step, value in content.pop(since, ()) if step < steps_done]  # later ones: undone
        if now != (changes[-1][1] if changes else content.get(name, 1)):
            changes.append([steps_done, now])
        if changes:
            content[since] = changes
    if content != record:
        RUN_RECORD.write(run.folder / "run.json", content)


def build_variant(run: Run) -> Variant:
    """The variant at step 0, built by the recipe with the run's seed, before `set_normalization`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        return run.recipe.make(run.config, run.options, run.stored)


def set_normalization(trainer: RunTrainer, cache: object) -> None:
    """Set the normalization constants of a new trainer from the statistics of a cache."""
    assert isinstance(cache, Cache | ConcatCache)
    array = trainer.run.hook.array
    mean_D = torch.from_numpy(cache.mean(array)).float().to(trainer.device)
    sample_ND = first_rows(trainer.run, SAMPLE_ROWS) if trainer.variant.reads_rows else None
    trainer.variant.set_normalization(mean_D, cache.statistics(array)["mean_square_norm"], sample_ND)


def first_rows(run: Run, count: int) -> torch.Tensor:
    """The first `count` rows (count, d_in) that a run reads. Repeats the rows if the cache has fewer."""
    batches = math.ceil(count / run.config.batch_size)
    with open_batches(run, 0, "cpu", batches) as loader:
        return torch.cat([x_BD.clone() for x_BD in loader])[:count].float()
