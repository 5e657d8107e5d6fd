"""One chunk, one file: raw rows and a crc32c behind them, so that a Zarr reader checks it and we map it."""

import struct
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from .errors import DamagedError
from .files import publish, read_json
from .layout import Array


def write_chunk(folder: Path, array: Array, chunk: int, rows: np.ndarray) -> tuple[str, dict[str, Any]]:
    """Write a chunk, filled up with zeros when it is the short last one. Returns its file and the record of it."""
    block = np.ascontiguousarray(rows, array.numpy_dtype)
    if len(block) < array.chunk[0]:
        block = np.concatenate([block, np.zeros((array.chunk[0] - len(block), *block.shape[1:]), block.dtype)])
    raw = block.reshape(-1).view(np.uint8)
    checksum = google_crc32c.value(raw)
    publish(folder / array.file(chunk), raw.data, struct.pack("<I", checksum))
    return array.file(chunk), {"bytes": len(raw) + 4, "crc32c": f"{checksum:08x}"}


MEND = "Remove the file and run the same `sae harvest` again: it writes again what is missing."


def all_there(folder: Path, files: dict[str, dict[str, Any]]) -> bool:
    """Whether every file of a record exists at its size."""
    return all((folder / f).is_file() and (folder / f).stat().st_size == r["bytes"] for f, r in files.items())


def read_array(folder: Path, name: str) -> Array:
    return Array.from_metadata(
        name, read_json(folder / name / "zarr.json", "shape", "chunk_grid", "data_type", "attributes")
    )


def map_chunk(folder: Path, array: Array, chunk: int) -> np.ndarray:
    """A chunk's rows as a read-only map, the last chunk without its filling. DamagedError when missing or short."""
    path = folder / array.file(chunk)
    expected = array.chunk_bytes + 4
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise DamagedError(f"{path} is listed in the cache but missing. {MEND}") from None
    if size != expected:
        raise DamagedError(f"{path} has {size:,} bytes, expected {expected:,}: it was cut off. {MEND}")
    rows = min(array.chunk[0], array.shape[0] - chunk * array.chunk[0])
    return np.memmap(path, array.numpy_dtype, mode="r", shape=(rows, *array.chunk[1:]))


def check_chunk(folder: Path, array: Array, chunk: int, recorded: str | None = None) -> np.ndarray:
    """The map of a chunk; DamagedError unless its bytes have the checksum behind them, and that is the recorded one."""
    rows, path = map_chunk(folder, array, chunk), folder / array.file(chunk)
    raw = np.memmap(path, np.uint8, mode="r")
    found, expected = google_crc32c.value(raw[:-4]), struct.unpack("<I", raw[-4:].tobytes())[0]
    if found != expected:
        raise DamagedError(
            f"The checksum of {path} does not match ({found:08x}, expected {expected:08x}): a bit was flipped. {MEND}"
        )
    if recorded is not None and f"{found:08x}" != recorded:
        raise DamagedError(f"{path} is not the file that the manifest lists: it comes from another harvest. {MEND}")
    return rows


def read_whole(folder: Path, name: str) -> np.ndarray:
    """A small array, checked, in memory."""
    array = read_array(folder, name)
    return np.concatenate([check_chunk(folder, array, chunk) for chunk in range(array.chunks)])
