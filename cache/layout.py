"""What a cache is: the names, shapes and metadata of its arrays, and the records that say which bytes exist.

    activations/<model>--<dataset>--<digest8>/     a Zarr v3 group
        zarr.json            format version, identity (every input that changes a byte), rows, which arrays are whole
        layer_12/            "bfloat16" (rows, d_in), one file per chunk of rows: raw bytes and a crc32c
        layer_12.row_norm/   float32 (rows,): the L2 norm of each row
        layer_12.moments/    float64 (windows, 2, d_in): sum and sum of squares of each window's rows
        row_ctx/ row_pos/    uint32, uint16 (rows,): where in tokens/ids a row came from
        tokens/              the exact ids fed to the model: ids, length, document, held_out (these come last)
        commits/             one file per window and layer, written last: the only proof that they exist
        manifest.json        the union of the commits, with statistics, written once at the end

A chunk is `chunk_rows` rows, a window `window_rows` rows: a whole number of chunks, shuffled as one, written as one.
The last chunk of an array is stored at full size, as Zarr demands: row counts come from the metadata, never from sizes.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

FORMAT = 1
CHUNK_ROWS = 8192
WINDOW_ROWS = 262_144

DTYPES = {"bfloat16": np.uint16, "uint16": np.uint16, "uint32": np.uint32, "float32": np.float32, "float64": np.float64, "bool": np.bool_}  # fmt: skip


def layer_array(layer: int, site: str = "resid_post") -> str:
    """The array of a layer's residual stream, `layer_12`; other sites stand beside it, `layer_12.mlp_out`."""
    return f"layer_{layer:02d}" if site == "resid_post" else f"layer_{layer:02d}.{site}"


@dataclass(frozen=True)
class Array:
    """The metadata of one Zarr array."""

    name: str
    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    dtype: str  # a Zarr v3 data type
    logical_dtype: str | None = None  # "bfloat16" where the bits are stored as uint16 for readers without the type

    @property
    def numpy_dtype(self) -> Any:
        return np.dtype(DTYPES[self.dtype])

    @property
    def chunk_bytes(self) -> int:
        return int(np.prod(self.chunk)) * self.numpy_dtype.itemsize

    @property
    def chunks(self) -> int:
        """Chunks along the first axis; every other axis is one chunk."""
        return -(-self.shape[0] // self.chunk[0])

    def file(self, chunk: int) -> str:
        """The file of a chunk, relative to the cache."""
        return f"{self.name}/" + ".".join(["c", str(chunk), *["0"] * (len(self.shape) - 1)])

    def metadata(self) -> dict[str, Any]:
        fill: Any = {"bool": False, "float32": 0.0, "float64": 0.0, "bfloat16": 0.0}.get(self.dtype, 0)
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(self.shape),
            "data_type": self.dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(self.chunk)}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
            "fill_value": fill,
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
            "attributes": {"logical_dtype": self.logical_dtype} if self.logical_dtype else {},
        }

    @classmethod
    def from_metadata(cls, name: str, metadata: dict[str, Any]) -> "Array":
        return cls(
            name,
            tuple(metadata["shape"]),
            tuple(metadata["chunk_grid"]["configuration"]["chunk_shape"]),
            metadata["data_type"],
            metadata["attributes"].get("logical_dtype"),
        )


@dataclass(frozen=True)
class Layout:
    """Rows, and how they are cut into chunks and windows."""

    rows: int
    window_rows: int = WINDOW_ROWS
    storage_dtype: str = "bfloat16"

    @property
    def chunk_rows(self) -> int:
        return min(CHUNK_ROWS, self.window_rows)

    @property
    def windows(self) -> int:
        return -(-self.rows // self.window_rows)

    def window(self, index: int) -> range:
        """The rows of a window."""
        return range(index * self.window_rows, min(self.rows, (index + 1) * self.window_rows))

    def activations(self, layer: int, d_in: int) -> list[Array]:
        """The arrays that belong to a layer."""
        name = layer_array(layer)
        logical = "bfloat16" if self.storage_dtype == "uint16" else None
        return [
            Array(name, (self.rows, d_in), (self.chunk_rows, d_in), self.storage_dtype, logical),
            Array(f"{name}.row_norm", (self.rows,), (self.window_rows,), "float32"),
            Array(f"{name}.moments", (self.windows, 2, d_in), (1, 2, d_in), "float64"),
        ]

    def origins(self) -> list[Array]:
        """Where each row came from."""
        return [
            Array("row_ctx", (self.rows,), (self.window_rows,), "uint32"),
            Array("row_pos", (self.rows,), (self.window_rows,), "uint16"),
        ]


def tokens_arrays(contexts: int, length: int) -> list[Array]:
    return [
        Array("tokens/ids", (contexts, length), (contexts, length), "uint32"),
        Array("tokens/length", (contexts,), (contexts,), "uint16"),
        Array("tokens/document", (contexts,), (contexts,), "uint32"),
        Array("tokens/held_out", (contexts,), (contexts,), "bool"),
    ]


def group_metadata(attributes: dict[str, Any]) -> dict[str, Any]:
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes}


def home() -> Path:
    """Where `activations/` and `runs/` are: $SAE_HOME, or the working directory."""
    import os

    return Path(os.environ.get("SAE_HOME", "."))
