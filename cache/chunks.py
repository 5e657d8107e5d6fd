"""One chunk, one file: raw rows and a crc32c behind them, so that a Zarr reader checks it and we map it.

With compression a file is a Zarr shard instead: blocks of rows, each compressed, and an index of them at the end.
"""

import functools
import struct
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numcodecs.blosc import SHUFFLE, Blosc

from ..common.errors import DamagedError, UsageError
from ..common.files import atomic_write, read_json
from .layout import BLOSC, FORMAT, Array

Bytes = np.ndarray | bytes
PART = 1 << 20  # bytes read at a time to be checked
BLOSC_CODEC = Blosc(BLOSC["cname"], BLOSC["clevel"], SHUFFLE, BLOSC["blocksize"])


def encode_chunk(array: Array, rows: np.ndarray) -> tuple[list[Bytes], dict[str, Any]]:
    """The bytes of a chunk's file in parts, and its record. A short last chunk is filled up with zeros."""
    block = np.ascontiguousarray(rows, array.numpy_dtype)
    if len(block) < array.chunk[0]:
        block = np.concatenate([block, np.zeros((array.chunk[0] - len(block), *block.shape[1:]), block.dtype)])
    if array.block is None:
        raw = block.reshape(-1).view(np.uint8)
        checksum = google_crc32c.value(raw)
        return [raw, struct.pack("<I", checksum)], {"bytes": len(raw) + 4, "crc32c": f"{checksum:08x}"}
    parts: list[Bytes] = [BLOSC_CODEC.encode(block[at : at + array.block]) for at in range(0, len(block), array.block)]
    sizes = np.array([len(part) for part in parts], np.uint64)
    index = np.stack([np.cumsum(sizes) - sizes, sizes], 1).astype("<u8").tobytes()
    parts += [index, struct.pack("<I", google_crc32c.value(index))]
    checksum = functools.reduce(google_crc32c.extend, parts, 0)
    return parts, {"bytes": sum(map(len, parts)), "crc32c": f"{checksum:08x}"}


def write_chunk(folder: Path, array: Array, chunk: int, rows: np.ndarray) -> tuple[str, dict[str, Any]]:
    """Write a chunk; returns its file and the record of it."""
    parts, record = encode_chunk(array, rows)
    atomic_write(folder / array.file(chunk), *(memoryview(part) for part in parts))
    return array.file(chunk), record


MEND = "`sae cache repair` harvests again what is damaged, and so does the same `sae harvest` once the file is removed."


def all_there(folder: Path, files: dict[str, dict[str, Any]]) -> bool:
    """Whether every file of a record exists at its size."""
    return all((folder / f).is_file() and (folder / f).stat().st_size == r["bytes"] for f, r in files.items())


def attributes_of(folder: Path) -> dict[str, Any]:
    """What zarr.json says of a cache; UsageError when it is a Zarr group of something else, or of a newer format."""
    attributes = read_json(folder / "zarr.json", "attributes")["attributes"]
    if attributes.get("format") is None:
        raise UsageError(f"{folder} is a Zarr group but no activation cache. Make one with `sae harvest`.")
    if attributes["format"] > FORMAT:
        raise UsageError(
            f"{folder} was written in format {attributes['format']}; this version reads up to {FORMAT}. Upgrade."
        )
    return attributes


def read_array(folder: Path, name: str) -> Array:
    return Array.from_metadata(
        name, read_json(folder / name / "zarr.json", "shape", "chunk_grid", "data_type", "attributes", "codecs")
    )


def check_size(path: Path, size: int) -> None:
    """DamagedError when a file is missing or of another size."""
    try:
        found = path.stat().st_size
    except FileNotFoundError:
        raise DamagedError(f"{path} is listed in the cache but missing. {MEND}") from None
    if found != size:
        raise DamagedError(f"{path} has {found:,} bytes, expected {size:,}: it was cut off. {MEND}")


def map_file(path: Path, size: int) -> np.ndarray:
    """The bytes of a file, mapped; DamagedError when it is missing or of another size than `size`."""
    check_size(path, size)
    return np.memmap(path, np.uint8, mode="r")


def check_chunk(folder: Path, array: Array, chunk: int, record: dict[str, Any] | None = None) -> None:
    """DamagedError unless a chunk's file is the one that was recorded; without a record, unless it is whole in itself.

    The checksum of a raw chunk is that of its rows and stands behind them; that of a shard is of the whole file.
    """
    path, size = folder / array.file(chunk), record["bytes"] if record else array.chunk_bytes + 4
    check_size(path, size)
    found, behind = checksum_of(path, size if array.block else size - 4)
    if array.block is None and found != behind:
        raise DamagedError(f"The checksum of {path} does not match: a bit was flipped. {MEND}")
    if record and found != record["crc32c"]:
        cause = "a bit was flipped" if array.block else "it comes from another harvest"
        raise DamagedError(f"{path} is not the file that the manifest lists: {cause}. {MEND}")


def checksum_of(path: Path, size: int) -> tuple[str, str]:
    """The checksum of the first `size` bytes of a file, and the one that stands behind them.

    A part at a time, because the checksum holds the interpreter's lock: the disk is waited for without it.
    """
    part, checksum = np.empty(PART, np.uint8), 0
    with path.open("rb", buffering=0) as file:
        while size and (count := file.readinto(part[:size].data)):
            checksum, size = google_crc32c.extend(checksum, part[:count]), size - count
        return f"{checksum:08x}", file.read()[::-1].hex()


def map_rows(folder: Path, array: Array, chunk: int) -> np.ndarray:
    """A raw chunk's rows as a read-only map, the last chunk without its filling. DamagedError when missing or short."""
    raw = map_file(folder / array.file(chunk), array.chunk_bytes + 4)
    return raw[:-4].view(array.numpy_dtype).reshape(array.chunk)[: rows_in(array, chunk)]


def rows_in(array: Array, chunk: int) -> int:
    return min(array.chunk[0], array.shape[0] - chunk * array.chunk[0])


class Shard:
    """A compressed chunk: its file stays mapped, its index is read once, its blocks are decoded one at a time."""

    def __init__(self, folder: Path, array: Array, chunk: int, size: int) -> None:
        self.raw, self.array = map_file(folder / array.file(chunk), size), array
        blocks = array.chunk[0] // (array.block or 1)
        self.index = self.raw[-4 - 16 * blocks : -4].view("<u8").reshape(blocks, 2)

    def block(self, number: int) -> np.ndarray:
        """A block's rows (block, ...), in memory of their own."""
        start, size = (int(n) for n in self.index[number])
        rows = np.empty((self.array.block, *self.array.chunk[1:]), self.array.numpy_dtype)
        BLOSC_CODEC.decode(self.raw[start : start + size], out=rows)
        return rows


def take(folder: Path, array: Array, chunk: int, which: np.ndarray, size: int) -> np.ndarray:
    """Some rows of a chunk, whose file has `size` bytes."""
    if array.block is None:
        return map_rows(folder, array, chunk)[which]
    shard = Shard(folder, array, chunk, size)
    return np.stack([shard.block(row // array.block)[row % array.block] for row in which])


def read_whole(folder: Path, name: str) -> np.ndarray:
    """A small array, checked, in memory."""
    array = read_array(folder, name)
    for chunk in range(array.chunks):
        check_chunk(folder, array, chunk)
    return np.concatenate([map_rows(folder, array, chunk) for chunk in range(array.chunks)])
