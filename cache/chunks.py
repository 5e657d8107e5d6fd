"""Read and write chunks. A chunk is one file, which can be memory-mapped and has a checksum that Zarr readers verify.

An uncompressed chunk is its raw rows followed by a crc32c. A compressed chunk is a Zarr shard: blocks of rows, each
compressed, followed by an index of the blocks.
"""

import contextlib
import functools
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
from numcodecs.blosc import SHUFFLE, Blosc

from ..common.cache_schemas import ARRAY_RECORD, CACHE_RECORD, REPAIR_HINT
from ..common.errors import DamagedError, UsageError
from ..common.files import atomic_write, os_error, read_json, reading
from ..common.open_files import files_limits
from ..common.zarr_metadata import array_essentials
from .consistency import check_array, check_attributes, contradiction, moments_of
from .layout import BLOSC, FORMAT, ArraySpec, Layout

BytesLike = bytes | memoryview
FileRecords = Mapping[str, Mapping[str, Any]]  # file, relative to the cache -> {"bytes", "crc32c"}
FEW_CHUNKS = 4
OPEN_CHUNKS = 256  # memory maps kept open, several per lane: opening one for every read halves the speed
READ_BYTES = 1 << 20  # bytes read at a time to compute a checksum
BLOSC_CODEC = Blosc(BLOSC["cname"], BLOSC["clevel"], SHUFFLE, BLOSC["blocksize"])

# --- metadata --------------------------------------------------------------------------------------------------------


def read_attributes(folder: Path) -> dict[str, Any]:
    """The attributes in a cache's zarr.json.

    Raises UsageError if zarr.json describes another kind of Zarr group or a newer format, DamagedError if zarr.json was
    changed or contradicts itself.
    """
    path = folder / "zarr.json"
    try:
        attributes: dict[str, Any] = dict(CACHE_RECORD.read(path)["attributes"])
    except DamagedError:
        with contextlib.suppress(DamagedError):
            check_is_readable_cache(folder, read_json(path))  # newer versions can write other fields
        raise
    check_is_readable_cache(folder, {"attributes": attributes})
    check_attributes(path, attributes)
    return attributes


def check_is_readable_cache(folder: Path | str, metadata: Any) -> None:
    """Raise UsageError if the zarr.json in a folder describes another kind of group, or a newer format."""
    attributes = metadata.get("attributes") if isinstance(metadata, dict) else None
    if not isinstance(attributes, dict):
        return
    if not {"format", "fingerprint", "identity"} & attributes.keys():
        raise UsageError(f"{folder} is a Zarr group, but not an activation cache. Create a cache with `sae harvest`.")
    if isinstance(number := attributes.get("format"), int) and number > FORMAT:
        raise UsageError(
            f"{folder} was written in format {number}; this version reads formats up to {FORMAT}. Upgrade this "
            "package. If the cache was not written by a newer version, its zarr.json is damaged: delete that file and "
            "run `sae cache repair`."
        )


def read_array_spec(folder: Path, name: str, layout: Layout | None = None) -> ArraySpec:
    """The shape and storage of an array, from its zarr.json.

    Raises DamagedError if zarr.json was changed or does not match the layout of the cache.
    """
    path = folder / name / "zarr.json"
    metadata: dict[str, Any] = dict(ARRAY_RECORD.read(path))
    array = ArraySpec.from_metadata(name, metadata)
    if array_essentials(metadata) != array_essentials(array.metadata()):
        raise contradiction(
            path, "it lists unexpected codecs", "the cache format has only those in docs/reference/cache-format.md"
        )
    if layout is not None:
        of = moments_of(name)
        check_array(path, array, layout, None if of is None else read_array_spec(folder, of, layout).shape[-1])
    return array


def files_exist(folder: Path, records: FileRecords) -> bool:
    """Whether every recorded file exists with its recorded size. Reads no content."""
    return all((folder / f).is_file() and (folder / f).stat().st_size == r["bytes"] for f, r in records.items())


def file_sizes(folder: Path, files: Iterable[str]) -> dict[str, int]:
    """The sizes in bytes of all files in the folders that contain these files."""
    sizes: dict[str, int] = {}
    for name in dict.fromkeys(file.rsplit("/", 1)[0] for file in files):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder / name) as entries:
            sizes |= {f"{name}/{entry.name}": entry.stat().st_size for entry in entries}
    return sizes


# --- writing ---------------------------------------------------------------------------------------------------------


def encode_chunk(array: ArraySpec, rows: np.ndarray) -> tuple[list[BytesLike], dict[str, Any]]:
    """The bytes of a chunk's file, in parts, and its record {"bytes", "crc32c"}. A short last chunk is zero-padded."""
    block = np.ascontiguousarray(rows, array.numpy_dtype)
    if len(block) < array.chunk_shape[0]:
        block = np.concatenate([block, np.zeros((array.chunk_shape[0] - len(block), *block.shape[1:]), block.dtype)])
    if array.block_rows is None:
        raw = block.reshape(-1).view(np.uint8)
        checksum = extended(0, raw)
        return [raw.data, struct.pack("<I", checksum)], {"bytes": len(raw) + 4, "crc32c": f"{checksum:08x}"}
    parts: list[BytesLike] = [
        BLOSC_CODEC.encode(block[start : start + array.block_rows]) for start in range(0, len(block), array.block_rows)
    ]
    sizes = np.array([len(part) for part in parts], np.uint64)
    index = np.stack([np.cumsum(sizes) - sizes, sizes], 1).astype("<u8").tobytes()
    parts += [index, struct.pack("<I", google_crc32c.value(index))]
    checksum = functools.reduce(google_crc32c.extend, parts, 0)
    return parts, {"bytes": sum(map(len, parts)), "crc32c": f"{checksum:08x}"}


def write_chunk(folder: Path, array: ArraySpec, chunk: int, rows: np.ndarray) -> tuple[str, dict[str, Any]]:
    """Write a chunk; returns its file, relative to the cache, and its record {"bytes", "crc32c"}."""
    parts, record = encode_chunk(array, rows)
    atomic_write(folder / array.chunk_file(chunk), *parts)
    return array.chunk_file(chunk), record


def extended(checksum: int, raw: np.ndarray) -> int:
    """Continue a crc32c with more bytes. Works in parts, because computing a crc32c holds the interpreter lock."""
    for start in range(0, len(raw), READ_BYTES):
        checksum = google_crc32c.extend(checksum, raw[start : start + READ_BYTES])
    return checksum


# --- checking --------------------------------------------------------------------------------------------------------


def check_size(path: Path, size: int) -> None:
    """Raise DamagedError unless the file exists and has `size` bytes."""
    try:
        actual = path.stat().st_size
    except FileNotFoundError:
        raise DamagedError(f"{path} is listed in the cache but missing. {REPAIR_HINT}") from None
    except OSError as error:
        raise os_error(error, path, "read") from error
    if actual != size:
        raise DamagedError(f"{path} has {actual:,} bytes, expected {size:,}: it was truncated. {REPAIR_HINT}")


def check_chunk(folder: Path, array: ArraySpec, chunk: int, files: FileRecords) -> None:
    """Read a chunk's file and raise DamagedError unless it has the size and checksum listed in `files`.

    `files` are the records in the manifest, a commit or tokens/commit.json. The checksum at the end of a file does not
    prove that the file belongs here, since files of other windows and caches also end with valid checksums. In the
    records, the checksum of an uncompressed chunk covers its rows; the checksum of a shard covers the whole file.
    """
    file = array.chunk_file(chunk)
    path = folder / file
    if (record := files.get(file)) is None:
        raise DamagedError(f"{path} is not listed in the cache: a record was overwritten. {REPAIR_HINT}")
    size = record["bytes"]
    check_size(path, size)
    checksum, stored = file_checksums(path, size if array.block_rows else size - 4)
    if array.block_rows is None and checksum != stored:
        raise DamagedError(f"The checksum of {path} does not match: a bit was flipped. {REPAIR_HINT}")
    if checksum != record["crc32c"]:
        cause = "a bit was flipped" if array.block_rows else "it comes from another window or another cache"
        raise DamagedError(f"{path} is not the file that the cache lists: {cause}. {REPAIR_HINT}")


def file_checksums(path: Path, size: int) -> tuple[str, str]:
    """The crc32c of the first `size` bytes of a file, and the crc32c stored after them, both as hexadecimal.

    Reads the file in parts, so that other threads can run in between: computing a checksum holds the interpreter lock,
    but a wait for the disk releases it.
    """
    buffer, checksum = np.empty(READ_BYTES, np.uint8), 0
    with reading(path), path.open("rb", buffering=0) as file:
        while size and (count := file.readinto(buffer[:size].data)):
            checksum, size = google_crc32c.extend(checksum, buffer[:count]), size - count
        return f"{checksum:08x}", file.read()[::-1].hex()


def content_matches(content: bytes, array: ArraySpec, record: Mapping[str, Any]) -> bool:
    """Whether the content of a chunk's file matches its record, as in `check_chunk`."""
    every = np.frombuffer(content, np.uint8)
    checksum = extended(0, every if array.block_rows else every[:-4])
    is_stored = bool(array.block_rows) or content[-4:] == struct.pack("<I", checksum)
    return len(content) == record["bytes"] and is_stored and f"{checksum:08x}" == record["crc32c"]


# --- reading ---------------------------------------------------------------------------------------------------------


def most_open_chunks(caches: int = 1) -> int:
    """The number of memory maps that each cache may keep open when `caches` of them are read together. A map keeps a
    file open.
    """
    return min(OPEN_CHUNKS, max(FEW_CHUNKS, files_limits()[0] // (4 * caches)))


def map_file(path: Path, size: int) -> np.ndarray:
    """The bytes of a file as a read-only memory map. Raises DamagedError unless the file has `size` bytes."""
    check_size(path, size)
    with reading(path):
        return np.memmap(path, np.uint8, mode="r")


def map_chunk(folder: Path, array: ArraySpec, chunk: int) -> np.ndarray:
    """The rows of an uncompressed chunk as a read-only memory map, without the padding of the last chunk.

    Checks the size, not the checksum: raises DamagedError if the file is missing or short.
    """
    raw = map_file(folder / array.chunk_file(chunk), array.chunk_bytes + 4)
    return raw[:-4].view(array.numpy_dtype).reshape(array.chunk_shape)[: array.rows_in_chunk(chunk)]


class Shard:
    """A compressed chunk of `size` bytes: a memory map whose blocks are decoded one at a time."""

    def __init__(self, folder: Path, array: ArraySpec, chunk: int, size: int) -> None:
        assert array.block_rows is not None
        self.raw, self.block_rows = map_file(folder / array.chunk_file(chunk), size), array.block_rows
        self.array, self.index = array, block_index(self.raw[-4 - index_bytes(array) : -4])

    def decode_block(self, number: int) -> np.ndarray:
        """The rows of a block, (block_rows, ...), in newly allocated memory."""
        start, size = (int(n) for n in self.index[number])
        return decode_block(self.array, self.raw[start : start + size])


def decode_block(array: ArraySpec, data: BytesLike | np.ndarray) -> np.ndarray:
    """The rows of a compressed block, (block_rows, ...), in newly allocated memory."""
    assert array.block_rows is not None
    rows = np.empty((array.block_rows, *array.chunk_shape[1:]), array.numpy_dtype)
    BLOSC_CODEC.decode(data, out=rows)
    return rows


def index_bytes(array: ArraySpec) -> int:
    """The size of a shard's index in bytes, without the four bytes of the checksum that follows it."""
    assert array.block_rows is not None
    return 16 * (array.chunk_shape[0] // array.block_rows)


def block_index(data: BytesLike | np.ndarray) -> np.ndarray:
    """Start and size of each block of a shard, (blocks, 2), from the bytes of its index."""
    return np.frombuffer(data, "<u8").reshape(-1, 2)


class RowsOfChunk(NamedTuple):
    """Some rows of a chunk whose file has `size` bytes."""

    chunk: int
    rows: np.ndarray
    size: int


RowReader = Callable[[ArraySpec, Sequence[RowsOfChunk]], Iterator[np.ndarray]]


def row_reader(folder: Path) -> RowReader:
    """A function that reads rows of the chunks in a folder."""
    return lambda array, chunks: (read_rows(folder, array, *one) for one in chunks)


def read_rows(folder: Path, array: ArraySpec, chunk: int, rows: np.ndarray, size: int) -> np.ndarray:
    """The given rows of a chunk whose file has `size` bytes. Does not verify the checksum."""
    if array.block_rows is None:
        return map_chunk(folder, array, chunk)[rows]
    shard = Shard(folder, array, chunk, size)
    return np.stack([shard.decode_block(row // shard.block_rows)[row % shard.block_rows] for row in rows])


def read_chunk(folder: Path, array: ArraySpec, chunk: int, files: FileRecords) -> np.ndarray:
    """Check an uncompressed chunk with `check_chunk`, and return its rows, mapped by `map_chunk`."""
    check_chunk(folder, array, chunk, files)
    return map_chunk(folder, array, chunk)


def read_array(folder: Path, name: str, files: FileRecords, layout: Layout | None = None) -> np.ndarray:
    """Read a whole uncompressed array into memory, checking every chunk like `check_chunk`; for small arrays.

    Raises DamagedError if `read_array_spec` raises it, or if a file is missing, is too short, or is not the one that
    `files` lists.
    """
    array = read_array_spec(folder, name, layout)
    values, per_chunk = np.empty(array.shape, array.numpy_dtype), array.chunk_shape[0]
    for chunk in range(array.n_chunks):  # one map at a time: each map holds a file open
        values[chunk * per_chunk : (chunk + 1) * per_chunk] = read_chunk(folder, array, chunk, files)
    return values
