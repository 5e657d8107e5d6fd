"""Train runs that read the same batches. Each batch is read once and used by all unfinished runs."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..cache.loader import BatchLoader, ResidentLoader, open_loader
from ..cache.planned import PlannedCache
from ..cache.ring import RingCache
from ..common.errors import Interrupted, SaeError
from ..common.escaping import quote
from ..common.memory import out_of_memory
from ..common.process_group import rank_and_count
from .capture import CapturedSteps
from .checkpoint_writer import CheckpointWriter
from .loop import train_loop
from .memory_error import save_after_running_out
from .passes import reserved_memory
from .plan import Run, TrainConfig
from .progress import TrainProgress
from .run_folder import append_metrics
from .run_trainer import RunTrainer
from .sae import fold_normalization, save_sae
from .step import Mechanism
from .store_reading import CALIBRATION_BATCHES


def shared_passes(
    trainers: Sequence[RunTrainer],
    config: TrainConfig,
    progress: TrainProgress,
    should_stop: Callable[[], bool],
    writer: CheckpointWriter,
    capture: bool = False,
) -> list["SharedPass"]:
    """Put trainers that read the same stream of batches into passes: one for each step from which trainers resume.

    The trainers of a pass need the same next batch, because they resume from the same step.

    If `capture` is set, the steps of each pass are captured in one CUDA graph.
    """
    starts = sorted({trainer.steps_done for trainer in trainers})
    groups = [[trainer for trainer in trainers if trainer.steps_done == start] for start in starts]
    return [SharedPass(group, config, progress, should_stop, writer, capture) for group in groups]


class SharedPass:
    """Trains runs in one pass over the same batches, until every run is done, has failed or is interrupted."""

    def __init__(
        self,
        trainers: list[RunTrainer],
        config: TrainConfig,
        progress: TrainProgress,
        should_stop: Callable[[], bool],
        writer: CheckpointWriter,
        capture: bool = False,
    ) -> None:
        self.active, self.config, self.progress, self.should_stop = trainers, config, progress, should_stop
        self.writer, self.capture = writer, capture
        self.steps_done = trainers[0].steps_done
        self.max_steps = max(trainer.steps for trainer in trainers)
        self.batch_size = trainers[0].run.config.batch_size
        self.seconds_waited = 0.0  # time for which the closed loaders waited for data

    def train(self, until: int) -> None:
        """Take the steps up to `until`. Runs that are not finished at that step get a checkpoint."""
        self._finish_runs(self.steps_done)  # for runs killed before sae.json was written
        if self.active:
            self.until, first, sharing = until, self.active[0], [trainer.run for trainer in self.active]
            replay = CapturedSteps(self.progress.say).replay if self.capture else None
            try:
                count = until - self.steps_done
                with open_batches(
                    first.run, self.steps_done, first.device, count, sharing, self.should_stop, self.capture
                ) as self.batches:
                    train_loop(self.active, self.batches, range(self.steps_done, until), self._after_step, replay)
                self.writer.wait()
            except Exception as error:
                if isinstance(error, SaeError) and error is self.batches.store_failure:
                    raise self._save_after_store_failure(error) from error
                if not out_of_memory(error):
                    raise
                self.writer.give_up()
                raise save_after_running_out(self.active, error, self.config) from None
            self.steps_done, self.seconds_waited = until, self.seconds_waited + self.batches.seconds_waited

    def join(self, later: "SharedPass") -> None:
        """Add the runs of this pass to a pass that begins at the step where this pass stopped."""
        later.active, later.max_steps = [*later.active, *self.active], max(self.max_steps, later.max_steps)

    def _after_step(self, number: int) -> bool:
        """Log, finish runs, save checkpoints. Returns whether all runs are done. Raises Interrupted on request."""
        self.writer.check()
        steps_done, stop = number + 1, self.should_stop()
        checkpoint = stop or steps_done == self.until or steps_done % self.config.checkpoint_every == 0
        due = [trainer for trainer in self.active if stop or checkpoint or trainer.logs_after(steps_done)]
        if due:
            self._log(steps_done, self._drop_failed_runs(due))
        elif steps_done == 1:  # the first step gets its own line, and still counts in the mean of the next line
            self._log(steps_done, self._drop_failed_runs(list(self.active)), first=True)
        self._finish_runs(steps_done)
        if checkpoint and self.active:
            self.writer.save(self.active, steps_done)
        if stop and self.active:
            self.writer.wait()
            raise self._interrupted(steps_done)
        return not self.active

    def _interrupted(self, steps_done: int) -> Interrupted:
        folders = " ".join(f"--resume {quote(trainer.run.folder)}" for trainer in self.active)
        same_command = isinstance(self.config.source, RingCache) or rank_and_count()[1] > 1
        also = "" if same_command else f", or with: sae train {folders}"
        return Interrupted(
            f"Stopped after step {steps_done}; everything is saved. Resume with the same command{also or '.'}"
        )

    def _save_after_store_failure(self, error: SaeError) -> SaeError:
        """Save checkpoints after the store failed to deliver the next batch, or after the wait for it was interrupted.

        Returns the error to raise.
        """
        steps_done = int(self.active[0].i)
        if steps_done > self.steps_done:
            healthy = self._drop_failed_runs(list(self.active))
            self._log(steps_done, [trainer for trainer in healthy if trainer.logged < steps_done])
            self.writer.save(self.active, steps_done)
        self.writer.wait()
        if isinstance(error, Interrupted):
            return self._interrupted(steps_done)
        saved = f"Everything up to step {steps_done:,} is saved; the same command continues from there."
        return type(error)(f"{error} {saved if steps_done else 'No step was taken.'}")

    def _drop_failed_runs(self, due: Sequence[RunTrainer]) -> list[RunTrainer]:
        """Remove the trainers that failed, and return the others."""
        for trainer in due:
            step, run = int(trainer.failed_at), trainer.run
            if step < 0:
                continue
            self.writer.wait()
            saved = any(run.folder.glob("checkpoints/*"))
            run.problem = (
                f"the loss or its gradient was not finite at step {step} (batch {step} of shuffle seed "
                f"{run.shuffle_seed}). That step did not change the weights, and "
                f"{'the last good checkpoint is kept' if saved else 'there is no checkpoint yet'}. "
                f"A smaller learning rate usually helps: --set {run.recipe.name}.lr=..."
            )
            self.progress.say_problem(f"{run.name}: {run.problem}")
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
            trainer.logged = steps_done
        self.progress.step(steps_done, self.max_steps, metrics)

    def _finish_runs(self, steps_done: int) -> None:
        for trainer in [t for t in self.active if t.steps == steps_done]:
            finish_run(trainer, self.writer)
            self.active.remove(trainer)


def finish_run(trainer: RunTrainer, writer: CheckpointWriter) -> None:
    """Fold the normalization into the SAE and write the files for evaluation.

    sae.json comes last: it marks the run as done.
    """
    run, variant = trainer.run, trainer.variant
    assert not isinstance(run.cache, PlannedCache)
    writer.save([trainer], run.steps)
    calibrate(trainer)
    origin = {
        "model": run.cache.identity["model"],
        **run.hook._asdict(),
        "hook_name": run.hook.name,
        "variant": run.recipe.name,
        "seed": run.seed,
        "training_tokens": run.steps * run.config.batch_size,
        "cache": run.cache_folders[0],  # documents held out here are also held out in the run's other caches
        "fingerprint": run.cache.fingerprint,
        "context": run.cache.identity["context"],
        **{key: run.cache.identity[key] for key in ("bos",) if key in run.cache.identity},
        "norm_limit": run.cache.norm_limit(run.hook.array),  # rows with a larger norm were not used in training
    }
    layer_norm = variant.optimization.normalize == "layer_norm"
    sae = fold_normalization(variant.sae, variant.scale, variant.mean_D, layer_norm)
    with torch.no_grad():
        for mechanism in variant.mechanisms:
            mechanism.export(sae)
    writer.wait()  # the last checkpoint has to be complete first: a lost SAE is written again from it
    writer.forget(trainer)
    save_sae(sae, run.folder, origin, trainer.digest)


def open_batches(
    run: Run, step: int, device: str, count: int, sharing: Sequence[Run] | None = None,
    should_stop: Callable[[], bool] = lambda: False, captured: bool = False,
) -> BatchLoader | ResidentLoader:  # fmt: skip
    """The next `count` batches of a run, starting at a step.

    If the run trains while its activations are harvested (RingCache), the batches come from the group that is
    open at the moment.

    `sharing` lists the runs of the pass. If `sharing` is given, the loader may keep all rows on the GPU, provided that
    they fit there together with the runs. For only a few batches, loading all rows is not worthwhile, so `sharing` is
    left out. If `should_stop` returns True, the loader stops waiting for a store.
    """
    size, cache, batch = run.config.batch_size, run.cache, step
    assert not isinstance(cache, PlannedCache)
    rows, batch = cache.locate_batch(step, size) if isinstance(cache, RingCache) else (cache, step)
    part: dict[str, Any] = {"seed": run.shuffle_seed, "batch": batch, "device": device, "stop": batch + count}
    if sharing is None:
        return BatchLoader(rows, run.hook.array, size, **part)
    part |= {"expected": True, "should_stop": should_stop}
    if not device.startswith("cuda"):
        return BatchLoader(rows, run.hook.array, size, **part)
    return open_loader(rows, run.hook.array, size, reserve=reserved_memory(sharing, device, captured), **part)


@torch.no_grad()
def calibrate(trainer: RunTrainer) -> None:
    """Call `calibrate` of the mechanisms that have one, with the batches that follow the last step."""
    run = trainer.run
    calibrating = [m for m in trainer.variant.mechanisms if type(m).calibrate is not Mechanism.calibrate]
    if not calibrating:
        return
    with open_batches(run, run.steps, trainer.device, CALIBRATION_BATCHES) as batches:
        for x_BD in batches:
            step = trainer.forward(x_BD)
            for mechanism in calibrating:
                mechanism.calibrate(step)
