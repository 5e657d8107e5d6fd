"""Read a cache: open, check, map.

    cache = open_cache("activations/gemma-2-2b--pile-uncopyrighted--9f31c2aa")
    rows = cache.chunk("layer_12", 0)        # (8192, 2304) uint16, mapped, the bits of bfloat16

What no commit lists does not exist. What one lists and is missing, short or of another checksum is corruption: it is
named, and never read as zeros.
"""

import os
import shutil
import threading
from collections.abc import Iterator
from functools import cache, cached_property, lru_cache
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np

from ..common.errors import DamagedError, SaeError, UsageError
from ..common.files import digest_of, folder_bytes, read_json, sae_home, writer_lock
from . import bfloat16  # noqa: F401  (zarr can read the arrays from here on)
from .chunks import MEND, Shard, attributes_of, check_chunk, map_rows, read_array, read_whole, rows_in
from .contexts import Contexts
from .layout import Array, Hook, Layout
from .statistics import moments, outlier_rows

OPEN_MAPS = 256  # kept open, several for each lane: opening a map anew at every touch halves the speed
DECODED_BLOCKS = 128  # of a compressed cache, 150 MB at d_in 2304: a lane comes back for the rest of its block


class Cache:
    """An open cache. Raises UsageError when it is none or of a newer format, DamagedError when a record is broken."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        if not (self.folder / "zarr.json").exists():
            raise UsageError(f"{self.folder} holds no activation cache (no zarr.json). Make one with `sae harvest`.")
        self.attributes = attributes_of(self.folder)
        self.identity: dict[str, Any] = self.attributes["identity"]
        self.layout = Layout(*(self.attributes[name] for name in ("rows", "window_rows", "storage_dtype", "compress")))
        self.array = cache(self._read_array)
        self._opened = lru_cache(OPEN_MAPS)(self._open_chunk)  # threads may share them
        self._block = lru_cache(DECODED_BLOCKS)(self._decode_block)
        self._checked: set[str] = set()
        self._checking = threading.Lock()

    def __repr__(self) -> str:
        return f"Cache({str(self.folder)!r}: {self.model}, {', '.join(map(str, self.hooks))}, {self.rows:,} rows)"

    @property
    def model(self) -> str:
        return self.identity["model"]["name"]

    @property
    def fingerprint(self) -> str:
        """The digest of everything that decides a byte."""
        return self.attributes["fingerprint"]

    @property
    def rows(self) -> int:
        return self.layout.rows

    @property
    def hooks(self) -> list[Hook]:
        """Where the activations that are whole were read."""
        return sorted(map(Hook.of, self.attributes["complete"]))

    @property
    def layers(self) -> list[int]:
        """The layers whose residual stream is whole."""
        return [hook.layer for hook in self.hooks if hook.site == "resid_post"]

    @property
    def begun(self) -> list[int]:
        """The windows that are committed, in some array at least."""
        return sorted({int(path.name.split(".")[0]) for path in (self.folder / "commits").glob("*.json")})

    @property
    def state(self) -> str:
        """What of it is there, in a few words."""
        if not is_ring(self.folder):
            return ", ".join(map(str, self.hooks)) or "half written"
        there = f"windows {self.begun[0]}-{self.begun[-1]}" if self.begun else "no windows left"
        return f"rolling, {there} of {self.layout.windows}"

    @cached_property
    def manifest(self) -> dict[str, Any]:
        if is_ring(self.folder):
            raise UsageError(
                f"{self.folder} is {self.state}: only the `sae train --stream` that fills it reads it. "
                "For a cache to keep, `sae harvest`."
            )
        if not self.attributes["complete"]:
            raise UsageError(
                f"{self.folder} is half written ({len(self.begun)} of {self.layout.windows} windows). Run the same `sae harvest` again to finish it."
            )
        manifest = read_json(self.folder / "manifest.json", "fingerprint", "complete", "statistics", "files")
        if manifest["fingerprint"] != self.fingerprint:
            raise DamagedError(f"{self.folder / 'manifest.json'} comes from another harvest. {MEND}")
        return manifest

    def require(self, layer: int, site: str = "resid_post") -> str:
        """The array of a layer's site, `layer_12`; UsageError when the cache does not hold it whole."""
        self.manifest  # noqa: B018  (a half-written cache has its own sentence)
        hook = Hook(layer, site)
        if hook not in self.hooks:
            held = ", ".join(map(str, self.hooks))
            raise UsageError(
                f"{self.folder} holds {held}, not {hook}. Add it with `sae harvest {hook.flags}` and the same text."
            )
        return hook.array

    def digest(self, name: str) -> str:
        """What the rows of an array are: sha256 over the identity, the checksums of its chunks, and what is marked."""
        files = {f: r["crc32c"] for f, r in self.manifest["files"].items() if f.startswith(f"{name}/")}
        return digest_of([self.fingerprint, files, self.statistics(name)["norm_limit"]])

    def statistics(self, name: str) -> dict[str, Any]:
        return self.manifest["statistics"][name]

    def mean(self, name: str) -> np.ndarray:
        """The mean unmarked row (d_in,), float64."""
        return moments(self.folder, self.layout, name, self.marked(name), self.manifest["files"])[0]

    def marked(self, name: str) -> np.ndarray:
        """Which rows are marked, ascending: training gives them no weight."""
        return outlier_rows(read_whole(self.folder, f"{name}.row_norm"), self.statistics(name)["norm_limit"])

    def _read_array(self, name: str) -> Array:
        """The shape and type of an array."""
        return read_array(self.folder, name)

    def _open_chunk(self, name: str, index: int) -> np.ndarray | Shard:
        """A chunk, mapped and kept open, compared with its record once."""
        array = self.array(name)
        file = array.file(index)
        record = self.manifest["files"].get(file)
        if record is None:
            raise UsageError(f"{self.folder} has no whole chunk {index} of {name}: the manifest does not list {file}.")
        with self._checking:  # two threads that come to a chunk together check it once
            if file not in self._checked:
                check_chunk(self.folder, array, index, record)
                self._checked.add(file)
        if array.block is None:
            return map_rows(self.folder, array, index)
        return Shard(self.folder, array, index, record["bytes"])

    def _decode_block(self, name: str, chunk: int, block: int) -> np.ndarray:
        return self._opened(name, chunk).block(block)

    def chunk(self, name: str, index: int) -> np.ndarray:
        """A chunk's rows (rows, d_in) as uint16, the bits of bfloat16: a read-only map, or decoded when compressed."""
        opened, array = self._opened(name, index), self.array(name)
        if isinstance(opened, np.ndarray):
            return opened
        return np.concatenate([opened.block(n) for n in range(len(opened.index))])[: rows_in(array, index)]

    def rows_of(self, name: str, index: int, start: int, count: int) -> list[np.ndarray]:
        """The rows of a chunk from `start` on, in parts: of the read-only map, or of what is decoded when compressed."""
        opened, stop = self._opened(name, index), start + count
        if isinstance(opened, np.ndarray):
            return [opened[start:stop]]
        size = opened.array.block
        return [
            self._block(name, index, block)[max(0, start - block * size) : stop - block * size]
            for block in range(start // size, -(-stop // size))
        ]

    @property
    def chunk_rows(self) -> list[int]:
        """How many rows each chunk holds."""
        size = self.layout.chunk_rows
        return [min(size, self.rows - start) for start in range(0, self.rows, size)]

    def batches(
        self, layer: int, *, batch_size: int = 2048, site: str = "resid_post", seed: int = 0, batch: int = 0,
        epochs: int | None = 1, device: str = "cpu", dtype: str = "float32",
    ) -> Iterator[Any]:  # fmt: skip
        """Shuffled batches (batch_size, d_in) of raw activations, those that training reads with this `--order-seed`.

        From batch number `batch` to the end of so many `epochs`; None goes on for ever. Tensors of `dtype`, float32 or
        bfloat16, on `device`; each is the caller's. Raises UsageError when the cache does not hold the layer whole, or
        has fewer rows than a batch.
        """
        import torch

        from ..common.device import best_device
        from .loader import copy_batches, open_loader

        if dtype not in ("float32", "bfloat16"):
            raise UsageError(
                f"Batches of dtype {dtype!r} are not given: float32 or bfloat16, in which they are stored."
            )
        for what, number in (("batch_size", batch_size), ("seed", seed), ("batch", batch)):
            if not isinstance(number, Integral):
                raise UsageError(f"{what}={number!r} has to be a whole number.")
        if batch_size < 1 or batch < 0:
            raise UsageError(f"batch_size={batch_size} has to be positive, and batch={batch} not negative.")
        name = self.require(layer, site)
        stream = open_loader(self, name, batch_size, seed=seed, batch=batch, device=best_device(device))
        last = None if epochs is None else epochs * stream.plan.batches_per_epoch
        return copy_batches(stream, last, getattr(torch, dtype))

    def contexts(self, *, held_out: bool) -> Contexts:
        """The text: what was harvested, or the documents that were held out."""
        everything = Contexts.read(self.folder)
        return everything.select(everything.held_out == held_out)

    def verify(self) -> Iterator[str]:
        """Check every byte; yields the name of each file that was read."""
        for file in self.manifest["files"]:
            self.check(file)
            yield file

    def check_sizes(self) -> None:
        """DamagedError when a file of the manifest is missing or of another size; reads no activations."""
        folders: dict[str, dict[str, int]] = {}
        for file in self.manifest["files"]:
            name = file.rsplit("/", 1)[0]
            if name not in folders and (self.folder / name).is_dir():
                with os.scandir(self.folder / name) as entries:
                    folders[name] = {f"{name}/{entry.name}": entry.stat().st_size for entry in entries}
        found = {file: size for sizes in folders.values() for file, size in sizes.items()}
        wrong = [file for file, record in self.manifest["files"].items() if found.get(file) != record["bytes"]]
        if wrong:
            named = ", ".join(wrong[:3]) + (f" and {len(wrong) - 3:,} more" if len(wrong) > 3 else "")
            raise DamagedError(f"{len(wrong):,} files of {self.folder} are missing or cut off: {named}. {MEND}")

    def check(self, file: str) -> None:
        """DamagedError unless a file of the manifest is as it was recorded."""
        name, chunk = file.rsplit("/", 1)
        check_chunk(self.folder, self.array(name), int(chunk.split(".")[1]), self.manifest["files"][file])


def check_removable(folder: Path) -> None:
    """UsageError unless the folder is a cache, or what was begun of one or is left of it."""
    if not any((folder / record).exists() for record in ("harvest.json", "tokens/commit.json", "tokens/draft")):
        raise UsageError(f"{folder} holds no activation cache; nothing was removed.")


def remove_cache(folder: Path) -> int:
    """Remove a cache, or what was begun of one; returns the bytes freed. UsageError when the folder is none."""
    check_removable(folder)
    with writer_lock(folder, "sae cache rm"):
        size = folder_bytes(folder)
        shutil.rmtree(folder)
    return size


def recorded_modules(folder: Path) -> dict[str, str]:
    """Array -> where its hook is in transformers' words, as the harvest recorded it; older harvests did not."""
    try:
        return read_json(folder / "harvest.json", "modules")["modules"]
    except DamagedError:  # or missing
        return {}


def is_ring(folder: Path) -> bool:
    """Whether a cache keeps only a ring of its windows: the others were removed, or are still to come."""
    return (folder / "ring.json").exists()


def open_cache(folder: Path | str) -> Cache:
    """Open the activation cache in `folder`."""
    return Cache(folder)


def list_caches(root: Path | None = None) -> dict[Path, Cache | SaeError]:
    """Every cache under `activations/` by its folder; one that does not open stands there as its error."""
    found: dict[Path, Cache | SaeError] = {}
    for path in sorted((root or sae_home() / "activations").glob("*/zarr.json")):
        try:
            found[path.parent] = Cache(path.parent)
        except SaeError as error:
            found[path.parent] = error
    return found


def model_name(asked: str | None) -> str | None:
    """What a cache calls the model that somebody asks for: a folder by its whole path."""
    return str(Path(asked).resolve()) if asked and Path(asked).is_dir() else asked


def find_cache(model: str | None, hook: Hook, root: Path | None = None) -> Cache:
    """The one whole cache of this model and hook; UsageError lists them when it is none or several."""
    everything, model = list_caches(root), model_name(model)
    opened = [cache for cache in everything.values() if isinstance(cache, Cache)]
    matching = [c for c in opened if model in (None, c.model) and hook in c.hooks]
    if len(matching) == 1:
        return matching[0]
    if matching:
        listed = "\n".join(f"  --cache {c.folder}   ({c.rows:,} rows, {c.identity['data']['name']})" for c in matching)
        raise UsageError(f"{len(matching)} caches hold {hook}. Say which:\n{listed}")
    unfinished = [c for c in opened if not c.attributes["complete"] and not is_ring(c.folder)]
    if unfinished:
        raise UsageError(
            f"No whole cache holds {hook}; {unfinished[0].folder} is half written. Run the same `sae harvest` again to finish it."
        )
    models = {model} if model else {c.model for c in opened}
    named = f" --model {models.pop()}" if len(models) == 1 else ""
    held = "".join(f"\n  {c.folder} holds {', '.join(map(str, c.hooks))} of {c.model}" for c in opened if c.hooks)
    broken = "".join(f"\n  {error}" for error in everything.values() if isinstance(error, SaeError))
    raise UsageError(
        f"No cache holds {hook}{f' of {model}' if model else ''}. Make one with `sae harvest {hook.flags}{named}`.{held}{broken}"
    )
