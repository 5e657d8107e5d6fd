"""A harvest into an object store writes the same files as one to disk, whatever fails and wherever it is resumed."""

import json
import os
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sae.cache import store_place
from sae.cache.mirror import working_folder
from sae.cache.object_store import ObjectStore, open_store
from sae.cache.store_place import StorePlace
from sae.common.cache_schemas import CACHE_RECORD, HARVEST_RECORD
from sae.common.errors import UnavailableError, UsageError
from sae.harvest.config import HarvestConfig
from sae.harvest.description import describe_harvest
from sae.harvest.plan import plan_harvest
from sae.harvest.request import request_of
from sae.harvest.run import harvest_activations
from sae.harvest.windows import WindowComputer

from ..faulty_proxy import FaultyProxy, Request, faulty_proxy
from ..worker_process import WorkerProcess
from .written import files_of, objects_of

Options = dict[str, Any]
RANK_OF_TWO = """
import json, sys
import torch
from sae.harvest.run import harvest_activations
harvest_activations(**json.loads(sys.argv[1]))
assert torch.distributed.get_world_size() == 2
"""


@pytest.fixture
def options(tiny_model: Path, sentences: Path) -> Options:
    """A harvest of 900 rows of both layers, in four windows of 256."""
    return {
        "model": str(tiny_model), "dataset": str(sentences), "layers": (0, 1), "tokens": 900, "context": 32,
        "window": 256, "held_out": 0.1, "device": "cpu", "batch_contexts": 8,
    }  # fmt: skip


@pytest.fixture
def proxy(s3_endpoint: str, bucket: str, monkeypatch: pytest.MonkeyPatch):
    with faulty_proxy(s3_endpoint) as running:
        monkeypatch.setenv("AWS_ENDPOINT_URL", running.url)
        yield running


def test_tasks_that_add_other_layers_at_once_keep_each_other_s_modules(
    options: Options, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task's harvest.json arrives between another task's look and its upload, as a new file or as a replacement."""
    store, find = open_store(f"{bucket}/pile"), ObjectStore.find
    places = [StorePlace(store, tmp_path / str(number)) for number in range(3)]
    request = request_of(plan_harvest(HarvestConfig(**options | {"layers": (0,)}, out=tmp_path / "cache")))
    for number, place in enumerate(places):
        place.folder.mkdir()
        modules = {f"layer_{number:02d}": f"model.layers.{number}"}
        HARVEST_RECORD.write(place.folder / "harvest.json", request | {"modules": modules})

    def find_late(self: ObjectStore, key: str) -> bytes | None:
        seen = find(self, key)
        if others:
            others.pop()._push_request()
        return seen

    others: list[StorePlace] = [places[1], places[2]]
    monkeypatch.setattr(ObjectStore, "find", find_late)
    places[0]._push_request()
    record = HARVEST_RECORD.parse(store.get("harvest.json"), "harvest.json")
    assert list(record["modules"]) == ["layer_00", "layer_01", "layer_02"] and not others


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, list[str]]]:
    """The windows that are computed, each with the names of its arrays."""
    windows, compute = [], WindowComputer.compute

    def record(self, window, buffers):
        windows.append((window, sorted(buffers)))
        return compute(self, window, buffers)

    monkeypatch.setattr(WindowComputer, "compute", record)
    return windows


def another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty SAE_HOME."""
    home = tmp_path / f"home-{len(list(tmp_path.iterdir()))}"
    home.mkdir()
    monkeypatch.setenv("SAE_HOME", str(home))
    return home


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"compress": True, "max_norm": 1.05, "window": 512}])
def test_the_objects_are_the_files_of_a_disk(options: Options, more: Options, bucket: str, tmp_path: Path) -> None:
    options = options | more
    disk = harvest_activations(**options, out=tmp_path / "disk")
    assert not more or disk.statistics("layer_01")["marked"]  # so rows of chunks are read for its mean
    stored = harvest_activations(**options, out=f"{bucket}/pile/")
    assert np.array_equal(stored.read_chunk("layer_01", 1), disk.read_chunk("layer_01", 1))
    objects = objects_of(f"{bucket}/pile")
    assert objects == files_of(tmp_path / "disk") and len(objects) > 30
    kept = files_of(working_folder(f"{bucket}/pile"))
    assert not [name for name in kept if "/c." in name and not name.startswith("tokens/")]
    assert kept.items() <= objects.items()


@pytest.mark.slow
def test_another_machine_goes_on(
    options: Options, proxy: FaultyProxy, bucket: str, tmp_path: Path, computed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store refuses everything after three commits of two windows. What is committed is not computed again."""
    harvest_activations(**options, out=tmp_path / "disk")
    computed.clear()

    def refuse_later(request: Request) -> str | None:
        commits = [one for one in proxy.requests if one.method == "PUT" and "/commits/" in one.path]
        return "403" if len(commits) > 3 else None

    proxy.schedule = refuse_later
    with pytest.raises(UnavailableError, match="the store refused the credentials"):
        harvest_activations(**options, out=f"{bucket}/pile")
    proxy.schedule = lambda request: None
    assert len(list(open_store(f"{bucket}/pile").list("commits"))) == 3
    computed.clear()
    another_machine(tmp_path, monkeypatch)
    plan = plan_harvest(HarvestConfig(**options, out=f"{bucket}/pile"))
    assert f"{bucket}/pile is begun: 3 of 4 windows, 644 rows to harvest" in describe_harvest(plan)[-1]
    harvest_activations(**options, out=f"{bucket}/pile")
    both = ["layer_00", "layer_01"]
    assert sorted(computed) == [(1, ["layer_01"]), (2, both), (3, both)]
    assert objects_of(f"{bucket}/pile") == files_of(tmp_path / "disk")
    computed.clear()
    another_machine(tmp_path, monkeypatch)
    assert harvest_activations(**options, out=f"{bucket}/pile").layers == [0, 1] and not computed


@pytest.mark.slow
def test_a_listing_from_before_decides_nothing(
    options: Options, proxy: FaultyProxy, bucket: str, tmp_path: Path, computed, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy.schedule = lambda request: "stale" if request.is_listing else None
    harvest_activations(**options | {"layers": 0}, out=f"{bucket}/pile")
    another_machine(tmp_path, monkeypatch)
    computed.clear()
    harvest_activations(**options, out=f"{bucket}/pile")
    assert any(fault == "stale" for fault, _ in proxy.injected)
    assert sorted(computed) == [(window, ["layer_01"]) for window in range(4)]
    proxy.schedule = lambda request: None
    harvest_activations(**options | {"layers": 0}, out=tmp_path / "disk")
    harvest_activations(**options, out=tmp_path / "disk")
    assert objects_of(f"{bucket}/pile") == files_of(tmp_path / "disk")


@pytest.mark.slow
def test_layers_that_two_machines_complete_at_once_are_both_there(
    options: Options, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second machine seals before the first writes its manifest, or between its manifest and its zarr.json."""
    harvest_activations(**options, out=tmp_path / "disk")
    for number, step in enumerate(("seal", "_seal_root")):
        url, original = f"{bucket}/pile-{number}", getattr(store_place.StorePlace, step)

        def second(self, *records, url=url, step=step, original=original):
            monkeypatch.setattr(store_place.StorePlace, step, original)
            before = working_folder(url)
            monkeypatch.setattr("sae.harvest.plan.working_folder", lambda *_: tmp_path / f"second-{step}")
            harvest_activations(**options | {"layers": 1}, out=url)
            monkeypatch.setattr("sae.harvest.plan.working_folder", lambda *_: before)
            return original(self, *records)

        monkeypatch.setattr(store_place.StorePlace, step, second)
        harvest_activations(**options | {"layers": 0}, out=url)
        objects, disk = objects_of(url), files_of(tmp_path / "disk")
        assert CACHE_RECORD.parse(objects["zarr.json"], url)["attributes"]["complete"] == ["layer_00", "layer_01"]
        # the last request for this cache was for one layer
        assert {n for n in disk if objects[n] != disk[n]} <= {"harvest.json"}


@pytest.mark.slow
def test_what_else_is_at_the_address_is_refused(options: Options, bucket: str, tmp_path: Path) -> None:
    open_store(f"{bucket}/photos").put("2026/cat.jpg", b"")
    with pytest.raises(UsageError, match=f"{bucket}/photos holds 2026, but no activation cache. Choose another"):
        harvest_activations(**options, out=f"{bucket}/photos")
    harvest_activations(**options | {"layers": 0, "tokens": 300}, out=f"{bucket}/pile")
    before = objects_of(f"{bucket}/pile")
    with pytest.raises(UsageError, match=rf"{bucket}/pile holds another harvest \(.* Different: seed \(0, here 1\)"):
        harvest_activations(**options | {"seed": 1}, out=f"{bucket}/pile")
    assert objects_of(f"{bucket}/pile") == before


@pytest.mark.slow
def test_a_store_that_may_not_be_written_is_refused_before_the_work(
    options: Options, proxy: FaultyProxy, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store is refused before the text is cut or, if it is cut already, before a window is computed.

    A finished cache is only read.
    """
    options |= {"layers": 0, "tokens": 300}
    for prepared, work in ((False, "sae.harvest.stages.tokenize"), (True, "sae.harvest.stages.load_model_for")):
        if prepared:
            harvest_activations(**options, out=f"{bucket}/pile", prepare=True)
        proxy.schedule = lambda request: "403" if request.method == "PUT" else None
        with monkeypatch.context() as patched, pytest.raises(UnavailableError, match="refused the credentials .403"):
            patched.setattr(work, lambda *given: pytest.fail("it works"))
            harvest_activations(**options, out=f"{bucket}/pile")
        proxy.schedule = lambda request: None
    harvest_activations(**options, out=f"{bucket}/pile")
    proxy.schedule = lambda request: "403" if request.method == "PUT" else None
    assert harvest_activations(**options, out=f"{bucket}/pile").rows == 300


@pytest.mark.slow
def test_a_small_disk_is_noticed_before_the_harvest(
    options: Options, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the space for the working folder counts, since the store has room."""
    plan = plan_harvest(HarvestConfig(**options, out=f"{bucket}/pile"))
    local = next(line for line in describe_harvest(plan) if line.startswith("local"))
    assert str(working_folder(f"{bucket}/pile")) in local and "at a time" in local
    monkeypatch.setattr("sae.harvest.store_costs.free_space", lambda folder: plan.working_bytes)
    with pytest.raises(UnavailableError, match="The working folder of the harvest, .* Set SAE_HOME"):
        harvest_activations(**options, out=f"{bucket}/pile")
    monkeypatch.setattr("sae.harvest.store_costs.free_space", lambda folder: plan.working_bytes * 1.03)
    # the free space for a cache on disk does not matter
    monkeypatch.setattr("sae.harvest.plan.free_space", lambda folder: 1)
    assert harvest_activations(**options, out=f"{bucket}/pile").rows == 900


@pytest.mark.slow
def test_the_plan_counts_the_requests(options: Options, proxy: FaultyProxy, bucket: str) -> None:
    config = HarvestConfig(**options, out=f"{bucket}/pile")
    line = next(line for line in describe_harvest(plan_harvest(config)) if line.startswith("store"))
    writes, reads = (int(word.replace(",", "")) for word in line.split() if word.replace(",", "").isdecimal())
    proxy.requests.clear()
    harvest_activations(**options, out=f"{bucket}/pile")
    methods = [request.method for request in proxy.requests]
    # the plan counts three reads of the largest rows of a window, as with outlier rows; here there is one
    reads -= 2 * 2 * 4
    assert methods.count("PUT") == pytest.approx(writes, rel=0.1)
    assert methods.count("GET") + methods.count("HEAD") == pytest.approx(reads, rel=0.1)


@pytest.mark.slow
def test_shares_on_machines_of_their_own_write_the_objects_of_a_disk(
    options: Options, tmp_path: Path, computed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The text is cut for one layer, and the request of the shares, for two layers, replaces the request for one."""
    harvest_activations(**options, out=tmp_path / "disk")
    address = f"file://{tmp_path}/store/pile"
    computed.clear()
    assert harvest_activations(**options | {"layers": 0}, out=address, prepare=True).hooks == [] and not computed
    for share in ("2/2", "1/2", "2/2"):
        another_machine(tmp_path, monkeypatch)
        harvest_activations(**options, out=address, share=share)
    assert [window for window, _ in computed] == [1, 3, 0, 2]
    assert objects_of(address) == files_of(tmp_path / "disk")


@pytest.mark.slow
@pytest.mark.parametrize("machines", [1, 2])
def test_ranks_write_the_objects_of_a_disk(
    options: Options,
    bucket: str,
    tmp_path: Path,
    machines: int,
    monkeypatch: pytest.MonkeyPatch,
    launcher: WorkerProcess,
) -> None:
    """The ranks of one machine share a working folder; each machine has a working folder of its own."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # which harvest.json records
    harvest_activations(**options, out=tmp_path / "disk")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["0", "-c", RANK_OF_TWO, json.dumps(options | {"out": f"{bucket}/pile"})]
    ranks = []
    for rank in range(2):
        (home := tmp_path / f"home-{rank % machines}").mkdir(exist_ok=True)
        numbers = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank // machines, "LOCAL_WORLD_SIZE": 2 // machines}
        given = numbers | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "SAE_HOME": home}
        environment = os.environ | {name: str(value) for name, value in given.items()}
        ranks.append(launcher("forked_ranks.start", words=words, folder=home, environment=environment))
    ended = [launcher("forked_ranks.finish", pid=process) for process in ranks]
    assert [code for code, *_ in ended] == [0, 0], ended
    assert objects_of(f"{bucket}/pile") == files_of(tmp_path / "disk")
