"""What several processes of one command agree on. Threads simulate them; tests/train/test_ranks.py runs processes."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from sae.common.errors import Interrupted, ReportedElsewhere, SaeError, UnavailableError, UsageError
from sae.common.process_group import ProcessGroup, current_process_group, with_launcher


def in_each(count: int, work: Callable[[ProcessGroup], Any]) -> list[Any]:
    """What `work` returns or raises in each of `count` processes."""
    given: list[Any] = [None] * count
    barrier = threading.Barrier(count, timeout=20)

    def call(rank: int) -> Any:
        def gather(value: Any) -> list[Any]:
            barrier.wait()
            given[rank] = value
            barrier.wait()
            return list(given)

        try:
            return work(ProcessGroup(rank, count, gather=gather))
        except SaeError as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(call, range(count)))


def test_alone_a_process_is_its_own_group() -> None:
    group = current_process_group("cpu")
    assert (group.rank, group.count, group.is_first, group.gather("x")) == (0, 1, True, ["x"])
    group.barrier()
    assert group.everywhere(lambda: 7) == 7
    with pytest.raises(UsageError, match="own"):
        group.everywhere(lambda: fail(UsageError("own")))


def fail(error: SaeError) -> None:
    raise error


def test_what_succeeds_everywhere_is_returned() -> None:
    assert in_each(3, lambda group: group.everywhere(lambda: 10 * group.rank)) == [0, 10, 20]


def test_one_failure_is_raised_in_every_process_and_reported_by_its_own() -> None:
    own = UnavailableError("no room")
    found = in_each(3, lambda group: group.everywhere(lambda: fail(own) if group.rank == 1 else None))
    assert found[1] is own
    for other in (found[0], found[2]):
        assert type(other) is ReportedElsewhere and str(other) == "no room" and other.exit_code == 4


def test_the_same_failure_is_reported_once_and_another_beside_it() -> None:
    def work(group: ProcessGroup) -> None:
        group.everywhere(lambda: fail(UsageError(f"{('same', 'same', 'other', 'same')[group.rank]}")))

    assert [(type(e), str(e)) for e in in_each(4, work)] == [
        (UsageError, "same"), (ReportedElsewhere, "same"), (UsageError, "other"), (ReportedElsewhere, "same"),
    ]  # fmt: skip


def test_the_exit_code_of_the_others_is_the_highest() -> None:
    errors = [None, UsageError("a"), UnavailableError("b"), SaeError("c")]

    def work(group: ProcessGroup) -> None:
        group.everywhere(lambda: fail(errors[group.rank]) if errors[group.rank] else None)

    assert [error.exit_code for error in in_each(4, work)] == [4, 2, 4, 1]


def test_the_first_process_works_for_all() -> None:
    called: list[int] = []

    def work(group: ProcessGroup) -> str:
        return group.first(lambda: (called.append(group.rank), f"by {group.rank}")[1])

    assert in_each(3, work) == ["by 0"] * 3 and called == [0]


def test_a_process_that_has_to_stop_waits_for_none() -> None:
    group = ProcessGroup(0, 2, gather=lambda value: pytest.fail("it waits"))
    with pytest.raises(Interrupted):
        group.everywhere(lambda: fail(Interrupted("Stopped.")))


def test_a_command_is_given_with_the_launcher_of_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only for torchrun on one machine is the full command known."""
    assert with_launcher("sae evaluate runs/*") == "sae evaluate runs/*"
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert with_launcher("sae evaluate") == "sae evaluate     (with the same launcher, in 4 processes)"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert with_launcher("sae evaluate") == "torchrun --standalone --nproc_per_node 4 -m sae evaluate"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert with_launcher("sae evaluate").startswith("sae evaluate     (with")
