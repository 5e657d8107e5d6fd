"""Triton's interpreter as a fixture."""

from collections.abc import Iterator

import pytest

from sae.tests.worker_process import WorkerProcess
from sae.train.kernels.choice import reason_against_triton


class Interpreter(WorkerProcess):
    """A process in which kernels run on a CPU, one program after the other. Triton has to be imported for that."""

    name = "Triton's interpreter"


@pytest.fixture(scope="session")
def interpreter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Interpreter]:
    """Tests that ask for it are skipped where Triton is not installed."""
    if reason := reason_against_triton():
        pytest.skip(reason)
    log = tmp_path_factory.mktemp("interpreter") / "log"
    one = Interpreter(["sae.tests.train.kernels.interpreted"], log, {"TRITON_INTERPRET": "1"})
    yield one
    one.close()
