"""Calls functions of this folder in the process that has the simulated GPU."""

from pathlib import Path

from sae.tests.worker_process import Failed, WorkerProcess

__all__ = ["Failed", "SimulatedGPU"]


class SimulatedGPU(WorkerProcess):
    """The process. `gpu("training.take_steps", name="topk")` returns what the function returns."""

    name = "the simulated GPU"

    def __init__(self, library: Path, log: Path) -> None:
        super().__init__(["sae.tests.simulated_cuda.worker", str(library)], log)
