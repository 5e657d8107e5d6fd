"""What a cache is: the names, shapes and metadata of its arrays, and the records that say which bytes exist.

    activations/<model>--<dataset>--<digest8>/     a Zarr v3 group
        zarr.json            format version, identity (every input that changes a byte), rows, which arrays are whole
        layer_12/            "bfloat16" (rows, d_in), one file per chunk of rows: raw bytes and a crc32c, or a compressed shard
        layer_12.row_norm/   float32 (rows,): the L2 norm of each row
        layer_12.moments/    float64 (windows, 2, d_in): sum and sum of squares of each window's rows
        layer_12.mlp_out/    other sites of a layer beside it, each with its row_norm and moments
        row_ctx/ row_pos/    uint32, uint16 (rows,): where in tokens/ids a row came from
        tokens/              the exact ids fed to the model: ids, length, document, held_out (these come last)
        commits/             one file per window and array, written last: the only proof that they exist
        harvest.json         what was asked for, so that a damaged window can be harvested again
        manifest.json        the union of the commits, with statistics, written once at the end
        ring.json            instead of a manifest, where `sae train --stream` removes windows that it has read

A chunk is `chunk_rows` rows, a window `window_rows` rows: a whole number of chunks, shuffled as one, written as one.
The last chunk of an array is stored at full size, as Zarr demands: row counts come from the metadata, never from sizes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..common.files import digest_of

FORMAT = 1
CHUNK_ROWS = 8192
WINDOW_ROWS = 262_144
BLOCK_ROWS = 256
# The high bytes of bfloat16 (sign and exponent) compress, the low ones are noise: shuffled bytewise, the cheapest level does
# as well as any; blosc's own choice of block size would lose half of the gain.
BLOSC = {"cname": "zstd", "clevel": 1, "shuffle": "shuffle", "blocksize": 1 << 20}

DTYPES = {"bfloat16": np.uint16, "uint16": np.uint16, "uint32": np.uint32, "float32": np.float32, "float64": np.float64, "bool": np.bool_}  # fmt: skip


SITES = {
    "resid_post": "blocks.{}.hook_resid_post",
    "mlp_out": "blocks.{}.hook_mlp_out",
    "attn_z": "blocks.{}.attn.hook_z",
}  # with TransformerLens' names


class Hook(NamedTuple):
    """Where activations are read: a site of a layer."""

    layer: int
    site: str = "resid_post"

    def __str__(self) -> str:
        return f"layer {self.layer}" if self.site == "resid_post" else f"{self.site} of layer {self.layer}"

    @property
    def flags(self) -> str:
        """The options of the command line that ask for it."""
        return f"--layer {self.layer}" + (f" --site {self.site}" if self.site != "resid_post" else "")

    @property
    def array(self) -> str:
        """`layer_12` for the residual stream; other sites stand beside it, `layer_12.mlp_out`."""
        return f"layer_{self.layer:02d}" if self.site == "resid_post" else f"layer_{self.layer:02d}.{self.site}"

    @property
    def name(self) -> str:
        return SITES[self.site].format(self.layer)

    @classmethod
    def of(cls, array: str) -> "Hook":
        layer, _, site = array.removeprefix("layer_").partition(".")
        return cls(int(layer), site or "resid_post")


@dataclass(frozen=True)
class Array:
    """The metadata of one Zarr array."""

    name: str
    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    dtype: str  # a Zarr v3 data type
    logical_dtype: str | None = None  # "bfloat16" where the bits are stored as uint16 for readers without the type
    block: int | None = None  # rows compressed as one, where a chunk is a shard of compressed blocks

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
        little = {"name": "bytes", "configuration": {"endian": "little"}}
        checked: list[dict[str, Any]] = [little, {"name": "crc32c"}]
        codecs = checked
        if self.block is not None:
            blosc = {"typesize": self.numpy_dtype.itemsize, **BLOSC}
            shard = {
                "chunk_shape": [self.block, *self.chunk[1:]],
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
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(self.chunk)}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
            "fill_value": fill,
            "codecs": codecs,
            "attributes": {"logical_dtype": self.logical_dtype} if self.logical_dtype else {},
        }

    @classmethod
    def from_metadata(cls, name: str, metadata: dict[str, Any]) -> "Array":
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
    """Rows, and how they are cut into chunks and windows."""

    rows: int
    window_rows: int = WINDOW_ROWS
    storage_dtype: str = "bfloat16"
    compress: bool = False

    @property
    def chunk_rows(self) -> int:
        return min(CHUNK_ROWS, self.window_rows)

    @property
    def windows(self) -> int:
        return -(-self.rows // self.window_rows)

    def window(self, index: int) -> range:
        """The rows of a window."""
        return range(index * self.window_rows, min(self.rows, (index + 1) * self.window_rows))

    @property
    def block_rows(self) -> int:
        """Rows that are compressed as one: few, so that a lane reads little more than it needs, and a whole part of a chunk."""
        whole = max(n for n in range(1, BLOCK_ROWS + 1) if self.chunk_rows % n == 0)
        return whole if whole >= BLOCK_ROWS // 4 else self.chunk_rows

    def activations(self, name: str, d_in: int) -> list[Array]:
        """The arrays that belong to the array `name` of activations; itself first."""
        logical = "bfloat16" if self.storage_dtype == "uint16" else None
        block = self.block_rows if self.compress else None
        return [
            Array(name, (self.rows, d_in), (self.chunk_rows, d_in), self.storage_dtype, logical, block),
            Array(f"{name}.row_norm", (self.rows,), (self.window_rows,), "float32"),
            Array(f"{name}.moments", (self.windows, 2, d_in), (1, 2, d_in), "float64"),
        ]

    def origins(self) -> list[Array]:
        """Where each row came from."""
        return [
            Array("row_ctx", (self.rows,), (self.window_rows,), "uint32"),
            Array("row_pos", (self.rows,), (self.window_rows,), "uint16"),
        ]

    def arrays(self, widths: Mapping[str, int]) -> list[Array]:
        """Every array that windows write, for arrays of activations by name and width."""
        return [*self.origins(), *(a for name, d_in in widths.items() for a in self.activations(name, d_in))]

    def chunks_of(self, array: Array, windows: range) -> range:
        """An array's chunks in these windows: several a window where it holds activations, else one."""
        each = self.window_rows // array.chunk[0] if len(array.shape) == 2 else 1
        return range(windows.start * each, min(windows.stop * each, array.chunks))


def tokens_arrays(contexts: int, length: int) -> list[Array]:
    return [
        Array("tokens/ids", (contexts, length), (contexts, length), "uint32"),
        Array("tokens/length", (contexts,), (contexts,), "uint16"),
        Array("tokens/document", (contexts,), (contexts,), "uint32"),
        Array("tokens/held_out", (contexts,), (contexts,), "bool"),
    ]


def fingerprint_of(identity: dict[str, Any]) -> str:
    """The digest of everything that decides a byte: what a model or a text is called is not."""
    return digest_of({key: unnamed(value) for key, value in identity.items()})


def unnamed(value: Any) -> Any:
    """An entry of the identity without its name: a model and a text are what their revisions say, wherever they are."""
    return {k: v for k, v in value.items() if k != "name"} if isinstance(value, dict) else value


def group_metadata(attributes: dict[str, Any]) -> dict[str, Any]:
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes}
