"""Write a cache: windows of shuffled rows, each whole or absent, in any order, by anybody who holds the lock.

contexts.write(folder)
writer = Writer(folder, identity, layout, widths={5: 2304, 12: 2304})
for window in writer.missing():
    writer.write_window(window, {5: bits, 12: bits}, ctx, pos, made_with={})
writer.finish()
"""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .chunks import MEND, all_there, read_whole, write_chunk
from .errors import DamagedError, SaeError, UsageError
from .files import digest_of, read_json, sweep, write_json
from .layout import FORMAT, Array, Layout, group_metadata, layer_array

WRITERS = 2  # threads: two saturate a disk, four gain a tenth more
QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99, 0.999)


class Writer:
    """The one writer of a cache; the caller holds `one_writer(folder)`."""

    def __init__(self, folder: Path, identity: dict[str, Any], layout: Layout, widths: Mapping[int, int]) -> None:
        self.folder, self.identity, self.layout, self.widths = folder, identity, layout, dict(sorted(widths.items()))
        self.fingerprint = digest_of(identity)
        sweep(folder)
        if not begun(folder, self.fingerprint):
            self._write_root(complete=[])
        elif (rows := read_json(folder / "zarr.json")["attributes"]["rows"]) != layout.rows:
            raise DamagedError(
                f"{folder} was begun with {rows:,} rows, but its text now has {layout.rows:,}. Use another --out."
            )
        layers = [a for layer, d_in in self.widths.items() for a in layout.activations(layer, d_in)]
        for array in [*layout.origins(), *layers]:
            if not (folder / array.name / "zarr.json").exists():
                write_json(folder / array.name / "zarr.json", array.metadata())

    def _write_root(self, complete: list[str]) -> None:
        attributes = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "identity": self.identity,
            "rows": self.layout.rows,
            "window_rows": self.layout.window_rows,
            "chunk_rows": self.layout.chunk_rows,
            "storage_dtype": self.layout.storage_dtype,
            "complete": complete,
            "to_read": "import sae.cache.bfloat16  # gives zarr-python the bfloat16 data type",
        }
        write_json(self.folder / "zarr.json", group_metadata(attributes))

    def commits(self) -> Iterator[dict[str, Any]]:
        """The records whose files are all there."""
        for path in sorted((self.folder / "commits").glob("*.json")):
            commit = read_json(path, "fingerprint", "window", "array", "files")
            if commit["fingerprint"] != self.fingerprint:
                raise DamagedError(f"{path} belongs to another harvest ({commit['fingerprint'][:8]}). {MEND}")
            if all_there(self.folder, commit["files"]):
                yield commit

    def missing(self) -> dict[int, list[int]]:
        """Window -> the layers asked for that are not committed in it."""
        have = {(commit["array"], commit["window"]) for commit in self.commits()}
        wanted = {w: [n for n in self.widths if (layer_array(n), w) not in have] for w in range(self.layout.windows)}
        return {window: layers for window, layers in wanted.items() if layers}

    def write_window(
        self,
        window: int,
        bits: Mapping[int, np.ndarray],
        row_ctx: np.ndarray,
        row_pos: np.ndarray,
        made_with: Mapping[str, Any],
    ) -> None:
        """Write and commit one window. `bits[layer]`: (rows, d_in) uint16; row_ctx, row_pos: (rows,).

        Raises SaeError, and commits nothing, when an activation is not finite.
        """
        layout, rows = self.layout, len(self.layout.window(window))
        array_ctx, array_pos = layout.origins()
        origins = [(array_ctx, window, row_ctx), (array_pos, window, row_pos)]
        first = window * layout.window_rows // layout.chunk_rows
        commits = {}
        with ThreadPoolExecutor(WRITERS) as pool:

            def write(jobs: list[tuple[Array, int, np.ndarray]]) -> dict[str, Any]:
                return dict(pool.map(lambda job: write_chunk(self.folder, *job), jobs))

            origin_files = write(origins)
            for layer, block in bits.items():
                if block.shape != (rows, self.widths[layer]):
                    raise SaeError(
                        f"Window {window} of layer {layer} has {block.shape} activations captured, expected {(rows, self.widths[layer])}: a hook did not fire."
                    )
                stored, norms, moments = layout.activations(layer, self.widths[layer])
                norm, moment = measure(block)
                if not np.isfinite(norm).all():
                    bad = int(np.flatnonzero(~np.isfinite(norm))[0])
                    raise SaeError(
                        f"Layer {layer} has an activation that is not finite, in context {int(row_ctx[bad])} at position {int(row_pos[bad])}. "
                        "Nothing of this window was committed. Try --dtype bfloat16 or float32, and --attention eager."
                    )
                jobs = [(norms, window, norm), (moments, window, moment[None])]
                for start in range(0, rows, layout.chunk_rows):
                    jobs.append((stored, first + start // layout.chunk_rows, block[start : start + layout.chunk_rows]))
                commits[stored.name] = {
                    "format": FORMAT,
                    "fingerprint": self.fingerprint,
                    "window": window,
                    "array": stored.name,
                    "rows": rows,
                    "made_with": dict(made_with),
                    "files": origin_files | write(jobs),
                }
        for array, commit in commits.items():
            write_json(self.folder / "commits" / f"{window:06d}.{array}.json", commit, indent=None)

    @property
    def finished(self) -> bool:
        """Whether the seal covers every layer asked for."""
        complete = read_json(self.folder / "zarr.json")["attributes"]["complete"]
        return (self.folder / "manifest.json").exists() and set(map(layer_array, self.widths)) <= set(complete)

    def finish(self) -> None:
        """Seal the cache: manifest.json, then the mark in zarr.json that says which arrays are whole."""
        manifest = seal(self.folder, self.fingerprint, self.layout, list(self.commits()))
        write_json(self.folder / "manifest.json", manifest)
        self._write_root(manifest["complete"])


def begun(folder: Path, fingerprint: str) -> bool:
    """Whether this harvest has begun here. UsageError when another one has, or when the folder is used for something else."""
    if not (folder / "zarr.json").exists():
        ours = {"tokens", ".lock", ".lock.holder"}
        others = {p.name for p in folder.iterdir() if p.name not in ours and not p.name.startswith("zarr.json.tmp-")}
        if others:
            raise UsageError(f"{folder} holds {min(others)}, but no activation cache. Give a new folder with --out.")
        return False
    found = read_json(folder / "zarr.json", "attributes")["attributes"].get("fingerprint", "no harvest")
    if found != fingerprint:
        raise UsageError(
            f"{folder} holds another harvest ({found[:8]}, this one is {fingerprint[:8]}). Use another --out."
        )
    return True


def measure(bits_RD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Norms (R,) float32, and the sum and sum of squares (2, D) in float64, of rows of bfloat16 bits."""
    norms, moments = [], torch.zeros(2, bits_RD.shape[1], dtype=torch.float64)
    for block in torch.from_numpy(bits_RD).view(torch.bfloat16).split(2048):
        values = block.double()
        moments += torch.stack([values.sum(0), values.square().sum(0)])
        norms.append(values.norm(dim=1).float())
    return torch.cat(norms).numpy(), moments.numpy()


def seal(folder: Path, fingerprint: str, layout: Layout, commits: list[dict[str, Any]]) -> dict[str, Any]:
    """The manifest: the union of the commits, and for every whole layer its statistics."""
    windows: dict[str, set[int]] = {}
    files: dict[str, Any] = dict(read_json(folder / "tokens" / "commit.json", "files")["files"])
    for commit in commits:
        files |= commit["files"]
        windows.setdefault(commit["array"], set()).add(commit["window"])
    complete = sorted(a for a, have in windows.items() if len(have) == layout.windows)
    return {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "rows": layout.rows,
        "complete": complete,
        "statistics": {array: statistics(folder, layout, array) for array in complete},
        "files": dict(sorted(files.items())),
    }


def statistics(folder: Path, layout: Layout, array: str) -> dict[str, Any]:
    """What training and a reader want to know of a layer's rows, from float64 sums.

    `variance` is the mean over dimensions of each dimension's variance (elementwise); `mean_square_norm` is E|x|^2.
    """
    moments = read_whole(folder, f"{array}.moments").sum(0) / layout.rows
    norms = read_whole(folder, f"{array}.row_norm")
    mean, square = moments
    spread = np.sqrt(np.maximum(square - mean**2, 0))
    outliers = np.flatnonzero(np.sqrt(square) > 8 * np.median(np.sqrt(square)))
    return {
        "count": layout.rows,
        "variance": float((square - mean**2).mean()),
        "mean_square_norm": float(square.sum()),
        "mean_norm": float(norms.mean(dtype=np.float64)),
        "norm_of_mean": float(np.sqrt((mean**2).sum())),
        "norm_quantiles": {str(q): float(v) for q, v in zip(QUANTILES, np.quantile(norms, QUANTILES), strict=True)},
        "outlier_dimensions": {str(int(d)): {"mean": float(mean[d]), "sd": float(spread[d])} for d in outliers[:32]},
    }
