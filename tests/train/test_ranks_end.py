"""What each of several processes says at the end, simulated in one process.

tests/train/test_ranks.py has real processes.
"""

import fcntl
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from sae.common.errors import Interrupted, ReportedElsewhere, SaeError, UnavailableError
from sae.common.locks import is_locked, was_abandoned, writer_lock
from sae.common.process_group import ProcessGroup
from sae.train import ranks
from sae.train.plan import Run, plan_training
from sae.train.progress import SILENT, Overview, TrainProgress
from sae.train.run_folder import append_metrics

from .runs import make_config

FULL = "The disk is full."


def planned(cache, out: Path, **changes) -> list[Run]:
    return plan_training(make_config(cache, "relu", layers=[0, 1], out=out, **changes)).runs


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for long."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(ranks, "STOP_SECONDS", 0.05)
    monkeypatch.setattr(ranks, "POLL_SECONDS", 0.01)


@pytest.fixture
def two_ranks(sparse_cache, tmp_path: Path, soon: None) -> tuple[ranks.Watch, ranks.Watch]:
    """Two ranks, each with a run that is not finished."""
    runs = planned(sparse_cache, tmp_path)
    shares = [runs[:1], runs[1:]]
    return ranks.Watch(shares, ProcessGroup(0, 2), SILENT), ranks.Watch(shares, ProcessGroup(1, 2), SILENT)


def kind_of(watch: ranks.Watch) -> type[SaeError]:
    """The kind of error by which a process reports a full disk."""
    with pytest.raises(SaeError, match=FULL) as raised:
        watch.report(UnavailableError(FULL))
    assert raised.value.exit_code == UnavailableError.exit_code
    return raised.type


def die(watch: ranks.Watch) -> None:
    """Leave what a process leaves behind when it dies before it reports."""
    watch.leaves_early = True
    with watch.present():
        pass


def test_the_error_of_a_process_keeps_its_kind_and_names_what_is_left(
    sparse_cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 had the runs of layer 0 and died. Rank 1, the first that still runs, reports this."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    runs = planned(sparse_cache, tmp_path, seeds=list(range(7)))
    shares = [*([run for run in runs if run.hook.layer == layer] for layer in (0, 1)), []]
    for run in runs:
        run.folder.mkdir()
    (shares[0][0].folder / ".lock.holder").touch()
    (shares[1][0].folder / "sae.json").touch()
    left = f"rank 0 died before it had finished {', '.join(run.name for run in shares[0][:5])} and 2 more."
    watch = ranks.Watch(shares, ProcessGroup(1, 3), SILENT)
    with pytest.raises(UnavailableError) as full:
        watch.report(UnavailableError(FULL))
    said = str(full.value).splitlines()
    assert said[:2] == [FULL, left] and said[3].startswith("13 of 14 runs are not finished. ")
    with pytest.raises(SaeError, match=left):
        watch.report(None)
    with pytest.raises(ReportedElsewhere, match=FULL) as elsewhere:
        ranks.Watch(shares, ProcessGroup(2, 3), SILENT).report(UnavailableError(FULL))
    assert elsewhere.value.exit_code == UnavailableError.exit_code
    with pytest.raises(ZeroDivisionError):
        watch.report(ZeroDivisionError("a bug"))


def test_one_that_died_after_its_own_runs_leaves_the_word_to_the_next(
    sparse_cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 has finished.

    Only its presence file shows whether it is alive: the file is locked while it is, left unlocked if it died, and
    removed at its end.
    """
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    done, *failed = planned(sparse_cache, tmp_path, seeds=[0, 1, 2])[:3]
    shares = [[done], [failed[0]], [failed[1]]]
    for run in (done, *failed):
        run.folder.mkdir()
    (done.folder / "sae.json").touch()
    first, second, third = (ranks.Watch(shares, ProcessGroup(rank, 3), SILENT) for rank in range(3))

    with first.present(), second.present():
        assert kind_of(first) is UnavailableError
    assert kind_of(second) is kind_of(third) is ReportedElsewhere and not list(tmp_path.glob("*/.lock.rank"))
    with second.present():
        die(first)
        assert kind_of(second) is UnavailableError
    assert kind_of(third) is ReportedElsewhere
    die(second)
    assert kind_of(third) is UnavailableError


def test_one_that_dies_when_it_is_about_to_report_leaves_the_word_to_the_next(
    sparse_cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks 1 and 2 find that rank 0 is alive and wait for it. Then rank 0 dies, and rank 1 reports."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    shares = [[run] for run in planned(sparse_cache, tmp_path, seeds=[0, 1, 2])[:3]]
    first, second, third = (ranks.Watch(shares, ProcessGroup(rank, 3), SILENT) for rank in range(3))
    said = []
    with ExitStack() as zero, ExitStack() as one, third.present():
        zero.enter_context(first.present())
        one.enter_context(second.present())

        def die_first() -> None:
            first.leaves_early = True
            zero.close()

        def report_second() -> None:
            said.append(kind_of(second))
            one.close()

        turns = iter([lambda: None, die_first, lambda: None, report_second])
        monkeypatch.setattr(time, "sleep", lambda seconds: next(turns)())
        said.append(kind_of(third))
    assert said == [UnavailableError, ReportedElsewhere] and next(turns, None) is None


def test_one_that_is_interrupted_before_it_has_reported_leaves_the_word_to_the_next(
    two_ranks: tuple[ranks.Watch, ranks.Watch], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = two_ranks

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    with first.present(), monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt), second.present():
        patched.setattr(time, "sleep", interrupt)
        second.report(UnavailableError(FULL))
    assert second.is_absent(1)


@pytest.mark.parametrize("kind", [UnavailableError, Interrupted])
def test_what_a_process_says_at_the_end_is_said_while_it_is_there(
    two_ranks: tuple[ranks.Watch, ranks.Watch], kind: type[SaeError]
) -> None:
    """If the process dies before it reports, another process reports instead."""
    watch, other = two_ranks
    said: list[tuple[str, bool]] = []
    file = watch.shares[0][0].folder / ranks.PRESENCE
    watch.progress = TrainProgress(end=lambda error: said.append((str(error), file.exists())))
    with pytest.raises(kind, match=FULL) as raised, watch.present():
        watch.report(kind(FULL))
    assert said == [(str(raised.value), True)] and not file.exists()


def test_a_run_whose_last_launch_has_not_ended_is_refused(two_ranks: tuple[ranks.Watch, ranks.Watch]) -> None:
    """Otherwise the two launches would wait for each other.

    The last launch waits for its other runs, some of which this launch trains, and this launch waits for the last one.
    """
    watch, _ = two_ranks
    with watch.present(), pytest.raises(UnavailableError, match="belongs to a command whose other processes"):
        with watch.present():
            pass


def test_one_that_is_told_to_stop_before_the_others_have_ended_leaves_the_word_to_them(
    two_ranks: tuple[ranks.Watch, ranks.Watch],
) -> None:
    watch, other = two_ranks
    with writer_lock(other.shares[1][0].folder, "sae train"), watch.present():
        watch.wait(lambda: True, None)
    assert other.is_absent(0)
    with watch.present():
        watch.wait(lambda: True, None)
    assert not other.is_absent(0)


def test_a_bug_hides_nothing_of_what_is_left(two_ranks: tuple[ranks.Watch, ranks.Watch]) -> None:
    said: list[str] = []
    watch, _ = two_ranks
    watch.progress = TrainProgress(problem=said.append)
    with pytest.raises(ZeroDivisionError):
        watch.report(ZeroDivisionError("a bug"))
    assert len(said) == 1 and "2 of 2 runs are not finished" in said[0]


def test_a_process_that_is_told_to_stop_does_not_wait_long(
    two_ranks: tuple[ranks.Watch, ranks.Watch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits neither for other processes that train nor for files of other machines, and it keeps its own problem."""
    watch, other = two_ranks
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    looks: list[bool] = []

    def look(at_once: bool = False) -> None:
        looks.append(at_once)
        assert len(looks) < 200, "it waits on"

    monkeypatch.setattr(watch, "update", look)
    with writer_lock(other.shares[1][0].folder, "sae train"):
        stopped = watch.wait(lambda: True, None)
        own = UnavailableError(FULL)
        assert watch.wait(lambda: True, own) is own
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("it waits for files"))
    with pytest.raises(Interrupted, match="Stopped while other processes were training"):
        watch.report(stopped)


def test_a_run_that_was_given_up_is_not_waited_for(
    sparse_cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = planned(sparse_cache, tmp_path)[:1]
    runs[0].problem = "the loss was not finite"
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("it waits for files"))
    ranks.Watch([runs, []], ProcessGroup(0, 2), SILENT).wait_for_files()


def test_the_overview_is_of_all_runs_and_of_the_first_process(sparse_cache, tmp_path: Path) -> None:
    done, begun = planned(sparse_cache, tmp_path)
    for run, step in ((done, 12), (begun, 4)):
        run.folder.mkdir()
        append_metrics(run.folder, {"step": step, "loss": 0.5})
    seen: list[Overview] = []
    for rank in (0, 1):
        watch = ranks.Watch([[done], [begun]], ProcessGroup(rank, 2), TrainProgress(overview=seen.append))
        watch.update()
        watch.update()  # too soon
        watch.update(at_once=True)
    assert len(seen) == 2 and seen[0] == seen[1]
    assert seen[0][:4] == (12 + 4, 2 * 12, {done.name}, 2) and seen[0].metrics[begun.name]["loss"] == 0.5


def test_processes_that_look_at_a_lock_at_once_all_find_that_its_owner_died(tmp_path: Path) -> None:
    """Otherwise each could take a dead process for a live one and leave the final report to it."""
    (tmp_path / ".lock.holder").write_text("process 1 on here")
    (tmp_path / ".lock").touch()
    with (tmp_path / ".lock").open() as other:
        fcntl.flock(other, fcntl.LOCK_SH)  # another process is looking at the lock
        assert not is_locked(tmp_path) and was_abandoned(tmp_path)
        fcntl.flock(other, fcntl.LOCK_EX)
        assert is_locked(tmp_path) and not was_abandoned(tmp_path)
