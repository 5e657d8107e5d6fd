"""Training in several processes (ranks) started by a launcher: each trains its share of the runs on its own device.

The first process assigns the runs and tells the other processes which ones to train. The other processes cannot decide
this themselves: a process that starts later could find different runs unfinished, and the measured time of a step
differs between processes. Each process locks the folders of its runs. After that the processes communicate only through
files in these folders. While a process works, it holds its locks. If a lock is released but a note is still beside it,
the process that held the lock has died. metrics.jsonl shows the progress of a run, and sae.json shows that the run is
finished. If a process dies, only the steps of its own runs since their last checkpoints are lost. The other processes
continue, unless the launcher ends them. A process that has finished its runs can also die while it waits for the
others. So each process holds a lock on `PRESENCE` in the folder of its first run until it has reported. Before a
process reports, it waits until every process with a lower rank has reported or died. It reports only if none of them
has, so a single process reports for all.
"""

import fcntl
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from math import inf
from typing import NoReturn

from ..common.errors import Interrupted, ReportedElsewhere, SaeError, UnavailableError, UsageError
from ..common.files import os_error
from ..common.locks import LOOK_SECONDS, acquire, is_abandoned, is_locked, release, was_abandoned, writer_lock
from ..common.process_group import ProcessGroup, processes_on_this_machine
from .plan import Run, TrainPlan
from .progress import Overview, TrainProgress
from .run_folder import last_metrics
from .signals import stop_on_signal

PRESENCE = ".lock.rank"
POLL_SECONDS, UPDATE_SECONDS, TURN_SECONDS = 0.5, 2.0, 0.05
STOP_SECONDS = 10.0  # for the other processes to stop if the launcher stops all; torchrun kills them after 30 s
LISTED = 5  # maximum number of runs listed per process
STALE_SECONDS = 60.0  # time that a network file system may need to show a file from another machine

TrainRuns = Callable[[TrainPlan, TrainProgress, Callable[[], bool]], None]


def train_on_ranks(plan: TrainPlan, group: ProcessGroup, progress: TrainProgress, train: TrainRuns) -> None:
    """Call `train` on the runs that this process has to train. Returns when every process has trained its runs.

    Raises:
        Interrupted: this process received a request to stop; its runs have checkpoints.
        SaeError: not every run of the plan is finished. In the first process that is still running, the message names
            these runs; the other processes raise ReportedElsewhere.
    """
    shares = dealt_runs(plan, group)
    own, watch = TrainPlan(plan.config, shares[group.rank]), Watch(shares, group, progress)
    with ExitStack() as presence, ExitStack() as locks:
        group.everywhere(partial(lock_runs, own.runs, locks, progress))
        group.everywhere(lambda: presence.enter_context(watch.present()))
        group.everywhere(partial(require_locks, shares))
        with stop_on_signal() as should_stop:
            problem = attempt(lambda: train(own, watch.while_training(), should_stop), progress)
            locks.close()
            problem = watch.wait(should_stop, problem)
        watch.report(problem)


def dealt_runs(plan: TrainPlan, group: ProcessGroup) -> list[list[Run]]:
    """The runs of each process, as assigned by process 0. Raises UsageError if the processes planned different runs."""
    names = [run.name for run in plan.runs]
    dealt = [sorted(share.runs) for share in plan.shares] if group.is_first else []
    told = group.gather((names, dealt))
    if different := [rank for rank, (others, _) in enumerate(told) if others != told[0][0]]:
        message = (
            f"Process {different[0]} plans different runs than process 0. Start all processes with the same command, "
            "and make sure that they find the same caches."
        )
        raise UsageError(message) if group.is_first else ReportedElsewhere(UsageError.exit_code, message)
    return [[plan.runs[number] for number in numbers] for numbers in told[0][1]]


def lock_runs(runs: Sequence[Run], locks: ExitStack, progress: TrainProgress) -> None:
    for run in runs:
        locks.enter_context(writer_lock(run.folder, "sae train", progress.say))


def require_locks(shares: Sequence[Sequence[Run]]) -> None:
    """Raise UnavailableError if this process cannot see a lock that another process holds."""
    for runs in shares:
        if runs and not is_locked(runs[0].folder):
            raise UnavailableError(
                f"Another process holds the lock of {runs[0].folder}, but this process cannot see that lock. With "
                "several machines, --out has to be on a file system that shares locks (flock) between them. Otherwise "
                "start a separate command on each machine."
            )


def attempt(train: Callable[[], None], progress: TrainProgress) -> Exception | None:
    """Train, and return the error or None. An error is shown at once, because the other processes continue."""
    try:
        train()
    except Interrupted as error:
        return error
    except Exception as error:
        name = "error" if isinstance(error, SaeError) else f"error: {type(error).__name__}"
        progress.say_problem(f"{name}: {error}\nThe other processes continue.")
        return error
    return None


class Watch:
    """Watches, from one process, the runs of all processes."""

    def __init__(self, shares: Sequence[Sequence[Run]], group: ProcessGroup, progress: TrainProgress) -> None:
        self.shares, self.group, self.progress = shares, group, progress
        self.updated, self.metrics = 0.0, dict[str, dict[str, float]]()
        self.leaves_early = False

    @contextmanager
    def present(self) -> Iterator[None]:
        """Hold a lock on `PRESENCE` until this process has reported, and then remove the file.

        If other processes are still training, the file stays: a file without a lock shows them that this process is
        gone. Raises UnavailableError if a process of another launch trained the same run and is still waiting for the
        other processes of that launch.
        """
        if not (own := self.shares[self.group.rank]):
            yield
            return
        path = own[0].folder / PRESENCE
        try:
            lock = acquire(path, fcntl.LOCK_EX, LOOK_SECONDS)
        except BlockingIOError:
            raise UnavailableError(
                f"{own[0].folder} belongs to a command whose other processes are still training. Wait for it, or stop "
                "it."
            ) from None
        except OSError as error:
            raise os_error(error, path) from error
        try:
            yield
        finally:
            if not self.leaves_early:
                path.unlink(missing_ok=True)
            release(lock)

    def is_absent(self, rank: int) -> bool:
        """Whether a process has died, or has stopped on request before the other processes finished."""
        runs = self.shares[rank]
        return any(was_abandoned(run.folder) for run in runs if not run.done) or any(
            is_abandoned(run.folder / PRESENCE) for run in runs[:1]
        )

    def has_the_word(self, patience: float) -> bool:
        """Whether this process has to report: True if every process of lower rank has ended without reporting.

        A process that is about to report can still die. So this function waits until each of these processes has
        reported or died, but for at most `patience` seconds in total.
        """
        until = time.monotonic() + patience
        try:
            for rank in range(self.group.rank):
                while not self.is_absent(rank):
                    is_there = any((run.folder / PRESENCE).exists() for run in self.shares[rank][:1])
                    if not is_there or time.monotonic() >= until:
                        return False
                    time.sleep(TURN_SECONDS)
        except KeyboardInterrupt:
            self.leaves_early = True
            raise
        return True

    def while_training(self) -> TrainProgress:
        """Callbacks for the runs of this process. They also update the overview."""

        def look(steps_done: int, steps: int, metrics: dict[str, dict[str, float]]) -> None:
            self.progress.step(steps_done, steps, metrics)
            self.update()

        return replace(self.progress, step=look)

    def wait(self, should_stop: Callable[[], bool], problem: Exception | None) -> Exception | None:
        """Wait until no process is training, but after a request to stop only for some seconds.

        Returns this process's problem.
        """
        until = inf
        while (others_train := any(runs and is_locked(runs[0].folder) for runs in self.shares)) and (
            time.monotonic() < until
        ):
            if should_stop() and until == inf:
                until = time.monotonic() + STOP_SECONDS
                problem = problem or Interrupted("Stopped while other processes were training; this one had finished.")
            self.update()
            time.sleep(POLL_SECONDS)
        self.leaves_early = others_train
        self.update(at_once=True)
        return problem

    def update(self, at_once: bool = False) -> None:
        """In the first process, report the progress of all runs if some seconds have passed since the last report."""
        if not self.group.is_first or (time.monotonic() - self.updated < UPDATE_SECONDS and not at_once):
            return
        self.updated = time.monotonic()
        runs = [run for share in self.shares for run in share]
        for run in runs:
            if self.steps_done(run) != run.steps and (metrics := last_metrics(run.folder)):
                self.metrics[run.name] = metrics
        finished = frozenset(run.name for run in runs if self.steps_done(run) == run.steps)
        done, steps = sum(map(self.steps_done, runs)), sum(run.steps for run in runs)
        self.progress.overview(Overview(done, steps, finished, len(runs), self.metrics))

    def steps_done(self, run: Run) -> int:
        return int(self.metrics.get(run.name, {}).get("step", 0))

    def report(self, problem: Exception | None) -> None:
        """Raise an error about unfinished runs. The first process that is still running reports for all."""
        if not isinstance(problem, Interrupted):
            self.wait_for_files()
        unfinished = {rank: [run for run in runs if not run.done] for rank, runs in enumerate(self.shares)}
        died = [rank for rank, runs in unfinished.items() if any(was_abandoned(run.folder) for run in runs)]
        if isinstance(problem, Interrupted):
            speaks = died and self.has_the_word(0 if self.leaves_early else STOP_SECONDS)
            lines = [describe_unfinished(rank, unfinished[rank], True) for rank in died] if speaks else []
            self.end(Interrupted("\n".join([str(problem), *lines])))
        lines = [describe_unfinished(rank, runs, rank in died) for rank, runs in unfinished.items() if runs]
        if problem is None and not lines:
            return
        speaks = self.has_the_word(inf)
        count, left = sum(map(len, self.shares)), sum(map(len, unfinished.values()))
        lines.append(
            f"{left} of {count} runs are not finished. Repeat the command to continue them, in any number of processes."
        )
        if problem is not None and not isinstance(problem, SaeError):  # a bug: raise it with its traceback
            if speaks:
                self.progress.say_problem("\n".join(lines))
            raise problem
        message = "\n".join(lines if problem is None else [str(problem), *lines])
        kind = SaeError if problem is None else type(problem)
        self.end(kind(message) if speaks else ReportedElsewhere(kind.exit_code, message))

    def end(self, error: SaeError) -> NoReturn:
        """Show an error, then raise it. After this process has ended, no other process can show the error."""
        self.progress.end(error)
        raise error from None

    def wait_for_files(self) -> None:
        """Wait until a network file system shows the last files that processes on other machines have written."""
        until = time.monotonic() + STALE_SECONDS
        while self.group.count > processes_on_this_machine() and time.monotonic() < until:
            late = [run for runs in self.shares for run in runs if not run.done and not run.problem]
            if not any(not was_abandoned(run.folder) for run in late):
                return
            time.sleep(POLL_SECONDS)


def describe_unfinished(rank: int, runs: Sequence[Run], died: bool) -> str:
    """A line about the runs that a process did not finish."""
    names = ", ".join(run.name for run in runs[:LISTED]) + (f" and {len(runs) - LISTED} more" if runs[LISTED:] else "")
    return f"rank {rank} {'died' if died else 'ended'} before it had finished {names}."
