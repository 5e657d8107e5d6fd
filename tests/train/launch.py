"""Processes as a launcher starts them.

They are forked because each start of torchrun imports torch again, for seconds.
"""

import json
import multiprocessing
import os
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from sae.common.errors import SaeError
from sae.common.process_group import current_process_group
from sae.train.plan import TrainConfig, plan_training
from sae.train.progress import Overview, TrainProgress
from sae.train.run import run_training

WAIT = 300  # seconds after which a test that would wait for ever fails
NOTHING = ("run.json", "metrics.jsonl", "sae.json")  # records that also say when and how a run was trained

Before = Callable[[int], None]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def start(count: int, work: Callable[[int], int]) -> list[multiprocessing.Process]:
    """Start `work` in so many ranks; it takes the rank and returns the exit code."""
    import accelerate  # noqa: F401  (here, since each rank would import it for a second)

    port = str(free_port())

    def run(rank: int) -> None:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
        os.environ |= {"LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)
        os._exit(work(rank))

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=run, args=(rank,)) for rank in range(count)]
    for process in processes:
        process.start()
    return processes


def join(processes: Sequence[multiprocessing.Process]) -> list[int | None]:
    """The exit codes, in the order of ranks."""
    for process in processes:
        process.join(WAIT)
    alive = [process for process in processes if process.is_alive()]
    for process in alive:
        process.kill()
    assert not alive, f"{len(alive)} of {len(processes)} processes wait for ever"
    return [process.exitcode for process in processes]


class Launch:
    """The runs of a config, trained by `count` forked ranks. Each rank leaves a record of what it says in `folder`."""

    def __init__(self, folder: Path, count: int, config: TrainConfig, before: Before = lambda rank: None) -> None:
        self.folder, self.count, self.config, self.before = folder, count, config, before
        folder.mkdir(exist_ok=True)
        self.processes = start(count, self.train)

    def train(self, rank: int) -> int:
        """What each rank does."""
        said: dict[str, Any] = {"say": [], "problem": [], "overviews": [], "trained": [], "events": [], "error": None}
        group = current_process_group()
        assert (group.rank, group.count) == (rank, self.count) == (rank, torch.distributed.get_world_size())

        def on_step(step: int, steps: int, metrics: dict) -> None:
            said["trained"] += [name for name in metrics if name not in said["trained"]]
            said["events"].append("step")

        def on_overview(overview: Overview) -> None:
            said["overviews"].append(overview.steps_done)
            said["events"].append("overview")

        progress = TrainProgress(on_step, said["say"].append, said["problem"].append, on_overview)
        code = 0
        try:
            plan = group.everywhere(lambda: plan_training(self.config))
            self.before(rank)
            run_training(plan, progress)
        except SaeError as error:
            said["error"], code = [type(error).__name__, str(error)], error.exit_code
        (self.folder / f"rank{rank}.json").write_text(json.dumps(said | {"pid": os.getpid()}))
        return code

    def end(self) -> list[int | None]:
        return join(self.processes)

    def said(self, rank: int) -> dict[str, Any]:
        return json.loads((self.folder / f"rank{rank}.json").read_text())


def launch(folder: Path, count: int, config: TrainConfig) -> Launch:
    """Train to the end, and check that every rank succeeds and that no run is trained by two ranks."""
    one = Launch(folder, count, config)
    assert one.end() == [0] * count, [one.said(rank)["error"] for rank in range(count)]
    names = [name for rank in range(count) for name in one.said(rank)["trained"]]
    assert len(names) == len(set(names))
    assert len({one.said(rank)["pid"] for rank in range(count)}) == count
    return one


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.005)


def contents(out: Path) -> dict[str, bytes]:
    """Every file that training left, except for records of when and how it ran."""
    paths = (path for path in out.rglob("*") if path.is_file() and path.name not in NOTHING and path.name[0] != ".")
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in paths}


def records(out: Path) -> dict[str, Any]:
    """run.json, metrics.jsonl and sae.json of every run, without entries about time and machine."""
    found: dict[str, Any] = {}
    for folder in sorted(path.parent for path in out.glob("*/run.json")):
        run, sae = (json.loads((folder / name).read_text()) for name in ("run.json", "sae.json"))
        environment = run.pop("environment")
        environment["variables"].pop("WORLD_SIZE", None)
        environment["variables"].pop("OMP_NUM_THREADS", None)
        for record in (run, sae):
            del record["content_digest"]
        del run["asked"]["out"]
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for line in lines:
            del line["waited_for_data"]
        found[folder.name] = (run, sae, environment, lines)
    return found
