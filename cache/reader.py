"""Open a cache, check it, and read its rows.

    cache = Cache("activations/gemma-2-2b--pile-uncopyrighted--9f31c2aa")
    rows = cache.read_chunk("layer_12", 0)   # (8192, 2304) uint16: the bits of bfloat16, memory-mapped

Data that no commit lists does not exist. If data that a commit lists is missing or short, or does not match its
checksum, it is damaged: reading it raises DamagedError and never returns zeros.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from functools import cache, cached_property, lru_cache
from numbers import Integral
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ..common.cache_schemas import MANIFEST_RECORD, REPAIR_HINT
from ..common.errors import DamagedError, UsageError
from ..common.files import digest_of
from ..common.formatting import format_bytes, format_count
from . import bfloat16  # noqa: F401  (registers the dtype, so that zarr can read the arrays)
from .batch_order import BatchOrder
from .chunks import (
    RowReader,
    Shard,
    check_chunk,
    file_sizes,
    map_chunk,
    most_open_chunks,
    read_array,
    read_array_spec,
    read_attributes,
    row_reader,
)
from .consistency import check_manifest, layout_of
from .contexts import Contexts
from .hooks import Hook
from .layout import ArraySpec, is_ring_cache
from .models import is_digest, model_label, recorded_folders
from .outliers import describe_largest, outlier_warning, rows_above
from .reading import ENDLESS, Folder, StoredFile
from .record_files import read_hook_modules, verify_records
from .statistics import describe_statistics, mean_and_mean_square

Read = TypeVar("Read")

DECODED_BLOCKS = 128  # kept decoded (150 MB at d_in 2304): the next read of a lane needs the rest of the block


class Cache:
    """An activation cache, opened for reading. The cache keeps at most `open_chunks` memory maps open.

    Raises UsageError if the folder holds no cache or a cache of a newer format, DamagedError if a record is broken.
    """

    def __init__(self, folder: Path | str, open_chunks: int | None = None) -> None:
        self.folder = Path(folder)
        if not (self.folder / "zarr.json").exists():
            raise UsageError(f"{self.folder} holds no activation cache (no zarr.json). Create one with `sae harvest`.")
        self.attributes = read_attributes(self.folder)
        self.identity: dict[str, Any] = self.attributes["identity"]
        self.layout = layout_of(self.attributes)
        self.array = cache(self._read_array)
        # Shared by threads.
        self.open_chunks = open_chunks or most_open_chunks()
        self._open_chunk_cached = lru_cache(self.open_chunks)(self._open_chunk_uncached)
        self._decode_block = lru_cache(DECODED_BLOCKS)(self._decode_block_uncached)
        self._verified_files: set[str] = set()
        self._verify_lock = threading.Lock()

    @property
    def place(self) -> str:
        """The folder, or the address of a cache in a store."""
        return str(self.folder)

    def _with_files(self, files: Callable[[], Iterable[str]], read: Callable[[], Read]) -> Read:
        """Call `read`, which reads these `files`. If the cache is in a folder, the files are already present."""
        return read()

    def _files_of(self, *arrays: str) -> list[str]:
        """All files of small arrays."""
        chunks = [file for file in self.manifest["files"] if file.rsplit("/", 1)[0] in arrays]
        return [*(f"{array}/zarr.json" for array in arrays), *chunks]

    def __repr__(self) -> str:
        return f"Cache({self.place!r}: {self.model}, {', '.join(map(str, self.hooks))}, {self.rows:,} rows)"

    @property
    def model(self) -> str:
        """The name of the model: its Hub id, or its folder's name and the first digits of the digest."""
        return model_label(self.identity["model"])

    @property
    def model_argument(self) -> str:
        """The value of `sae harvest --model` for the model: its Hub id, or the last known folder."""
        name = self.identity["model"]["name"]
        return (
            next(iter(recorded_folders(self.folder)), name) if is_digest(self.identity["model"]["revision"]) else name
        )

    @property
    def fingerprint(self) -> str:
        """The digest of all inputs of the harvest that determine the bytes of the cache."""
        return self.attributes["fingerprint"]

    @property
    def rows(self) -> int:
        """The number of rows, the same for all arrays of activations."""
        return self.layout.rows

    @property
    def hooks(self) -> list[Hook]:
        """The hooks whose activations are complete, sorted. Raises DamagedError if a name is not a hook's name."""
        try:
            return sorted(map(Hook.from_array, self.attributes["complete"]))
        except DamagedError as error:
            raise DamagedError(f"{self.folder / 'zarr.json'} was overwritten: {error} {REPAIR_HINT}") from None

    @property
    def layers(self) -> list[int]:
        """The layers whose residual stream is complete."""
        return [hook.layer for hook in self.hooks if hook.site == "resid_post"]

    @property
    def committed_windows(self) -> list[int]:
        """The windows that are committed for at least one array."""
        return sorted({int(path.name.split(".")[0]) for path in (self.folder / "commits").glob("*.json")})

    @property
    def state(self) -> str:
        """What the cache contains, in a few words: its hooks, or "half written"."""
        if not is_ring_cache(self.folder):
            return ", ".join(map(str, self.hooks)) or "half written"
        present = self.committed_windows
        windows = f"windows {present[0]}-{present[-1]}" if present else "no windows"
        return f"a ring with {windows} of {self.layout.n_windows}"

    def describe(self) -> list[str]:
        """Lines that describe a complete cache: its model, text, rows and the statistics of its arrays.

        Raises like `manifest`.
        """
        model, data, layout, files = self.identity["model"], self.identity["data"], self.layout, self.manifest["files"]
        size = format_bytes(sum(record["bytes"] for record in files.values()))
        modules = read_hook_modules(self.folder)
        lines = [
            f"model    {self.model} at {model['revision'][:12]}, computed in {self.identity['dtype']}, "
            f"{self.identity['attention']} attention",
            f"text     {data['name']} at {data['revision'][:12]}, contexts of {self.identity['context']} tokens",
            *self.describe_contexts(),
            f"rows     {self.rows:,} in {format_count(layout.n_windows, 'window')} and "
            f"{format_count(len(self.chunk_rows), 'chunk')} per array, "
            f"{layout.storage_dtype}{', compressed' if layout.compress else ''}: {size}",
        ]
        for hook in self.hooks:
            module = f" = {modules[hook.array]}" if hook.array in modules else ""
            lines.append(f"{hook.array:8s} {hook.name}{module}: {describe_statistics(self.statistics(hook.array))}")
            lines += self.describe_outliers(hook)
        return lines

    def describe_contexts(self) -> list[str]:
        """Lines about the first token of contexts, and about skipped tokens."""
        identity = self.identity
        bos = identity["bos"] if "bos" in identity else int(self._read_contexts().ids[0, 0])
        lines = [f"bos      {'none' if bos is None else f'token id {bos}'}"]
        if positions := identity.get("skip_positions", 0):
            lines[0] += f"; the first {format_count(positions, 'position')} of each context are left out"
        if roles := (identity.get("chat") or {}).get("roles"):
            lines.append(f"chat     rows are the tokens written by {' and '.join(roles)}")
        return lines

    def describe_outliers(self, hook: Hook) -> list[str]:
        """Lines about an array's rows with the largest norms, and a warning if these rows dominate its statistics."""
        statistics = self.statistics(hook.array)
        lines = [f"{'':8s} {line}" for line in [describe_largest(statistics)] if line]
        return lines + [f"warning  {line}" for line in [outlier_warning(hook.array, statistics)] if line]

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """The content of manifest.json: complete arrays, their statistics, and the record of each file.

        Raises UsageError if the cache is half written or is a ring, DamagedError if the manifest is broken.
        """
        if is_ring_cache(self.folder):
            raise UsageError(
                f"{self.place} is {self.state}: only the `sae train --stream` that fills it can read it. "
                "To create a permanent cache, use `sae harvest`."
            )
        if not self.attributes["complete"]:
            raise UsageError(
                f"{self.place} is half written ({len(self.committed_windows)} of {self.layout.n_windows} windows). "
                "Run the same `sae harvest` again to finish it."
            )
        path = self.folder / "manifest.json"
        manifest = self._with_files(lambda: ["manifest.json"], lambda: MANIFEST_RECORD.read(path))
        check_manifest(path, manifest, self.attributes)
        return dict(manifest)

    def require_array(self, layer: int, site: str = "resid_post") -> str:
        """The name of the array of a layer and site, such as `layer_12`.

        Raises UsageError if the cache does not hold the complete array, and the errors that `manifest` raises.
        """
        self.manifest  # noqa: B018  (raises an error if the cache is half written)
        hook = Hook(layer, site)
        if hook not in self.hooks:
            hooks = ", ".join(map(str, self.hooks))
            raise UsageError(
                f"{self.place} holds {hooks}, not {hook}. Add it with `sae harvest {hook.cli_flags}` and the same text."
            )
        return hook.array

    def array_digest(self, name: str) -> str:
        """The sha256 of everything that determines the rows of an array: fingerprint, chunk checksums, outlier limit.

        The digest leaves out a limit that no row exceeds, unless the statistics lack `largest`, as in older versions.
        """
        files = {f: r["crc32c"] for f, r in self.manifest["files"].items() if f.startswith(f"{name}/")}
        statistics = self.statistics(name)
        limit = statistics["norm_limit"] if statistics["marked"] or "largest" not in statistics else None
        return digest_of([self.fingerprint, files, limit])

    def statistics(self, name: str) -> dict[str, Any]:
        """The statistics of an array from the manifest, without outlier rows; see `array_statistics`."""
        return self.manifest["statistics"][name]

    def mean(self, name: str) -> np.ndarray:
        """The mean row (d_in,) float64, without outlier rows."""
        norms, files, moments = self.row_norms(name), self.manifest["files"], f"{name}.moments"
        outliers = rows_above(norms, self.norm_limit(name))
        return self._with_files(
            lambda: [f"{name}/zarr.json", *self._files_of(moments)],
            lambda: mean_and_mean_square(self.folder, self.layout, name, outliers, norms, files, self._row_reader),
        )[0]

    @cached_property
    def _row_reader(self) -> RowReader:
        return row_reader(self.folder)

    def norm_limit(self, name: str) -> float | None:
        """The norm limit of an array: a row with a larger norm is an outlier. None if there is no limit."""
        return self.statistics(name)["norm_limit"]

    def outlier_rows(self, name: str) -> np.ndarray:
        """The rows that training must ignore because their norm is over the limit of `--max-norm`, ascending."""
        return rows_above(self.row_norms(name), self.norm_limit(name))

    def row_norms(self, name: str) -> np.ndarray:
        """The L2 norm of every row of an array, (rows,) float32. Raises DamagedError if a file is damaged."""
        norms, records = f"{name}.row_norm", self.manifest["files"]
        files = self._files_of(norms)
        return self._with_files(lambda: files, lambda: read_array(self.folder, norms, records, self.layout))

    def _read_array(self, name: str) -> ArraySpec:
        files = [f"{one}/zarr.json" for one in (name, name.removesuffix(".moments"))]  # for the width of the moments
        return self._with_files(lambda: files, lambda: read_array_spec(self.folder, name, self.layout))

    def _open_chunk(self, name: str, index: int) -> np.ndarray | Shard:
        return self._open_chunk_cached(name, index)

    def _open_chunk_uncached(self, name: str, index: int) -> np.ndarray | Shard:
        """A memory-mapped chunk; its checksum is verified the first time that it is opened."""
        array = self.array(name)
        file = array.chunk_file(index)
        files = self.manifest["files"]
        if file not in files:
            raise UsageError(f"{self.place} has no chunk {index} of {name}: the manifest does not list {file}.")
        with self._verify_lock:  # two threads that open a chunk at the same time verify it once
            if file not in self._verified_files:
                check_chunk(self.folder, array, index, files)
                self._verified_files.add(file)
        if array.block_rows is None:
            return map_chunk(self.folder, array, index)
        return Shard(self.folder, array, index, files[file]["bytes"])

    def _decode_block_uncached(self, name: str, chunk: int, block: int) -> np.ndarray:
        shard = self._open_chunk(name, chunk)
        assert isinstance(shard, Shard)
        return shard.decode_block(block)

    def read_chunk(self, name: str, index: int) -> np.ndarray:
        """The rows of chunk number `index` of an array.

        Activations are (rows, d_in) uint16, the bits of bfloat16: a read-only memory map, or a decoded copy if the
        cache is compressed.

        Raises UsageError if the manifest does not list the chunk, DamagedError if its file is damaged.
        """
        chunk = self._open_chunk(name, index)
        if isinstance(chunk, np.ndarray):
            return chunk
        rows = np.concatenate([chunk.decode_block(n) for n in range(len(chunk.index))])
        return rows[: self.array(name).rows_in_chunk(index)]

    def read_rows(self, name: str, index: int, start: int, count: int) -> list[np.ndarray]:
        """`count` rows of chunk number `index`, starting at row `start` of the chunk, as parts to concatenate.

        The parts are views of the memory map, or of decoded blocks if the cache is compressed.
        """
        chunk, stop = self._open_chunk(name, index), start + count
        if isinstance(chunk, np.ndarray):
            return [chunk[start:stop]]
        size = chunk.block_rows
        return [
            self._decode_block(name, index, block)[max(0, start - block * size) : stop - block * size]
            for block in range(start // size, -(-stop // size))
        ]

    def stored_files(self, name: str) -> tuple[Folder, list[StoredFile | None]] | None:
        """The local folder and the file of each chunk of an array, if the cache is in a store; otherwise None."""
        return None

    @property
    def chunk_rows(self) -> list[int]:
        """The number of rows in each chunk of activations."""
        size = self.layout.chunk_rows
        return [min(size, self.rows - start) for start in range(0, self.rows, size)]

    def batches(
        self, layer: int, *, batch_size: int = 2048, site: str = "resid_post", seed: int = 0, batch: int = 0,
        epochs: int | None = 1, device: str = "cpu", dtype: str = "float32",
    ) -> Iterator[Any]:  # fmt: skip
        """Iterate over shuffled batches (batch_size, d_in) of raw activations, in the order that training reads them.

        Args:
            seed: the order of the rows; training's `--shuffle-seed`.
            batch: the number of the first batch.
            epochs: stop after this many epochs; None never stops.
            dtype: float32 or bfloat16. Each batch is a new tensor on `device`.

        Raises UsageError if an argument is invalid, the cache does not hold the complete layer, or it has fewer rows
        than a batch.
        """
        import torch

        from ..common.device import resolve_device
        from .loader import copy_batches, open_loader

        if dtype not in ("float32", "bfloat16"):
            raise UsageError(f"unknown dtype {dtype!r}: expected float32 or bfloat16.")
        for argument, value in (("batch_size", batch_size), ("seed", seed), ("batch", batch)):
            if not isinstance(value, Integral):
                raise UsageError(f"invalid {argument} {value!r}: expected an integer.")
        if batch_size < 1:
            raise UsageError(f"invalid batch_size {batch_size}: expected a positive number.")
        if batch < 0:
            raise UsageError(f"invalid batch {batch}: expected 0 or more.")
        name = self.require_array(layer, site)
        order = BatchOrder(self.chunk_rows, batch_size, seed)
        stop = ENDLESS if epochs is None else epochs * order.batches_per_epoch
        loader = open_loader(self, name, batch_size, seed=seed, batch=batch, device=resolve_device(device), stop=stop)
        return copy_batches(loader, stop, getattr(torch, dtype))

    def contexts(self, *, held_out: bool) -> Contexts:
        """The harvested contexts, or the contexts of the held-out documents."""
        contexts = self._read_contexts()
        return contexts.select(contexts.held_out == held_out)

    def _read_contexts(self) -> Contexts:
        def files() -> list[str]:
            arrays = sorted({file.rsplit("/", 1)[0] for file in self.manifest["files"] if file.startswith("tokens/")})
            return ["tokens/commit.json", *self._files_of(*arrays)]

        return self._with_files(files, lambda: Contexts.read(self.folder, self.attributes["tokens"]))

    def verify(self) -> Iterator[str]:
        """Read every record and every byte, and yield the name of each verified file in the manifest.

        Raises DamagedError at the first damaged file.
        """
        manifest = self.manifest
        verify_records(self.folder, self.attributes)
        for file in manifest["files"]:
            self.verify_file(file)
            yield file

    def check_sizes(self) -> None:
        """Raise DamagedError if a file in the manifest is missing or has another size. Reads no activations."""
        sizes = self._file_sizes()
        damaged = [file for file, record in self.manifest["files"].items() if sizes.get(file) != record["bytes"]]
        if damaged:
            names = ", ".join(damaged[:3]) + (f" and {len(damaged) - 3:,} more" if len(damaged) > 3 else "")
            raise DamagedError(
                f"{len(damaged):,} files of {self.place} are missing or truncated: {names}. {REPAIR_HINT}"
            )

    def _file_sizes(self) -> dict[str, int]:
        return file_sizes(self.folder, self.manifest["files"])

    def verify_file(self, file: str) -> None:
        """Read a file listed in the manifest and raise DamagedError unless it matches its record."""
        name, chunk = file.rsplit("/", 1)
        check_chunk(self.folder, self.array(name), int(chunk.split(".")[1]), self.manifest["files"])
