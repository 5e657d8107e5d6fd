"""Signals at chosen moments: a process sends itself one when a file gets its final name, which marks it as complete."""

import fnmatch
import itertools
import multiprocessing
import os
import random
import signal
import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch


def die_at(moment: str, number: int = 0, files: str = "*", by: int = signal.SIGKILL) -> threading.Event:
    """Let this process send itself a signal when a file gets its name.

    The file is the one with this number, from 0, among those whose path matches `files`. The signal comes "before" or
    "after" the file gets its name, a number of seconds later ("0.01"), or "later", which is within 20 ms. The returned
    event is set when the file gets its name.
    """
    met, numbers = threading.Event(), itertools.count()

    def die() -> None:
        os.kill(os.getpid(), by)

    def name(give: Callable[..., None], source: Any, target: Any, **more: Any) -> None:
        due = fnmatch.fnmatch(str(target), files) and next(numbers) == number
        if due:
            met.set()
        if due and moment == "before":
            die()
        give(source, target, **more)
        if due and moment == "after":
            die()
        elif due and moment != "before":
            seconds = random.Random(number).uniform(0, 0.02) if moment == "later" else float(moment)
            threading.Timer(seconds, die).start()

    os.replace, os.link = partial(name, os.replace), partial(name, os.link)  # one of these two gives a file its name
    return met


def run_until_killed(
    work: Callable[..., Any],
    arguments: Mapping[str, Any],
    file: str,
    moment: str,
    by: int = signal.SIGKILL,
    number: int = 0,
) -> None:
    """Call `work` and die; see `die_at`. If no such file is written, the process ends by itself."""
    met = die_at(moment, number, file, by)
    work(**arguments)
    if met.is_set():
        os.kill(os.getpid(), by)  # `work` ended before the timer fired


def finish(work: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    """Call `work` in a process of its own."""
    assert exit_code(work, **arguments) == 0


def kill(work: Callable[..., Any], arguments: Mapping[str, Any], file: str, moment: str, number: int = 0) -> None:
    """Call `work` in a process of its own until that is killed; see `run_until_killed`."""
    killed = exit_code(run_until_killed, work, arguments, file, moment, number=number)
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
    torch.set_num_threads(1)  # the fork has none of torch's other threads, and torch would wait for them
    work(*given, **named)
