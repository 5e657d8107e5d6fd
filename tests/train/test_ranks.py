"""Training dealt to several processes: the bytes of one, whatever dies, fails or is started twice."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sae.common import locks
from sae.common.errors import ReportedElsewhere, UnavailableError, UsageError
from sae.common.locks import is_abandoned
from sae.common.process_group import ProcessGroup
from sae.train import checkpoint, ranks, shared_pass, shares
from sae.train.deal import RankShare
from sae.train.plan import TrainConfig, TrainPlan, plan_training
from sae.train.progress import SILENT
from sae.train.run import run_training

from ..kills import die_at
from ..worker_process import WorkerProcess
from .launch import WAIT, Launch, contents, launch, records, wait_for
from .runs import CHECKPOINTS, make_config, train
from .test_checkpoint_writer import full_disk

RECIPES = ["relu", "topk", "hierarchical-resample"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]


def config_of(cache, out: Path, *variants: str, **changes) -> TrainConfig:
    """Two layers, so two streams."""
    settings = {"layers": [0, 1], "out": out, "log_every": 4}
    return make_config(cache, *(variants or RECIPES), **settings | changes)


@pytest.fixture
def ranks_time_alike(monkeypatch) -> None:
    """Give every step the same time, so that runs are dealt to processes in the same way each time."""
    monkeypatch.setattr(shares, "step_times", lambda runs, device: [1.0] * len(runs))


def test_two_processes_give_the_bytes_of_one(sparse_cache, tmp_path: Path, monkeypatch) -> None:
    """Records differ only in times and process counts. Rank 0 shows the progress of both ranks while it trains."""
    monkeypatch.setattr(ranks, "UPDATE_SECONDS", 0)
    train(config_of(sparse_cache, tmp_path / "one"))
    two = launch(tmp_path / "said", 2, config_of(sparse_cache, tmp_path / "two"))
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert records(tmp_path / "two") == records(tmp_path / "one") and len(records(tmp_path / "one")) == 6
    for path in (tmp_path / "two").glob("*/run.json"):
        assert json.loads(path.read_text())["environment"]["variables"]["WORLD_SIZE"] == "2"
    first, second = two.said(0), two.said(1)
    assert len(first["trained"]) + len(second["trained"]) == 6 and first["trained"] and second["trained"]
    assert second["say"] == second["problem"] == second["overviews"] == []
    assert first["overviews"] == sorted(first["overviews"]) and first["overviews"][-1] == 6 * 12
    assert "overview" in first["events"][: first["events"].index("step") + 2] and "step" in first["events"][2:]
    assert not list((tmp_path / "two").glob("*/.lock.holder"))


@pytest.fixture(scope="module")
def called_alone(tmp_path_factory) -> dict[str, Any]:
    """What one process trained, printed and reported, shared by the tests of all numbers of processes."""
    return {"folder": tmp_path_factory.mktemp("called") / "one"}


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_command_in_any_number_of_processes_gives_the_bytes_of_one(
    sparse_cache, tmp_path: Path, launcher: WorkerProcess, called_alone: dict[str, Any], count: int
) -> None:
    """Runs vary in seed, layer and batch size. torchrun starts two processes; those that train are not forked."""
    words = ["train", "--cache", sparse_cache.folder, "--layer", 0, "--layer", 1, "--seed", 0, "--seed", 1,
             "--steps", 12, "--batch-size", 64, "--width", 128, "--device", "cpu", "--checkpoint-every", 4,
             "--log-every", 2, *(word for name in RECIPES for word in ("--variant", name))]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment["OMP_NUM_THREADS"] = "1"

    def call(processes: int, out: Path, *more: str) -> tuple[str, str]:
        """Run the command in `processes` processes and return their stdout and stderr."""
        command = [*map(str, words), "--out", str(out), *more]
        if processes == 2 and not more:
            command = [sys.executable, *TORCHRUN, "2", "-m", "sae", *command]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            return done.stdout, done.stderr
        start = ["python", *TORCHRUN, "2", "-m", "sae"] if processes == 2 else [str(processes)]
        given = {"words": [*start, *command], "folder": tmp_path, "environment": environment}
        code, said, reported = launcher("forked_ranks.launch", **given)
        assert code == 0, reported
        return said, reported

    alone, out = called_alone["folder"], tmp_path / "many"
    plan = call(count, out, "--dry-run")[1]
    assert not out.exists()
    if "said" not in called_alone:
        called_alone["said"] = call(0, alone)
    one, many = called_alone["said"], call(count, out)
    assert contents(out) == contents(alone)
    assert records(out) == records(alone) and len(records(alone)) == 12
    worlds = {
        json.loads(path.read_text())["environment"]["variables"].get("WORLD_SIZE") for path in out.glob("*/run.json")
    }
    assert worlds == {str(count)}
    dealt = [line for line in plan.splitlines() if line.startswith("rank ")]
    assert len(dealt) == (count if count > 1 else 0) and all(" on cpu and " in line for line in dealt)
    assert sorted(many[0].splitlines()) == sorted(one[0].splitlines())  # the table
    assert "rank 1:" not in many[1] and many[1].count("done     in ") == 1


@pytest.mark.slow
def test_three_processes_and_another_number_goes_on(sparse_cache, tmp_path: Path) -> None:
    """Three processes begin the runs; two and then one continue them. Several batch sizes make more streams."""
    settings = {"seeds": [0, 1], "steps": 40}
    train(config_of(sparse_cache, tmp_path / "one", **settings))
    expected, out = contents(tmp_path / "one"), tmp_path / "out"
    config = config_of(sparse_cache, out, **settings)
    started = tmp_path / "started"

    def before(rank: int) -> None:
        attempt = ranks.attempt  # signals are handled while it runs
        ranks.attempt = lambda *args: ((started / str(rank)).touch(), attempt(*args))[1]

    for count in (3, 2):
        started.mkdir()
        begun = Launch(tmp_path / f"said{count}", count, config, before)
        wait_for(lambda: len(list(started.iterdir())) == count)  # noqa: B023
        shutil.rmtree(started)
        for process in begun.processes:
            os.kill(process.pid, signal.SIGTERM)
        assert begun.end() == [130] * count
        for rank in range(count):
            kind, message = begun.said(rank)["error"]
            assert kind == "Interrupted"
            assert re.fullmatch(r"Stopped after step \d+; everything is saved. Resume with the same command.", message)
        assert not list(out.glob("*/.lock.holder"))
    train(config)
    assert contents(out) == expected


# --- a process that dies ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_twenty_five_kills_of_each_process_in_turn(sparse_cache, tmp_path: Path, ranks_time_alike) -> None:
    """The others finish their runs, the first of them names whose runs are missing, and another number continues."""
    settings = {"steps": 20, "checkpoint_every": 1}
    train(config_of(sparse_cache, tmp_path / "one", **settings))
    expected, out, rng = contents(tmp_path / "one"), tmp_path / "out", random.Random(0)
    config = config_of(sparse_cache, out, **settings)
    for number in range(25):
        count = 2 + number % 2
        victim, moment = (number // 2) % count, ("before", "after", "later")[number % 3]
        file = rng.randrange(2 * 20 * 2)  # a state and a record in each of 20 checkpoints of at least two runs
        kill = lambda rank: die_at(moment, file, CHECKPOINTS) if rank == victim else None  # noqa: B023, E731
        one = Launch(tmp_path / f"said{number}", count, config, before=kill)
        codes = one.end()
        speaker = min(rank for rank in range(count) if rank != victim)
        assert codes[victim] == -signal.SIGKILL and set(codes) == {-signal.SIGKILL, 1}, codes
        for rank in range(count):
            if rank == victim:
                continue
            kind, message = one.said(rank)["error"]
            assert kind == ("SaeError" if rank == speaker else "ReportedElsewhere")
            assert f"rank {victim} died before it had finished " in message
            assert all((out / name / "sae.json").exists() for name in one.said(rank)["trained"])
        missing = [path.parent.name for path in out.glob("*/.lock") if not (path.parent / "sae.json").exists()]
        assert missing and all(name in message for name in missing)
        assert f"{len(missing)} of 6 runs are not finished" in message
        again = [count - 1, count + 1][number % 4 // 2]
        if again == 1:
            train(config)
        else:
            launch(tmp_path / f"again{number}", again, config)
        assert contents(out) == expected, f"kill {number}: {moment} file {file} of rank {victim}"
        shutil.rmtree(out)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1, 2, None], ids=["0", "1", "2", "Ctrl-C"])
def test_torchrun_ends_the_others_with_checkpoints(
    sparse_cache, tmp_path: Path, request, launcher: WorkerProcess, victim: int | None
) -> None:
    """torchrun ends the others when one is killed, and all after Ctrl-C, in a case that does not fork torchrun."""
    words = ["train", "--cache", sparse_cache.folder, "--layer", 0, "--steps", 100_000, "--batch-size", 64,
             "--width", 128, "--device", "cpu", "--checkpoint-every", 50, *("--seed 0 --seed 1 --seed 2".split()),
             "--variant", "topk", "--out", tmp_path / "out"]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment["OMP_NUM_THREADS"] = "1"
    torchrun = [*TORCHRUN, "3", "-m", "sae", *map(str, words)]
    if victim is None:
        process = subprocess.Popen([sys.executable, *torchrun], env=environment, stderr=subprocess.PIPE, text=True)
        pid = process.pid
    else:
        given = {"words": ["python", *torchrun], "folder": tmp_path, "environment": environment}
        pid = launcher("forked_ranks.start", **given)
    running = [pid]
    request.addfinalizer(lambda: [os.kill(one, signal.SIGTERM) for one in running])  # torchrun ends what it has started
    wait_for(lambda: len({path.parents[2] for path in tmp_path.glob("out/*/checkpoints/*/state.json")}) == 3)
    ranks_of = sorted(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))  # as they were started
    assert len(ranks_of) == 3
    if victim is None:
        os.kill(pid, signal.SIGINT)
        said = process.communicate(timeout=WAIT)[1]
        code = process.returncode
    else:
        os.kill(ranks_of[victim], signal.SIGKILL)
        code, _, said = launcher("forked_ranks.finish", pid=pid)
    running.clear()
    assert code == 1
    for rank in {0, 1, 2} - {victim}:
        (line,) = [
            line for line in said.splitlines() if line.startswith(f"rank {rank}: stopped" if rank else "stopped")
        ]
        step = int(line.split("after step ")[1].split(";")[0])
        assert line.endswith("everything is saved. Resume with the same command.")
        assert any(path.name == f"step-{step:08d}" for path in tmp_path.glob("out/*/checkpoints/*"))
    died = [line for line in said.splitlines() if "died before it had finished" in line]
    assert [line.split(" died")[0] for line in died] == ([] if victim is None else [f"rank {victim}"])


# --- a process that fails ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_that_fails_costs_the_others_nothing(sparse_cache, tmp_path: Path, ranks_time_alike) -> None:
    """Its process reports this at once and waits for the others, because a launcher would end them together with it."""

    def before(rank: int) -> None:
        step_of = shared_pass.RunTrainer.step

        def step(trainer, x_BD):
            if rank == 0:
                time.sleep(0.02)  # rank 0 finishes after rank 1
            elif int(trainer.i) == 6:
                x_BD = torch.full_like(x_BD, torch.inf)
            return step_of(trainer, x_BD)

        shared_pass.RunTrainer.step = step

    out = tmp_path / "out"
    one = Launch(tmp_path / "said", 2, config_of(sparse_cache, out, "relu"), before)
    assert one.end() == [1, 1]
    (failed,) = one.said(1)["trained"]
    (finished,) = one.said(0)["trained"]
    problem, ended = one.said(1)["problem"]
    assert problem.startswith(f"{failed}: the loss or its gradient was not finite at step 6")
    assert ended.startswith(f"error: {out / failed}: the loss") and ended.endswith("\nThe other processes continue.")
    assert one.said(1)["error"][0] == "ReportedElsewhere" and one.said(0)["problem"] == []
    kind, message = one.said(0)["error"]
    assert kind == "SaeError" and message == (
        f"rank 1 ended before it had finished {failed}.\n"
        "1 of 2 runs are not finished. Repeat the command to continue them, in any number of processes."
    )
    ended_at = (tmp_path / "said" / "rank1.json").stat().st_mtime_ns
    assert ended_at > (out / finished / "sae.json").stat().st_mtime_ns


@pytest.mark.slow
def test_a_run_fails_after_the_first_process_has_finished_and_died(
    sparse_cache, tmp_path: Path, ranks_time_alike
) -> None:
    """The next process gives the summary, although the first process had finished all its runs."""

    def before(rank: int) -> None:
        wait, write = ranks.Watch.wait, checkpoint.atomic_write

        def die(*given: object) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        def full(path: Path, *parts: bytes) -> None:
            if "step-00000008" in str(path):
                wait_for(lambda: any(is_abandoned(path) for path in out.glob(f"*/{ranks.PRESENCE}")))
                full_disk(path)
            write(path, *parts)

        ranks.Watch.wait = die if rank == 0 else wait
        checkpoint.atomic_write = write if rank == 0 else full

    out = tmp_path / "out"
    one = Launch(tmp_path / "said", 3, config_of(sparse_cache, out, "relu", seeds=[0, 1]), before)
    assert one.end() == [-signal.SIGKILL, 4, 1]  # rank 2 has no runs
    kind, message = one.said(1)["error"]
    assert kind == "UnavailableError" and one.said(2)["error"][0] == "ReportedElsewhere"
    assert message.startswith("The disk is full: ") and "rank 0" not in message
    assert "rank 1 ended before it had finished " in message
    assert "2 of 4 runs are not finished. Repeat the command to continue them" in message


@pytest.mark.slow
def test_a_full_disk_of_one_process(sparse_cache, tmp_path: Path, ranks_time_alike) -> None:
    def before(rank: int) -> None:
        write = checkpoint.atomic_write

        def sometimes_full(path: Path, *parts: bytes) -> None:
            if rank == 0 and "step-00000008" in str(path):
                full_disk(path)
            write(path, *parts)

        checkpoint.atomic_write = sometimes_full

    train(config_of(sparse_cache, tmp_path / "one"))
    config = config_of(sparse_cache, tmp_path / "out")
    one = Launch(tmp_path / "said", 2, config, before)
    assert one.end() == [4, 1]
    kind, message = one.said(0)["error"]
    assert kind == "UnavailableError" and message.startswith("The disk is full: ")
    assert "rank 0 ended before it had finished " in message and "3 of 6 runs are not finished" in message
    assert one.said(0)["problem"][0].startswith("error: The disk is full: ")
    assert all((tmp_path / "out" / name / "sae.json").exists() for name in one.said(1)["trained"])
    launch(tmp_path / "again", 3, config)
    assert contents(tmp_path / "out") == contents(tmp_path / "one")


@pytest.mark.slow
def test_a_second_launch_is_refused_and_the_first_goes_on(sparse_cache, tmp_path: Path) -> None:
    """It is refused before it trains anything, whatever its number of processes, and even if it has other runs too."""
    settings = {"steps": 60}
    train(config_of(sparse_cache, tmp_path / "one", **settings))
    config = config_of(sparse_cache, tmp_path / "out", **settings)
    held = tmp_path / "go"

    def before(rank: int) -> None:
        attempt = ranks.attempt
        ranks.attempt = lambda *args: (wait_for(held.exists), attempt(*args))[1]  # with the locks

    first = Launch(tmp_path / "said", 2, config, before)
    wait_for(lambda: len(list(tmp_path.glob("out/*/.lock.holder"))) == 6)
    for number, seeds in ((1, [0]), (2, [0]), (3, [0, 1])):
        second_config = config_of(sparse_cache, tmp_path / "out", seeds=seeds, **settings)
        if number == 1:
            with pytest.raises(UnavailableError, match=r"is being written by process \d+ on .* \(sae train\) since"):
                train(second_config)
            continue
        second = Launch(tmp_path / f"second{number}", number, second_config)
        assert second.end() == [4] * number
        errors = [second.said(rank)["error"] for rank in range(number)]
        assert "is being written by process" in errors[0][1] or "UnavailableError" in [kind for kind, _ in errors]
        assert not any(second.said(rank)["trained"] for rank in range(number))
    held.touch()
    assert first.end() == [0, 0]
    for folder in (tmp_path / "one").iterdir():
        assert contents(tmp_path / "out" / folder.name) == contents(folder)


# --- what is agreed before the first step -----------------------------------------------------------------------------


def group_of(told: Callable[[object], list]) -> Callable[[int], ProcessGroup]:
    return lambda rank: ProcessGroup(rank, 2, gather=told)


def test_processes_that_plan_other_runs_are_refused(sparse_cache, tmp_path: Path, ranks_time_alike) -> None:
    """For example, one machine may find another cache."""
    plan = plan_training(config_of(sparse_cache, tmp_path, "relu"))
    others = [("relu-L00-another", "relu-L01-another"), []]
    assert isinstance(plan.shares[0], RankShare)
    for rank, kind in ((0, UsageError), (1, ReportedElsewhere)):
        group = ProcessGroup(rank, 2, gather=lambda mine: [mine, others])
        if rank:
            group = ProcessGroup(rank, 2, gather=lambda mine: [others, mine])
        with pytest.raises(
            kind, match="Process 1 plans different runs than process 0. Start all processes with the same"
        ):
            ranks.dealt_runs(plan, group)
    shares_of = ranks.dealt_runs(plan, ProcessGroup(1, 2, gather=lambda mine: [(mine[0], [[1], [0]]), mine]))
    assert shares_of == [[plan.runs[1]], [plan.runs[0]]]  # the deal of process 0, not of this one


def test_a_lock_that_is_not_seen_is_refused(sparse_cache, tmp_path: Path, monkeypatch) -> None:
    plan = plan_training(config_of(sparse_cache, tmp_path, "relu"))
    with locks.writer_lock(plan.runs[0].folder, "sae train"):
        ranks.require_locks([[plan.runs[0]], []])
        plan.runs[1].folder.mkdir()
        with pytest.raises(
            UnavailableError, match=f"holds the lock of {plan.runs[1].folder}, but this process cannot see that lock"
        ):
            ranks.require_locks([[plan.runs[0]], [plan.runs[1]]])


def test_a_lock_is_seen_and_what_its_death_leaves(tmp_path: Path) -> None:
    assert not locks.is_locked(tmp_path / "none") and not locks.was_abandoned(tmp_path / "none")
    with locks.writer_lock(tmp_path, "sae train"):
        assert locks.is_locked(tmp_path) and not locks.was_abandoned(tmp_path)
    assert not locks.is_locked(tmp_path) and not locks.was_abandoned(tmp_path)
    (tmp_path / ".lock.holder").write_text("process 1 on here")
    assert locks.was_abandoned(tmp_path)


def test_files_of_another_machine_are_waited_for(sparse_cache, tmp_path: Path, monkeypatch) -> None:
    """A network file system may show them late. Files of this machine or of a dead process are not waited for."""
    plan = plan_training(config_of(sparse_cache, tmp_path, "relu"))
    watch = ranks.Watch([plan.runs[:1], plan.runs[1:]], ProcessGroup(0, 2), SILENT)
    monkeypatch.setattr(ranks, "POLL_SECONDS", 0.01)
    plan.runs[0].folder.mkdir()
    plan.runs[1].folder.mkdir()
    (plan.runs[0].folder / "sae.json").touch()
    timer = threading.Timer(0.1, (plan.runs[1].folder / "sae.json").touch)
    timer.start()
    watch.wait_for_files()
    assert plan.runs[1].done
    monkeypatch.setattr(ranks.time, "sleep", lambda seconds: pytest.fail("waits"))
    (plan.runs[1].folder / "sae.json").unlink()
    (plan.runs[1].folder / ".lock.holder").touch()
    watch.wait_for_files()
    (plan.runs[1].folder / ".lock.holder").unlink()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    watch.wait_for_files()


@pytest.mark.slow
def test_a_plan_without_unfinished_runs_ends_at_once(sparse_cache, tmp_path: Path) -> None:
    config = config_of(sparse_cache, tmp_path / "out", "relu", layers=[0])
    launch(tmp_path / "first", 2, config)  # one run, so that one process has none
    said = launch(tmp_path / "again", 2, config)
    assert [said.said(rank)["trained"] for rank in (0, 1)] == [[], []]
    assert said.said(0)["say"][0].endswith("is already trained.") and said.said(1)["say"] == said.said(0)["say"]
    assert isinstance(run_training(TrainPlan(config, [])), type(None))
