"""Checkpoints in the background have the bytes of training that waits. A kill or a full disk loses nothing."""

import errno
import random
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save as to_safetensors

from sae.common.errors import Interrupted, UnavailableError
from sae.common.files import os_error
from sae.train import checkpoint, checkpoint_writer, passes, shared_pass
from sae.train.checkpoint import training_state
from sae.train.checkpoint_writer import CheckpointWriter, StateFile
from sae.train.memory import host_bytes
from sae.train.plan import plan_training
from sae.train.progress import SILENT, TrainProgress
from sae.train.run import prepare_trainer, run_training, set_normalization

from ..kills import kill
from ..recipes import SOME_QUICK
from .runs import CHECKPOINTS, make_config, train

NAMES = ["relu", "topk", "hierarchical-resample"]
WAIT = 20  # seconds after which a test fails that would wait for ever


def contents(out: Path) -> dict[str, bytes]:
    """Every file that training left, but for records of when and how."""
    records = ("run.json", "metrics.jsonl", "sae.json")
    paths = (path for path in out.rglob("*") if path.is_file() and path.name not in records and path.name[0] != ".")
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in paths}


def steps_saved(folder: Path) -> list[int]:
    return sorted(int(path.parent.name[5:]) for path in folder.glob("checkpoints/*/state.json"))


@pytest.fixture
def written(monkeypatch) -> Callable[[Callable[[int], None]], list[int]]:
    """A function that calls `before` with the step of each checkpoint before it is written.

    It returns the list of steps whose checkpoints are whole.
    """

    def arm(before: Callable[[int], None]) -> list[int]:
        write, steps = checkpoint.write_checkpoint, []

        def patched(folder: Path, step: int, *more: object) -> None:
            before(step)
            write(folder, step, *more)
            steps.append(step)

        monkeypatch.setattr(checkpoint_writer, "write_checkpoint", patched)
        return steps

    return arm


def full_disk(path: Path, *_: object) -> None:
    raise os_error(OSError(errno.ENOSPC, "No space left on device"), path)


@pytest.mark.parametrize("recipe", SOME_QUICK)
def test_the_bytes_are_those_that_safetensors_writes(make_trainer, batches, recipe: str) -> None:
    """The bytes match after one step, and again after the state of the next step is copied over the first."""
    trainer = make_trainer(recipe)
    trainer.step(batches[0])
    file = StateFile(training_state(trainer), pinned=False)
    for x_BD in (None, batches[1]):
        if x_BD is not None:
            trainer.step(x_BD)
        file.copy(training_state(trainer))
        expected = to_safetensors({n: t.contiguous() for n, t in training_state(trainer).items()})
        assert file.bytes.numpy().tobytes() == expected


def test_training_goes_on_while_a_checkpoint_is_written(sparse_cache, tmp_path: Path, written) -> None:
    """The first checkpoint is held until step 6 is done. The files equal those of training that waits for each one."""
    whole = train(make_config(sparse_cache, *NAMES, out=tmp_path / "whole"))
    released, held = threading.Event(), []
    saved = written(lambda step: held.append((step, released.wait(WAIT))))

    def look(step: int, *_: object) -> None:
        if step == 6:
            assert saved == []
            released.set()

    train(make_config(sparse_cache, *NAMES, out=tmp_path / "out", log_every=1), TrainProgress(step=look))
    assert held == [(step, True) for step in (4, 4, 4, 8, 8, 8, 12, 12, 12)]
    assert saved == [step for step, _ in held]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole") and len(whole) == len(NAMES)


def test_one_is_written_at_a_time(sparse_cache, tmp_path: Path, written, monkeypatch) -> None:
    """The next one waits in the training thread, so that nothing is copied over a checkpoint that is being written."""
    waited_for, before = threading.Event(), []
    saved = written(lambda step: waited_for.wait(0 if step > 4 else WAIT))
    wait, copy = CheckpointWriter.wait, CheckpointWriter._copy

    def watched_wait(writer: CheckpointWriter) -> None:
        if writer._writing is not None:
            waited_for.set()
        wait(writer)

    def watched_copy(writer: CheckpointWriter, trainers: object) -> object:
        before.append(list(saved))
        return copy(writer, trainers)

    monkeypatch.setattr(CheckpointWriter, "wait", watched_wait)
    monkeypatch.setattr(CheckpointWriter, "_copy", watched_copy)
    train(make_config(sparse_cache, "relu", out=tmp_path, steps=10))
    assert before == [[], [4], [4, 8]] and saved == [4, 8, 10]


def test_the_sae_is_written_after_the_last_checkpoint(sparse_cache, tmp_path: Path, written) -> None:
    """Otherwise a kill between the two would leave a finished run that cannot be written again."""
    (folder,) = (run.folder for run in plan_training(make_config(sparse_cache, "batchtopk", out=tmp_path)).runs)
    found = []
    written(lambda step: (time.sleep(0.1 if step == 12 else 0), found.append((folder / "sae.safetensors").exists())))
    train(make_config(sparse_cache, "batchtopk", out=tmp_path))
    assert found == [False] * 3 and steps_saved(folder) == [8, 12]


@pytest.mark.parametrize("at", [4, pytest.param(12, marks=pytest.mark.slow)])
def test_a_full_disk_ends_training_and_the_resumed_runs_are_whole(
    sparse_cache, tmp_path: Path, monkeypatch, at: int
) -> None:
    """The message is that of training that waits. It comes at the next step or when the next checkpoint is due."""
    train(make_config(sparse_cache, *NAMES, out=tmp_path / "whole"))
    config, seen = make_config(sparse_cache, *NAMES, out=tmp_path / "out", log_every=1), []
    write, check, failed = checkpoint.atomic_write, CheckpointWriter.check, threading.Event()

    def sometimes_full(path: Path, *parts: bytes) -> None:
        if f"step-{at:08d}" in str(path):
            failed.set()
            full_disk(path)
        write(path, *parts)

    def look(step: int, *_: object) -> None:
        seen.append(step)
        if step == at + 1:  # the thread has failed, and the next step shows it
            assert failed.wait(WAIT)

    def check_a_failed_thread(writer: CheckpointWriter) -> None:
        if failed.is_set() and writer._writing is not None:
            writer._writing.exception(WAIT)
        check(writer)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "check", check_a_failed_thread)
        patch.setattr(checkpoint, "atomic_write", sometimes_full)
        with pytest.raises(UnavailableError) as raised:
            train(config, TrainProgress(step=look))
    target = f"checkpoints/step-{at:08d}/state.safetensors"
    assert re.match(f"The disk is full: .*{target} could not be written. Free some space", str(raised.value))
    assert at <= seen[-1] <= at + 1
    assert not list(tmp_path.glob(f"out/*/checkpoints/step-{at:08d}/state.json"))
    assert not list(tmp_path.glob("out/*/sae.json"))
    train(config)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_pass_ends_when_its_checkpoint_is_whole(sparse_cache, tmp_path: Path, written) -> None:
    """After that, the rows that the pass read may be removed, as a ring removes a group of windows."""
    plan = plan_training(make_config(sparse_cache, "relu", out=tmp_path))
    trainer = prepare_trainer(plan.runs[0], "cpu", SILENT)
    set_normalization(trainer, trainer.run.cache)
    written(lambda step: time.sleep(0.05))
    with CheckpointWriter("cpu") as writer:
        shared_pass.SharedPass([trainer], plan.config, SILENT, lambda: False, writer).train(until=2)
        assert steps_saved(trainer.run.folder) == [2]


def test_a_writer_ends_when_its_thread_has_and_raises_what_failed(monkeypatch) -> None:
    """An error of training is not replaced by the writer's error.

    After `give_up` (out of memory) the latter is ignored.
    """
    wrote: list[int] = []

    def write(copies: object, step: int, copied: object) -> None:
        time.sleep(0.03)
        wrote.append(step)
        full_disk(Path("state.safetensors"))

    monkeypatch.setattr(checkpoint_writer, "write_copies", write)
    with pytest.raises(UnavailableError, match="The disk is full"), CheckpointWriter("cpu") as writer:
        writer.save([], 1)
    with pytest.raises(KeyError), CheckpointWriter("cpu") as writer:
        writer.save([], 2)
        raise KeyError
    assert wrote == [1, 2]
    with CheckpointWriter("cpu") as writer:
        writer.save([], 3)
        writer.give_up()
    assert wrote == [1, 2, 3]


def test_ctrl_c_waits_for_the_checkpoint(sparse_cache, tmp_path: Path, written) -> None:
    def press(step: int, *_: object) -> None:
        if step == 6:
            signal.raise_signal(signal.SIGINT)

    saved = written(lambda step: time.sleep(0.05))
    config = make_config(sparse_cache, *NAMES, out=tmp_path)
    with pytest.raises(Interrupted, match="after step 7; everything is saved"):
        train(config, TrainProgress(step=press))
    assert saved == [4] * 3 + [7] * 3
    assert [steps_saved(folder) for folder in sorted(tmp_path.iterdir())] == [[4, 7]] * 3


def test_ctrl_c_does_not_say_that_all_is_saved_on_a_full_disk(sparse_cache, tmp_path: Path, written) -> None:
    def press(step: int, *_: object) -> None:
        if step == 1:
            signal.raise_signal(signal.SIGINT)

    written(lambda step: full_disk(Path("state.safetensors")))
    with pytest.raises(UnavailableError, match="The disk is full"):
        train(make_config(sparse_cache, "relu", out=tmp_path), TrainProgress(step=press))


def test_a_state_of_another_layout_is_copied_into_new_bytes(tmp_path: Path, monkeypatch) -> None:
    """A mechanism can create tensors between two steps, which changes the layout."""
    states = [
        {"a": torch.ones(2), "b": torch.zeros(3)},
        {"a": torch.ones(2), "b": torch.zeros(4)},
        {"a": torch.ones(1)},
    ]
    states.append({"a": torch.ones(1, dtype=torch.int64)})
    given = iter(states)
    monkeypatch.setattr(checkpoint_writer, "training_state", lambda _: next(given))
    writer, trainer = CheckpointWriter("cpu"), object()
    for state in states:
        assert writer._copy_state(trainer).numpy().tobytes() == to_safetensors(state)
    writer.forget(trainer)
    assert writer._files == {}


def test_the_copies_of_a_finished_run_are_freed(sparse_cache, tmp_path: Path, monkeypatch) -> None:
    """The memory is that of the runs that are still trained."""
    kept, forget = [], CheckpointWriter.forget

    def watch(writer: CheckpointWriter, trainer: object) -> None:
        forget(writer, trainer)
        kept.append(len(writer._files))

    monkeypatch.setattr(CheckpointWriter, "forget", watch)
    train(make_config(sparse_cache, "relu", "topk", out=tmp_path))
    assert kept == [1, 0]


def test_out_of_memory_waits_for_the_checkpoint_and_frees_the_copies(
    sparse_cache, tmp_path: Path, monkeypatch, written
) -> None:
    step_of, files = shared_pass.RunTrainer.step, []

    def fail(trainer, x_BD):
        if int(trainer.i) == 5 and not files:
            files.append([len(writer._files) for writer in writers])
            raise MemoryError("no room")
        return step_of(trainer, x_BD)

    writers: list[CheckpointWriter] = []
    init = CheckpointWriter.__init__
    monkeypatch.setattr(
        CheckpointWriter, "__init__", lambda self, *a, **k: (writers.append(self), init(self, *a, **k))[1]
    )
    monkeypatch.setattr(shared_pass.RunTrainer, "step", fail)
    saved = written(lambda step: time.sleep(0.05))
    config = make_config(sparse_cache, "relu", "topk", out=tmp_path)
    with pytest.raises(UnavailableError, match="continues from step 5"):
        train(config)
    assert saved == [4, 4] and files == [[2]] and writers[0]._files == {}
    assert [steps_saved(folder) for folder in sorted(tmp_path.iterdir())] == [[4, 5]] * 2


def test_a_run_that_fails_says_whether_it_has_a_checkpoint(sparse_cache, tmp_path: Path, monkeypatch, written) -> None:
    """It says so only when the checkpoint that is being written is whole."""
    written(lambda step: time.sleep(0.1))
    step_of = shared_pass.RunTrainer.step

    def fail(trainer, x_BD):
        return step_of(trainer, torch.full_like(x_BD, torch.inf) if int(trainer.i) == 4 else x_BD)

    monkeypatch.setattr(shared_pass.RunTrainer, "step", fail)
    plan = plan_training(make_config(sparse_cache, "relu", out=tmp_path, log_every=1))
    with pytest.raises(Exception, match="the last good checkpoint is kept"):
        run_training(plan)
    assert steps_saved(plan.runs[0].folder) == [4]


def test_where_copies_turn_out_not_to_fit_training_waits(sparse_cache, tmp_path: Path, monkeypatch) -> None:
    train(make_config(sparse_cache, *NAMES, out=tmp_path / "whole"))
    made, init = [], StateFile.__init__

    def second_fails(self, *args, **more) -> None:
        made.append(self)
        if len(made) == 2:
            raise MemoryError("no room for a copy")
        init(self, *args, **more)

    monkeypatch.setattr(StateFile, "__init__", second_fails)
    train(make_config(sparse_cache, *NAMES, out=tmp_path / "out"))
    assert len(made) == 2 and contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_another_error_of_a_copy_is_not_taken_for_it(sparse_cache, tmp_path: Path, monkeypatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(StateFile, "copy", broken)
    with pytest.raises(RuntimeError, match="shapes differ"):
        train(make_config(sparse_cache, "relu", out=tmp_path))


def test_the_plan_counts_the_copies(sparse_cache, tmp_path: Path, monkeypatch) -> None:
    """The plan states the memory of the copies.

    Where the copies do not fit, it states that training waits, and training does.
    """
    config = make_config(sparse_cache, "relu", "topk", out=tmp_path)
    plan = plan_training(config)
    state = 4 * 3 * (2 * 32 * 128 + 128 + 32)  # weights and two moments
    copies = passes.copied_bytes(plan.runs, "cpu")
    assert 2 * state < copies < 2.2 * state and plan.in_background
    assert passes.copied_bytes(plan.runs, "cuda") == 2 << 17 > copies  # torch pins a power of two bytes for each run
    (line,) = (line for line in plan.describe(time=True) if line.startswith("saved"))
    assert line == (
        f"saved    while training continues, from copies of the states that take {copies / 1e6:.1f} MB of host memory"
    )

    needed = passes.pass_memory(plan.runs, "cpu").total
    for extra, fits in ((-1, False), (1, True)):
        monkeypatch.setenv("SAE_MEMORY_GB", str((needed + copies + extra) / passes.FREE_SHARE / 1e9))
        assert plan_training(config).in_background is fits
        on_gpu = passes.copied_bytes(plan.runs, "cuda") + max(map(host_bytes, plan.runs))  # the runs are elsewhere
        monkeypatch.setenv("SAE_MEMORY_GB", str((on_gpu + extra) / passes.FREE_SHARE / 1e9))
        assert passes.copies_fit(plan.runs, "cuda") is fits
    monkeypatch.setenv("SAE_MEMORY_GB", str((needed + copies / 2) / passes.FREE_SHARE / 1e9))
    waiting = plan_training(config)
    (line,) = (line for line in waiting.describe() if line.startswith("saved"))
    assert (
        line.startswith("saved    between two steps, while training waits: ")
        and "copies of the states would take" in line
    )
    monkeypatch.setattr(CheckpointWriter, "_copy", pytest.fail)
    run_training(waiting)
    assert all(run.done for run in waiting.runs)


# --- kills ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_fifty_kills_during_checkpoints(sparse_cache, tmp_path: Path) -> None:
    """Three runs share a pass. After every kill, the resumed runs end with the same bytes."""
    settings = {"steps": 20, "checkpoint_every": 1}
    train(make_config(sparse_cache, *NAMES, out=tmp_path / "whole", **settings))
    expected, out = contents(tmp_path / "whole"), tmp_path / "out"
    config = make_config(sparse_cache, *NAMES, out=out, **settings)
    files = random.Random(0).sample(range(3 * 20 * 2), 50)  # a state and a record in each of 20 checkpoints of 3 runs
    assert {file % 2 for file in files[:20]} == {file % 2 for file in files[20:40]} == {0, 1}
    for number, file in enumerate(files):
        moment = ("before", "before", "after", "after", "later")[number // 10]
        kill(train, {"config": config}, CHECKPOINTS, moment, file)
        targets = list(out.glob("*/checkpoints/step-*"))
        if moment == "before":
            assert len([path for target in targets for path in target.glob("*.tmp-*")]) == 1
        if moment == "after":  # the record comes after the state
            assert any(not (target / "state.json").exists() for target in targets) == (file % 2 == 0)
        train(config)
        assert contents(out) == expected, f"kill {moment} file {file}"
        shutil.rmtree(out)
