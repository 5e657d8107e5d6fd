"""The layout of a cache on disk: the names, shapes and metadata of its arrays, and the records of what exists.

    activations/<model>--<dataset>--<digest8>/     a Zarr v3 group
        zarr.json            format version, identity (every input that changes a byte), rows, complete arrays
        layer_12/            "bfloat16" (rows, d_in), one file per chunk: raw bytes and a crc32c, or a compressed shard
        layer_12.row_norm/   float32 (rows,): the L2 norm of each row
        layer_12.moments/    float64 (windows, 2, d_in): sum and sum of squares of each window's rows
        layer_12.mlp_out/    another site of the layer, with its own row_norm and moments
        layer_12.mlp.gate_proj.output/   the output of another module
        row_ctx/ row_pos/    uint32, uint16 (rows,): the position in tokens/ids that each row comes from
        tokens/              the exact ids fed to the model: ids, length, document, held_out (held-out contexts last);
                             for conversations also rows, the tokens of the roles that are harvested
        commits/             one file per window and array, written last: the only proof that its rows are complete
        harvest.json         the harvest's configuration, so that a damaged window can be harvested again
        manifest.json        the files of the complete arrays, from their commits, with statistics
        ring.json            instead of a manifest, if `sae train --stream` deletes windows that it has read

A chunk holds `chunk_rows` rows. A window holds `window_rows` rows, a whole number of chunks, which are shuffled and
written together. Zarr requires that the last chunk of an array is stored at full size, so row counts come from the
metadata, never from file sizes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..common.files import digest_of

FORMAT = 1
CHUNK_ROWS = 8192
WINDOW_ROWS = 262_144
BLOCK_ROWS = 256
NAN_BITS = 0x7FC0  # of bfloat16: 32704
# The high bytes of bfloat16 (sign and exponent) compress; the low bytes are noise. With byte shuffle, the cheapest
# level compresses as well as any other. With blosc's default block size, half of the gain is lost.
BLOSC = {"cname": "zstd", "clevel": 1, "shuffle": "shuffle", "blocksize": 1 << 20}

DTYPES = {  # Zarr data type -> NumPy
    "bfloat16": np.uint16,
    "uint16": np.uint16,
    "uint32": np.uint32,
    "float32": np.float32,
    "float64": np.float64,
    "bool": np.bool_,
}


@dataclass(frozen=True)
class ArraySpec:
    """The name, shape and storage of one Zarr array; the data is read and written in chunks.py."""

    name: str
    shape: tuple[int, ...]
    chunk_shape: tuple[int, ...]
    dtype: str  # a Zarr v3 data type, a key of DTYPES
    logical_dtype: str | None = None  # "bfloat16" if stored as uint16 bits, for readers without bfloat16
    block_rows: int | None = None  # rows per compressed block, if chunks are shards of compressed blocks

    @property
    def numpy_dtype(self) -> Any:
        """The dtype in memory: bfloat16 is read as uint16."""
        return np.dtype(DTYPES[self.dtype])

    @property
    def chunk_bytes(self) -> int:
        """The uncompressed bytes of a chunk, without its checksum."""
        return int(np.prod(self.chunk_shape)) * self.numpy_dtype.itemsize

    @property
    def n_chunks(self) -> int:
        """The number of chunks along the first axis; the other axes are not split."""
        return -(-self.shape[0] // self.chunk_shape[0])

    def chunk_file(self, chunk: int) -> str:
        """The file of a chunk, relative to the cache's folder: `layer_12/c.3.0`."""
        return f"{self.name}/" + ".".join(["c", str(chunk), *["0"] * (len(self.shape) - 1)])

    def rows_in_chunk(self, chunk: int) -> int:
        """The number of rows in a chunk; the last chunk can have fewer than the others."""
        return min(self.chunk_shape[0], self.shape[0] - chunk * self.chunk_shape[0])

    @property
    def fill_value(self) -> Any:
        """The value that a Zarr reader returns for a missing chunk file: NaN, so that lost rows are not taken for
        zeros.

        Integers and booleans have no NaN; for them the value is 0 or False. Earlier versions recorded 0 for every
        dtype.
        """
        if self.logical_dtype == "bfloat16":
            return NAN_BITS
        return {"bool": False, "float32": "NaN", "float64": "NaN", "bfloat16": "NaN"}.get(self.dtype, 0)

    def metadata(self) -> dict[str, Any]:
        """The content of the array's zarr.json."""
        little = {"name": "bytes", "configuration": {"endian": "little"}}
        checked: list[dict[str, Any]] = [little, {"name": "crc32c"}]
        codecs = checked
        if self.block_rows is not None:
            blosc = {"typesize": self.numpy_dtype.itemsize, **BLOSC}
            shard = {
                "chunk_shape": [self.block_rows, *self.chunk_shape[1:]],
                "codecs": [little, {"name": "blosc", "configuration": blosc}],
                "index_codecs": checked,
                "index_location": "end",
            }
            codecs = [{"name": "sharding_indexed", "configuration": shard}]
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(self.shape),
            "data_type": self.dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(self.chunk_shape)}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
            "fill_value": self.fill_value,
            "codecs": codecs,
            "attributes": {"logical_dtype": self.logical_dtype} if self.logical_dtype else {},
        }

    @classmethod
    def from_metadata(cls, name: str, metadata: dict[str, Any]) -> "ArraySpec":
        """The inverse of `metadata`."""
        shard = metadata["codecs"][0].get("configuration", {})
        return cls(
            name,
            tuple(metadata["shape"]),
            tuple(metadata["chunk_grid"]["configuration"]["chunk_shape"]),
            metadata["data_type"],
            metadata["attributes"].get("logical_dtype"),
            shard["chunk_shape"][0] if "chunk_shape" in shard else None,
        )


@dataclass(frozen=True)
class Layout:
    """The number of rows of a cache, how they are split into chunks and windows, and how they are stored."""

    rows: int
    window_rows: int = WINDOW_ROWS
    storage_dtype: str = "bfloat16"
    compress: bool = False

    @property
    def chunk_rows(self) -> int:
        """Rows per chunk of activations: 8192, or the window if that is smaller."""
        return min(CHUNK_ROWS, self.window_rows)

    @property
    def n_windows(self) -> int:
        """The number of windows; the last can be shorter than the others."""
        return -(-self.rows // self.window_rows)

    def row_range(self, index: int) -> range:
        """The rows of window number `index`."""
        return range(index * self.window_rows, min(self.rows, (index + 1) * self.window_rows))

    def rows_in(self, windows: Sequence[int]) -> int:
        """The total number of rows in these windows; no window may be listed twice."""
        missing_of_last = self.n_windows * self.window_rows - self.rows
        return len(windows) * self.window_rows - missing_of_last * (self.n_windows - 1 in windows)

    @property
    def block_rows(self) -> int:
        """Rows per compressed block: a divisor of the chunk, small so that a lane reads little more than it needs."""
        divisor = max(n for n in range(1, BLOCK_ROWS + 1) if self.chunk_rows % n == 0)
        return divisor if divisor >= BLOCK_ROWS // 4 else self.chunk_rows

    def activation_arrays(self, name: str, d_in: int) -> list[ArraySpec]:
        """The activation array `name` (layer_12), its row_norm and its moments, in this order."""
        logical = "bfloat16" if self.storage_dtype == "uint16" else None
        block = self.block_rows if self.compress else None
        return [
            ArraySpec(name, (self.rows, d_in), (self.chunk_rows, d_in), self.storage_dtype, logical, block),
            ArraySpec(f"{name}.row_norm", (self.rows,), (self.window_rows,), "float32"),
            ArraySpec(f"{name}.moments", (self.n_windows, 2, d_in), (1, 2, d_in), "float64"),
        ]

    def origin_arrays(self) -> list[ArraySpec]:
        """row_ctx and row_pos: the context and position that each row comes from."""
        return [
            ArraySpec("row_ctx", (self.rows,), (self.window_rows,), "uint32"),
            ArraySpec("row_pos", (self.rows,), (self.window_rows,), "uint16"),
        ]

    def arrays(self, widths: Mapping[str, int]) -> list[ArraySpec]:
        """The arrays that are divided among the windows; `widths` are the activation arrays as {name: d_in}."""
        return [
            *self.origin_arrays(),
            *(a for name, d_in in widths.items() for a in self.activation_arrays(name, d_in)),
        ]

    def chunk_range(self, array: ArraySpec, windows: range) -> range:
        """The chunks of `array` in these windows: several per window for activations, one for other arrays."""
        per_window = self.window_rows // array.chunk_shape[0] if len(array.shape) == 2 else 1
        return range(windows.start * per_window, min(windows.stop * per_window, array.n_chunks))


def token_arrays(contexts: int, length: int, *, rows: bool = False) -> list[ArraySpec]:
    """The arrays for `contexts` contexts of at most `length` tokens; with `rows`, also the mask of harvested tokens."""
    marks = [ArraySpec("tokens/rows", (contexts, length), (contexts, length), "bool")] if rows else []
    return [
        ArraySpec("tokens/ids", (contexts, length), (contexts, length), "uint32"),
        ArraySpec("tokens/length", (contexts,), (contexts,), "uint16"),
        ArraySpec("tokens/document", (contexts,), (contexts,), "uint32"),
        ArraySpec("tokens/held_out", (contexts,), (contexts,), "bool"),
        *marks,
    ]


def commit_file(window: int, array: str) -> str:
    """The path, relative to the cache's folder, of the commit for one window of an array."""
    return f"commits/{window:06d}.{array}.json"


def fingerprint_of(identity: dict[str, Any]) -> str:
    """The digest of everything in the identity that determines the bytes of the cache; names are left out."""
    return digest_of({key: without_name(value) for key, value in identity.items()})


def describe_difference(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """The entries that differ between two identities, as text: "dtype (float32, here bfloat16), model"."""
    pairs = {key: (without_name(theirs.get(key)), without_name(ours.get(key))) for key in {*theirs, *ours}}
    return ", ".join(
        key if isinstance(there, dict | list) or isinstance(here, dict | list) else f"{key} ({there}, here {here})"
        for key, (there, here) in sorted(pairs.items())
        if there != here
    )


def without_name(value: Any) -> Any:
    """An entry of the identity, with any names removed: models, adapters and datasets are identified by their
    revisions, wherever they are stored.
    """
    if not isinstance(value, dict):
        return value
    adapters = {"adapters": [one["revision"] for one in value["adapters"]]} if "adapters" in value else {}
    return {k: v for k, v in value.items() if k != "name"} | adapters


def group_metadata(attributes: dict[str, Any]) -> dict[str, Any]:
    """The zarr.json of a group."""
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes}


def is_ring_cache(folder: Path) -> bool:
    """Whether the folder is a ring, which keeps only some windows: the others are deleted or not harvested yet."""
    return (folder / "ring.json").exists()
