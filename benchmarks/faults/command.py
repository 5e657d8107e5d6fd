"""Run `sae` as a process: start it, send it signals, and read its output and exit code."""

import contextlib
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

OK, FAILED, USAGE, DAMAGED, OUTSIDE, INTERRUPTED, BROKEN_PIPE = 0, 1, 2, 3, 4, 130, 141
NEVER_ENDED = 124  # the command did not end and was killed

SAE = [sys.executable, "-m", "sae"]

TEXT = ["--dataset", "sentences.jsonl", "--tokens", 6000]

SHAPE = ["--context", 32, "--window", 256, "--batch-contexts", 8, "--device", "cpu"]

BOTH = ["--layer", 0, "--layer", 1]

HARVEST = ["harvest", "--model", "./tiny", *TEXT, *BOTH, *SHAPE]  # 24 windows of two layers

TRAIN = ["train", "--variant", "topk", "--layer", 0, "--batch-size", 64, "--width", 64, "--set", "k=4"]

context = multiprocessing.get_context("forkserver")


class Outcome(NamedTuple):
    """The exit code and the output of a command."""

    code: int
    out: str
    err: str

    @property
    def last(self) -> str:
        """The last message, starting at `error`, `stopped` or `done`; if there is none, the last line. A frame around a
        message is left out."""
        text = self.err.strip() or self.out.strip()
        framed = re.sub("[│╭╮╰╯─]|Error ─", "", text[text.find("╭") :]) if "╭" in text else text
        lines = [" ".join(framed.split())] if "╭" in text else text.splitlines()
        starts = [n for n, line in enumerate(lines) if re.match(r"(error|stopped|done) *:? ", line)]
        outcome = lines[starts[-1] :] if starts else lines[-1:]
        return " ".join(line.strip() for line in outcome if not line.startswith("next "))


class Command:
    """`sae` with these arguments, started in the working directory."""

    def __init__(
        self,
        *words: Any,
        new_process: bool = False,
        stdin: str = "",
        env: dict[str, str | None] | None = None,
        prefix: Sequence[str] = (),
    ) -> None:
        self.words = [str(word) for word in words]
        self.files = [Path(tempfile.mkstemp()[1]) for _ in range(3)]
        self.files[0].write_text(stdin)
        if new_process or prefix:
            environment = {k: v for k, v in (os.environ | (env or {})).items() if v is not None}
            streams = [open(file, mode) for file, mode in zip(self.files, ("r", "w", "w"), strict=True)]
            self.process: Any = subprocess.Popen(
                [*prefix, *SAE, *self.words], stdin=streams[0], stdout=streams[1], stderr=streams[2], env=environment
            )
            self.code = self.process.wait
        else:
            self.process = context.Process(target=forked, args=(self.words, self.files, env or {}))
            self.process.start()
            self.code = self._join
        self.pid = self.process.pid

    def _join(self, timeout: float) -> int:
        self.process.join(timeout)
        return self.process.exitcode

    def send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    @property
    def running(self) -> bool:
        return (self.process.poll() is None) if isinstance(self.process, subprocess.Popen) else self.process.is_alive()

    @property
    def started(self) -> bool:
        """Whether Python has reached the first line of the project's code."""
        return not self.files[0].exists()

    @property
    def err(self) -> str:
        return self.files[2].read_text(errors="replace")

    def wait(self) -> Outcome:
        """Wait for the end of the process."""
        code = self.code(timeout=200)
        if code is None:
            os.kill(self.pid, signal.SIGKILL)
            code = NEVER_ENDED
        outcome = Outcome(code, self.files[1].read_text(errors="replace"), self.err)
        for file in self.files:
            file.unlink(missing_ok=True)
        return outcome


def forked(words: list[str], files: list[Path], env: dict[str, str]) -> None:
    """`sae` in a forked process that has already imported everything and has its own streams."""
    for number, (file, flags) in enumerate(zip(files, (os.O_RDONLY, os.O_WRONLY, os.O_WRONLY), strict=True)):
        os.dup2(os.open(file, flags), number)
    sys.stdin, sys.argv = open(0), ["sae", *words]
    os.environ |= env
    import sae.cli.main  # noqa: F401
    from sae.__main__ import main

    files[0].unlink()
    main()


def sae(*words: Any, **how: Any) -> Outcome:
    return Command(*words, **how).wait()
