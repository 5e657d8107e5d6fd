"""Workers write and seal one cache at the same time. In every order of steps, manifest, commits and chunks agree."""

import math
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from obstore.store import MemoryStore

import sae.cache.writer as writer_module
from sae.cache import mirror, store_place
from sae.cache.object_store import ObjectStore
from sae.cache.place import FolderPlace
from sae.cache.reader import Cache
from sae.cache.store_place import StorePlace
from sae.cache.writer import CacheWriter
from sae.common.cache_schemas import HARVEST_RECORD
from sae.common.errors import DamagedError

ROWS, D, WINDOW = 24, 8, 16  # two windows
REQUEST = {"model": "none", "dataset": None, "tokens": ROWS, "context": 8, "held_out": None, "window": WINDOW}
Bits = dict[int, np.ndarray]
STEPS_ON_A_DISK = ("commit_files", "read_record", "publish", "create_commit", "remove_records", "seal")
STEPS_IN_A_STORE = ("put", "get", "head", "list", "delete")


class Turns:
    """Lets two workers take turns, each in its own thread.

    `plan` is a list of turns: the worker, and the number of its steps.
    """

    def __init__(self, *plan: tuple[str, float]) -> None:
        self.plan, self.changed, self.worker = list(plan), threading.Condition(), threading.local()
        self.steps = {"first": 0, "second": 0}

    def step(self) -> None:
        """Wait for the turn of the calling worker; every step of a worker calls this first.

        Other callers, such as the test, do not wait.
        """
        if (name := getattr(self.worker, "name", None)) is not None:
            with self.changed:
                if self.plan[0] == (name, 0):  # the worker has also finished what followed its last step
                    self._next()
                self.changed.wait_for(lambda: self.plan[0][0] == name)
                self.steps[name] += 1
                self.plan[0] = name, self.plan[0][1] - 1

    def whole_step(self, action: Callable[[], Any]) -> Any:
        """Run an action, with everything that it calls, as one step, and return its result."""
        if getattr(self.worker, "is_in_step", False):
            return action()
        self.step()
        self.worker.is_in_step = True
        try:
            return action()
        finally:
            self.worker.is_in_step = False

    def _next(self) -> None:
        self.plan.pop(0)
        self.changed.notify_all()

    def run(self, works: dict[str, Callable[[], Any]]) -> dict[str, Any]:
        """Run the work of each worker in a thread, and return the results."""
        results: dict[str, Any] = {}

        def run(name: str) -> None:
            self.worker.name = name
            try:
                results[name] = works[name]()
            except DamagedError:  # another worker was replacing the file that this one read
                results[name] = False
            finally:
                with self.changed:
                    self.plan = [turn for turn in self.plan if turn[0] != name]
                    self.changed.notify_all()

        threads = [threading.Thread(target=run, args=(name,)) for name in works]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


class Scene:
    """A cache in a folder or a store, its workers, and the turns that they take."""

    def __init__(self, folder: Path, stored: bool, make_writer: Callable[..., CacheWriter]) -> None:
        self.folder, self.make_writer, self.turns = folder, make_writer, Turns()
        self.store = ObjectStore("s3://memory/pile", SteppedStore(self)) if stored else None

    def worker(self, name: str, bits: Bits) -> CacheWriter:
        if self.store is None:
            return self.make_writer(self.folder / "cache", bits, WINDOW)
        local = self.make_writer(folder := self.folder / name, bits, WINDOW)
        HARVEST_RECORD.write(folder / "harvest.json", REQUEST)
        writer = CacheWriter(folder, local.identity, local.layout, local.widths, StorePlace(self.store, folder))
        writer.place.begin()
        return writer

    def cache(self) -> Cache:
        """Return the cache, after verifying each of its records and chunks."""
        folder = self.folder / "cache"
        if self.store is not None:
            for key, _ in self.store.list():
                (folder / key).parent.mkdir(parents=True, exist_ok=True)
                (folder / key).write_bytes(self.store.get(key))
        cache = Cache(folder)
        assert len(list(cache.verify())) == len(cache.manifest["files"])
        return cache


class SteppedStore:
    """A store in memory in which every request is a step."""

    def __init__(self, scene: Scene) -> None:
        self.scene, self.store = scene, MemoryStore()

    def __getattr__(self, name: str) -> Any:
        if name in STEPS_IN_A_STORE:
            self.scene.turns.step()
        return getattr(self.store, name)


class OneThread:
    """Replaces a pool of threads, so that the steps of a worker have a fixed order."""

    def __init__(self, threads: int) -> None: ...

    def __enter__(self) -> "OneThread":
        return self

    def __exit__(self, *_: object) -> None: ...

    def map(self, action: Callable[..., Any], items: Any) -> list[Any]:
        return [action(item) for item in items]


@pytest.fixture
def scenes(tmp_path: Path, make_writer, monkeypatch: pytest.MonkeyPatch, where: str) -> Iterator[Callable[[], Scene]]:
    """scenes() returns a new scene, on a disk or in a store, as the test's parameter `where` says."""
    current: list[Scene] = []
    monkeypatch.setattr(writer_module, "ThreadPoolExecutor", OneThread)
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    for module in (mirror, store_place):
        monkeypatch.setattr(module, "map_ahead", lambda action, items, threads=1: iter([action(one) for one in items]))
    if where == "disk":
        for owner, name in [(FolderPlace, name) for name in STEPS_ON_A_DISK] + [(writer_module, "write_chunk")]:
            original = getattr(owner, name)

            def stepped(*arguments, original=original):
                return current[-1].turns.whole_step(lambda: original(*arguments))

            monkeypatch.setattr(owner, name, stepped)

    def begin() -> Scene:
        shutil.rmtree(folder := tmp_path / "scene", ignore_errors=True)
        current.append(Scene(folder, where == "store", make_writer))
        return current[-1]

    yield begin


def harvest(writer: CacheWriter, bits: Bits, write_windows, max_norm: float | None = None) -> bool:
    write_windows(writer, bits, list(writer.missing_windows()))
    return writer.seal(max_norm)


def run(
    scenes,
    write_windows,
    bits: tuple[Bits, Bits],
    *plan: tuple[str, float],
    norms=(None, None),
    there: Bits | None = None,
) -> Turns:
    """Let two workers with these bits take turns. The cache is whole afterwards, and each window is that of one worker.

    `there` maps the layers that are already complete in the cache to their bits.
    """
    scene, written = scenes(), list(zip(bits, norms, strict=True))
    if there:
        assert harvest(scene.worker("before", there), there, write_windows)
    works = {}
    for name, (one, norm) in zip(("first", "second"), written, strict=True):
        writer = scene.worker(name, one)
        works[name] = lambda writer=writer, one=one, norm=norm: harvest(writer, one, write_windows, norm)
    scene.turns = Turns(*plan, ("first", math.inf), ("second", math.inf))
    sealed = scene.turns.run(works)
    assert len(sealed) == 2 and any(sealed.values())
    written += [(there, None)] if there else []
    cache = scene.cache()
    for layer in cache.layers:
        for window in range(2):
            chunk = cache.read_chunk(f"layer_{layer:02d}", window)
            rows = slice(WINDOW * window, min(WINDOW * window + WINDOW, ROWS))
            assert any(np.array_equal(chunk, one[layer][rows]) for one, _ in written if layer in one)
    for layer in cache.layers:
        allowed = {norm for one, norm in written if layer in one}
        assert cache.statistics(f"layer_{layer:02d}")["max_norm"] in allowed
    assert cache.layers == sorted({layer for one, _ in written for layer in one})
    return scene.turns


def two_workers(finite_bits, added: str) -> tuple[Bits, Bits]:
    """The bits of two workers: different bits of one layer, as from two kinds of GPUs, or bits of two layers."""
    return {5: finite_bits(ROWS, D, 5)}, {5 if added == "the same layer" else 12: finite_bits(ROWS, D, 6)}


def twins(finite_bits) -> tuple[Bits, Bits]:
    """The bits of two workers for one layer, with equal norms and moments.

    The windows can be told apart only by the lists of their files.
    """
    one = finite_bits(ROWS, D, 5)
    one[::WINDOW, 0] = 0x0000
    other = one.copy()
    other[::WINDOW, 0] = 0x8000  # only the sign of a zero differs
    return {5: one}, {5: other}


NORMS = (1e3, 1e6)  # their --max-norm
ADDED = ("the same layer", "another layer")


@pytest.mark.parametrize(
    ("added", "complete", "every"),
    [
        *((added, [], 7) for added in ADDED),
        ("another layer", [8], 7),
        *(pytest.param(added, layers, 1, marks=pytest.mark.slow) for added in ADDED for layers in ([], [8])),
    ],
)
@pytest.mark.parametrize("where", ["disk", "store"])
def test_another_worker_writes_and_seals_between_two_steps_of_the_first(
    scenes, finite_bits, write_windows, added: str, complete: list[int], every: int
) -> None:
    """The cache is new, or it is complete with another layer and its manifest is replaced."""
    bits, there = two_workers(finite_bits, added), {layer: finite_bits(ROWS, D, layer) for layer in complete}
    steps = run(scenes, write_windows, bits, norms=NORMS, there=there).steps["first"]
    assert steps > 15
    for step in range(steps - 1, 0, -every):
        run(scenes, write_windows, bits, ("first", step), ("second", math.inf), norms=NORMS, there=there)


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("where", ["disk", "store"])
def test_a_window_that_another_worker_replaces_is_listed_as_it_is_then(
    scenes, finite_bits, write_windows, every: int
) -> None:
    """The first worker finds the window missing, and then replaces what the second has committed in the meantime."""
    bits, looked = twins(finite_bits), ("first", 2)
    steps = run(scenes, write_windows, bits, looked, ("second", math.inf)).steps["second"]
    for step in range(steps - 2, steps // 2, -every):  # the second seals
        run(scenes, write_windows, bits, looked, ("second", step), ("first", math.inf))


@pytest.mark.slow
@pytest.mark.parametrize("where", ["disk", "store"])
@pytest.mark.parametrize("added", ADDED)
def test_each_of_two_workers_stops_at_a_step_for_the_other(scenes, finite_bits, write_windows, added: str) -> None:
    bits = two_workers(finite_bits, added)
    for step in range(1, run(scenes, write_windows, bits, norms=NORMS).steps["first"], 4):
        alone = run(scenes, write_windows, bits, ("first", step), ("second", math.inf), norms=NORMS)
        for others in range(1 + step % 5, alone.steps["second"], 5):
            run(scenes, write_windows, bits, ("first", step), ("second", others), norms=NORMS)
