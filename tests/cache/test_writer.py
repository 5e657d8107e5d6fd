"""Writing a cache: windows are complete or absent, and mismatched data raises."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

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


def test_another_number_of_rows_raises(cache: Cache, finite_bits, make_writer) -> None:
    with pytest.raises(DamagedError, match="was started with 40 rows, but its text now has 39"):
        make_writer(cache.folder, {5: finite_bits(ROWS - 1, D)}, 16, tokens=ROWS)


def test_other_tokens_raise(cache: Cache, finite_bits, make_writer) -> None:
    record = TOKENS_RECORD.read(cache.folder / "tokens/commit.json")
    record["files"]["tokens/ids/c.0.0"]["crc32c"] = "00000000"
    TOKENS_RECORD.write(cache.folder / "tokens/commit.json", record)
    with pytest.raises(DamagedError, match="was started with different tokens than its text gives now"):
        make_writer(cache.folder, {5: finite_bits(ROWS, D, 5)}, 16)


def test_rewriting_a_window_removes_its_commit_first(
    cache: Cache, finite_bits, make_writer, write_windows, monkeypatch: pytest.MonkeyPatch
) -> None:
    bits = {5: finite_bits(ROWS, D, 5), 12: finite_bits(ROWS, D, 12)}
    writer = make_writer(cache.folder, bits, 16)
    monkeypatch.setattr(CacheWriter, "chunks_to_write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_windows(writer, bits, [1])
    assert writer.missing_windows() == {1: ["layer_05", "layer_12"]}


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
        count = os_write(descriptor, data[: min(room, 100)])  # os.write may write less than it is given
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
