"""Commands of the command line on the simulated GPU, which `--device auto` finds there."""

import os
from collections.abc import Sequence
from pathlib import Path

from typer.testing import CliRunner

from sae.cli.main import app

from .functions import simulated_gpu


def run(home: Path, commands: Sequence[Sequence[str]]) -> list[tuple[int, str]]:
    """Run commands up to the first that fails. Returns the exit code and output of each; raises unexpected errors."""
    before = Path.cwd()
    os.environ["SAE_HOME"] = str(home)
    os.chdir(home)
    results = []
    try:
        for command in commands:
            with simulated_gpu():
                done = CliRunner().invoke(app, list(command))
            if done.exception is not None and not isinstance(done.exception, SystemExit):
                raise done.exception
            results.append((done.exit_code, done.output))
            if done.exit_code:
                break
    finally:
        os.chdir(before)
    return results
