"""For each window, the rows with the largest norms, which a cache in a store keeps in an additional object.

To compute the statistics of an array, two sets of its rows must be read: the outlier rows, and the 0.1 % of the rows
that have the largest norms. On a disk these rows are read from the chunks; in a store, each of these rows would take a
request of its own. Which rows these are is known only when all windows are written, so the object of each window holds
more than 0.1 % of its rows. Rows that are not in the object are read from the chunks. All rows are read from the chunks
if the object is missing or damaged, or was made from files other than the listed ones. The object never changes a
result.
"""

import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import google_crc32c
import numpy as np

from ..common.files import digest_of
from .chunks import FileRecords, RowReader, RowsOfChunk, block_index, decode_block, index_bytes
from .consistency import window_files
from .layout import ArraySpec, Layout
from .mirror import RECORD_THREADS, map_ahead
from .object_store import ObjectStore
from .outliers import TOP_SHARE

FOLDER = "largest"
SHARE = 3 * TOP_SHARE  # of a window's rows; more than TOP_SHARE, because some windows have more large rows than others
FAR = 4.0  # multiple of the window's median; rows above it are stored too, because --max-norm can make them outliers
MOST = 0.04  # of a window's rows


def largest_file(window: int, name: str) -> str:
    """The name of the object that stores, for one window of an array, the rows with the largest norms."""
    return f"{FOLDER}/{window:06d}.{name}"


def encode_largest(files: FileRecords, norms: np.ndarray, bits: np.ndarray) -> bytes:
    """The object for a window whose rows have the given `norms` (rows,) and `bits` (rows, d_in), and whose commit lists
    `files`.

    The object contains the digest of the files, the number of its rows, their indices in the window, the rows, and a
    checksum.
    """
    far = min(int(MOST * len(norms)), int(np.count_nonzero(norms > FAR * np.median(norms))))
    smallest = len(norms) - max(math.ceil(SHARE * len(norms)), far)
    rows = np.sort(np.argpartition(norms, smallest)[smallest:])
    content = bytes.fromhex(digest_of(files)) + struct.pack("<I", len(rows)) + rows.astype("<u4").tobytes()
    content += np.ascontiguousarray(bits[rows]).tobytes()
    return content + struct.pack("<I", google_crc32c.value(content))


def decode_largest(data: bytes, files: FileRecords, array: ArraySpec) -> tuple[np.ndarray, np.ndarray] | None:
    """The rows that `encode_largest` stored, preceded by their indices in the window; None if `data` is not valid for
    these files.
    """
    content, width = data[:-4], array.numpy_dtype.itemsize * array.shape[-1]
    if len(data) < 40 or data[-4:] != struct.pack("<I", google_crc32c.value(content)):
        return None
    (count,) = struct.unpack("<I", content[32:36])
    if content[:32] != bytes.fromhex(digest_of(files)) or len(content) != 36 + count * (4 + width):
        return None
    rows = np.frombuffer(content, "<u4", count, 36).astype(np.int64)
    return rows, np.frombuffer(content, array.numpy_dtype, offset=36 + 4 * count).reshape(count, -1)


def stored_row_reader(store: ObjectStore, layout: Layout, files: Mapping[str, Any]) -> RowReader:
    """A reader for rows of a cache in a store; `files` are the files in its manifest. The reader takes rows from the
    objects with the largest rows, and takes from the chunks only the rows that these objects lack.
    """

    def read_window(array: ArraySpec, window: int, chunks: Sequence[RowsOfChunk]) -> list[np.ndarray]:
        made_of = {file: files[file] for file in window_files(layout, [array.name], range(window, window + 1))}
        data = store.find(largest_file(window, array.name))
        kept = None if data is None else decode_largest(data, made_of, array)
        return [
            read_stored_rows(store, array, one) if kept is None else read_chunk(array, one, *kept) for one in chunks
        ]

    def read_chunk(array: ArraySpec, one: RowsOfChunk, kept: np.ndarray, values: np.ndarray) -> np.ndarray:
        wanted = one.rows + one.chunk * layout.chunk_rows % layout.window_rows
        at = np.minimum(np.searchsorted(kept, wanted), len(kept) - 1)
        found, lacking = values[at], kept[at] != wanted
        if lacking.any():
            found[lacking] = read_stored_rows(store, array, one._replace(rows=one.rows[lacking]))
        return found

    def read(array: ArraySpec, chunks: Sequence[RowsOfChunk]) -> Iterator[np.ndarray]:
        per_window = layout.window_rows // layout.chunk_rows
        windows = [(window, list(some)) for window, some in groupby(chunks, lambda one: one.chunk // per_window)]
        for found in map_ahead(lambda window: read_window(array, *window), windows, RECORD_THREADS):
            yield from found

    return read


def read_stored_rows(store: ObjectStore, array: ArraySpec, one: RowsOfChunk) -> np.ndarray:
    """Read rows of a chunk in a store: only the bytes of these rows, or of the compressed blocks that hold them."""
    key = array.chunk_file(one.chunk)
    if array.block_rows is None:
        size = array.chunk_bytes // array.chunk_shape[0]
        parts = store.get_ranges(key, (one.rows * size).tolist(), [size] * len(one.rows))
        return np.stack([np.frombuffer(part, array.numpy_dtype) for part in parts])
    length = index_bytes(array)
    index = block_index(store.get_ranges(key, [one.size - 4 - length], [length])[0])
    numbers = np.unique(one.rows // array.block_rows).tolist()
    starts, sizes = index[numbers].T.tolist()
    blocks = dict(zip(numbers, store.get_ranges(key, starts, sizes), strict=True))
    decoded = {number: decode_block(array, data) for number, data in blocks.items()}
    return np.stack([decoded[row // array.block_rows][row % array.block_rows] for row in one.rows.tolist()])
