"""SIGKILL at chosen instants: a process that kills itself when it renames a file, and a rename makes a file whole."""

import fnmatch
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch


def run_until_killed(work: Callable[..., Any], arguments: Mapping[str, Any], file: str, moment: str) -> None:
    """Call `work` until it renames something to `file`, a pattern, and die `before` or `after` that, or so many
    seconds later, wherever its threads then are. Without such a rename the process ends by itself.
    """
    replace, met = os.replace, threading.Event()

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def rename(source: Path, target: Path) -> None:
        due = not met.is_set() and fnmatch.fnmatch(str(target), file)
        if due and moment == "before":
            die()
        replace(source, target)
        if due and moment == "after":
            die()
        if due:
            met.set()
            threading.Timer(float(moment), die).start()

    os.replace = rename
    work(**arguments)
    if met.is_set():
        die()  # it was faster than the timer


def finish(work: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    """Call `work` in a process of its own."""
    assert exit_code(work, **arguments) == 0


def kill(work: Callable[..., Any], arguments: Mapping[str, Any], file: str, moment: str) -> None:
    """The same until it is killed; see `run_until_killed`."""
    killed = exit_code(run_until_killed, work, arguments, file, moment)
    assert killed == -signal.SIGKILL, f"{file} was not renamed: exit code {killed}"


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
