"""Processes that end, hang or never start are named. Threads with an in-memory store simulate processes."""

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
from torch.distributed import HashStore

from sae.common import heartbeat
from sae.common.errors import UnavailableError
from sae.common.heartbeat import Heartbeat, has_ended


class Store(HashStore):
    """An in-memory store of torch whose clone is the store itself."""

    def clone(self) -> "Store":
        return self


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(heartbeat, "BEAT", 0.01)
    monkeypatch.setattr(heartbeat, "PATIENCE", 0.2)
    monkeypatch.setattr(heartbeat, "START", 0.2)
    shared = Store()
    shared.set_timeout(timedelta(seconds=10))
    return shared


def test_processes_meet_again_and_again(store: Any) -> None:
    ranks = [Heartbeat(store, rank, 3) for rank in range(3)]
    order: list[int] = []

    def work(one: Heartbeat) -> None:
        for step in range(4):
            one.meet()
            order.append(step)
            one.meet()

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(work, ranks))
    assert order == sorted(order) and len(order) == 12


def test_one_that_never_starts_is_named(store: Any) -> None:
    with pytest.raises(UnavailableError, match="Rank 1 of 2 has not started in 0.2 s. Everything committed is safe"):
        Heartbeat(store, 0, 2).meet()


def test_one_that_is_slow_is_waited_for_and_a_silent_one_named(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process on another machine is known only by its heartbeat."""
    monkeypatch.setattr(heartbeat, "pid_namespace", lambda: "")
    first, slow = Heartbeat(store, 0, 2), Heartbeat(store, 1, 2)
    timer = threading.Timer(0.6, slow.meet)
    timer.start()
    first.meet()
    timer.join()
    store.set("sae/name/2", "process 7 on node-b")
    store.set("sae/machine/2", " 999999999")  # no such process here, but it belongs to another machine
    first.count = 3
    with pytest.raises(UnavailableError, match=r"Rank 2 of 3 .process 7 on node-b. no longer runs: it has been silent"):
        second = threading.Thread(target=slow.meet)
        second.start()
        first.meet()
    second.join()


def test_the_system_says_at_once_that_a_process_of_this_machine_has_ended(store: Any) -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    first = Heartbeat(store, 0, 2)
    store.set("sae/name/1", f"process {child.pid} on here")
    store.set("sae/machine/1", f"{first.machine} {child.pid}")
    if first.machine:
        with pytest.raises(UnavailableError, match=rf"Rank 1 of 2 .process {child.pid} on here. has ended. Everything"):
            first.meet()


def test_a_process_that_nobody_has_waited_for_has_ended() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # the child is now a zombie
    assert has_ended(child.pid) and not has_ended(os.getpid())
    child.wait()
    assert has_ended(child.pid)


def test_a_process_that_arrived_and_ended_since_the_last_look_is_not_dead(store: Any) -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    first = Heartbeat(store, 1, 2)
    store.set("sae/name/0", f"process {child.pid} on here")
    store.set("sae/machine/0", f"{first.machine} {child.pid}")

    class ArrivesAfterTheFirstLook:
        def check(self, keys: list[str]) -> bool:
            arrived = store.check(keys)
            if keys == ["sae/met/1/0"]:
                store.set(keys[0], "")
            return arrived

        def __getattr__(self, name: str) -> Any:
            return getattr(store, name)

    first.store = ArrivesAfterTheFirstLook()
    first.meet()


def test_silence_counts_from_the_last_beat(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(heartbeat, "pid_namespace", lambda: "")
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    first = Heartbeat(store, 0, 2)
    store.set("sae/name/1", "process 7 on node-b")
    store.set("sae/machine/1", " 7")
    for beat in range(4):
        store.add("sae/beat/1", 1)
        for later in (0.0, 0.14):
            now[0] = 0.15 * beat + later
            assert not first._find_dead(1)
    now[0] += 0.1
    assert first._find_dead(1).endswith("no longer runs: it has been silent for 0.2 s.")


def test_time_for_which_this_process_was_stopped_too_is_no_silence(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(heartbeat, "pid_namespace", lambda: "")
    monkeypatch.setattr(heartbeat, "PATIENCE", 120.0)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    first = Heartbeat(store, 0, 2)
    store.set("sae/name/1", "process 7 on node-b")
    store.set("sae/machine/1", " 7")
    assert not first._find_dead(1)
    now[0] += 3600  # the machine was suspended
    assert not first._find_dead(1)
    for _ in range(24):
        now[0] += heartbeat.GAP
        last = first._find_dead(1)
    assert last.endswith("no longer runs: it has been silent for 120 s.")


def test_rank_0_which_may_keep_the_store_ends_last(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 is dead. Rank 2 works on for a while, and must be able to find that out from the store too."""
    monkeypatch.setattr(heartbeat, "FAREWELL", 0)
    monkeypatch.setattr(heartbeat, "PATIENCE", 60)
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    first = Heartbeat(store, 0, 3)
    for rank, process in ((1, child.pid), (2, os.getpid())):
        store.set(f"sae/name/{rank}", f"process {process} on here")
        store.set(f"sae/machine/{rank}", f"{first.machine} {process}")
    threading.Timer(0.1, store.set, ("sae/met/1/2", "")).start()
    if first.machine:
        with pytest.raises(UnavailableError, match="Rank 1 of 3 .* has ended"):
            first.meet()
        assert store.check(["sae/met/1/2"])
