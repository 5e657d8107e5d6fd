"""Compare real harvests of gemma-2-mini by 1, 2 and 3 processes of torchrun on this machine with the simulation. The
times of a window and of everything before the first window come from the harvest by one process. From these, the
simulation predicts the times of the other harvests, in which processes share the cores equally. The times are
meaningful only if nothing else runs on the machine.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from sae.benchmarks.common import machine

from .constants import Constants
from .harvest import Harvest, HarvestRun

TOKENS, WINDOW, LAYER = 49_152, 4096, 12
UNLIMITED = 1e18


class Measured(NamedTuple):
    """Seconds from the launch to each commit, in order."""

    commits: list[float]

    @property
    def window(self) -> float:
        """Seconds between two windows of one process."""
        return statistics.median(b - a for a, b in zip(self.commits, self.commits[1:], strict=False))

    @property
    def before(self) -> float:
        """Seconds before the first window is begun."""
        return self.commits[0] - self.window


def harvest(processes: int, folder: Path) -> Measured:
    """Harvest with this number of processes."""
    launch = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    words = [
        "-m",
        "sae",
        "harvest",
        "--model",
        "gemma-2-mini",
        "--layer",
        LAYER,
        "--tokens",
        TOKENS,
        "--window",
        WINDOW,
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    started = time.time()
    subprocess.run([*launch, *map(str, words), "--out", str(folder)], env=environment, check=True, capture_output=True)
    return Measured(sorted(path.stat().st_mtime - started for path in (folder / "commits").glob("*.json")))


def simulate(processes: int, one: Measured, cores: int) -> float:
    """Seconds to the last commit according to the simulation, from the times that one process took."""
    free = replace(
        Constants(), start=one.before, latency=0, connection=UNLIMITED, node_link=UNLIMITED, put_rate=UNLIMITED,
        get_rate=UNLIMITED, writer=UNLIMITED, node_failures=0, speed_spread=0,
    )  # fmt: skip
    plan = Harvest(tokens=TOKENS, layers=(LAYER,), nodes=processes, gpus=1, window=WINDOW, constants=free)
    seconds = plan.token_seconds * WINDOW
    plan = replace(plan, constants=replace(free, gpu_flops=free.gpu_flops * seconds / one.window))
    run = HarvestRun(plan)
    for node in run.nodes:
        node.speed = min(1.0, cores / processes)
    return run.run().windows_seconds


def compare() -> str:
    cores = len(os.sched_getaffinity(0))
    lines = [
        f"{machine()}; load {os.getloadavg()[0]:.1f}\n",
        "| processes | measured | simulated | ratio |",
        "|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as place:
        one = harvest(1, Path(place) / "1")
        for processes in (1, 2, 3):
            measured = one if processes == 1 else harvest(processes, Path(place) / str(processes))
            assert len(measured.commits) == TOKENS // WINDOW
            simulated = simulate(processes, one, cores)
            last = measured.commits[-1]
            lines.append(f"| {processes} | {last:.1f} s | {simulated:.1f} s | {last / simulated:.2f} |")
    return "\n".join(lines)
