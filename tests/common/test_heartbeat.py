"""Processes that end, hang or never start are named. Threads with a store in memory stand for processes."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
from torch.distributed import HashStore

from sae.common import heartbeat
from sae.common.errors import UnavailableError
from sae.common.heartbeat import Heartbeat, has_ended


class Store(HashStore):
    """Torch's store in memory; its clone is itself."""

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
    with pytest.raises(UnavailableError, match="Rank 1 of 2 has not started in 0.2 s. What is committed is safe"):
        Heartbeat(store, 0, 2).meet()


def test_one_that_is_slow_is_waited_for_and_a_silent_one_named(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another machine tells nothing but its beats."""
    monkeypatch.setattr(heartbeat, "pid_namespace", lambda: "")
    first, slow = Heartbeat(store, 0, 2), Heartbeat(store, 1, 2)
    timer = threading.Timer(0.6, slow.meet)
    timer.start()
    first.meet()
    timer.join()
    store.set("sae/name/2", "process 7 on node-b")
    store.set("sae/machine/2", " 7")
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
        with pytest.raises(UnavailableError, match=rf"Rank 1 of 2 .process {child.pid} on here. has ended. What is"):
            first.meet()


def test_a_process_that_nobody_has_waited_for_has_ended() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it is a zombie now
    assert has_ended(child.pid) and not has_ended(os.getpid())
    child.wait()
    assert has_ended(child.pid)
