"""Run a TrainPlan. Runs that read the same batches share one pass: each batch is read once and steps all of them."""

import contextlib
import itertools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from ..cache.concat import ConcatCache
from ..cache.loader import BatchLoader, ResidentLoader, open_loader
from ..cache.planned import PlannedCache
from ..cache.reader import Cache
from ..cache.ring import RingCache
from ..common.device import require_one_process, resolve_device
from ..common.errors import DamagedError, Interrupted, SaeError, UsageError, did_you_mean
from ..common.escaping import quote
from ..common.files import writer_lock
from ..common.schemas import RUN_RECORD
from .checkpoint import restore_checkpoint, save_checkpoint
from .compile import compile_step
from .loop import Trainer, autocast, train_loop
from .plan import Run, TrainConfig, TrainPlan, default_log_interval, group_by_pass, plan_training
from .run_folder import append_metrics, run_record, truncate_metrics
from .sae import fold_normalization, read_run_record, run_digest, save_sae
from .signals import stop_on_signal
from .step import Mechanism
from .stored_options import describe_changes, stored_options
from .variant import Variant

CALIBRATION_BATCHES = 32
SAMPLE_ROWS = 10_000  # of what `Variant.reads_rows`

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class TrainProgress:
    """Callbacks of training, silent by default."""

    step: Callable[[int, int, dict[str, dict[str, float]]], None] = lambda step, steps, metrics: None
    """Called when metrics are logged, with the steps taken, the steps in all, and run name -> metrics."""
    say: Callable[[str], None] = lambda sentence: None
    """Called with sentences such as "... resumes from step 1000."."""


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
    trained together on one pass. Finished runs are not trained again, and interrupted ones are resumed.

    Example:
        >>> runs = sae.train_saes(["topk", "batchtopk"], cache="activations/...", options={"k": 64, "topk.lr": 1e-3})
        >>> s = runs[0].load()
        >>> rows = sae.evaluate_saes(runs, suite="core")

    Args:
        variants: the name of a recipe, or several; `sae variants` lists them.
        cache: an open cache, its folder, or several folders read as one. None: the only cache that holds the layer.
        layers: zero-based blocks; the SAEs are of the residual stream after them.
        seeds: seeds of the initial weights.
        steps: optimization steps. None: one epoch of the cache.
        width: d_sae, as a number, "16k" or "8x" for eight times d_in. None: the recipe's.
        l0: target latents per token, for any recipe. None: the recipe's default.
        options: of the recipes, as {"k": 64, "topk.lr": 1e-3} or, as for --set, ["k=64", "topk.lr=1e-3"].
        out: the folder of the run folders. None: runs/.
        device: "auto", "cpu", "cuda" or "cuda:N".
        progress: callbacks; None is silent.
        more: other fields of `sae.train.plan.TrainConfig`: batch_size, site, paper_exact, shuffle_seed, log_every, ...

    Returns:
        A list of `Run`, which can be given wherever a path is taken; `run.load()` is its SAE, `run.folder` its folder.

    Raises:
        UsageError: an argument is wrong; the message lists every problem. Nothing has been written.
        UnavailableError: the runs do not fit on the disk, or the device does not exist.
        Interrupted: after Ctrl-C or SIGTERM, with checkpoints written.
        SaeError: a run was given up because its loss was not finite. The others are finished.
    """
    known = {f.name for f in fields(TrainConfig)} - {"variants", "caches"}
    for name in more:
        if name not in known:
            raise UsageError(f"train_saes has no argument {name!r}{did_you_mean(name, known)}")
    plan = plan_training(
        TrainConfig(
            variants=[variants] if isinstance(variants, str) else list(variants),
            caches=cache_folders(cache),
            layers=[layers] if isinstance(layers, int) else list(layers),
            seeds=[seeds] if isinstance(seeds, int) else list(seeds),
            steps=steps,
            width=None if width is None else str(width),
            l0=() if l0 is None else [l0] if isinstance(l0, int | float) else list(l0),
            options=options or (),
            out=None if out is None else Path(out),
            device=device,
            **more,
        )
    )
    run_training(plan, progress or TrainProgress())
    return plan.runs


def cache_folders(cache: Cache | ConcatCache | PathLike | Sequence[PathLike] | None) -> list[Path]:
    if cache is None:
        return []
    if isinstance(cache, ConcatCache):
        return [one.folder for one in cache.caches]
    if isinstance(cache, Cache):
        return [cache.folder]
    if isinstance(cache, str | os.PathLike):
        return [Path(cache)]
    return [Path(folder) for folder in cache]


def run_training(plan: TrainPlan, progress: TrainProgress = TrainProgress()) -> None:
    """Train the unfinished runs of a plan, one pass after the other.

    Raises:
        Interrupted: after Ctrl-C or SIGTERM, with checkpoints written.
        SaeError: a run failed; raised when all others are done.
        UsageError: the plan is on a cache that has not been harvested, or a launcher has started several processes.
    """
    require_one_process("sae train")
    if isinstance(plan.config.source, PlannedCache):
        raise UsageError(f"{plan.config.source.folder} has not been harvested yet. Harvest it, then plan again.")
    device = resolve_device(plan.config.device)
    with stop_on_signal() as should_stop:
        for runs in group_by_pass(skip_finished(plan, progress)):
            with contextlib.ExitStack() as locks:
                for run in runs:
                    locks.enter_context(writer_lock(run.folder, "sae train", progress.say))
                trainers = [prepare_trainer(run, device, progress) for run in runs]
                for trainer in trainers:
                    if not trainer.steps_done:
                        set_normalization(trainer, trainer.run.cache)
                for shared_pass in shared_passes(trainers, plan.config, progress, should_stop):
                    shared_pass.train(shared_pass.max_steps)
    raise_problems(plan)


def skip_finished(plan: TrainPlan, progress: TrainProgress) -> list[Run]:
    """The unfinished runs of a plan; the others are mentioned."""
    for run in plan.runs:
        if run.done:
            changed = f", with {describe_changes(run.changed)}" if run.changed else ""
            progress.say(f"{run.folder} is already trained{changed}.")
    return plan.unfinished


def raise_problems(plan: TrainPlan) -> None:
    if failed := [run for run in plan.runs if run.problem]:
        raise SaeError("\n".join(f"{run.folder}: {run.problem}" for run in failed))


class RunTrainer(Trainer):
    """The trainer of a run that has a folder."""

    def __init__(self, run: Run, variant: Variant, device: str) -> None:
        super().__init__(variant, run.steps, device)
        self.run = run
        self.steps_done = 0  # when it was prepared
        self.digest = ""  # of what decides the run, as run.json has it
        self.log_every = run.requested.get("log_every") or default_log_interval(run.steps)  # steps

    def logs_after(self, steps_done: int) -> bool:
        """Whether metrics are logged after so many steps, checkpoints aside."""
        return steps_done % self.log_every == 0 or steps_done == self.steps


def prepare_trainer(run: Run, device: str, progress: TrainProgress) -> RunTrainer:
    """Build a run's variant, and load its newest checkpoint if it has one.

    Without a checkpoint (`steps_done` is 0) the caller still has to `set_normalization`.
    """
    record = read_run_record(run.folder)
    run.stored = stored_options(record, run.folder)
    trainer = RunTrainer(run, build_variant(run).to(device), device)
    if record:
        if changed := trainer.variant.changed:
            progress.say(f"{run.name} keeps the options that it was started with: {describe_changes(changed)}.")
        if not run.requested.get("log_every"):  # a resumed run keeps its own: a line is the mean since the one before
            trainer.log_every = record.get("asked", {}).get("log_every") or trainer.log_every
        trainer.digest = run_digest(record)
        trainer.steps_done = restore_checkpoint(trainer, run.folder, progress.say, trainer.digest)
        if trainer.steps_done:
            progress.say(f"{run.name} resumes from step {trainer.steps_done}.")
        truncate_metrics(run.folder, trainer.steps_done)
    elif any(run.folder.glob("checkpoints/step-*")):
        raise DamagedError(
            f"{run.folder} has checkpoints but no run.json, which says what they are of. Restore run.json from a copy. "
            "Without one, delete the folder: the same command then starts again."
        )
    else:
        content = run_record(run, trainer.variant, trainer.device)
        trainer.digest = run_digest(content)
        RUN_RECORD.write(run.folder / "run.json", content)
    if run.compiled and (reason := compile_step(trainer, run.config.batch_size)):
        progress.say(f"{run.name} is trained without --compile: {run.recipe.name} cannot be compiled here ({reason}).")
    return trainer


def build_variant(run: Run) -> Variant:
    """The variant at step 0: the recipe under the run's seed, before `set_normalization`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        return run.recipe.make(run.config, run.options, run.stored)


def set_normalization(trainer: RunTrainer, cache: object) -> None:
    """Give a new trainer the constants of normalization, from the statistics of a cache."""
    assert isinstance(cache, Cache | ConcatCache)
    array = trainer.run.hook.array
    mean_D = torch.from_numpy(cache.mean(array)).float().to(trainer.device)
    sample_ND = first_rows(trainer.run, SAMPLE_ROWS) if trainer.variant.reads_rows else None
    trainer.variant.set_normalization(mean_D, cache.statistics(array)["mean_square_norm"], sample_ND)


def first_rows(run: Run, count: int) -> torch.Tensor:
    """The first `count` rows (count, d_in) that a run reads, from the start again where its cache has fewer."""
    batches = math.ceil(count / run.config.batch_size)
    with open_batches(run, 0, "cpu", resident=False) as loader:
        return torch.cat([x_BD.clone() for x_BD in itertools.islice(loader, batches)])[:count].float()


def shared_passes(
    trainers: Sequence[RunTrainer], config: TrainConfig, progress: TrainProgress, should_stop: Callable[[], bool]
) -> list["SharedPass"]:
    """Group trainers of the same batches by the step they resume from, since that decides the batch they read next."""
    starts = sorted({trainer.steps_done for trainer in trainers})
    groups = [[trainer for trainer in trainers if trainer.steps_done == start] for start in starts]
    return [SharedPass(group, config, progress, should_stop) for group in groups]


class SharedPass:
    """Runs on one pass over the same batches, from the same step on, until each is done, fails or is interrupted."""

    def __init__(
        self,
        trainers: list[RunTrainer],
        config: TrainConfig,
        progress: TrainProgress,
        should_stop: Callable[[], bool],
    ) -> None:
        self.active, self.config, self.progress, self.should_stop = trainers, config, progress, should_stop
        self.steps_done = trainers[0].steps_done
        self.max_steps = max(trainer.steps for trainer in trainers)
        self.batch_size = trainers[0].run.config.batch_size
        self.seconds_waited = 0.0  # for data, by the loaders that are closed

    def train(self, until: int) -> None:
        """Take the steps up to `until`. Runs that are not done then have a checkpoint there."""
        self._finish_runs(self.steps_done)  # a run that was killed between its last checkpoint and its end
        if self.active:
            self.until, first = until, self.active[0]
            with open_batches(first.run, self.steps_done, first.device) as self.batches:
                train_loop(self.active, self.batches, range(self.steps_done, until), self._after_step)
            self.steps_done, self.seconds_waited = until, self.seconds_waited + self.batches.seconds_waited

    def _after_step(self, number: int) -> bool:
        """Log, finish runs, checkpoint. Returns whether all is done; raises Interrupted if told to stop."""
        steps_done, stop = number + 1, self.should_stop()
        checkpoint = stop or steps_done == self.until or steps_done % self.config.checkpoint_every == 0
        due = [trainer for trainer in self.active if stop or checkpoint or trainer.logs_after(steps_done)]
        if due:
            self._log(steps_done, self._drop_failed_runs(due))
        elif steps_done == 1:  # the first step has a line of its own, and still counts in the mean of the next
            self._log(steps_done, self._drop_failed_runs(list(self.active)), first=True)
        self._finish_runs(steps_done)
        if checkpoint:
            for trainer in self.active:
                save_checkpoint(trainer, trainer.run.folder, steps_done, trainer.digest)
        if stop and self.active:
            folders = " ".join(f"--resume {quote(trainer.run.folder)}" for trainer in self.active)
            also = "" if isinstance(self.config.source, RingCache) else f", or with: sae train {folders}"
            raise Interrupted(
                f"Stopped after step {steps_done}; everything is saved. Resume with the same command{also or '.'}"
            )
        return not self.active

    def _drop_failed_runs(self, due: Sequence[RunTrainer]) -> list[RunTrainer]:
        """Give up those trainers that failed, and return the others."""
        for trainer in due:
            step, run = int(trainer.failed_at), trainer.run
            if step < 0:
                continue
            saved = any(run.folder.glob("checkpoints/*"))
            run.problem = (
                f"the loss or its gradient was not finite at step {step} (batch {step} of shuffle seed "
                f"{run.shuffle_seed}). That step did not change the weights, and "
                f"{'the last good checkpoint is kept' if saved else 'there is no checkpoint yet'}. "
                f"A smaller learning rate usually helps: --set {run.recipe.name}.lr=..."
            )
            self.progress.say(f"{run.name}: {run.problem}")
            self.active.remove(trainer)
        return [trainer for trainer in due if trainer in self.active]

    def _log(self, steps_done: int, due: Sequence[RunTrainer], first: bool = False) -> None:
        metrics: dict[str, dict[str, float]] = {}
        waited = round(self.seconds_waited + self.batches.seconds_waited, 3)
        for trainer in due:
            run, tokens = trainer.run, steps_done * trainer.run.config.batch_size
            measured = trainer.pop_metrics(reset=not first)
            line = {"step": steps_done, "tokens": tokens, **measured, "waited_for_data": waited}
            metrics[run.name] = line
            append_metrics(run.folder, line)
        self.progress.step(steps_done, self.max_steps, metrics)

    def _finish_runs(self, steps_done: int) -> None:
        for trainer in [t for t in self.active if t.steps == steps_done]:
            finish_run(trainer)
            self.active.remove(trainer)


def finish_run(trainer: RunTrainer) -> None:
    """Fold the normalization in and write what evaluation loads. sae.json comes last and marks the run as done."""
    run, variant = trainer.run, trainer.variant
    assert not isinstance(run.cache, PlannedCache)
    save_checkpoint(trainer, run.folder, run.steps, trainer.digest)
    calibrate(trainer)
    origin = {
        "model": run.cache.identity["model"],
        **run.hook._asdict(),
        "hook_name": run.hook.name,
        "variant": run.recipe.name,
        "seed": run.seed,
        "training_tokens": run.steps * run.config.batch_size,
        "cache": run.cache_folders[0],  # its held-out documents are held out of the other caches too
        "fingerprint": run.cache.fingerprint,
        "context": run.cache.identity["context"],
        **{key: run.cache.identity[key] for key in ("bos",) if key in run.cache.identity},
        "norm_limit": run.cache.norm_limit(run.hook.array),  # rows over it were not trained on
    }
    layer_norm = variant.optimization.normalize == "layer_norm"
    sae = fold_normalization(variant.sae, variant.scale, variant.mean_D, layer_norm)
    with torch.no_grad():
        for mechanism in variant.mechanisms:
            mechanism.export(sae)
    save_sae(sae, run.folder, origin, trainer.digest)


def open_batches(run: Run, step: int, device: str, resident: bool = True) -> BatchLoader | ResidentLoader:
    """The batches of a run from a step on; of a ring, those of the group that is open.

    `resident` lets the loader keep the rows on a GPU, which does not pay for a few batches.
    """
    size, cache, batch = run.config.batch_size, run.cache, step
    assert not isinstance(cache, PlannedCache)
    rows, batch = cache.locate_batch(step, size) if isinstance(cache, RingCache) else (cache, step)
    make_loader = open_loader if resident else BatchLoader
    return make_loader(rows, run.hook.array, size, seed=run.shuffle_seed, batch=batch, device=device)


@torch.no_grad()
def calibrate(trainer: RunTrainer) -> None:
    """Call the mechanisms that fit a number to the final weights, on the batches that follow the last step's."""
    run = trainer.run
    calibrating = [m for m in trainer.variant.mechanisms if type(m).calibrate is not Mechanism.calibrate]
    if not calibrating:
        return
    with open_batches(run, run.steps, trainer.device, resident=False) as batches, autocast(trainer.device):
        for x_BD in itertools.islice(batches, CALIBRATION_BATCHES):
            step = trainer.variant(trainer.i, x_BD, trainer.optimizer)
            for mechanism in calibrating:
                mechanism.calibrate(step)
