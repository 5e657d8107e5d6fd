"""Artifacts that do not depend on the SAE are computed by one rank and read by the others."""

import fcntl
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from sae.cache.hooks import Hook
from sae.common.errors import UnavailableError
from sae.evaluate import artifacts
from sae.evaluate.artifacts import ArtifactCache
from sae.evaluate.inputs import artifact_cache, make_context
from sae.evaluate.metrics.base import RowSet
from sae.evaluate.metrics.held_out_rows import read_rows
from sae.evaluate.metrics.text_passes import TextPasses

pytestmark = pytest.mark.usefixtures("one_thread")
KEY = {"a": 1}


def in_threads(count: int, work: Callable[[ArtifactCache], Any], folder: Path) -> list[Any]:
    """The results of `work` in `count` threads, which stand for ranks: the file locks also exclude threads."""
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(work, [ArtifactCache(folder, shared=True) for _ in range(count)]))


def test_only_the_ranks_of_a_launcher_lock(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not artifact_cache().shared
    artifact_cache().get_or_compute("kind", KEY, lambda: {"x": torch.ones(1)})
    assert not artifact_cache().locks.exists()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert artifact_cache().shared


def test_an_artifact_is_computed_by_the_rank_that_comes_first(tmp_path: Path) -> None:
    computed, waited, others = [], [], threading.Barrier(3)

    def work(cache: ArtifactCache) -> torch.Tensor:
        def compute() -> dict[str, torch.Tensor]:
            computed.append(1)
            while len(waited) < 2:
                time.sleep(0.01)
            return {"x": torch.arange(3)}

        cache.waiting = waited.append
        others.wait()
        return cache.get_or_compute("kind", KEY, compute)["x"]

    found = in_threads(3, work, tmp_path)
    assert len(computed) == 1 and all(x.tolist() == [0, 1, 2] for x in found)
    name = ArtifactCache(tmp_path).path("kind", KEY).stem
    assert sorted(waited) == ["", "", name, name]


def test_one_that_could_not_be_written_is_not_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> None:
        raise UnavailableError("The disk is full")

    monkeypatch.setattr(artifacts, "atomic_write", full)
    cache = ArtifactCache(tmp_path)
    with pytest.raises(UnavailableError):
        cache.get_or_compute("kind", KEY, lambda: {"x": torch.ones(1)})
    assert not cache.contains("kind", KEY)


def test_one_that_is_damaged_is_computed_again_once(tmp_path: Path) -> None:
    cache = ArtifactCache(tmp_path)
    cache.get_or_compute("kind", KEY, lambda: {"x": torch.zeros(1)})
    cache.path("kind", KEY).write_bytes(b"")
    computed = []

    def compute() -> dict[str, torch.Tensor]:
        computed.append(1)
        return {"x": torch.ones(1)}

    found = in_threads(3, lambda one: one.get_or_compute("kind", KEY, compute)["x"].item(), tmp_path)
    assert found == [1, 1, 1] and len(computed) == 1


def test_several_artifacts_of_one_pass_are_claimed_together_in_any_order(tmp_path: Path) -> None:
    keys, captured = [{"hook": n} for n in range(4)], []

    def work(place: int, cache: ArtifactCache) -> None:
        for _ in range(5):
            with cache.claim("rows", keys[::-1] if place else keys):
                missing = [key for key in keys if not cache.contains("rows", key)]
                captured.extend(key["hook"] for key in missing)
                for key in keys:
                    cache.get_or_compute("rows", key, lambda: {"x": torch.ones(1)})  # the lock is already held

    caches = [ArtifactCache(tmp_path, shared=True) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(work, place, cache) for place, cache in enumerate(caches)]:
            done.result(timeout=20)
    assert sorted(captured) == [0, 1, 2, 3]


def test_the_locks_of_a_pass_are_taken_in_one_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise two ranks could deadlock, each holding the lock that the other waits for."""
    acquire, taken, keys = ArtifactCache._acquire, [], [{"hook": n} for n in range(4)]

    def noted(cache: ArtifactCache, path: Path, wait: bool) -> Any:
        taken.append(path)
        return acquire(cache, path, wait)

    monkeypatch.setattr(ArtifactCache, "_acquire", noted)
    for some in (keys, keys[::-1]):
        with ArtifactCache(tmp_path, shared=True).claim("rows", some):
            pass
    assert taken[:4] == taken[4:] and len(set(taken)) == 4


def test_the_lock_of_a_rank_that_died_is_free(tmp_path: Path) -> None:
    ready, go = os.pipe()
    if not (child := os.fork()):
        compute = lambda: (os.write(go, b"x"), time.sleep(60))  # noqa: E731
        ArtifactCache(tmp_path, shared=True).get_or_compute("kind", KEY, compute)  # type: ignore[arg-type]
        os._exit(1)
    assert os.read(ready, 1) == b"x"
    waited: list[str] = []
    cache = ArtifactCache(tmp_path, shared=True)
    cache.waiting = lambda what: (waited.append(what), what and os.kill(child, signal.SIGKILL))
    assert cache.get_or_compute("kind", KEY, lambda: {"x": torch.ones(1)})["x"].item() == 1
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL and len(waited) == 2


def test_a_turn_does_not_wait_unless_it_is_asked_to(tmp_path: Path) -> None:
    one, other = (ArtifactCache(tmp_path, shared=True) for _ in range(2))
    with one.turn("batch", wait=False) as first, other.turn("batch", wait=False) as second:
        assert (first, second) == (True, False)
        with other.turn("another", wait=False) as third:
            assert third
    with other.turn("batch", wait=True) as mine:
        assert mine


def test_without_locks_each_rank_computes_for_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    cache = ArtifactCache(tmp_path, shared=True)
    assert cache.get_or_compute("kind", KEY, lambda: {"x": torch.ones(1)})["x"].item() == 1
    with cache.turn("batch", wait=False) as now, cache.turn("batch", wait=True) as later:
        assert (now, later) == (False, True)


@pytest.fixture
def contexts(tiny_cache, home: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The evaluation contexts of three ranks."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    return [make_context(tiny_cache, tokens=400) for _ in range(3)]


def count_passes(contexts: list[Any], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by one with each forward pass of a model; a pass nested in another does not count."""
    counts: list[int] = []
    inside = threading.local()
    for ctx in contexts:
        for name in ("forward", "capture_hooks"):
            original = getattr(ctx.model, name)

            def counted(*args: Any, original: Any = original) -> Any:
                if getattr(inside, "pass_", False):
                    return original(*args)
                counts.append(1)
                inside.pass_ = True
                try:
                    return original(*args)
                finally:
                    inside.pass_ = False

            monkeypatch.setattr(ctx.model, name, counted)
    return counts


def test_each_batch_goes_through_the_model_of_one_rank(contexts, monkeypatch: pytest.MonkeyPatch) -> None:
    passes_of = [TextPasses(ctx, [Hook(0), Hook(1)], list(ctx.batches(2, 10))) for ctx in contexts]
    counts = count_passes(contexts, monkeypatch)
    silent = lambda *_: None  # noqa: E731
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda one: one.compute_together(3, silent), passes_of))
    batches = passes_of[0].batches
    assert len(counts) == len(batches) > 3
    whole = passes_of[0].whole(batches[0])
    again = [one.whole(batches[0]) for one in passes_of[1:]]
    assert len(counts) == len(batches) and all(torch.equal(whole.final, one.final) for one in again)
    fresh = contexts[0].model.forward(batches[0].ids, [Hook(0), Hook(1)])
    assert torch.equal(fresh.final, whole.final)


def test_passes_that_do_not_fit_are_run_by_each_rank(contexts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sae.evaluate.metrics.text_passes.MAX_BYTES", 0)
    one = TextPasses(contexts[0], [Hook(0)], list(contexts[0].batches(2, 10)))
    counts = count_passes(contexts[:1], monkeypatch)
    one.compute_together(3, lambda *_: None)
    assert len(counts) == 1 and one.keeps is False
    one.whole(one.batches[0])
    assert len(counts) == 2


def test_rows_of_held_out_text_are_read_by_one_rank(contexts, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = count_passes(contexts, monkeypatch)
    read = partial(read_rows, row_sets=[RowSet(Hook(1))], tokens=50, batch_contexts=2, progress=lambda *_: None)
    with ThreadPoolExecutor(3) as pool:
        first, *others = pool.map(read, contexts)
    rows = RowSet(Hook(1))
    assert len(counts) == 1 and all(torch.equal(first[rows].x_TD, one[rows].x_TD) for one in others)


def test_a_lock_that_was_released_is_taken_again(tmp_path: Path) -> None:
    one, other = (ArtifactCache(tmp_path, shared=True) for _ in range(2))
    for _ in range(2):
        with one.claim("rows", [KEY]), other.turn(one.path("rows", KEY).name, wait=False) as free:
            assert not free
        with other.turn(one.path("rows", KEY).name, wait=False) as free:
            assert free
