"""Where a harvest stores the files of a cache: in a folder. A harvest accesses the files only through this interface,
so a subclass can store them elsewhere and use the folder only to create them.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..common.cache_schemas import CLAIM_RECORD, COMMIT_RECORD
from ..common.errors import DamagedError
from ..common.files import atomic_write, fsync_folder, os_error
from ..common.locks import brief_lock
from .chunks import FileRecords, RowReader, check_chunk, files_exist, read_array_spec, row_reader
from .layout import Layout
from .object_store import ObjectStore


def chunk_error(folder: Path, file: str, record: Mapping[str, Any]) -> str | None:
    """The problem with a chunk file in a folder; None if it is intact."""
    name, chunk = file.rsplit("/", 1)
    try:
        check_chunk(folder, read_array_spec(folder, name), int(chunk.split(".")[1]), {file: record})
    except DamagedError as error:
        return str(error)
    return None


def claim_file(number: int) -> str:
    """The path, relative to the cache's folder, of the file for claim `number`; claims are numbered from 1.

    A *claim* says that a task is cutting the text into contexts.
    """
    return f"tokens/claim-{number:06d}.json"


class FolderPlace:
    """A cache in a folder that every worker sees.

    A worker first calls `fetch` and `begin`, then for each window `publish` and, for each array, `create_commit`, and
    finally `seal`. Any worker may call the methods at any time, and repeatedly.
    """

    store: ObjectStore | None = None  # where the files are stored, if not in the folder

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def fetch(self) -> None:
        """Called first, while the folder's lock is held. Copies the stored records and tokens into the folder."""

    def begin(self) -> None:
        """Called before the first window, when tokens/, harvest.json and all zarr.json files are in the folder."""

    def check_writes(self) -> None:
        """Check that files can be stored. Called before the text is cut and before windows are computed, because both
        can take hours.
        """

    def publish_tokens(self) -> None:
        """Called when tokens/ has been written to the folder."""

    def commit_files(self) -> list[str]:
        """The commits that exist now, sorted, relative to the folder: commits/000000.layer_05.json."""
        return sorted(f"commits/{path.name}" for path in (self.folder / "commits").glob("*.json"))

    def has_commits(self, files: Iterable[str]) -> bool:
        """Whether all of these commits exist now."""
        return all((self.folder / file).exists() for file in files)

    def read_commits(self, files: Iterable[str]) -> Iterator[Mapping[str, Any] | None]:
        """The current content of these commits, in this order; None for a missing one."""
        for file in files:
            try:
                yield COMMIT_RECORD.read(self.folder / file)
            except DamagedError:
                if (self.folder / file).exists():
                    raise
                yield None

    def has_files(self, records: FileRecords) -> bool:
        """Whether every recorded file exists with its recorded size. Reads no content."""
        return files_exist(self.folder, records)

    def keep_largest(
        self, window: int, name: str, files: FileRecords, norms: np.ndarray, bits: np.ndarray
    ) -> list[str]:
        """Called with the rows of a window of an array, before `publish`; returns any additional files written."""
        return []

    def publish(self, files: Iterable[str]) -> None:
        """Called with the chunks of a window, already in the folder, before the first commit that lists them."""

    def create_commit(self, file: str, content: Mapping[str, Any]) -> bool:
        """Write a commit unless there is one; returns whether this call wrote it."""
        return COMMIT_RECORD.create(self.folder / file, content)

    def remove_records(self, files: Iterable[str]) -> None:
        """Remove records: commits of files that are about to be replaced, and damaged records."""
        folders = set()
        for file in files:
            (self.folder / file).unlink(missing_ok=True)
            folders.add((self.folder / file).parent)
        for folder in folders:
            fsync_folder(folder)

    def fetch_damaged(self) -> None:
        """Like `fetch`, for a cache that may have damaged files. Copies all stored records into the folder."""

    def chunk_errors(self, records: FileRecords) -> Iterator[tuple[str, str | None]]:
        """Each of these chunk files with its problem, or with None if the file is intact. Reads every byte."""
        for file, record in records.items():
            yield file, chunk_error(self.folder, file, record)

    def claim_files(self) -> list[str]:
        """The files of all claims, in order."""
        return sorted(f"tokens/{path.name}" for path in (self.folder / "tokens").glob("claim-??????.json"))

    def read_claim(self, file: str) -> Mapping[str, Any] | None:
        """The content of a claim; None if it is missing or incomplete."""
        with contextlib.suppress(DamagedError):
            return CLAIM_RECORD.read(self.folder / file)
        return None

    def create_claim(self, file: str, content: Mapping[str, Any]) -> bool:
        """Write this claim unless it exists; returns whether it was written."""
        return CLAIM_RECORD.create(self.folder / file, content)

    def renew_claim(self, file: str, content: Mapping[str, Any]) -> None:
        """Replace a claim. Does nothing if the claim was removed, since a claim is removed once the text has been
        cut.
        """
        # Written in place, because a rename would restore a claim that another task has removed. A half-written claim
        # counts as unreadable.
        path = self.folder / file
        try:
            with path.open("r+b") as claim:
                claim.write(CLAIM_RECORD.encode(content))
                claim.truncate()
        except FileNotFoundError:
            pass
        except OSError as error:
            raise os_error(error, path) from error

    def remove_claims(self, files: Iterable[str]) -> None:
        """Remove claims."""
        for file in files:
            (self.folder / file).unlink(missing_ok=True)

    def is_begun(self) -> bool:
        """Whether some worker has called `begin`. If `begin` has been called, the files that it requires are now in the
        folder.
        """
        return (self.folder / "zarr.json").exists()

    def bring(self, records: FileRecords) -> None:
        """Called before small files of committed windows are read. Copies them into the folder."""

    def drop(self, records: FileRecords) -> None:
        """Called when the small files have been read."""

    def row_reader(self, layout: Layout, files: FileRecords) -> RowReader:
        """A function that reads single rows from chunks of activations. It does not verify checksums."""
        return row_reader(self.folder)

    def read_record(self, name: str) -> bytes | None:
        """Return the current content of manifest.json or zarr.json, or None if it is missing. If the cache is in a
        store, the record is also copied into the folder.
        """
        with contextlib.suppress(FileNotFoundError):
            return (self.folder / name).read_bytes()
        return None

    def seal(self, manifest: bytes, root: bytes, seen: bytes | None) -> bool:
        """If manifest.json still equals `seen` (None: missing), atomically replace it and then zarr.json; returns
        whether it did.

        While a manifest is being built from commits, another worker may replace one of these commits. Such a manifest
        is never the final one, because the worker that replaces a commit checks the manifest afterwards.
        """
        with brief_lock(self.folder / "tokens" / "commit.json"):  # which is never replaced again
            if self.read_record("manifest.json") != seen:
                return False
            for name, data in (("manifest.json", manifest), ("zarr.json", root)):
                if self.read_record(name) != data:
                    atomic_write(self.folder / name, data)
        return True
