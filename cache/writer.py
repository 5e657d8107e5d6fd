"""Write a cache: windows of shuffled rows, each complete or absent, written in any order by any number of workers.

contexts.write(folder)
writer = CacheWriter(folder, identity, layout, widths={"layer_05": 2304, "layer_12": 2304})
for window, arrays in writer.missing_windows().items():
    writer.write_window(window, WindowRows({"layer_05": bits, "layer_12": bits}, row_ctx, row_pos), made_with={})
writer.seal()

A window is the unit of work. The rows of a window are a function of the text, so workers need no locks: a commit is
created only if there is none yet, and committed windows are not changed. A worker that finds every window committed
seals the cache. Sealing a cache again changes nothing.
"""

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..common.cache_schemas import (
    ARRAY_RECORD,
    CACHE_RECORD,
    COMMIT_RECORD,
    MANIFEST_RECORD,
    TOKENS_RECORD,
)
from ..common.errors import DamagedError, SaeError, UnavailableError, UsageError
from ..common.files import digest_of
from ..common.locks import LOCK_FILES
from ..common.process_group import processes_on_this_machine
from .chunks import read_attributes, write_chunk
from .consistency import check_commit, check_same_harvest, check_same_text
from .hooks import Hook
from .layout import FORMAT, ArraySpec, Layout, commit_file, fingerprint_of, group_metadata
from .measure import RowStatistics, Run, measure_rows
from .place import FolderPlace
from .record_files import add_digests
from .sealing import SealState
from .statistics import build_manifest

MOST_THREADS = 8  # threads that measure, compute checksums, write and flush; two of them can saturate a disk
SEAL_ATTEMPTS = 20
# The files of a harvest that has no fingerprint yet; any other file means that the folder is used for something else.
INITIAL_FILES = {"tokens", "harvest.json", "ring.json", "zarr.json", *LOCK_FILES}

ChunkWrite = tuple[ArraySpec, int, np.ndarray]  # an array, the number of a chunk, its rows


@dataclass(frozen=True)
class WindowRows:
    """The rows of a window, already shuffled."""

    bits: Mapping[str, np.ndarray]  # array name -> (rows, d_in) uint16, the bits of bfloat16
    row_ctx: np.ndarray  # (rows,): the context that each row comes from
    row_pos: np.ndarray  # (rows,): its position in the context
    measured: Mapping[str, RowStatistics] = field(default_factory=dict)  # for arrays that were measured on a GPU


class CacheWriter:
    """Writes the activation arrays `widths` ({name: d_in}) into a cache, which it creates or continues.

    The contexts must be written first. `place` is where the files are stored, by default the folder.

    Raises UsageError if the folder holds another harvest or other files, DamagedError if the harvest was started with
    another number of rows or other tokens.
    """

    def __init__(
        self, folder: Path, identity: dict[str, Any], layout: Layout, widths: Mapping[str, int],
        place: FolderPlace | None = None,
    ) -> None:  # fmt: skip
        self.folder, self.identity, self.layout, self.widths = folder, identity, layout, dict(widths)
        self.place = place or FolderPlace(folder)
        self.fingerprint = fingerprint_of(identity)
        harvest_started(folder, self.fingerprint)
        self.tokens_digest = digest_of(TOKENS_RECORD.read(folder / "tokens" / "commit.json")["files"])
        if not (folder / "zarr.json").exists():
            CACHE_RECORD.create(folder / "zarr.json", self._root(complete=[]))
        check_same_text(folder, read_attributes(folder), layout.rows, self.tokens_digest)
        for array in layout.arrays(self.widths):
            ARRAY_RECORD.write_if_changed(folder / array.name / "zarr.json", array.metadata())

    def _root(self, complete: list[str]) -> dict[str, Any]:
        """The content of zarr.json."""
        attributes = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "identity": self.identity,
            "tokens": self.tokens_digest,
            "rows": self.layout.rows,
            "window_rows": self.layout.window_rows,
            "chunk_rows": self.layout.chunk_rows,
            "storage_dtype": self.layout.storage_dtype,
            "compress": self.layout.compress,
            "complete": complete,
            "to_read": "import sae.cache.bfloat16  # gives zarr-python the bfloat16 data type",
        }
        return group_metadata(attributes)

    def commits(self, files: Iterable[str] | None = None, *, check_files: bool = True) -> Iterator[dict[str, Any]]:
        """The current commits of windows: all, or the given ones; with `check_files`, only those whose files exist with
        their recorded sizes.

        Raises DamagedError if a commit is damaged, or belongs to another harvest or window.
        """
        files = self.place.commit_files() if files is None else list(files)
        for file, commit in zip(files, self.place.read_commits(files), strict=True):
            if commit is not None:
                check_commit(self.folder / file, commit, self.fingerprint, self.layout)
                if not check_files or self.place.has_files(commit["files"]):
                    yield dict(commit)

    def is_committed(self, window: int, array: str) -> bool:
        """Whether a window of an array is committed now, and its files exist with their recorded sizes."""
        return any(self.commits([commit_file(window, array)]))

    def missing_windows(self, windows: Iterable[int] | None = None) -> dict[int, list[str]]:
        """{window: names of the arrays of `widths` that are not committed for it}; complete windows are left out.

        Checks all windows, or only the given `windows`.
        """
        if windows is not None:
            missing = {w: [name for name in self.widths if not self.is_committed(w, name)] for w in windows}
        else:
            if self.place.store is None:
                committed = {commit_file(one["window"], one["array"]) for one in self.commits()}
            else:  # an object is complete once it exists, and a commit is written after its objects
                committed = set(self.place.commit_files())
            missing = {
                window: [name for name in self.widths if commit_file(window, name) not in committed]
                for window in range(self.layout.n_windows)
            }
        return {window: names for window, names in missing.items() if names}

    def committed_windows(self) -> set[int]:
        """The windows for which every array of `widths` has a commit. Reads only names."""
        files = set(self.place.commit_files())
        return {w for w in range(self.layout.n_windows) if files.issuperset(commit_file(w, n) for n in self.widths)}

    def chunks_to_write(self, window: int, rows: WindowRows, run: Run = map) -> Iterator[tuple[str, list[ChunkWrite]]]:
        """The chunks of a window: first ("", row_ctx and row_pos), then (name, row_norm, moments and rows) per array.

        Arrays not measured yet are measured with `run`, which is `map` or the `map` method of a thread pool.

        Raises SaeError if an activation is not finite or an array has the wrong shape.
        """
        layout, size = self.layout, len(self.layout.row_range(window))
        row_ctx, row_pos = layout.origin_arrays()
        yield "", [(row_ctx, window, rows.row_ctx), (row_pos, window, rows.row_pos)]
        first_chunk = window * layout.window_rows // layout.chunk_rows
        for name, block in rows.bits.items():
            if block.shape != (size, self.widths[name]):
                raise SaeError(
                    f"Window {window} of {Hook.from_array(name)} has {block.shape} activations, "
                    f"expected {(size, self.widths[name])}: a hook did not fire."
                )
            activations, row_norm, moments = layout.activation_arrays(name, self.widths[name])
            norms, sums = rows.measured.get(name) or measure_rows(block, layout.chunk_rows, run)
            if not np.isfinite(norms).all():
                bad = int(np.flatnonzero(~np.isfinite(norms))[0])
                raise SaeError(
                    f"An activation of {Hook.from_array(name)} is not finite, in context {int(rows.row_ctx[bad])} "
                    f"at position {int(rows.row_pos[bad])}. This window was not committed. "
                    "Try --dtype bfloat16 or float32, and --attention eager."
                )
            parts = (block[start : start + layout.chunk_rows] for start in range(0, size, layout.chunk_rows))
            chunks = [(activations, chunk, part) for chunk, part in enumerate(parts, first_chunk)]
            yield name, [(row_norm, window, norms), (moments, window, sums[None]), *chunks]

    def write_window(
        self, window: int, rows: WindowRows, made_with: Mapping[str, Any], *, replace: bool = False
    ) -> None:
        """Write and commit the arrays in `rows.bits` that are not yet committed for this window; if `replace` is set,
        write and commit all of them.

        If anything fails, no array is committed. `made_with` is recorded in the commits. Raises SaeError if
        `chunks_to_write` raises it, UnavailableError if the disk is full or not writable.
        """
        bits, stale = {}, []
        for name, block in rows.bits.items():
            commits = list(self.commits([file := commit_file(window, name)], check_files=False))
            if replace or not commits or not self.place.has_files(commits[0]["files"]):
                bits[name] = block
                stale += [file] * len(commits)
        if not bits:
            return
        # Some of the files that these commits list are lost, or all are about to be replaced. Remove the commits first.
        if stale:
            self.place.remove_records(stale)
        pending, norms = {}, {}
        with ThreadPoolExecutor(writing_threads()) as pool:
            # The norms and moments of an array are computed while the previous array is written.
            for name, chunks in self.chunks_to_write(window, dataclasses.replace(rows, bits=bits), pool.map):
                pending[name] = pool.map(lambda chunk: write_chunk(self.folder, *chunk), chunks)
                norms[name] = chunks[0][2]
            written = {name: dict(files) for name, files in pending.items()}
        origins, mixed = written.pop(""), {}
        written = {name: origins | files for name, files in written.items()}
        publish = {file for files in written.values() for file in files}
        for name, files in written.items():
            publish.update(self.place.keep_largest(window, name, files, norms[name], bits[name]))
        self.place.publish(sorted(publish))
        for name, files in written.items():
            commit = {
                "format": FORMAT,
                "fingerprint": self.fingerprint,
                "window": window,
                "array": name,
                "rows": len(rows.row_ctx),
                "made_with": dict(made_with),
                "files": files,
            }
            file = commit_file(window, name)
            if not self.place.create_commit(file, commit):
                theirs = next(self.commits([file], check_files=False), None)
                if theirs is None or theirs["files"] != commit["files"]:
                    mixed[name] = bits[name]
        if mixed:
            # In the meantime another worker has committed this window with different bytes, for example because it
            # computed them on another GPU model. The two workers' files overwrote each other. The other worker is done,
            # so all files of this worker can be written again.
            self.write_window(window, dataclasses.replace(rows, bits=mixed), made_with, replace=True)

    def seal(self, max_norm: float | None = None, token_text: Callable[[int], str] | None = None) -> bool:
        """Complete the cache if every window of the arrays of `widths` is committed; returns whether the cache is
        complete.

        Does nothing if the cache is already complete. Several workers may call it at the same time. `max_norm` and
        `token_text` have the same meaning as in `finish`.
        """
        if not self.place.has_commits(self._commit_files(self.widths)):
            return False
        for state in self._seal_states():
            if not state.has_every(self.widths, self.layout.n_windows):
                return False
            if state.covers(self.widths, max_norm) and state.is_listed:
                break
            try:
                if self._seal(state, max_norm, token_text):
                    break
            except DamagedError:
                if self._seal_state().commits == state.commits:
                    raise  # if commits differ, another worker replaced a window whose norms were read
        return True

    def finish(self, max_norm: float | None = None, token_text: Callable[[int], str] | None = None) -> None:
        """Write manifest.json, then the list of complete arrays in zarr.json, from the existing commits.

        Adds a digest to records of earlier versions.

        Rows of the arrays of `widths` whose norm is over `max_norm` x the median norm become outlier rows: they are
        kept, but masked out of training, evaluation and statistics. `token_text` returns the text of a token id, so
        that the statistics can name the tokens of the largest rows.
        """
        for state in self._seal_states():
            if self._seal(state, max_norm, token_text):
                break

    def is_finished(self, max_norm: float | None = None) -> bool:
        """Whether the manifest and zarr.json include every array of `widths`, and their outlier rows were determined
        with this `max_norm`.
        """
        return self._seal_state(commits=False).covers(self.widths, max_norm)

    def _commit_files(self, names: Iterable[str]) -> list[str]:
        return [commit_file(window, name) for window in range(self.layout.n_windows) for name in sorted(names)]

    def _seal_states(self) -> Iterator[SealState]:
        """Yield the records needed for sealing; they are read again for each value that is yielded."""
        for _ in range(SEAL_ATTEMPTS):
            yield self._seal_state()
        raise UnavailableError(f"Other processes keep changing {self.folder}. Run the same command again.")

    def _seal_state(self, *, commits: bool = True) -> SealState:
        self.place.read_record("zarr.json")
        complete = set(read_attributes(self.folder)["complete"])
        seen = self.place.read_record("manifest.json")
        manifest = None if seen is None else MANIFEST_RECORD.parse(seen, self.folder / "manifest.json")
        lost = complete - set(manifest["complete"] if manifest else ())  # the manifest that listed them is lost too
        names = {*self.widths, *lost}
        found = list(self.commits(self._commit_files(names))) if commits else []
        return SealState(names, complete, seen, manifest, found)

    def _seal(self, state: SealState, max_norm: float | None, token_text: Callable[[int], str] | None) -> bool:
        """Write the manifest that follows from `state`; False if another worker wrote one after `state` was read."""
        manifest = build_manifest(self.place, self.fingerprint, self.layout, state, max_norm, token_text)
        root = CACHE_RECORD.encode(self._root(manifest["complete"]))
        if done := self.place.seal(MANIFEST_RECORD.encode(manifest), root, state.seen):
            add_digests(self.folder)
        return done


def writing_threads() -> int:
    """The number of threads that write a window: the cores per launched process on this machine, at least two."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(2, min(MOST_THREADS, cores // processes_on_this_machine()))


def harvest_started(folder: Path, fingerprint: str, identity: dict[str, Any] | None = None) -> bool:
    """Whether the harvest with this fingerprint has started in the folder; False if the folder is empty.

    Raises UsageError if the folder holds another harvest or other files. If `identity` is given, the message lists the
    differences.
    """
    # List the files before reading the fingerprint: another worker that begins the harvest now writes zarr.json before
    # its other files, so if any of these are listed, the fingerprint is found.
    names = {path.name for path in folder.iterdir()}
    existing = read_fingerprint(folder)
    if existing is None:
        # Compare names without suffixes: a killed writer may have left the temporary file of a record.
        others = {name for name in names if name.split(".tmp-")[0] not in INITIAL_FILES}
        if others:
            left = f" (`sae cache rm {folder}` deletes the remains of one)" if "harvest.json" in names else ""
            raise UsageError(
                f"{folder} holds {min(others)}, but no activation cache{left}. Choose a new folder with --out."
            )
        return False
    root = folder / "zarr.json"
    theirs = read_attributes(folder)["identity"] if identity and root.exists() and existing != fingerprint else None
    check_same_harvest(folder, existing, fingerprint, theirs, identity)
    return True


def read_fingerprint(folder: Path) -> str | None:
    """The fingerprint of the harvest in a folder, from a commit if zarr.json was lost; None if there is no harvest."""
    if (folder / "zarr.json").exists():
        return read_attributes(folder)["fingerprint"]
    commit = next((folder / "commits").glob("*.json"), None)
    return COMMIT_RECORD.read(commit)["fingerprint"] if commit else None


def recorded_tokens(folder: Path) -> str | None:
    """The digest of the tokens that a cache was harvested from, read from zarr.json or else the manifest; None if both
    are missing.
    """
    if (folder / "zarr.json").exists():
        return read_attributes(folder)["tokens"]
    manifest = folder / "manifest.json"
    files = MANIFEST_RECORD.read(manifest)["files"] if manifest.exists() else {}
    tokens = {file: record for file, record in files.items() if file.startswith("tokens/")}
    return digest_of(tokens) if tokens else None
