"""The local folder for files pulled from stores: its size limit, damaged files, and sharing between processes."""

import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sae.cache import local_folder as module
from sae.cache.batch_order import BatchOrder
from sae.cache.loader import ResidentLoader
from sae.cache.local_folder import LocalFolder, local_folder
from sae.cache.object_store import ObjectStore
from sae.cache.opening import open_place
from sae.cache.pull_plan import plan_pulls
from sae.cache.pulled_files import contents, default_size, walk
from sae.cache.reader import Cache
from sae.cache.reading import batch_reading
from sae.cache.shared_folder import SharedFolder, Statement
from sae.cache.store_cache import StoreCache
from sae.common.errors import DamagedError, UnavailableError, UsageError

CHUNK = 128 * 8 * 2 + 4  # bytes


@pytest.fixture
def disk_cache(twenty_chunks: Cache) -> Cache:
    return twenty_chunks


@pytest.fixture
def address(disk_cache: Cache, tmp_path: Path) -> str:
    """The address of a copy that a test may damage, on a mounted file system, which needs no server."""
    shutil.copytree(disk_cache.folder, tmp_path / "store" / "pile")
    return f"file://{tmp_path}/store/pile"


@pytest.fixture
def local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalFolder]:
    """A local folder for one test, which checks for changes by other processes every 0.05 s."""
    monkeypatch.setattr(module, "LOOK_AGAIN", 0.05)
    yield local_folder(tmp_path / "local")
    module.OPENED.clear()


def read(cache, batch_size: int, epochs: int = 2, **options) -> list[torch.Tensor]:
    return list(cache.batches(5, batch_size=batch_size, dtype="bfloat16", epochs=epochs, **options))


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) > 0 and all(map(torch.equal, one, other))


def opened(address: str, local: LocalFolder, chunks: int):
    """Open the cache at an address, with room for this number of chunks in the local folder."""
    cache = open_place(address, local=local.folder)
    cache.row_norms("layer_05")
    cache.array("layer_05")
    local.size = contents(local.folder).other + chunks * CHUNK
    return cache


@pytest.mark.parametrize(("chunks", "batch_size"), [(4, 74), (7, 74), (20, 74), (2, 37), (20, 64)])
def test_the_size_is_kept_and_as_few_chunks_are_pulled_as_it_allows(
    disk_cache: Cache, address: str, local: LocalFolder, monkeypatch: pytest.MonkeyPatch, chunks: int, batch_size: int
) -> None:
    cache, sizes = opened(address, local, chunks), []
    reserve = local._reserve

    def reserve_and_look(file, remove) -> None:
        reserve(file, remove)
        sizes.append(sum(size for name, size in walk(local.folder, "") if "/" in name))

    monkeypatch.setattr(local, "_reserve", reserve_and_look)
    order = BatchOrder(cache.chunk_rows, batch_size, 3)
    reading = batch_reading(cache, "layer_05", order, range(2 * order.batches_per_epoch))
    assert reading is not None
    planned = plan_pulls(local.folder, local.size, [reading])
    assert same(read(cache, batch_size, seed=3), read(disk_cache, batch_size, seed=3))
    assert max(sizes) <= local.size
    assert local.pulled_files == planned.counts.sum() == len(sizes)
    assert (local.pulled_files == 20) == (chunks == 20)
    if chunks == 20:
        before = local.pulled_files
        assert same(read(cache, 64, seed=9), read(disk_cache, 64, seed=9)) and local.pulled_files == before
    assert not contents(local.folder).parts and not list(local.folder.glob(".reader-*"))
    # a deleted file that is still mapped would keep its disk space
    assert str(local.folder) not in Path("/proc/self/maps").read_text()


def test_a_folder_that_is_too_small_for_a_batch_is_refused_with_a_size_that_works(
    disk_cache: Cache, address: str, local: LocalFolder
) -> None:
    cache = opened(address, local, 15)
    with pytest.raises(
        UsageError, match=r"too small: one step reads .* of chunks.* Give --local-cache [\d.]+ MB or more"
    ):
        read(cache, 64)
    assert not list(local.folder.glob(".reader-*"))  # other processes do not see it as a reader either


def test_what_is_damaged_on_the_disk_is_pulled_again_and_what_is_damaged_in_the_store_is_named(
    disk_cache: Cache, address: str, local: LocalFolder
) -> None:
    cache = opened(address, local, 22)  # a damaged chunk that a step reads stays until its replacement is there
    expected = read(disk_cache, 74)
    assert same(read(cache, 74), expected) and local.pulled_files == 20
    for file in ("layer_05/c.3.0", "layer_05.row_norm/c.7"):
        path = cache.folder / file
        data = bytearray(path.read_bytes())
        data[9] ^= 4
        path.write_bytes(data)
    (cache.folder / "layer_05/c.4.0").write_bytes(b"short")
    again = open_place(address, local=local.folder)
    assert same(read(again, 74), expected) and local.pulled_files == 22
    stored = Path(address.removeprefix("file://")) / "layer_05/c.3.0"
    stored.write_bytes(bytes(data[:-1] + b"x") + stored.read_bytes()[len(data) :])
    (cache.folder / "layer_05/c.3.0").unlink()
    with pytest.raises(DamagedError, match=f"{address}/layer_05/c.3.0 is not the file that the cache lists"):
        read(again, 74)
    stored.unlink()
    with pytest.raises(DamagedError, match=f"{address}/layer_05/c.3.0 is missing"):
        read(again, 74)


def test_a_chunk_that_arrives_damaged_is_asked_for_once_more(
    disk_cache: Cache, address: str, local: LocalFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, get, asked = opened(address, local, 20), ObjectStore.get, []

    def half_at_first(store: ObjectStore, key: str) -> bytes:
        asked.append(key)
        data = get(store, key)
        return data if asked.count(key) > 1 else data[: len(data) // 2]

    monkeypatch.setattr(ObjectStore, "get", half_at_first)
    assert same(read(cache, 74), read(disk_cache, 74)) and len(asked) == 40


def test_a_full_disk_is_a_sentence_and_what_is_whole_is_kept(
    disk_cache: Cache, address: str, local: LocalFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, replace, left = opened(address, local, 20), Path.replace, [3]

    def full(path: Path, target: Path) -> Path:
        if path.suffix == ".part":
            # otherwise a thread that lists the folder at this moment could see neither name
            assert local._shared._threads.locked()
            left[0] -= 1
            if left[0] < 0:
                raise OSError(28, "No space left on device")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(UnavailableError, match="The disk is full"):
        read(cache, 74)
    while contents(local.folder).parts:  # waits for pulls that had begun when the first one failed
        time.sleep(0.01)
    monkeypatch.undo()
    assert len(contents(local.folder).whole) == 3
    assert same(read(cache, 74), read(disk_cache, 74)) and local.pulled_files == 20


def test_chunks_of_another_cache_make_room_and_what_a_dead_process_was_pulling_goes(
    disk_cache: Cache, address: str, local: LocalFolder, tmp_path: Path
) -> None:
    before = opened(address, local, 20)
    assert same(read(before, 74), read(disk_cache, 74)) and len(contents(local.folder).whole) == 20
    shutil.copytree(disk_cache.folder, tmp_path / "store" / "other")
    cache = opened(f"file://{tmp_path}/store/other", local, 7)
    assert cache.local_name != before.local_name
    part = cache.folder / f"layer_05/c.1.0.{16 * '0'}.part"
    part.write_bytes(b"x" * 100)
    assert same(read(cache, 74), read(disk_cache, 74))
    found = contents(local.folder)
    assert found.other + sum(found.whole.values()) <= local.size and not part.exists()
    assert 7 == sum(name.startswith(f"{cache.local_name}/") for name in found.whole)


def test_only_so_many_bytes_are_pulled_at_once(
    disk_cache: Cache, address: str, local: LocalFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks stay in memory until they are verified."""
    cache, fetch, pulling, most = opened(address, local, 20), StoreCache.fetch_chunk, [0], [0]

    def count(cache: StoreCache, file: str) -> bytes:
        pulling[0] += 1
        most[0] = max(most[0], pulling[0])
        time.sleep(0.01)
        data = fetch(cache, file)
        pulling[0] -= 1
        return data

    monkeypatch.setattr(StoreCache, "fetch_chunk", count)
    monkeypatch.setattr(module, "PULLED_BYTES", 2 * CHUNK)
    assert same(read(cache, 74), read(disk_cache, 74)) and most[0] <= 2


def test_a_long_wait_is_said_with_the_rate(
    disk_cache: Cache, address: str, local: LocalFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SAY_AFTER", 0.05)
    cache, fetch, said = opened(address, local, 4), StoreCache.fetch_chunk, []

    def slow(cache: StoreCache, file: str) -> bytes:
        time.sleep(0.2)
        return fetch(cache, file)

    monkeypatch.setattr(StoreCache, "fetch_chunk", slow)
    monkeypatch.setattr(local, "say", said.append)
    next(cache.batches(5, batch_size=74))
    said_so = r"Waiting for the store: \d+ chunks? of step \d not yet received; receiving 0.0 MB per second."
    assert re.fullmatch(said_so, said[0])


def test_single_chunks_are_pulled_when_they_are_read(disk_cache: Cache, address: str, local: LocalFolder) -> None:
    cache = opened(address, local, 6)
    assert [int(cache.read_chunk("layer_05", n)[0, 0]) for n in (0, 7, 19)] == [
        int(disk_cache.read_chunk("layer_05", n)[0, 0]) for n in (0, 7, 19)
    ]
    assert local.pulled_files == 3


def test_what_a_process_states_counts_as_long_as_it_lives(tmp_path: Path) -> None:
    shared = SharedFolder(tmp_path / "local")
    with shared.mutex():
        shared.join(7)
        shared.state(Statement(frozenset({"a"}), frozenset({"b"}), 7))
        assert shared.others() == {}
    script = """
        import sys; from pathlib import Path
        from sae.cache.shared_folder import SharedFolder, Statement
        shared = SharedFolder(Path(sys.argv[1]))
        with shared.mutex():
            shared.join(0)
            shared.state(Statement(frozenset({"c"})))
            print(*[(*kept, *pulling, least) for kept, pulling, least in shared.others().values()], flush=True)
        sys.stdin.read()
    """
    words = [sys.executable, "-c", textwrap.dedent(script), str(shared.folder)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "('a', 'b', 7)\n"
        with shared.mutex():
            assert list(shared.others().values()) == [Statement(frozenset({"c"}))]
        other.send_signal(signal.SIGKILL)
        other.wait()
    with shared.mutex():
        assert shared.others() == {} and len(list(shared.folder.glob(".reader-*"))) == 2  # its own
        shared.leave()
    assert not list(shared.folder.glob(".reader-*"))
    shared.close()


def test_a_map_is_closed_when_its_file_may_go(disk_cache: Cache, address: str, local: LocalFolder) -> None:
    cache = opened(address, local, 4)
    for number, _ in enumerate(cache.batches(5, batch_size=74, dtype="bfloat16", epochs=2)):
        if number % 5 == 0:
            lines = Path("/proc/self/maps").read_text().splitlines()
            assert not [line for line in lines if str(local.folder) in line and "(deleted)" in line]


def test_a_resident_copy_is_pulled_chunk_by_chunk(disk_cache: Cache, address: str, local: LocalFolder) -> None:
    cache = opened(address, local, 3)
    with (
        ResidentLoader(cache, "layer_05", 74, seed=1) as stored,
        ResidentLoader(disk_cache, "layer_05", 74, seed=1) as own,
    ):
        assert all(torch.equal(next(stored), next(own)) for _ in range(40))
    assert local.pulled_files == 20


def test_processes_agree_on_the_size_of_the_first(local: LocalFolder) -> None:
    local.size = 12345
    local._agree_on_size(False)
    local.size = 99
    local._agree_on_size(True)
    assert local.size == 12345


def test_what_the_folder_holds_is_no_loss_of_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sae.cache.pulled_files.free_space", lambda folder: 1000)
    assert default_size(tmp_path / "local") == 500
    (tmp_path / "local" / "pile").mkdir(parents=True)
    (tmp_path / "local" / "pile" / "zarr.json").write_bytes(b"x" * 400)
    assert default_size(tmp_path / "local") == 700
