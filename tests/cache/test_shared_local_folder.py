"""Several processes, threads and readings share one local folder.

Two objects for one folder share nothing but its files, as two processes do. Most tests make each decision and each pull
by hand, at the moment that they test.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from sae.cache import local_folder as module
from sae.cache.local_folder import LocalFolder, local_folder
from sae.cache.object_store import ObjectStore
from sae.cache.opening import open_place
from sae.cache.pulled_files import contents
from sae.cache.reader import Cache
from sae.cache.reading import ChunkReading
from sae.cache.shared_folder import SharedFolder, Statement
from sae.cache.store_cache import StoreCache
from sae.common.errors import DamagedError, UnavailableError, UsageError

CHUNK = 128 * 8 * 2 + 4  # bytes
READ = """
import random, sys
from pathlib import Path
import numpy as np
from sae.cache.local_folder import local_folder
from sae.cache.reader import Cache
from sae.cache.reading import ChunkReading
from sae.cache.store_cache import StoreCache
address, folder, disk, size, seed, steps = sys.argv[1:]
local, rng = local_folder(Path(folder), int(size)), random.Random(int(seed))
cache, expected = StoreCache(address, local=local), Cache(disk)
reads = [sorted(rng.sample(range(20), rng.randint(1, 2))) for _ in range(int(steps))]
uses = np.array([[chunk, step, step] for step, chunks in enumerate(reads) for chunk in chunks])
_, files = cache.stored_files("layer_05")
reading = ChunkReading(local, files, lambda steps: uses, range(len(reads)), len(reads))
local.begin(reading)
for step, chunks in enumerate(reads):
    with reading.step(step, chunks):
        for chunk in chunks:
            assert np.array_equal(cache.read_chunk("layer_05", chunk), expected.read_chunk("layer_05", chunk))
    if rng.random() < 0.1:  # somebody who reads a chunk in passing
        cache.read_chunk("layer_05", rng.randrange(20))
reading.close()
print(local.pulled_files)
"""


@pytest.fixture
def address(twenty_chunks: Cache, tmp_path: Path) -> str:
    shutil.copytree(twenty_chunks.folder, tmp_path / "store" / "pile")
    return f"file://{tmp_path}/store/pile"


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[LocalFolder, LocalFolder]]:
    """Two objects for one folder, as if in two processes, whose threads are not started."""
    monkeypatch.setattr(LocalFolder, "_start_threads", lambda local: None)
    yield LocalFolder(tmp_path / "local"), LocalFolder(tmp_path / "local")


def begin(local: LocalFolder, address: str, reads: list[list[int]], chunks: int) -> tuple[StoreCache, ChunkReading]:
    """Begin to read the chunks of `reads`, step by step, in a folder with room for `chunks` chunks."""
    cache = StoreCache(address, local=local)
    uses = np.array([[chunk, step, step] for step, read in enumerate(reads) for chunk in read])
    _, files = cache.stored_files("layer_05")
    local.size = contents(local.folder).other + chunks * CHUNK
    reading = ChunkReading(local, files, lambda steps: uses, range(len(reads)), len(reads))
    local.begin(reading)
    return cache, reading


def decide(local: LocalFolder):
    """Decide which chunk to pull now. Returns its number and its file."""
    with local._lock:
        file = local._decide()[0]
    return None if file is None else (int(file.name.rsplit("/c.")[1].split(".")[0]), file)


def pull(local: LocalFolder) -> int | None:
    """Decide once, and pull the chunk that was chosen."""
    if (decided := decide(local)) is None:
        return None
    local._pull(decided[1])
    return decided[0]


def chunks_in(local: LocalFolder) -> set[int]:
    return {int(name.rsplit("/c.")[1].split(".")[0]) for name in contents(local.folder).whole}


def read_step(reading: ChunkReading, step: int, chunks: list[int]) -> None:
    with reading.step(step, chunks):
        pass


def test_a_chunk_that_has_just_arrived_is_kept_before_its_process_looks_again(address: str, pair) -> None:
    a, b = pair
    begin(a, address, [[0]], 2)
    assert pull(a) == 0  # a makes no further decision
    _, reading = begin(b, address, [[1], [2]], 2)
    assert pull(b) == 1
    with b._lock:
        b._decide()
    read_step(reading, 0, [1])
    assert pull(b) == 2 and chunks_in(a) == {0, 2}


def test_a_part_that_is_being_pulled_stays_although_its_reading_has_ended(
    address: str, pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = pair
    _, reading = begin(a, address, [[0]], 2)
    decided, fetch = decide(a), StoreCache.fetch_chunk
    assert decided is not None

    def meanwhile(cache: StoreCache, file: str) -> bytes:
        monkeypatch.undo()
        reading.close()
        begin(b, address, [[0]], 2)
        assert decide(b) is None  # a is still pulling it
        return fetch(cache, file)

    monkeypatch.setattr(StoreCache, "fetch_chunk", meanwhile)
    monkeypatch.setattr(LocalFolder, "_start_threads", lambda local: None)
    a._pull(decided[1])
    assert not a._failed and chunks_in(b) == {0} and not contents(b.folder).parts
    assert not a._shared.owner and len(list(a.folder.glob(".reader-*"))) == 2  # those of b


def test_no_two_threads_pull_a_chunk_and_no_process_writes_the_part_of_another(address: str, pair) -> None:
    a, b = pair
    begin(a, address, [[0], [1]], 2)
    decided = decide(a)
    assert decided is not None and decided[0] == 0
    for path in a.folder.rglob("*.part"):
        path.unlink()  # deleted by a program that does not know what it is
    again = decide(a)
    assert again is not None and again[0] == 1
    assert a._part("x") != b._part("x")


def test_a_chunk_that_another_finds_damaged_is_replaced_while_it_is_read(
    address: str, pair, twenty_chunks: Cache
) -> None:
    a, b = pair
    cache, reading = begin(a, address, [[0]], 3)
    pull(a)
    with a._lock:
        a._decide()
    with reading.step(0, [0]):
        path = cache.folder / "layer_05/c.0.0"
        path.write_bytes(b"x" * CHUNK)
        _, other = begin(b, address, [[0]], 3)
        with b._lock:
            b._decide()
            b._damaged.add(f"{cache.local_name}/layer_05/c.0.0")  # what `wait` found
        decided = decide(b)
        assert decided is not None and path.exists()
        b._pull(decided[1])
        assert np.array_equal(cache.read_chunk("layer_05", 0), twenty_chunks.read_chunk("layer_05", 0))
    read_step(other, 0, [0])


def test_a_damaged_chunk_that_another_replaces_is_waited_for_and_verified_again(address: str, pair) -> None:
    a, b = pair
    cache, _ = begin(a, address, [[0]], 3)
    pull(a)
    begin(b, address, [[0]], 3)
    name = f"{cache.local_name}/layer_05/c.0.0"
    for local in pair:
        with local._lock:
            local._decide()
            local._damaged.add(name)
            local._verified.discard(name)
    decided = decide(b)
    assert decided is not None and decide(a) is None and name not in a._ready
    b._pull(decided[1])
    assert decide(a) is None and name in a._ready and name not in a._verified


def test_what_a_step_reads_does_not_make_room_for_an_earlier_one(address: str, pair) -> None:
    a, _ = pair
    _, reading = begin(a, address, [[0], [1], [0]], 1)
    reading.uses = lambda steps: np.array([[0, 0, 0], [1, 1, 1], [0, 2, 2]])
    a._plan.remake()
    assert pull(a) == 0
    read_step(reading, 0, [0])
    with a._lock:
        a._being_read[reading, 2] = {reading.files[0].name: reading.files[0]}
    assert decide(a) is None and chunks_in(a) == {0}
    with a._lock:
        del a._being_read[reading, 2]
    assert pull(a) == 1


def test_statements_are_told_apart_by_what_they_say(tmp_path: Path) -> None:
    a, b = (SharedFolder(tmp_path / "local") for _ in range(2))
    with a.mutex():
        a.join(0)
        a.state(Statement(frozenset({"one"})))
    with b.mutex():
        assert list(b.others().values()) == [Statement(frozenset({"one"}))]
    path = tmp_path / "local" / f".reader-{a.owner}.json"
    before = path.stat()
    path.write_text(json.dumps([["two"], [], 0]))  # the same file with the same modification time
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with b.mutex():
        assert list(b.others().values()) == [Statement(frozenset({"two"}))]
        path.write_text("[[")
        with pytest.raises(UnavailableError, match="lists the chunks that a process reads, is damaged"):
            b.others()


def test_a_process_for_whose_step_there_is_no_room_is_refused_and_the_others_are_told_of(address: str, pair) -> None:
    a, b = pair
    begin(a, address, [[0, 1]], 3)
    with pytest.raises(UsageError, match=r"other processes that share the folder need 0.0 MB.* or more") as info:
        begin(b, address, [[2, 3]], 3)
    assert "start all of them with this size" in str(info.value)
    assert len(list(a.folder.glob(".reader-*"))) == 2  # b has not joined


def test_room_that_vanishes_later_is_told_to_the_step_that_waits_for_it(address: str, pair) -> None:
    a, _ = pair
    cache, reading = begin(a, address, [[0, 1]], 2)
    (cache.folder / "more").write_bytes(b"x" * CHUNK)
    pull(a)
    with a._lock:
        a._waiting[reading, 0] = {reading.files[n].name: reading.files[n] for n in (0, 1)}
        with pytest.raises(UsageError, match="is too small: one step reads 0.0 MB of chunks, and"):
            a._decide()


def test_each_process_pulls_ahead_no_further_than_its_share(address: str, pair) -> None:
    a, b = pair
    begin(b, address, [[9]], 6)
    begin(a, address, [[0], [1], [2], [3], [4]], 6)
    assert [pull(a) for _ in range(4)] == [0, 1, 2, None]
    assert pull(b) == 9 and pull(a) is None


def test_the_earliest_needs_are_kept_where_the_share_is_too_small_for_all(address: str, pair) -> None:
    a, b = pair
    begin(a, address, [[5], [4], [3], [2]], 4)
    assert [pull(a) for _ in range(4)] == [5, 4, 3, 2]
    begin(b, address, [[9]], 4)
    with a._lock:
        a._decide()
    kept = {int(name.rsplit("/c.")[1].split(".")[0]) for name in a._kept}
    assert kept == {5, 4}
    assert pull(b) == 9 and chunks_in(a) >= {5, 4}


def test_what_could_not_be_pulled_ahead_is_tried_again_later(
    address: str, pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, _ = pair
    begin(a, address, [[0], [1]], 2)

    def fail(cache: StoreCache, file: str) -> bytes:
        raise UnavailableError("gone")

    monkeypatch.setattr(StoreCache, "fetch_chunk", fail)
    assert (pull(a), pull(a), pull(a)) == (0, 1, None)
    assert not contents(a.folder).parts
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + module.TRY_AGAIN + 1)
    assert pull(a) == 0


def test_a_step_that_failed_keeps_nothing(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local, fetch = LocalFolder(tmp_path / "local"), StoreCache.fetch_chunk

    def without_chunk_1(cache: StoreCache, file: str) -> bytes:
        if file.endswith("c.1.0"):
            raise UnavailableError("gone")
        return fetch(cache, file)

    monkeypatch.setattr(StoreCache, "fetch_chunk", without_chunk_1)
    _, reading = begin(local, address, [[0, 1], [2, 3]], 2)
    with pytest.raises(UnavailableError, match="gone"), reading.step(0, [0, 1]):
        pass
    assert not local._waiting and not local._being_read
    reading.position = 1
    read_step(reading, 1, [2, 3])
    reading.close()


def test_readings_that_take_turns_end_in_the_smallest_folder(
    twenty_chunks: Cache, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOOK_AGAIN", 0.05)
    local = local_folder(tmp_path / "local")
    cache = open_place(address, local=local.folder)
    cache.row_norms("layer_05")
    cache.array("layer_05")
    local.size = contents(local.folder).other + 4 * CHUNK
    options = dict(batch_size=74, dtype="bfloat16")
    both = [
        zip(*(one.batches(5, seed=seed, **options) for seed in (1, 2)), strict=True) for one in (cache, twenty_chunks)
    ]
    for stored, on_disk in zip(*both, strict=True):
        assert all(map(torch.equal, stored, on_disk))
    module.OPENED.clear()


def test_a_small_file_that_arrives_damaged_is_asked_for_once_more(
    twenty_chunks: Cache, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    get, damaged = ObjectStore.get, [1]

    def half(store: ObjectStore, key: str) -> bytes:
        content = get(store, key)
        if key == "layer_05.row_norm/c.7" and damaged[0]:
            damaged[0] -= 1
            return content[:-9]
        return content

    monkeypatch.setattr(ObjectStore, "get", half)
    cache = StoreCache(address, local=LocalFolder(tmp_path / "local"))
    assert np.array_equal(cache.row_norms("layer_05"), twenty_chunks.row_norms("layer_05")) and damaged == [0]
    damaged[0] = 2
    cache = StoreCache(address, local=LocalFolder(tmp_path / "other"))
    with pytest.raises(DamagedError, match=f"{address}/layer_05.row_norm/c.7 is not the file"):
        cache.row_norms("layer_05")


def read_in_processes(address: str, disk: Cache, folder: Path, size: int, processes: int, steps: int) -> list[int]:
    words = [sys.executable, "-c", READ, address, str(folder), str(disk.folder), str(size)]
    started = [
        subprocess.Popen([*words, str(seed), str(steps)], stdout=subprocess.PIPE, text=True)
        for seed in range(processes)
    ]
    said = [process.communicate()[0] for process in started]
    assert [process.returncode for process in started] == [0] * processes
    return list(map(int, said))


@pytest.mark.slow
def test_processes_that_read_in_random_order_from_a_tiny_folder_read_the_right_bytes(
    address: str, twenty_chunks: Cache, tmp_path: Path
) -> None:
    local = LocalFolder(tmp_path / "local")
    small = 30_000  # of records and tokens
    StoreCache(address, local=local).array("layer_05")
    size = contents(local.folder).other + small + 8 * CHUNK
    pulled = read_in_processes(address, twenty_chunks, local.folder, size, 3, 40)
    assert sum(pulled) >= 20 and not contents(local.folder).parts and not list(local.folder.glob(".reader-*"))
    assert sum(contents(local.folder).whole.values()) + contents(local.folder).other <= size
