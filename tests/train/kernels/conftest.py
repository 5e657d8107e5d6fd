"""Fixtures: Triton's interpreter, and Triton's compiler for a GPU."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from sae.tests.worker_process import WorkerProcess
from sae.train.kernels.choice import reason_against_triton


class Interpreter(WorkerProcess):
    """A process in which kernels run on a CPU, one program after another.

    It is a separate process because TRITON_INTERPRET has to be set before Triton is imported.
    """

    name = "Triton's interpreter"


@pytest.fixture(scope="session")
def interpreter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Interpreter]:
    """Triton's interpreter. Tests that use this fixture are skipped if Triton is not installed."""
    if reason := reason_against_triton():
        pytest.skip(reason)
    log = tmp_path_factory.mktemp("interpreter") / "log"
    one = Interpreter(["sae.tests.train.kernels.interpreted"], log, {"TRITON_INTERPRET": "1"})
    yield one
    one.close()


@pytest.fixture
def compiler(tmp_path: Path) -> Iterator[WorkerProcess]:
    """A process that compiles kernels for a GPU, starting with an empty Triton cache."""
    if reason := reason_against_triton():
        pytest.skip(reason)
    cache = {"TRITON_CACHE_DIR": str(tmp_path / "triton")}
    with contextlib.closing(WorkerProcess(["sae.tests.train.kernels.compiled"], tmp_path / "log", cache)) as one:
        yield one
