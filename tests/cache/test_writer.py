"""Writing a cache: windows are complete or absent, and mismatched data raises."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sae.cache import writer
from sae.cache.place import FolderPlace
from sae.cache.reader import Cache
from sae.cache.writer import CacheWriter, WindowRows, harvest_started
from sae.common.cache_schemas import COMMIT_RECORD, TOKENS_RECORD
from sae.common.errors import DamagedError, SaeError, UnavailableError, UsageError

D = 8
ROWS = 40


def test_a_half_written_cache_raises_until_it_is_finished(
    tmp_path: Path, finite_bits, make_writer, write_windows
) -> None:
    bits = {5: finite_bits(ROWS, D)}
    writer = make_writer(tmp_path / "c", bits, 16)
    write_windows(writer, bits, [0, 2])
    message = r"half written \(2 of 3 windows\). Run the same `sae harvest` again"
    with pytest.raises(UsageError, match=message) as raised:
        Cache(tmp_path / "c").require_array(5)
    assert raised.value.exit_code == 2
    writer = make_writer(tmp_path / "c", bits, 16)
    assert writer.missing_windows() == {1: ["layer_05"]} and not writer.is_finished()
    write_windows(writer, bits, [1])
    writer.finish()
    assert writer.is_finished() and np.array_equal(Cache(tmp_path / "c").read_chunk("layer_05", 1), bits[5][16:32])


def test_adding_a_layer_leaves_the_others_alone(cache: Cache, finite_bits, make_writer, write_windows) -> None:
    before = {p: p.stat().st_mtime_ns for p in (cache.folder / "layer_05").iterdir()}
    bits = {5: finite_bits(ROWS, D, 5), 19: finite_bits(ROWS, D, 19)}
    writer = make_writer(cache.folder, bits, 16)
    assert writer.missing_windows() == {0: ["layer_19"], 1: ["layer_19"], 2: ["layer_19"]}
    write_windows(writer, {19: bits[19]}, [0, 1, 2])
    writer.finish()
    after = Cache(cache.folder)
    assert after.layers == [5, 12, 19] and after.array_digest("layer_05") == cache.array_digest("layer_05")
    assert {p: p.stat().st_mtime_ns for p in (cache.folder / "layer_05").iterdir()} == before


def delete(file: Path) -> None:
    file.unlink()


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


@pytest.mark.parametrize("damage", [delete, truncate])
def test_windows_with_lost_files_are_missing(
    cache: Cache, finite_bits, make_writer, damage: Callable[[Path], None]
) -> None:
    damage(cache.folder / "layer_12/c.1.0")
    bits = {5: finite_bits(ROWS, D, 5), 12: finite_bits(ROWS, D, 12)}
    assert make_writer(cache.folder, bits, 16).missing_windows() == {1: ["layer_12"]}


def test_a_folder_of_another_harvest_raises(cache: Cache, finite_bits, make_writer) -> None:
    with pytest.raises(UsageError, match="holds another harvest .* Use another --out") as raised:
        make_writer(cache.folder, {5: finite_bits(ROWS, D)}, 16, seed=1)
    assert raised.value.exit_code == 2


def test_a_folder_with_other_files_raises(tmp_path: Path, finite_bits, make_writer) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UsageError, match="holds thesis.tex, but no activation cache. Choose a new folder with --out"):
        make_writer(tmp_path, {5: finite_bits(ROWS, D)}, 16)


def test_temporary_files_of_a_killed_writer_do_not_count_as_other_files(tmp_path: Path) -> None:
    for record in ("zarr.json", "harvest.json", "ring.json"):
        (tmp_path / f"{record}.tmp-1234").write_text("{")
    assert not harvest_started(tmp_path, "f" * 64)
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UsageError, match="holds thesis.tex, but no activation cache"):
        harvest_started(tmp_path, "f" * 64)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_harvest_that_another_worker_begins_meanwhile_is_no_other_file(
    tmp_path: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Both workers find an empty folder, and the other one writes its metadata before or after this one reads it."""
    folder, read = tmp_path / "new", writer.read_fingerprint
    folder.mkdir()

    def read_while_another_begins(folder: Path) -> str | None:
        found = read(folder) if moment == "after" else None
        shutil.copytree(cache.folder, folder, dirs_exist_ok=True)
        return read(folder) if moment == "before" else found

    monkeypatch.setattr(writer, "read_fingerprint", read_while_another_begins)
    assert harvest_started(folder, cache.fingerprint) == (moment == "before")


def test_another_number_of_rows_raises(cache: Cache, finite_bits, make_writer) -> None:
    with pytest.raises(DamagedError, match="was started with 40 rows, but its text now has 39"):
        make_writer(cache.folder, {5: finite_bits(ROWS - 1, D)}, 16, tokens=ROWS)


def test_other_tokens_raise(cache: Cache, finite_bits, make_writer) -> None:
    record = TOKENS_RECORD.read(cache.folder / "tokens/commit.json")
    record["files"]["tokens/ids/c.0.0"]["crc32c"] = "00000000"
    TOKENS_RECORD.write(cache.folder / "tokens/commit.json", record)
    with pytest.raises(DamagedError, match="was started with other tokens than the tokenizer now produces"):
        make_writer(cache.folder, {5: finite_bits(ROWS, D, 5)}, 16)


def test_rewriting_a_window_removes_its_commit_first(
    cache: Cache, finite_bits, make_writer, write_windows, monkeypatch: pytest.MonkeyPatch
) -> None:
    bits = {5: finite_bits(ROWS, D, 5), 12: finite_bits(ROWS, D, 12)}
    writer = make_writer(cache.folder, bits, 16)
    monkeypatch.setattr(CacheWriter, "chunks_to_write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_windows(writer, bits, [1], replace=True)
    assert writer.missing_windows() == {1: ["layer_05", "layer_12"]}


def test_a_commit_stays_removed_when_the_power_fails(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    monkeypatch.setattr("sae.cache.place.fsync_folder", synced.append)
    FolderPlace(cache.folder).remove_records(["commits/000001.layer_05.json", "manifest.json"])
    assert sorted(synced) == [cache.folder, cache.folder / "commits"]


def test_a_committed_window_is_left_alone(cache: Cache, finite_bits, make_writer, write_windows) -> None:
    """A late worker brings different bytes of layer 5, as another GPU would compute them, and a new layer 19."""
    late = {5: finite_bits(ROWS, D, 50), 12: finite_bits(ROWS, D, 12), 19: finite_bits(ROWS, D, 19)}
    before = {p: p.stat().st_mtime_ns for name in ("layer_05", "commits") for p in (cache.folder / name).iterdir()}
    writer = make_writer(cache.folder, late, 16)
    write_windows(writer, late, [0, 1, 2])
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert writer.seal() and Cache(cache.folder).layers == [5, 12, 19]
    assert len(list(Cache(cache.folder).verify())) == len(Cache(cache.folder).manifest["files"])


@pytest.mark.parametrize("second_has", ["the same bytes", "other bytes"])
@pytest.mark.parametrize("moment", ["before its chunks", "before its commit"])
def test_two_workers_at_one_window_leave_the_files_of_one(
    tmp_path: Path,
    finite_bits,
    make_writer,
    write_windows,
    monkeypatch: pytest.MonkeyPatch,
    second_has: str,
    moment: str,
) -> None:
    """Another worker writes and commits the window while the first is between two of its own steps."""
    first = {5: finite_bits(ROWS, D, 5)}
    second = first if second_has == "the same bytes" else {5: finite_bits(ROWS, D, 6)}
    writer = make_writer(tmp_path / "c", first, 16)
    step = "chunks_to_write" if moment == "before its chunks" else "publish"
    owner = CacheWriter if moment == "before its chunks" else FolderPlace
    original = getattr(owner, step)

    def interrupted(self, *arguments):
        monkeypatch.setattr(owner, step, original)
        write_windows(make_writer(tmp_path / "c", second, 16), second, [0, 1, 2])
        return original(self, *arguments)

    monkeypatch.setattr(owner, step, interrupted)
    write_windows(writer, first, [0])
    assert writer.seal()
    cache = Cache(tmp_path / "c")
    assert len(list(cache.verify())) == len(cache.manifest["files"])
    assert np.array_equal(cache.read_chunk("layer_05", 0), first[5][:16])
    assert np.array_equal(cache.read_chunk("layer_05", 1), second[5][16:32])


def test_equal_bytes_of_two_workers_are_not_written_again(
    tmp_path: Path, finite_bits, make_writer, write_windows, monkeypatch: pytest.MonkeyPatch
) -> None:
    bits, publish = {5: finite_bits(ROWS, D, 5)}, FolderPlace.publish

    def second_commits(place: FolderPlace, files: list[str]) -> None:
        monkeypatch.setattr(FolderPlace, "publish", publish)
        write_windows(make_writer(tmp_path / "c", bits, 16), bits, [0])
        publish(place, files)

    writer = make_writer(tmp_path / "c", bits, 16)
    monkeypatch.setattr(FolderPlace, "publish", second_commits)
    monkeypatch.setattr(FolderPlace, "remove_records", lambda *_: pytest.fail("a commit is removed"))
    write_windows(writer, bits, [0])
    assert writer.missing_windows().keys() == {1, 2}


def test_sealing_twice_changes_nothing_and_needs_every_window(
    tmp_path: Path, finite_bits, make_writer, write_windows
) -> None:
    bits = {5: finite_bits(ROWS, D), 12: finite_bits(ROWS, D, 12)}
    writer = make_writer(tmp_path / "c", bits, 16)
    write_windows(writer, bits, [0, 2])
    assert not writer.seal() and not (tmp_path / "c/manifest.json").exists()
    write_windows(make_writer(tmp_path / "c", {5: bits[5]}, 16), {5: bits[5]}, [1])
    assert make_writer(tmp_path / "c", {5: bits[5]}, 16).seal() and not writer.seal()
    assert Cache(tmp_path / "c").layers == [5]
    write_windows(writer, bits, [1])
    assert writer.seal() and Cache(tmp_path / "c").layers == [5, 12]
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "c").iterdir()}
    assert writer.seal() and {p: p.stat().st_mtime_ns for p in before} == before


def test_a_layer_that_is_completed_during_sealing_is_sealed_too(
    tmp_path: Path, finite_bits, make_writer, write_windows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the slower of two workers would write a manifest without the layer that the other one has sealed."""
    bits = {5: finite_bits(ROWS, D), 12: finite_bits(ROWS, D, 12)}
    writer = make_writer(tmp_path / "c", {5: bits[5]}, 16)
    write_windows(writer, {5: bits[5]}, [0, 1, 2])
    original = FolderPlace.seal

    def other_first(self, *records):
        monkeypatch.undo()
        other = make_writer(tmp_path / "c", {12: bits[12]}, 16)
        write_windows(other, {12: bits[12]}, [0, 1, 2])
        assert other.seal()
        return original(self, *records)

    monkeypatch.setattr(FolderPlace, "seal", other_first)
    assert writer.seal() and Cache(tmp_path / "c").layers == [5, 12]


def test_a_commit_of_another_harvest_raises(cache: Cache, finite_bits, make_writer) -> None:
    path = cache.folder / "commits" / "000001.layer_05.json"
    COMMIT_RECORD.write(path, COMMIT_RECORD.read(path) | {"fingerprint": "0" * 64})
    writer = make_writer(cache.folder, {5: finite_bits(ROWS, D, 5)}, 16)
    with pytest.raises(DamagedError, match="000001.layer_05.json belongs to another harvest") as raised:
        writer.missing_windows()
    assert raised.value.exit_code == 3


@pytest.mark.parametrize("bad", [0x7F80, 0xFF80, 0x7FC0])
def test_activations_that_are_not_finite_are_never_committed(
    tmp_path: Path, finite_bits, make_writer, write_windows, bad: int
) -> None:
    bits = {5: finite_bits(ROWS, D)}
    bits[5][16 + 9, 4] = bad  # row 25 is position 1 + 25 % 7 of context 25 // 7
    writer = make_writer(tmp_path / "c", bits, 16)
    with pytest.raises(SaeError, match="An activation of layer 5 is not finite, in context 3 at position 5"):
        write_windows(writer, bits, [1])
    assert writer.missing_windows() == {0: ["layer_05"], 1: ["layer_05"], 2: ["layer_05"]}


def test_a_wrong_number_of_rows_raises(tmp_path: Path, finite_bits, make_writer) -> None:
    writer = make_writer(tmp_path / "c", {5: finite_bits(ROWS, D)}, 16)
    with pytest.raises(SaeError, match=r"Window 0 of layer 5 has \(15, 8\) .* expected \(16, 8\): a hook did not fire"):
        writer.write_window(
            0, WindowRows({"layer_05": finite_bits(15, D)}, np.zeros(16, np.uint32), np.zeros(16, np.uint16)), {}
        )


def test_a_full_disk_raises_and_leaves_no_temporary_file(
    tmp_path: Path, finite_bits, make_writer, write_windows, monkeypatch: pytest.MonkeyPatch
) -> None:
    bits = {5: finite_bits(ROWS, D)}
    writer = make_writer(tmp_path / "c", bits, 16)
    write_windows(writer, bits, [0])
    room, os_write = 500, os.write

    def write_until_full(descriptor: int, data: memoryview) -> int:
        nonlocal room
        if room <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        count = os_write(descriptor, data[: min(room, 100)])  # os.write may write fewer bytes than it is given
        room -= count
        return count

    monkeypatch.setattr(os, "write", write_until_full)
    with pytest.raises(UnavailableError, match="The disk is full: .* run the same command again") as raised:
        write_windows(writer, bits, [1])
    monkeypatch.undo()
    assert raised.value.exit_code == 4 and not list((tmp_path / "c").rglob("*.tmp-*"))
    assert writer.missing_windows() == {1: ["layer_05"], 2: ["layer_05"]}
    write_windows(writer, bits, [1, 2])
    writer.finish()
    assert np.array_equal(np.concatenate([Cache(tmp_path / "c").read_chunk("layer_05", n) for n in range(3)]), bits[5])


def test_a_window_whose_file_is_lost_is_not_sealed(cache: Cache, finite_bits, make_writer, write_windows) -> None:
    """The manifest lists the lost file until the window is written with other bytes, and then the new file."""
    bits = {layer: finite_bits(ROWS, D, layer) for layer in (5, 12)}
    writer = make_writer(cache.folder, bits, 16)
    assert writer.seal()
    (cache.folder / "layer_05" / "c.1.0").unlink()
    assert not writer.seal() and writer.missing_windows() == {1: ["layer_05"]}
    other = {5: finite_bits(ROWS, D, 50)}
    write_windows(make_writer(cache.folder, other, 16), other, [1])
    assert writer.seal()
    again = Cache(cache.folder)
    assert len(list(again.verify())) == len(again.manifest["files"])
