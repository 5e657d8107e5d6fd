"""Read a cache: open, check, map.

    cache = open_cache("activations/gemma-2-2b--pile-uncopyrighted--9f31c2aa")
    rows = cache.chunk("layer_12", 0)        # (8192, 2304) uint16, mapped, the bits of bfloat16

What no commit lists does not exist. What one lists and is missing, short or of another checksum is corruption: it is
named, and never read as zeros.
"""

from collections.abc import Iterator
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from . import bfloat16  # noqa: F401  (zarr can read the arrays from here on)
from .chunks import MEND, check_chunk, map_chunk, read_array, read_whole
from .contexts import Contexts
from .errors import DamagedError, SaeError, UsageError
from .files import digest_of, read_json
from .layout import FORMAT, Array, Layout, home, layer_array

OPEN_MAPS = 256  # kept open, several for each lane: opening a map anew at every touch halves the speed


class Cache:
    """An open cache. Raises UsageError when it is none or of a newer format, DamagedError when a record is broken."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        if not (self.folder / "zarr.json").exists():
            raise UsageError(f"{self.folder} holds no activation cache (no zarr.json). Make one with `sae harvest`.")
        self.attributes: dict[str, Any] = read_json(self.folder / "zarr.json", "attributes")["attributes"]
        if self.attributes.get("format") is None:
            raise UsageError(f"{self.folder} is a Zarr group but no activation cache. Make one with `sae harvest`.")
        if self.attributes["format"] > FORMAT:
            raise UsageError(
                f"{self.folder} was written in format {self.attributes['format']}; this version reads up to {FORMAT}. Upgrade."
            )
        self.identity: dict[str, Any] = self.attributes["identity"]
        self.layout = Layout(self.attributes["rows"], self.attributes["window_rows"], self.attributes["storage_dtype"])
        self.array = cache(self._read_array)
        self.chunk = lru_cache(OPEN_MAPS)(self._open_chunk)  # threads may share it
        self._checked: set[str] = set()

    def __repr__(self) -> str:
        return f"Cache({str(self.folder)!r}: {self.model}, layers {self.layers}, {self.rows:,} rows)"

    @property
    def model(self) -> str:
        return self.identity["model"]["name"]

    @property
    def rows(self) -> int:
        return self.layout.rows

    @property
    def layers(self) -> list[int]:
        """The layers that are whole."""
        return sorted(int(a.removeprefix("layer_")) for a in self.attributes["complete"] if "." not in a)

    @cached_property
    def manifest(self) -> dict[str, Any]:
        if not self.attributes["complete"]:
            begun = {path.name.split(".")[0] for path in (self.folder / "commits").glob("*.json")}
            raise UsageError(
                f"{self.folder} is half written ({len(begun)} of {self.layout.windows} windows). Run the same `sae harvest` again to finish it."
            )
        manifest = read_json(self.folder / "manifest.json", "fingerprint", "complete", "statistics", "files")
        if manifest["fingerprint"] != self.attributes["fingerprint"]:
            raise DamagedError(f"{self.folder / 'manifest.json'} comes from another harvest. {MEND}")
        return manifest

    def require(self, layer: int) -> str:
        """The array of a layer; UsageError when the cache does not hold it whole."""
        self.manifest  # noqa: B018  (a half-written cache has its own sentence)
        if layer not in self.layers:
            raise UsageError(
                f"{self.folder} holds layers {self.layers}, not {layer}. Add it with `sae harvest --layer {layer}` and the same text."
            )
        return layer_array(layer)

    def digest(self, layer: int) -> str:
        """What the bytes of a layer are: sha256 over the identity and the checksums of its chunks."""
        prefix = f"{self.require(layer)}/"
        return digest_of(
            [
                self.attributes["fingerprint"],
                {f: r["crc32c"] for f, r in self.manifest["files"].items() if f.startswith(prefix)},
            ]
        )

    def statistics(self, layer: int) -> dict[str, Any]:
        return self.manifest["statistics"][self.require(layer)]

    def mean(self, layer: int) -> np.ndarray:
        """The mean row (d_in,), float64."""
        return read_whole(self.folder, f"{self.require(layer)}.moments")[:, 0].sum(0) / self.rows

    def _read_array(self, name: str) -> Array:
        """The shape and type of an array."""
        return read_array(self.folder, name)

    def _open_chunk(self, name: str, index: int) -> np.ndarray:
        """A chunk's rows as a map that is kept open, compared with its record once. Copy from it; never hand it out."""
        array = self.array(name)
        file = array.file(index)
        if file in self._checked:
            return map_chunk(self.folder, array, index)
        record = self.manifest["files"].get(file)
        if record is None:
            raise UsageError(f"{self.folder} has no whole chunk {index} of {name}: the manifest does not list {file}.")
        rows = check_chunk(self.folder, array, index, record["crc32c"])
        self._checked.add(file)
        return rows

    def chunk_rows(self, layer: int) -> list[int]:
        """How many rows each chunk holds."""
        size = self.layout.chunk_rows
        return [min(size, self.rows - start) for start in range(0, self.rows, size)]

    def contexts(self, *, held_out: bool) -> Contexts:
        """The text: what was harvested, or the documents that were held out."""
        everything = Contexts.read(self.folder)
        return everything.select(everything.held_out == held_out)

    def verify(self) -> Iterator[str]:
        """Check every byte; yields the name of each file that was read."""
        for file, record in self.manifest["files"].items():
            name, chunk = file.rsplit("/", 1)
            check_chunk(self.folder, self.array(name), int(chunk.split(".")[1]), record["crc32c"])
            yield file


def open_cache(folder: Path | str) -> Cache:
    """Open the activation cache in `folder`."""
    return Cache(folder)


def caches(root: Path | None = None) -> dict[Path, Cache | SaeError]:
    """Every cache under `activations/` by its folder; one that does not open stands there as its error."""
    found: dict[Path, Cache | SaeError] = {}
    for path in sorted((root or home() / "activations").glob("*/zarr.json")):
        try:
            found[path.parent] = Cache(path.parent)
        except SaeError as error:
            found[path.parent] = error
    return found


def find_cache(model: str | None, layer: int, root: Path | None = None) -> Cache:
    """The one whole cache of this model and layer; UsageError lists them when it is none or several."""
    everything = caches(root)
    opened = [cache for cache in everything.values() if isinstance(cache, Cache)]
    matching = [c for c in opened if model in (None, c.model) and layer in c.layers]
    if len(matching) == 1:
        return matching[0]
    if matching:
        listed = "\n".join(f"  --cache {c.folder}   ({c.rows:,} rows, {c.identity['data']['name']})" for c in matching)
        raise UsageError(f"{len(matching)} caches hold layer {layer}. Say which:\n{listed}")
    unfinished = [c for c in opened if not c.attributes["complete"]]
    if unfinished:
        raise UsageError(
            f"No whole cache holds layer {layer}; {unfinished[0].folder} is half written. Run the same `sae harvest` again to finish it."
        )
    models = {model} if model else {c.model for c in opened}
    named = f" --model {models.pop()}" if len(models) == 1 else ""
    held = "".join(f"\n  {c.folder} holds layers {c.layers} of {c.model}" for c in opened)
    broken = "".join(f"\n  {error}" for error in everything.values() if isinstance(error, SaeError))
    raise UsageError(
        f"No cache holds layer {layer}{f' of {model}' if model else ''}. Make one with `sae harvest --layer {layer}{named}`.{held}{broken}"
    )
