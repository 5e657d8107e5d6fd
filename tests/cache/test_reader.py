"""Reading a cache returns what was written, and damage raises instead of reading as zeros."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import google_crc32c
import numpy as np
import pytest

from sae.cache.opening import open_cache
from sae.cache.reader import Cache
from sae.common.cache_schemas import MANIFEST_RECORD
from sae.common.errors import DamagedError, UsageError
from sae.common.files import read_json

D = 8
ROWS = 40


def test_a_cache_holds_the_rows_that_were_written(cache: Cache, finite_bits) -> None:
    for layer in (5, 12):
        chunks = [cache.read_chunk(f"layer_{layer:02d}", n) for n in range(3)]
        assert [len(chunk) for chunk in chunks] == cache.chunk_rows == [16, 16, 8]
        assert np.array_equal(np.concatenate(chunks), finite_bits(ROWS, D, layer))
    assert cache.layers == [5, 12] and cache.rows == ROWS and cache.model == "none"
    assert len(list(cache.verify())) == len(cache.manifest["files"]) == 4 + 3 * (2 + 2 * 3)


def test_a_mapped_chunk_is_read_only(cache: Cache) -> None:
    with pytest.raises(ValueError, match="read-only"):
        cache.read_chunk("layer_05", 0)[0, 0] = 1


def test_the_array_digest_depends_on_the_bytes_of_one_layer(write_cache, finite_bits) -> None:
    five, twelve = finite_bits(ROWS, D, 5), finite_bits(ROWS, D, 12)
    changed = five.copy()
    changed[-1, -1] ^= 1
    both = write_cache({5: five, 12: twelve})
    alone, other = write_cache({5: five}, name="b"), write_cache({5: changed}, name="c")
    assert both.array_digest("layer_05") == alone.array_digest("layer_05") != other.array_digest("layer_05")
    assert both.array_digest("layer_05") != both.array_digest("layer_12")


def test_a_layer_that_the_cache_does_not_hold_raises(cache: Cache) -> None:
    message = r"holds layer 5, layer 12, not layer 19. Add it with `sae harvest --layer 19`"
    with pytest.raises(UsageError, match=message):
        cache.require_array(19)
    with pytest.raises(UsageError, match=r"not mlp_out of layer 5. Add it with `sae harvest --layer 5 --site mlp_out`"):
        cache.require_array(5, "mlp_out")


# Damage: reading the chunk and verifying the cache raise the same message.


def delete(file: Path) -> None:
    file.unlink()


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def flip(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)


def replace(file: Path) -> None:
    raw = b"\1" * (file.stat().st_size - 4)
    file.write_bytes(raw + struct.pack("<I", google_crc32c.value(raw)))


DAMAGE = {
    delete: "missing",
    truncate: "truncated",
    flip: "a bit was flipped",
    replace: "comes from another window or another cache",
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.items())
@pytest.mark.parametrize("chunk", [0, 2])
def test_a_damaged_chunk_raises(cache: Cache, damage: Callable[[Path], None], message: str, chunk: int) -> None:
    damage(cache.folder / f"layer_12/c.{chunk}.0")
    for read in (lambda: cache.read_chunk("layer_12", chunk), lambda: list(Cache(cache.folder).verify())):
        with pytest.raises(
            DamagedError, match=rf"c\.{chunk}\.0 .*{message}.*Run `sae cache repair` to harvest"
        ) as raised:
            read()
        assert raised.value.exit_code == 3
    cache.read_chunk("layer_05", chunk)  # layer 5 is not damaged


SIDE_ARRAYS: dict[str, Callable[[Cache], object]] = {
    "tokens/ids/c.0.0": lambda cache: cache.contexts(held_out=False),
    "tokens/length/c.0": lambda cache: cache.contexts(held_out=False),
    "tokens/document/c.0": lambda cache: cache.contexts(held_out=False),
    "tokens/held_out/c.0": lambda cache: cache.contexts(held_out=True),
    "layer_12.moments/c.1.0.0": lambda cache: cache.mean("layer_12"),
    "layer_12.row_norm/c.1": lambda cache: cache.outlier_rows("layer_12"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.items())
@pytest.mark.parametrize("file", SIDE_ARRAYS)
def test_damage_to_side_arrays_raises(cache: Cache, damage, message: str, file: str) -> None:
    damage(cache.folder / file)
    with pytest.raises(DamagedError, match=rf"{file} .*{message}.*Run `sae cache repair`"):
        SIDE_ARRAYS[file](cache)


@pytest.mark.parametrize("array", ["layer_12.moments/c.{}.0.0", "layer_12.row_norm/c.{}"])
def test_a_side_chunk_of_another_window_raises(cache: Cache, array: str) -> None:
    """The chunk has a valid checksum of its own, and only the manifest shows that it belongs to another window."""
    shutil.copyfile(cache.folder / array.format(0), cache.folder / array.format(1))
    with pytest.raises(DamagedError, match=r"c\.1.* is not the file that the cache lists: it comes from another"):
        cache.mean("layer_12")


def test_the_tokens_of_another_cache_raise(cache: Cache, make_writer, finite_bits, tmp_path: Path) -> None:
    other = make_writer(tmp_path / "other", {5: finite_bits(80, D)}, 16).folder
    shutil.copyfile(other / "tokens/length/c.0", cache.folder / "tokens/length/c.0")
    with pytest.raises(DamagedError, match=r"tokens/length/c\.0 (has|is not the file)"):
        cache.contexts(held_out=False)
    # all tokens of the other cache, with their own record
    shutil.copytree(other / "tokens", cache.folder / "tokens", dirs_exist_ok=True)
    with pytest.raises(DamagedError, match="tokens is not the text that this cache was harvested from"):
        cache.contexts(held_out=False)


def test_an_outlier_row_of_another_norm_raises(outlier_cache: Cache, outliers: list[int]) -> None:
    """The mean reads single rows of large chunks, so it verifies these rows instead of whole chunks."""
    cache, (row, *_) = outlier_cache, outliers
    file = cache.folder / cache.array("layer_05").chunk_file(row // 16)
    if cache.layout.compress:
        shutil.copyfile(cache.folder / cache.array("layer_05").chunk_file(1), file)
    else:
        raw = bytearray(file.read_bytes())
        raw[16 * (row % 16) + 1] ^= 4  # the exponent of the row's first value
        file.write_bytes(raw)
    with pytest.raises(DamagedError, match=r"layer_05/c\.0\.0 has"):
        cache.mean("layer_05")


@pytest.mark.parametrize("file", ["manifest.json", "zarr.json", "layer_12/zarr.json"])
def test_a_truncated_record_raises(cache: Cache, file: str) -> None:
    cut = (cache.folder / file).read_text()[:50]
    (cache.folder / file).write_text(cut)
    with pytest.raises(DamagedError, match=f"{file} cannot be read .* it was truncated or overwritten"):
        Cache(cache.folder).read_chunk("layer_12", 0)


@pytest.mark.parametrize("content", ["{}", "[1]", '{"attributes"'])
def test_an_overwritten_record_raises(content: str, tmp_path: Path) -> None:
    (tmp_path / "zarr.json").write_text(content)
    with pytest.raises(DamagedError, match="Run `sae cache repair`") as raised:
        open_cache(tmp_path)
    assert raised.value.exit_code == 3


def test_a_missing_manifest_raises(cache: Cache) -> None:
    (cache.folder / "manifest.json").unlink()
    with pytest.raises(DamagedError, match="manifest.json is missing"):
        Cache(cache.folder).require_array(12)


def test_a_manifest_of_another_harvest_raises(cache: Cache) -> None:
    MANIFEST_RECORD.write(cache.folder / "manifest.json", cache.manifest | {"fingerprint": "0" * 64})
    with pytest.raises(DamagedError, match="manifest.json comes from another harvest"):
        Cache(cache.folder).require_array(12)


def test_a_chunk_that_the_manifest_does_not_list_raises(cache: Cache) -> None:
    with pytest.raises(UsageError, match="has no chunk 3 of layer_12"):
        cache.read_chunk("layer_12", 3)


def test_a_newer_format_raises(cache: Cache) -> None:
    root = read_json(cache.folder / "zarr.json")
    root["attributes"]["format"] = 99
    (cache.folder / "zarr.json").write_text(json.dumps(root))
    with pytest.raises(
        UsageError, match="was written in format 99; this version reads formats up to 1. Upgrade"
    ) as raised:
        Cache(cache.folder)
    assert raised.value.exit_code == 2


def test_opening_something_else_raises(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no activation cache .* Create one with `sae harvest`"):
        open_cache(tmp_path / "nowhere")
    (tmp_path / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}')
    with pytest.raises(UsageError, match="is a Zarr group, but not an activation cache"):
        open_cache(tmp_path)


@pytest.mark.parametrize("damage", [delete, truncate])
def test_missing_and_truncated_files_are_found_by_their_sizes(cache: Cache, damage: Callable[[Path], None]) -> None:
    cache.check_sizes()
    damage(cache.folder / "layer_12/c.1.0")
    with pytest.raises(
        DamagedError, match=r"1 files of .* are missing or truncated: layer_12/c\.1\.0\. Run `sae cache"
    ):
        cache.check_sizes()
