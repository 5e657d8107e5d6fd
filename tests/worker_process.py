"""Calls functions in another Python process, for tests that need a process with another environment or state."""

import contextlib
import importlib
import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class Failed(Exception):
    """A function raised in the other process; the text is its traceback."""


class WorkerProcess:
    """The process. `process("module.function", name="topk")` returns what the function returns.

    Args:
        command: arguments of Python; it has to call `serve`.
        log: a file for the output of the process.
        environment: variables added to those of this process.
    """

    name = "the worker"  # for errors

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str] = {}) -> None:
        self.log = log.open("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log,
            cwd=log.parent, env={**os.environ, **environment},
        )  # fmt: skip

    def __call__(self, function: str, **arguments: Any) -> Any:
        """Raises Failed with the traceback if the function raised."""
        assert self.process.stdin is not None and self.process.stdout is not None
        module, _, name = function.rpartition(".")
        try:
            pickle.dump((module, name, arguments), self.process.stdin)
            self.process.stdin.flush()
            done, answer = pickle.load(self.process.stdout)
        except (EOFError, BrokenPipeError) as error:
            self.log.seek(0)
            raise Failed(f"the process of {self.name} has ended: {self.log.read()[-4000:]}") from error
        if not done:
            raise Failed(answer)
        return answer

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has ended already
            self.process.communicate()
        self.log.close()


def serve(package: str) -> None:
    """Answer calls of the functions of a package until the input ends.

    Reads pickles of (module of the package, function, arguments) and writes (True, result) or (False, traceback).
    """
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # printed text does not mix with the answers
    calls = sys.stdin.buffer
    while True:
        try:
            module, function, arguments = pickle.load(calls)
        except EOFError:
            return
        try:
            called = getattr(importlib.import_module(f".{module}", package), function)
            answer = (True, called(**arguments))
        except BaseException:
            answer = (False, traceback.format_exc())
        pickle.dump(answer, answers)
        answers.flush()
