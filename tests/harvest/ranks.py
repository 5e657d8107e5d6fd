"""Run a harvest in several processes, as ranks without a launcher or as shares.

The processes are forked, so that they need not import torch.
"""

import json
import multiprocessing
import os
import socket
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sae.cache.writer import CacheWriter
from sae.common import heartbeat
from sae.common.errors import SaeError
from sae.harvest import claim, run, tasks
from sae.harvest.run import harvest_activations

from ..kills import die_at

FORK = multiprocessing.get_context("fork")


class Kill(NamedTuple):
    """The moment at which a process kills itself, by the number of the file that it names; see `die_at`."""

    moment: str
    number: int


def harvest_noted(options: dict[str, Any], environment: dict[str, str], note: Path, kill: Kill | None) -> None:
    """Harvest in this process, and note the windows that it committed, its world size, and how it ended."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    heartbeat.PATIENCE, heartbeat.BEAT = 2.0, 0.2
    run.SEEN_WITHIN, tasks.POLL = 1.0, 0.1
    claim.RENEW, claim.EXPIRY = 0.2, 2.0
    written: list[int] = []
    write_window = CacheWriter.write_window

    def noted(writer: CacheWriter, window: int, *arguments: Any, **more: Any) -> None:
        write_window(writer, window, *arguments, **more)
        written.append(window)

    CacheWriter.write_window = noted  # type: ignore[method-assign]
    if kill is not None:
        die_at(*kill)
    said: list[str] = []
    error = ""
    try:
        harvest_activations(**options, progress=run.HarvestProgress(say=said.append))
    except SaeError as raised:
        error = str(raised)
    size = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    note.write_text(json.dumps({"windows": written, "world_size": size, "error": error, "said": said}))
    os._exit(bool(error))


class Started:
    """A process that harvests."""

    def __init__(self, options: dict[str, Any], note: Path, *, kill: Kill | None = None, **environment: object) -> None:
        self.note = note
        variables = {name: str(value) for name, value in environment.items()}
        self.process = FORK.Process(target=harvest_noted, args=(options, variables, note, kill))
        self.process.start()

    def end(self) -> dict[str, Any]:
        """Wait until the process has ended. Returns its notes and its exit code."""
        self.process.join(120)
        noted = json.loads(self.note.read_text()) if self.note.exists() else {}
        self.note.unlink(missing_ok=True)
        return noted | {"code": self.process.exitcode}


def start_ranks(options: list[dict[str, Any]], notes: Path, kills: dict[int, Kill] | None = None) -> list[Started]:
    """Start one rank for each of these options as srun does: with an address in the environment and no launcher."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        Started(
            one,
            notes / f"rank{rank}",
            kill=(kills or {}).get(rank),
            RANK=rank,
            LOCAL_RANK=rank,
            WORLD_SIZE=len(options),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
        )  # fmt: skip
        for rank, one in enumerate(options)
    ]
