"""Signals at chosen instants: a process sends itself one when a file gets its name, by which it becomes whole."""

import fnmatch
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch


def run_until_killed(
    work: Callable[..., Any], arguments: Mapping[str, Any], file: str, moment: str, by: int = signal.SIGKILL
) -> None:
    """Call `work` until something gets the name `file`, a pattern, and die `before` or `after` that, or so many
    seconds later, wherever its threads then are. Without such a file the process ends by itself.
    """
    met = threading.Event()

    def die() -> None:
        os.kill(os.getpid(), by)

    def name(give: Callable[[Path, Path], None], source: Path, target: Path) -> None:
        due = not met.is_set() and fnmatch.fnmatch(str(target), file)
        if due:
            met.set()
        if due and moment == "before":
            die()
        give(source, target)
        if due and moment == "after":
            die()
        elif due and moment != "before":
            threading.Timer(float(moment), die).start()

    os.replace, os.link = partial(name, os.replace), partial(name, os.link)
    work(**arguments)
    if met.is_set():
        die()  # it was faster than the timer


def finish(work: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    """Call `work` in a process of its own."""
    assert exit_code(work, **arguments) == 0


def kill(work: Callable[..., Any], arguments: Mapping[str, Any], file: str, moment: str) -> None:
    """The same until it is killed; see `run_until_killed`."""
    killed = exit_code(run_until_killed, work, arguments, file, moment)
    assert killed == -signal.SIGKILL, f"there was no {file}: exit code {killed}"


def exit_code(work: Callable[..., Any], *given: object, **named: object) -> int | None:
    # A fork, as another process would have to import torch and transformers.
    process = multiprocessing.get_context("fork").Process(target=on_one_thread, args=(work, *given), kwargs=named)
    process.start()
    process.join(300)
    process.kill()  # one that hangs fails the test
    process.join()
    return process.exitcode


def on_one_thread(work: Callable[..., Any], *given: object, **named: object) -> None:
    torch.set_num_threads(1)  # other threads than the one that forks do not exist, and torch would wait for them
    work(*given, **named)
