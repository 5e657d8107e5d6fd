"""Carrying runs out: those that read the same batches are one stream, and each batch is read once for all of them."""

import contextlib
import itertools
import json
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from shlex import quote
from typing import Any

import torch

from ..cache.concat import ConcatCache
from ..cache.loader import BatchLoader, ResidentLoader, open_loader
from ..cache.reader import Cache
from ..cache.ring import RingCache
from ..common.device import resolve_device
from ..common.environment import environment_record
from ..common.errors import Interrupted, SaeError, UsageError
from ..common.files import atomic_write, os_error, read_json, write_json, writer_lock
from .checkpoint import restore_checkpoint, save_checkpoint
from .compile import compile_step
from .loop import Trainer, autocast, train_loop
from .plan import FORMAT, Run, TrainConfig
from .sae import fold_normalization, save_sae
from .step import Mechanism
from .variant import Variant

CALIBRATION_BATCHES = 32


@dataclass(frozen=True)
class TrainProgress:
    """What training tells whoever watches: (steps taken, steps in all, metrics by run), and sentences."""

    step: Callable[[int, int, dict[str, dict[str, float]]], None] = lambda number, steps, metrics: None
    say: Callable[[str], None] = lambda sentence: None


def run_training(runs: Sequence[Run], request: TrainConfig, report: TrainProgress = TrainProgress()) -> None:
    """Train what is not done yet, one stream after the other.

    Raises Interrupted after Ctrl-C or SIGTERM, with checkpoints written, and SaeError at the end when a run failed.
    """
    device = resolve_device(request.device)
    streams: dict[tuple[Any, ...], list[Run]] = {}
    for run in unfinished_runs(runs, report):
        streams.setdefault(run.order, []).append(run)
    with stop_on_signal() as stopping:
        for together in streams.values():
            with contextlib.ExitStack() as held:
                for run in together:
                    held.enter_context(writer_lock(run.folder, "sae train", report.say))
                begun = [prepare_trainer(run, device, report) for run in together]
                for training, taken in begun:
                    if not taken:
                        set_normalization(training, training.run.cache)
                for stream in shared_passes(begun, request, report, stopping):
                    stream.train(stream.longest)
    raise_problems(runs)


def unfinished_runs(runs: Sequence[Run], report: TrainProgress) -> list[Run]:
    for run in runs:
        if run.done:
            report.say(f"{run.folder} is trained already.")
    return [run for run in runs if not run.done]


def raise_problems(runs: Sequence[Run]) -> None:
    failed = [run for run in runs if run.problem]
    if failed:
        raise SaeError("\n".join(f"{run.folder}: {run.problem}" for run in failed))


class RunTrainer(Trainer):
    """A training that belongs to a run folder."""

    def __init__(self, run: Run, variant: Variant, device: str) -> None:
        super().__init__(variant, run.steps, device)
        self.run = run


def prepare_trainer(run: Run, device: str, report: TrainProgress) -> tuple[RunTrainer, int]:
    """Build a run's variant, load its newest checkpoint if it has one; returns how many steps were taken.

    Without one it still has to `adapt`: the constants of normalisation come with a checkpoint.
    """
    training, taken = RunTrainer(run, build_variant(run).to(device), device), 0
    if (run.folder / "run.json").exists():
        check_defaults_unchanged(run, training.variant)
        taken = restore_checkpoint(training, run.folder, report.say)
        if taken:
            report.say(f"{run.name} goes on from step {taken}.")
        truncate_metrics(run.folder, taken)
    else:
        write_json(run.folder / "run.json", run_record(run, training))
    if run.compiled and (why := compile_step(training, run.config.batch_size)):
        report.say(f"{run.name} is trained without --compile: {run.recipe.name} cannot be compiled here ({why}).")
    return training, taken


def build_variant(run: Run) -> Variant:
    """The variant at step 0: the recipe under the run's seed, without the constants of its activations."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        return run.recipe.make(run.config, run.options)


def set_normalization(training: RunTrainer, cache: Cache | ConcatCache) -> None:
    """Give a training that begins the constants of normalisation."""
    name = training.run.hook.array
    mean_D = torch.from_numpy(cache.mean(name)).float().to(training.device)
    training.variant.set_normalization(mean_D, cache.statistics(name)["mean_square_norm"])


def run_record(run: Run, training: RunTrainer) -> dict[str, Any]:
    return {
        "format": FORMAT,
        **run.identity(),
        "resolved": resolved_options(training.variant),
        "paper": run.recipe.paper,
        "cache_folders": run.cache_folders,
        **({"ring": run.cache.capacity} if isinstance(run.cache, RingCache) else {}),
        "asked": dict(run.asked),
        "device": training.device,
        "environment": environment_record(),
        "threads": torch.get_num_threads(),
    }


def resolved_options(variant: Variant) -> dict[str, Any]:
    """Every option, given or default."""
    return {**variant.options, **asdict(variant.optimization)}


def check_defaults_unchanged(run: Run, variant: Variant) -> None:
    """The folder's name holds the options that were given; the defaults of the others can change with the version."""
    begun, now = read_json(run.folder / "run.json", "resolved")["resolved"], resolved_options(variant)
    changed = [
        f"{name} {value} then, {now[name]} now" for name, value in begun.items() if now.get(name, value) != value
    ]
    if changed:
        raise UsageError(
            f"{run.folder} was begun with other options ({'; '.join(changed)}). "
            "Go on with the version that began it, or start a new run with --out."
        )


def shared_passes(
    begun: list[tuple[RunTrainer, int]], request: TrainConfig, report: TrainProgress, stopping: Callable[[], bool]
) -> list["SharedPass"]:
    """Runs that stopped at different steps read different batches next: each group of equals is a stream."""
    groups = [([t for t, at in begun if at == taken], taken) for taken in sorted({taken for _, taken in begun})]
    return [SharedPass(trainings, taken, request, report, stopping) for trainings, taken in groups]


class SharedPass:
    """Runs on one pass over the same batches, from batch `taken` until each is done, fails, or is told to stop."""

    def __init__(
        self,
        trainings: list[RunTrainer],
        taken: int,
        request: TrainConfig,
        report: TrainProgress,
        stopping: Callable[[], bool],
    ) -> None:
        self.active, self.taken, self.request, self.report, self.stopping = trainings, taken, request, report, stopping
        self.longest = max(training.steps for training in trainings)
        self.batch_size = trainings[0].run.config.batch_size
        self.waited = 0.0  # seconds for data, in the batches that are closed

    def train(self, until: int) -> None:
        """Take the steps up to `until`; whoever is not done then has a checkpoint there."""
        self._finish_those_at(self.taken)  # killed between their last checkpoint and their end
        if self.active:
            self.until, first = until, self.active[0]
            with open_batches(first.run, self.taken, first.device) as self.batches:
                train_loop(self.active, self.batches, range(self.taken, until), self._after_step)
            self.taken, self.waited = until, self.waited + self.batches.seconds_waited

    def _after_step(self, number: int) -> bool:
        count, stop = number + 1, self.stopping()
        ending = any(training.steps == count for training in self.active)
        checkpoint = stop or count == self.until or count % self.request.checkpoint_every == 0
        if stop or ending or checkpoint or count % self.request.log_every == 0:
            self._give_up_the_failed()
            self._log(count)
        self._finish_those_at(count)
        if checkpoint:
            for training in self.active:
                save_checkpoint(training, training.run.folder, count)
        if stop and self.active:
            folders = " ".join(f"--resume {quote(str(training.run.folder))}" for training in self.active)
            also = f", and so does: sae train {folders}" if self.request.ring is None else "."
            raise Interrupted(f"Stopped after step {count}; everything is saved. The same command goes on{also}")
        return not self.active

    def _give_up_the_failed(self) -> None:
        for training in list(self.active):
            step = int(training.failed_at)
            if step >= 0:
                run = training.run
                kept = (
                    "the last good checkpoint is kept"
                    if any(run.folder.glob("checkpoints/*"))
                    else "there is no checkpoint yet"
                )
                run.problem = (
                    f"the loss or its gradient was not finite at step {step} (batch {step} of order seed {run.shuffle_seed}); "
                    f"the weights were not moved by it, and {kept}. "
                    f"A smaller rate usually helps: --set {run.recipe.name}.lr=..."
                )
                self.report.say(f"{run.name}: {run.problem}")
                self.active.remove(training)

    def _log(self, count: int) -> None:
        metrics = {}
        waited = round(self.waited + self.batches.seconds_waited, 3)
        for training in self.active:
            tokens = count * training.run.config.batch_size
            line = {"step": count, "tokens": tokens, **training.pop_metrics(), "waited_for_data": waited}
            metrics[training.run.name] = line
            append_line(training.run.folder / "metrics.jsonl", line)
        self.report.step(count, self.longest, metrics)

    def _finish_those_at(self, count: int) -> None:
        for training in [t for t in self.active if t.steps == count]:
            finish_run(training)
            self.active.remove(training)


def finish_run(training: RunTrainer) -> None:
    """Fold the normalisation in and write what evaluation loads; sae.json comes last and says that the run is done."""
    run, variant = training.run, training.variant
    save_checkpoint(training, run.folder, run.steps)
    calibrate(training)
    origin = {
        "model": run.cache.identity["model"],
        **run.hook._asdict(),
        "hook_name": run.hook.name,
        "variant": run.recipe.name,
        "seed": run.seed,
        "training_tokens": run.steps * run.config.batch_size,
        "cache": run.cache_folders[0],  # its held-out documents are held out of the others too
        "fingerprint": run.cache.fingerprint,
        "context": run.cache.identity["context"],
    }
    sae = fold_normalization(variant.sae, float(variant.scale), variant.mean_D)
    with torch.no_grad():
        for mechanism in variant.mechanisms:
            mechanism.export(sae)
    save_sae(sae, run.folder, origin)


def open_batches(run: Run, batch: int, device: str, few: bool = False) -> BatchLoader | ResidentLoader:
    """What a run reads, from a batch on; of a ring, the group that is there. For a `few` nothing is kept on a GPU."""
    size = run.config.batch_size
    source, batch = run.cache.locate_batch(batch, size) if isinstance(run.cache, RingCache) else (run.cache, batch)
    make = BatchLoader if few else open_loader
    return make(source, run.hook.array, size, seed=run.shuffle_seed, batch=batch, device=device)


@torch.no_grad()
def calibrate(training: RunTrainer) -> None:
    """Let mechanisms settle what depends on the final weights, on the batches that come after the last step's."""
    run = training.run
    settling = [m for m in training.variant.mechanisms if type(m).calibrate is not Mechanism.calibrate]
    if not settling:
        return
    with open_batches(run, run.steps, training.device, few=True) as batches, autocast(training.device):
        for x_BD in itertools.islice(batches, CALIBRATION_BATCHES):
            step = training.variant(training.i, x_BD, training.optimizer)
            for mechanism in settling:
                mechanism.calibrate(step)


def append_line(path: Path, content: dict[str, float]) -> None:
    try:
        with path.open("a") as file:
            file.write(json.dumps(content) + "\n")
    except OSError as error:
        raise os_error(error, path) from error


def truncate_metrics(folder: Path, step: int) -> None:
    """Forget lines of steps that will be taken again, and a last line that a kill cut off."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return
    kept = []
    for line in path.read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
    atomic_write(path, "".join(kept).encode())


@contextlib.contextmanager
def stop_on_signal() -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM finish the step; a second Ctrl-C stops at once."""
    asked = False

    def ask(number: int, _frame: Any) -> None:
        nonlocal asked
        if asked and number == signal.SIGINT:
            raise Interrupted("Stopped at once. The last checkpoint is kept; the same command goes on from it.")
        asked = True

    try:
        previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread: whoever runs us there keeps the signals
        previous = {}
    try:
        yield lambda: asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
