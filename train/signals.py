"""Handle Ctrl-C and SIGTERM during training: the current step is finished and a checkpoint is written."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any

from ..common.errors import Interrupted


@contextlib.contextmanager
def stop_on_signal() -> Iterator[Callable[[], bool]]:
    """Yields a function that returns True after Ctrl-C or SIGTERM. A second Ctrl-C raises Interrupted at once."""
    stop = False

    def handle(number: int, _frame: Any) -> None:
        nonlocal stop
        if stop and number == signal.SIGINT:
            raise Interrupted("Stopped at once. The last checkpoint is kept; the same command resumes from it.")
        stop = True

    try:
        previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread: the caller keeps its own handlers
        previous = {}
    try:
        yield lambda: stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
