"""Write a cache: windows of shuffled rows, each whole or absent, in any order, by anybody who holds the lock.

contexts.write(folder)
writer = Writer(folder, identity, layout, widths={"layer_05": 2304, "layer_12": 2304})
for window, arrays in writer.missing().items():
    writer.write_window(window, Rows({"layer_05": bits, "layer_12": bits}, row_ctx, row_pos), made_with={})
writer.finish()
"""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..common.errors import DamagedError, SaeError, UsageError
from ..common.files import digest_of, fsync_folder, read_json, write_json, write_json_if_changed
from .chunks import MEND, all_there, attributes_of, write_chunk
from .layout import FORMAT, Array, Hook, Layout, fingerprint_of, group_metadata
from .statistics import seal

WRITERS = 2  # threads: two saturate a disk, four gain a tenth more
PART_ROWS = 128  # measured at once: as many as fit into a core's cache
OURS = {"tokens", "harvest.json", "ring.json", "zarr.json", ".lock", ".lock.holder"}  # what a folder holds first

Job = tuple[Array, int, np.ndarray]  # an array, a chunk of it, the rows


@dataclass(frozen=True)
class WindowRows:
    """A window's rows in their own order: bits[array] (rows, d_in) uint16; row_ctx and row_pos (rows,)."""

    bits: Mapping[str, np.ndarray]
    row_ctx: np.ndarray
    row_pos: np.ndarray


class CacheWriter:
    """A writer of the arrays `widths` (name -> d_in); whoever makes it holds `one_writer(folder)`, or shares it."""

    def __init__(self, folder: Path, identity: dict[str, Any], layout: Layout, widths: Mapping[str, int]) -> None:
        self.folder, self.identity, self.layout, self.widths = folder, identity, layout, dict(widths)
        self.fingerprint = fingerprint_of(identity)
        begun(folder, self.fingerprint)
        self.tokens = digest_of(read_json(folder / "tokens" / "commit.json", "files")["files"])
        if not (folder / "zarr.json").exists():
            self._write_root(complete=[])
        begun_with = read_json(folder / "zarr.json")["attributes"]
        if begun_with["rows"] != layout.rows:
            raise DamagedError(
                f"{folder} was begun with {begun_with['rows']:,} rows, but its text now has {layout.rows:,}. Use another --out."
            )
        if begun_with["tokens"] != self.tokens:
            raise DamagedError(
                f"{folder} was begun with other tokens than its text gives now, probably with another version of tokenizers. "
                "Use another --out."
            )
        for array in layout.arrays(self.widths):
            write_json_if_changed(folder / array.name / "zarr.json", array.metadata())

    def _write_root(self, complete: list[str]) -> None:
        attributes = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "identity": self.identity,
            "tokens": self.tokens,
            "rows": self.layout.rows,
            "window_rows": self.layout.window_rows,
            "chunk_rows": self.layout.chunk_rows,
            "storage_dtype": self.layout.storage_dtype,
            "compress": self.layout.compress,
            "complete": complete,
            "to_read": "import sae.cache.bfloat16  # gives zarr-python the bfloat16 data type",
        }
        write_json(self.folder / "zarr.json", group_metadata(attributes))

    def commits(self, *, whole: bool = True) -> Iterator[dict[str, Any]]:
        """The records of windows; with `whole`, of those whose files are all there."""
        for path in sorted((self.folder / "commits").glob("*.json")):
            commit = read_json(path, "fingerprint", "window", "array", "files")
            if commit["fingerprint"] != self.fingerprint:
                raise DamagedError(f"{path} belongs to another harvest ({commit['fingerprint'][:8]}). {MEND}")
            if not whole or all_there(self.folder, commit["files"]):
                yield commit

    def missing(self) -> dict[int, list[str]]:
        """Window -> the arrays asked for that are not committed in it."""
        have = {(commit["array"], commit["window"]) for commit in self.commits()}
        wanted = {w: [name for name in self.widths if (name, w) not in have] for w in range(self.layout.windows)}
        return {window: names for window, names in wanted.items() if names}

    def files_of(self, window: int, rows: WindowRows) -> Iterator[tuple[str, list[Job]]]:
        """What has to be written for a window: under "" where its rows came from, then the files of each array.

        Raises SaeError when an activation is not finite or a block has another shape than it should.
        """
        layout, size = self.layout, len(self.layout.window(window))
        ctx, pos = layout.origins()
        yield "", [(ctx, window, rows.row_ctx), (pos, window, rows.row_pos)]
        first = window * layout.window_rows // layout.chunk_rows
        for name, block in rows.bits.items():
            if block.shape != (size, self.widths[name]):
                raise SaeError(
                    f"Window {window} of {Hook.of(name)} has {block.shape} activations captured, expected {(size, self.widths[name])}: a hook did not fire."
                )
            stored, norms, moments = layout.activations(name, self.widths[name])
            norm, moment = measure(block)
            if not np.isfinite(norm).all():
                bad = int(np.flatnonzero(~np.isfinite(norm))[0])
                raise SaeError(
                    f"An activation of {Hook.of(name)} is not finite, in context {int(rows.row_ctx[bad])} at position {int(rows.row_pos[bad])}. "
                    "Nothing of this window was committed. Try --dtype bfloat16 or float32, and --attention eager."
                )
            starts = range(0, size, layout.chunk_rows)
            chunks = [(stored, first + i, block[at : at + layout.chunk_rows]) for i, at in enumerate(starts)]
            yield name, [(norms, window, norm), (moments, window, moment[None]), *chunks]

    def write_window(self, window: int, rows: WindowRows, made_with: Mapping[str, Any]) -> None:
        """Write and commit one window; nothing of it is committed when anything fails."""
        for name in rows.bits:  # a record of files that will be replaced proves nothing
            (self.folder / commit_file(window, name)).unlink(missing_ok=True)
        fsync_folder(self.folder / "commits")
        with ThreadPoolExecutor(WRITERS) as pool:
            under_way = {  # an array is measured while the one before is written
                name: pool.map(lambda job: write_chunk(self.folder, *job), jobs)
                for name, jobs in self.files_of(window, rows)
            }
            written = {name: dict(files) for name, files in under_way.items()}
        origins = written.pop("")
        for name, files in written.items():
            commit = {
                "format": FORMAT,
                "fingerprint": self.fingerprint,
                "window": window,
                "array": name,
                "rows": len(rows.row_ctx),
                "made_with": dict(made_with),
                "files": origins | files,
            }
            write_json(self.folder / commit_file(window, name), commit, indent=None)

    def finish(self, max_norm: float | None = None) -> None:
        """Seal the cache: manifest.json, then the mark in zarr.json that says which arrays are whole.

        Rows of the arrays written here whose norm is over `max_norm` medians are marked, and left out of the statistics.
        """
        manifest = seal(self.folder, self.fingerprint, self.layout, list(self.commits()), set(self.widths), max_norm)
        write_json(self.folder / "manifest.json", manifest)
        self._write_root(manifest["complete"])

    def finished(self, max_norm: float | None = None) -> bool:
        """Whether the seal covers every array asked for, with these marks."""
        complete = read_json(self.folder / "zarr.json")["attributes"]["complete"]
        if not (self.folder / "manifest.json").exists() or not set(self.widths) <= set(complete):
            return False
        statistics = read_json(self.folder / "manifest.json", "statistics")["statistics"]
        return all(statistics[name]["max_norm"] == max_norm for name in self.widths)


def commit_file(window: int, array: str) -> str:
    return f"commits/{window:06d}.{array}.json"


def begun(folder: Path, fingerprint: str) -> bool:
    """Whether this harvest has begun here. UsageError when another one has, or when the folder is used for something else."""
    found = fingerprint_in(folder)
    if found is None:
        # What a killed writer left half-written is ours, too.
        others = {p.name for p in folder.iterdir() if p.name.split(".tmp-")[0] not in OURS}
        if others:
            raise UsageError(f"{folder} holds {min(others)}, but no activation cache. Give a new folder with --out.")
    elif found != fingerprint:
        raise UsageError(
            f"{folder} holds another harvest ({found[:8]}, this one is {fingerprint[:8]}). Use another --out."
        )
    return found is not None


def fingerprint_in(folder: Path) -> str | None:
    """The fingerprint of the harvest in a folder; where zarr.json was lost a commit has it."""
    if (folder / "zarr.json").exists():
        return attributes_of(folder)["fingerprint"]
    commit = next((folder / "commits").glob("*.json"), None)
    return read_json(commit, "fingerprint")["fingerprint"] if commit else None


def measure(bits_RD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Norms (R,) float32, and the sum and sum of squares (2, D) in float64, of rows of bfloat16 bits."""
    d_in = bits_RD.shape[1]
    squares, moments = [], torch.zeros(2, d_in, dtype=torch.float64)
    ones_D, ones_R = torch.ones(d_in, dtype=torch.float64), torch.ones(PART_ROWS, dtype=torch.float64)
    part_RD = torch.empty(PART_ROWS, d_in, dtype=torch.float64)  # used again: new memory would cost more than the sums
    for block in torch.from_numpy(bits_RD).view(torch.bfloat16).split(PART_ROWS):
        values, ones = part_RD[: len(block)].copy_(block), ones_R[: len(block)]
        moments[0] += ones @ values
        values.square_()
        moments[1] += ones @ values
        squares.append(values @ ones_D)
    return torch.cat(squares).sqrt().float().numpy(), moments.numpy()
