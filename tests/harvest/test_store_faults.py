"""A harvest into a store writes the same files as one to disk, even if the store fails or the process is killed."""

import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sae.cache.opening import open_cache
from sae.harvest.run import harvest_activations

from ..faulty_proxy import FaultyProxy, Request, faulty_proxy, fits
from ..object_store import environment
from ..worker_process import WorkerProcess
from .written import files_of, objects_of

pytestmark = pytest.mark.slow

HARVEST = "import json, sys; from sae.harvest.run import harvest_activations as h; h(**json.loads(sys.argv[1]))"
FAULTS = ["500", "503", "429", "drop", "lost", "half", "short", "slow"] * 3 + ["stale"] * 2
# The process is killed when it sends this request, before or after the store gets it. The harvest has ten windows.
KILLS = [
    ("PUT", "tokens/ids/c.0.0", "before"), ("PUT", "tokens/commit.json", "after"), ("PUT", "zarr.json", "after"),
    ("PUT", "layer_00/zarr.json", "before"), ("PUT", "row_ctx/c.1", "after"), ("PUT", "layer_01/c.2.0", "before"),
    ("PUT", "commits/000003.layer_00.json", "before"), ("PUT", "commits/000004.layer_00.json", "after"),
    ("PUT", "commits/000006.layer_01.json", "after"), ("GET", "layer_01.row_norm/c.3", "before"),
    ("PUT", "manifest.json", "before"), ("PUT", "manifest.json", "after"),
]  # fmt: skip


@pytest.fixture
def options(tiny_model: Path, sentences: Path) -> dict[str, Any]:
    """A harvest of 1,200 rows of both layers, in ten windows."""
    return {
        "model": str(tiny_model), "dataset": str(sentences), "layers": (0, 1), "tokens": 1200, "context": 32,
        "window": 128, "held_out": 0.1, "device": "cpu", "batch_contexts": 8,
    }  # fmt: skip


@pytest.fixture
def proxy(s3_endpoint: str, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    with faulty_proxy(s3_endpoint) as running:
        monkeypatch.setenv("AWS_ENDPOINT_URL", running.url)
        yield running


def key_of(request: Request) -> str:
    return request.path.split("?")[0].partition("/pile/")[2]


def test_a_store_that_fails_in_every_way(options: dict[str, Any], proxy: FaultyProxy, bucket: str, tmp_path: Path):
    harvest_activations(**options, out=tmp_path / "disk")
    pending, cut = list(FAULTS), set[str]()

    def next_fault(request: Request) -> str | None:
        """Let every fifth request fail, in the first way that is left and fits it.

        Only chunks are cut short without notice, and each of them at most once.
        """
        can_be_short = "/c." in request.path and request.path not in cut
        fitting = [fault for fault in pending if fits(fault, request) and (fault != "short" or can_be_short)]
        if not fitting or (request.number % 5 and not request.is_listing):
            return None
        fault = fitting[-1] if request.is_listing else fitting[0]
        pending.remove(fault)
        if fault == "short":
            cut.add(request.path)
        return fault

    proxy.schedule = next_fault
    harvest_activations(**options, out=f"{bucket}/pile")
    proxy.schedule = lambda request: None
    assert len(proxy.injected) >= 25 and set(FAULTS) == {fault for fault, _ in proxy.injected}
    assert objects_of(f"{bucket}/pile") == files_of(tmp_path / "disk")


def test_a_process_that_is_killed_at_any_request(
    options: dict[str, Any], proxy: FaultyProxy, bucket: str, tmp_path: Path, launcher: WorkerProcess
) -> None:
    """Every second start is on another machine, which has no files. What is committed is not computed again."""
    harvest_activations(**options, out=tmp_path / "disk")
    homes = [tmp_path / f"home-{number}" for number in range(len(KILLS) + 1)]
    for number, (method, key, moment) in enumerate(KILLS):
        words = ["0", "-c", HARVEST, json.dumps(options | {"out": f"{bucket}/pile"})]
        home = homes[number // 2]
        home.mkdir(exist_ok=True)
        environ = os.environ | environment(proxy.url) | {"SAE_HOME": str(home), "OMP_NUM_THREADS": "1"}
        pid, killed = list[int](), list[int]()

        def kill(request: Request, pid=pid, killed=killed, method=method, key=key, moment=moment) -> str | None:
            if request.method == method and key_of(request) == key and not killed:
                os.kill(pid[0], signal.SIGKILL)
                killed.append(pid[0])
            return ("drop" if moment == "before" else "lost") if killed else None

        with proxy.lock:  # no request is handled before the process id is known
            proxy.schedule = kill
            pid.append(launcher("forked_ranks.start", words=words, folder=home, environment=environ))
        code, _, told = launcher("forked_ranks.finish", pid=pid[0])
        assert code == -signal.SIGKILL, f"{key} was not asked for: {told[-2000:]}"
    proxy.schedule = lambda request: None
    harvest_activations(**options, out=f"{bucket}/pile")
    assert objects_of(f"{bucket}/pile") == files_of(tmp_path / "disk")
    cache = open_cache(f"{bucket}/pile")
    assert len(list(cache.verify())) == len(cache.manifest["files"])
    assert recomputed(proxy) == []


def recomputed(proxy: FaultyProxy) -> list[str]:
    """The chunks of activations that were uploaded after the commit of their window."""
    lost = {request for fault, request in proxy.injected if fault == "drop"}
    uploads = [key_of(request) for request in proxy.requests if request.method == "PUT" and request not in lost]
    committed, again = set(), []
    for key in uploads:
        if match := re.fullmatch(r"commits/0{0,5}(\d+)\.(\w+)\.json", key):
            committed.add((match[2], match[1]))
        elif (match := re.fullmatch(r"(layer_\d+)/c\.(\d+)\.0", key)) and (match[1], match[2]) in committed:
            again.append(key)
    return again
