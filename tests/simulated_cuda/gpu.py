"""Calls functions of this folder in the process that has the simulated GPU."""

import contextlib
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any


class Failed(Exception):
    """A function raised in the other process; the text is its traceback."""


class SimulatedGPU:
    """The process. `gpu("training.take_steps", name="topk")` returns what the function returns."""

    def __init__(self, library: Path, log: Path) -> None:
        self.log = log.open("w+")
        command = [sys.executable, "-P", "-m", "sae.tests.simulated_cuda.worker", str(library)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, cwd=log.parent
        )

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
            raise Failed(f"the process of the simulated GPU has ended: {self.log.read()[-4000:]}") from error
        if not done:
            raise Failed(answer)
        return answer

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has ended already
            self.process.communicate()
        self.log.close()
