"""A cache says what it holds, and what is wrong with it; it never reads as zeros."""

import errno
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import torch

from sae.cache.catalog import find_cache, list_caches, remove_cache
from sae.cache.layout import Hook
from sae.cache.reader import Cache, open_cache
from sae.cache.writer import CacheWriter, WindowRows, harvest_started
from sae.common.device import resolve_device, resolve_dtype
from sae.common.errors import DamagedError, SaeError, UnavailableError, UsageError
from sae.common.files import digest_of, read_json, remove_stale_files, writer_lock

D = 8
ROWS = 40


@pytest.fixture
def cache(two_layers: Path, tmp_path: Path) -> Cache:
    return Cache(shutil.copytree(two_layers, tmp_path / "cache"))


def test_it_holds_what_was_written(cache: Cache, bits_of) -> None:
    for layer in (5, 12):
        chunks = [cache.read_chunk(f"layer_{layer:02d}", n) for n in range(3)]
        assert [len(chunk) for chunk in chunks] == cache.chunk_rows == [16, 16, 8]
        assert np.array_equal(np.concatenate(chunks), bits_of(ROWS, D, layer))
    assert cache.layers == [5, 12] and cache.rows == ROWS and cache.model == "none"
    assert len(list(cache.verify())) == len(cache.manifest["files"]) == 4 + 3 * (2 + 2 * 3)


def test_a_mapped_chunk_cannot_be_written(cache: Cache) -> None:
    with pytest.raises(ValueError, match="read-only"):
        cache.read_chunk("layer_05", 0)[0, 0] = 1


def test_statistics_are_those_of_numpy_in_float64(cache: Cache, bits_of) -> None:
    rows = torch.from_numpy(bits_of(ROWS, D, 12)).view(torch.bfloat16).double().numpy()
    norms = np.linalg.norm(rows, axis=1)
    found = cache.statistics("layer_12")
    np.testing.assert_allclose(cache.mean("layer_12"), rows.mean(0), rtol=1e-12)
    assert found["count"] == ROWS
    assert found["mean_square_norm"] == pytest.approx((norms**2).mean(), rel=1e-12)
    assert found["variance"] == pytest.approx(rows.var(0).mean(), rel=1e-9)
    assert found["norm_of_mean"] == pytest.approx(np.linalg.norm(rows.mean(0)), rel=1e-12)
    assert found["mean_norm"] == pytest.approx(norms.mean(), rel=1e-6)  # norms are kept in float32
    assert found["norm_quantiles"]["0.9"] == pytest.approx(np.quantile(norms, 0.9), rel=1e-6)


def test_an_outlier_dimension_is_named(write_cache) -> None:
    rows = torch.randn(ROWS, D, generator=torch.Generator().manual_seed(0))
    rows[:, 3] += 40
    cache = write_cache({5: rows.bfloat16().view(torch.int16).numpy().view(np.uint16)})
    assert list(cache.statistics("layer_05")["outlier_dimensions"]) == ["3"]
    assert cache.statistics("layer_05")["outlier_dimensions"]["3"]["mean"] == pytest.approx(40, abs=1)


def test_a_digest_is_of_the_bytes_of_one_layer(write_cache, bits_of) -> None:
    five, twelve = bits_of(ROWS, D, 5), bits_of(ROWS, D, 12)
    changed = five.copy()
    changed[-1, -1] ^= 1
    both, alone, other = (
        write_cache({5: five, 12: twelve}),
        write_cache({5: five}, name="b"),
        write_cache({5: changed}, name="c"),
    )
    assert both.array_digest("layer_05") == alone.array_digest("layer_05") != other.array_digest("layer_05")
    assert both.array_digest("layer_05") != both.array_digest("layer_12")


# Damage: each is refused with its own sentence, by whoever reads the chunk and by verify.


def delete(file: Path) -> None:
    file.unlink()


def cut_off(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def flip(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[100] ^= 1
    file.write_bytes(raw)


def replace(file: Path) -> None:
    raw = bytes(file.stat().st_size - 4)
    file.write_bytes(raw + struct.pack("<I", google_crc32c.value(raw)))


DAMAGE = {delete: "missing", cut_off: "truncated", flip: "a bit was flipped", replace: "comes from another harvest"}


@pytest.mark.parametrize(("damage", "sentence"), DAMAGE.items())
@pytest.mark.parametrize("chunk", [0, 2])
def test_a_damaged_chunk_is_refused(cache: Cache, damage: Callable[[Path], None], sentence: str, chunk: int) -> None:
    damage(cache.folder / f"layer_12/c.{chunk}.0")
    for read in (lambda: cache.read_chunk("layer_12", chunk), lambda: list(Cache(cache.folder).verify())):
        with pytest.raises(
            DamagedError, match=rf"c\.{chunk}\.0 .*{sentence}.*Run `sae cache repair` to harvest"
        ) as refused:
            read()
        assert refused.value.exit_code == 3
    cache.read_chunk("layer_05", chunk)  # the other layer is whole


@pytest.mark.parametrize(("damage", "sentence"), list(DAMAGE.items())[:3])
@pytest.mark.parametrize("array", ["tokens/ids/c.0.0", "layer_12.moments/c.0.0.0"])
def test_damage_to_the_small_arrays_is_refused(cache: Cache, damage, sentence: str, array: str) -> None:
    damage(cache.folder / array)
    with pytest.raises(DamagedError, match=sentence):
        cache.contexts(held_out=False) if array.startswith("tokens") else cache.mean("layer_12")


@pytest.mark.parametrize("file", ["manifest.json", "zarr.json", "layer_12/zarr.json"])
def test_a_record_that_was_cut_off_is_refused(cache: Cache, file: str) -> None:
    cut = (cache.folder / file).read_text()[:50]
    (cache.folder / file).write_text(cut)
    with pytest.raises(DamagedError, match=f"{file} cannot be read .* it was truncated or overwritten"):
        Cache(cache.folder).read_chunk("layer_12", 0)


def test_a_manifest_that_is_gone_is_damage(cache: Cache) -> None:
    (cache.folder / "manifest.json").unlink()
    with pytest.raises(DamagedError, match="manifest.json is missing"):
        Cache(cache.folder).require_array(12)


def test_a_manifest_of_another_harvest_is_refused(cache: Cache) -> None:
    record = cache.manifest | {"fingerprint": "0" * 64}
    (cache.folder / "manifest.json").write_text(json.dumps(record))
    with pytest.raises(DamagedError, match="manifest.json comes from another harvest"):
        Cache(cache.folder).require_array(12)


def test_a_chunk_that_no_record_lists_does_not_exist(cache: Cache) -> None:
    with pytest.raises(UsageError, match="has no chunk 3 of layer_12"):
        cache.read_chunk("layer_12", 3)


def test_a_newer_format_is_refused(cache: Cache) -> None:
    root = read_json(cache.folder / "zarr.json")
    root["attributes"]["format"] = 99
    (cache.folder / "zarr.json").write_text(json.dumps(root))
    with pytest.raises(UsageError, match="was written in format 99; this version reads up to 1. Upgrade") as refused:
        Cache(cache.folder)
    assert refused.value.exit_code == 2


def test_what_is_no_cache_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no activation cache .* Create one with `sae harvest`"):
        open_cache(tmp_path / "nowhere")
    (tmp_path / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}')
    with pytest.raises(UsageError, match="is a Zarr group, but not an activation cache"):
        open_cache(tmp_path)


# The writer


def test_a_half_written_cache_is_refused_and_then_finished(tmp_path: Path, bits_of, begin_cache, write_some) -> None:
    bits = {5: bits_of(ROWS, D)}
    writer = begin_cache(tmp_path / "c", bits, 16)
    write_some(writer, bits, [0, 2])
    with pytest.raises(
        UsageError, match=r"half written \(2 of 3 windows\). Run the same `sae harvest` again"
    ) as refused:
        Cache(tmp_path / "c").require_array(5)
    assert refused.value.exit_code == 2
    writer = begin_cache(tmp_path / "c", bits, 16)
    assert writer.missing_windows() == {1: ["layer_05"]} and not writer.is_finished()
    write_some(writer, bits, [1])
    writer.finish()
    assert writer.is_finished() and np.array_equal(Cache(tmp_path / "c").read_chunk("layer_05", 1), bits[5][16:32])


def test_a_layer_added_later_leaves_the_others_alone(cache: Cache, bits_of, begin_cache, write_some) -> None:
    before = {p: p.stat().st_mtime_ns for p in (cache.folder / "layer_05").iterdir()}
    bits = {5: bits_of(ROWS, D, 5), 19: bits_of(ROWS, D, 19)}
    writer = begin_cache(cache.folder, bits, 16)
    assert writer.missing_windows() == {0: ["layer_19"], 1: ["layer_19"], 2: ["layer_19"]}
    write_some(writer, {19: bits[19]}, [0, 1, 2])
    writer.finish()
    after = Cache(cache.folder)
    assert after.layers == [5, 12, 19] and after.array_digest("layer_05") == cache.array_digest("layer_05")
    assert {p: p.stat().st_mtime_ns for p in (cache.folder / "layer_05").iterdir()} == before


@pytest.mark.parametrize("damage", [delete, cut_off])
def test_the_writer_misses_what_was_lost(cache: Cache, bits_of, begin_cache, damage: Callable[[Path], None]) -> None:
    damage(cache.folder / "layer_12/c.1.0")
    bits = {5: bits_of(ROWS, D, 5), 12: bits_of(ROWS, D, 12)}
    assert begin_cache(cache.folder, bits, 16).missing_windows() == {1: ["layer_12"]}


def test_a_folder_of_another_harvest_is_refused(cache: Cache, bits_of, begin_cache) -> None:
    with pytest.raises(UsageError, match="holds another harvest .* Use another --out") as refused:
        begin_cache(cache.folder, {5: bits_of(ROWS, D)}, 16, seed=1)
    assert refused.value.exit_code == 2


def test_a_folder_of_other_things_is_refused(tmp_path: Path, bits_of, begin_cache) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UsageError, match="holds thesis.tex, but no activation cache. Choose a new folder with --out"):
        begin_cache(tmp_path, {5: bits_of(ROWS, D)}, 16)


def test_another_number_of_rows_is_refused(cache: Cache, bits_of, begin_cache) -> None:
    with pytest.raises(DamagedError, match="was started with 40 rows, but its text now has 39"):
        begin_cache(cache.folder, {5: bits_of(ROWS - 1, D)}, 16)


def test_other_tokens_are_refused(cache: Cache, bits_of, begin_cache) -> None:
    record = read_json(cache.folder / "tokens/commit.json")
    record["files"]["tokens/ids/c.0.0"]["crc32c"] = "00000000"
    (cache.folder / "tokens/commit.json").write_text(json.dumps(record))
    with pytest.raises(DamagedError, match="was started with other tokens than its text gives now"):
        begin_cache(cache.folder, {5: bits_of(ROWS, D, 5)}, 16)


def test_a_window_written_again_has_no_record_meanwhile(
    cache: Cache, bits_of, begin_cache, write_some, monkeypatch: pytest.MonkeyPatch
) -> None:
    bits = {5: bits_of(ROWS, D, 5), 12: bits_of(ROWS, D, 12)}
    writer = begin_cache(cache.folder, bits, 16)
    monkeypatch.setattr(CacheWriter, "chunks_to_write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_some(writer, bits, [1])
    assert writer.missing_windows() == {1: ["layer_05", "layer_12"]}


def test_a_commit_of_another_harvest_is_refused(cache: Cache, bits_of, begin_cache) -> None:
    path = cache.folder / "commits" / "000001.layer_05.json"
    path.write_text(json.dumps(read_json(path) | {"fingerprint": "0" * 64}))
    writer = begin_cache(cache.folder, {5: bits_of(ROWS, D, 5)}, 16)
    with pytest.raises(DamagedError, match="000001.layer_05.json belongs to another harvest") as refused:
        writer.missing_windows()
    assert refused.value.exit_code == 3


@pytest.mark.parametrize("bad", [0x7F80, 0xFF80, 0x7FC0])
def test_what_is_not_finite_is_never_committed(tmp_path: Path, bits_of, begin_cache, write_some, bad: int) -> None:
    bits = {5: bits_of(ROWS, D)}
    bits[5][16 + 9, 4] = bad  # row 25 is position 1 + 25 % 7 of context 25 // 7
    writer = begin_cache(tmp_path / "c", bits, 16)
    with pytest.raises(SaeError, match="An activation of layer 5 is not finite, in context 3 at position 5"):
        write_some(writer, bits, [1])
    assert writer.missing_windows() == {0: ["layer_05"], 1: ["layer_05"], 2: ["layer_05"]}


def test_rows_that_were_not_captured_are_refused(tmp_path: Path, bits_of, begin_cache) -> None:
    writer = begin_cache(tmp_path / "c", {5: bits_of(ROWS, D)}, 16)
    with pytest.raises(SaeError, match=r"Window 0 of layer 5 has \(15, 8\) .* expected \(16, 8\): a hook did not fire"):
        writer.write_window(
            0, WindowRows({"layer_05": bits_of(15, D)}, np.zeros(16, np.uint32), np.zeros(16, np.uint16)), {}
        )


def test_a_full_disk_is_a_sentence_and_leaves_no_stray(
    tmp_path: Path, bits_of, begin_cache, write_some, monkeypatch: pytest.MonkeyPatch
) -> None:
    bits = {5: bits_of(ROWS, D)}
    writer = begin_cache(tmp_path / "c", bits, 16)
    write_some(writer, bits, [0])
    room, written = 500, os.write

    def full(descriptor: int, data: memoryview) -> int:
        nonlocal room
        if room <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = written(descriptor, data[: min(room, 100)])  # a write may take less than it was given
        room -= taken
        return taken

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(UnavailableError, match="The disk is full: .* run the same command again") as refused:
        write_some(writer, bits, [1])
    monkeypatch.undo()
    assert refused.value.exit_code == 4 and not list((tmp_path / "c").rglob("*.tmp-*"))
    assert writer.missing_windows() == {1: ["layer_05"], 2: ["layer_05"]}
    write_some(writer, bits, [1, 2])
    writer.finish()
    assert np.array_equal(np.concatenate([Cache(tmp_path / "c").read_chunk("layer_05", n) for n in range(3)]), bits[5])


def test_only_a_cache_is_removed(cache: Cache, tmp_path: Path) -> None:
    stranger = tmp_path / "stranger.zarr"
    stranger.mkdir()
    (stranger / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}')
    for folder in (stranger, cache.folder / "layer_05"):
        with pytest.raises(UsageError, match="holds no activation cache; nothing was deleted"):
            remove_cache(folder)
        assert (folder / "zarr.json").exists()


def test_what_a_kill_left_behind_is_swept(cache: Cache, bits_of, begin_cache) -> None:
    stray = cache.folder / "layer_05" / "c.0.0.tmp-12345"
    stray.write_bytes(b"half")
    with writer_lock(cache.folder, "sae harvest"):
        assert not stray.exists() and remove_stale_files(cache.folder) == 0


def test_a_dead_holder_is_named(tmp_path: Path) -> None:
    (tmp_path / ".lock.holder").write_text("process 4121 on node7 (sae harvest) since 2026-11-21 09:00:00")
    said: list[str] = []
    with writer_lock(tmp_path, "sae harvest", said.append):
        pass
    assert said == [
        f"{tmp_path} was locked by process 4121 on node7 (sae harvest) since 2026-11-21 09:00:00, which no longer runs; its lock was taken over."
    ]
    with writer_lock(tmp_path, "sae harvest", said.append):
        assert len(said) == 1


def test_a_note_that_a_full_disk_left_empty_is_read(tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / ".lock.holder").write_text("")
    with writer_lock(tmp_path, "a test", said.append):
        pass
    assert said == [f"{tmp_path} was locked by another process, which no longer runs; its lock was taken over."]


def test_a_file_where_the_folder_would_be_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("years of work")
    for folder in (tmp_path / "file", tmp_path / "file" / "cache"):
        with pytest.raises(UsageError, match="is not a folder: a file is in its place"), writer_lock(folder, "a test"):
            pass


def test_a_second_writer_is_refused_and_told_who_is_first(tmp_path: Path) -> None:
    with writer_lock(tmp_path, "sae harvest"):
        with pytest.raises(
            UnavailableError, match=rf"is being written by process {os.getpid()} on .* \(sae harvest\)"
        ) as refused:
            with writer_lock(tmp_path, "sae harvest"):
                pass
        assert refused.value.exit_code == 4
    with writer_lock(tmp_path, "sae train"):  # free again
        pass


# Which cache


def test_the_one_cache_that_matches_is_found(tmp_path: Path, write_cache, bits_of) -> None:
    with pytest.raises(UsageError, match="No cache holds layer 5. Create one with `sae harvest --layer 5`"):
        find_cache(None, Hook(5), tmp_path)
    one = write_cache({5: bits_of(ROWS, D)}, name="one")
    assert find_cache(None, Hook(5), tmp_path).folder == find_cache("none", Hook(5), tmp_path).folder == one.folder
    with pytest.raises(UsageError, match=r"No cache holds layer 5 of gemma.*--model gemma.*\n.* holds layer 5 of none"):
        find_cache("gemma", Hook(5), tmp_path)
    with pytest.raises(UsageError, match="No cache holds layer 12"):
        find_cache(None, Hook(12), tmp_path)
    write_cache({5: bits_of(ROWS, D)}, name="two")
    assert [folder.name for folder in list_caches(tmp_path)] == ["one", "two"]
    with pytest.raises(UsageError, match=r"2 caches hold layer 5. Choose one:\n  --cache .*one .*\n  --cache .*two "):
        find_cache(None, Hook(5), tmp_path)


def test_a_half_written_cache_is_named_when_it_is_the_only_one(tmp_path: Path, bits_of, begin_cache) -> None:
    begin_cache(tmp_path / "half", {5: bits_of(ROWS, D)}, 16)
    with pytest.raises(UsageError, match="No complete cache holds layer 5; .*half is half written"):
        find_cache(None, Hook(5), tmp_path)


def test_a_digest_does_not_depend_on_the_order_of_fields() -> None:
    assert digest_of({"a": 1, "b": [2, 3]}) == digest_of({"b": [2, 3], "a": 1}) != digest_of({"a": 1, "b": [3, 2]})


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "mps:0", ""])
def test_an_unknown_device_is_refused(device: str) -> None:
    with pytest.raises(UsageError, match="unknown device .*: expected auto, cpu, cuda or cuda:N"):
        resolve_device(device)


def test_a_device_that_is_not_there_is_refused() -> None:
    missing = f"cuda:{torch.cuda.device_count()}"
    with pytest.raises(UnavailableError, match=f"device {missing} is not available: torch sees"):
        resolve_device(missing)
    assert resolve_device("cpu") == "cpu"


def test_the_dtype_follows_the_device() -> None:
    assert [resolve_dtype("auto", d) for d in ("cpu", "cuda:1")] == ["float32", "bfloat16"]
    assert resolve_dtype("float32", "cuda") == "float32"
    with pytest.raises(UsageError, match="unknown dtype .float99.: expected auto, bfloat16 or float32"):
        resolve_dtype("float99", "cpu")


def test_one_broken_cache_does_not_hide_the_others(tiny_cache, tmp_path: Path) -> None:
    """find_cache goes on with what opens; with nothing that fits, the broken one is named."""
    root = tmp_path / "several"
    (root / "broken").mkdir(parents=True)
    (root / "broken" / "zarr.json").write_text("{ torn")
    with pytest.raises(UsageError, match=r"No cache holds layer 0.*(?s:.*)broken/zarr.json cannot be read"):
        find_cache(None, Hook(0), root)
    (root / "whole").symlink_to(tiny_cache.folder)
    assert find_cache(None, Hook(0), root).folder == root / "whole"
    assert isinstance(list_caches(root)[root / "broken"], DamagedError)


@pytest.mark.parametrize("content", ["{}", "[1]", '{"attributes"'])
def test_a_record_that_was_overwritten_is_damage(content: str, tmp_path: Path) -> None:
    (tmp_path / "zarr.json").write_text(content)
    with pytest.raises(DamagedError, match="Delete it and run the command that wrote it again") as refused:
        open_cache(tmp_path)
    assert refused.value.exit_code == 3


def test_what_a_killed_writer_left_is_no_foreign_file(tmp_path: Path) -> None:
    for record in ("zarr.json", "harvest.json", "ring.json"):
        (tmp_path / f"{record}.tmp-1234").write_text("{")
    assert not harvest_started(tmp_path, "f" * 64)
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UsageError, match="holds thesis.tex, but no activation cache"):
        harvest_started(tmp_path, "f" * 64)
