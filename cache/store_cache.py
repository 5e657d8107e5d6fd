"""A cache in an object store. Files are pulled into the local folder (local_folder.py) and read there.

Records, tokens and the small arrays are pulled whole when they are first read, and stay. Chunks of activations are
pulled before they are read, and are removed when other chunks need the room. A file is verified when it arrives; if it
is damaged, it is pulled one more time.
"""

import contextlib
import re
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..common.cache_schemas import REPAIR_HINT
from ..common.errors import DamagedError, UsageError, naming
from ..common.files import atomic_write, digest_of, parse_json, read_file
from .chunks import RowReader, Shard, check_chunk, content_matches, map_chunk
from .largest_rows import stored_row_reader
from .layout import ArraySpec, commit_file
from .local_folder import LocalFolder, local_folder
from .mirror import Mirror, map_ahead
from .object_store import ObjectStore, open_store
from .reader import Cache, Read
from .reading import ChunkReading, StoredFile
from .record_files import verify_records
from .store_errors import MissingError

LABEL_LENGTH = 60


class StoreCache(Cache):
    """The cache at an address. The cache keeps at most `open_chunks` memory maps open.

    Raises UsageError if there is no cache, DamagedError if a record is broken, and UnavailableError if `open_store`
    raises it.
    """

    def __init__(self, url: str, open_chunks: int | None = None, local: LocalFolder | None = None) -> None:
        self.store, self.local = open_store(url), local or local_folder()
        self.local_name, root = read_root(self.store)
        self.mirror = Mirror(self.store, self.local.folder / self.local_name)
        self._refresh("zarr.json", root)
        with naming(self.store.url, self.mirror.folder):
            super().__init__(self.mirror.folder, open_chunks)
        # These can change while the rows stay the same: the statistics, and the location of the model.
        self._refresh("manifest.json")
        self._refresh("harvest.json")
        self._maps: dict[str, np.ndarray | Shard] = {}  # of files kept in the local folder; most recently used last
        self._maps_lock = threading.Lock()
        self._means: dict[str, np.ndarray] = {}

    @property
    def place(self) -> str:
        """The address."""
        return self.store.url

    @property
    def committed_windows(self) -> list[int]:
        """The windows that are committed for at least one array."""
        names = (key.rsplit("/", 1)[-1] for key, _ in self.store.list("commits"))
        return sorted({int(name.split(".")[0]) for name in names if name.endswith(".json")})

    def _file_sizes(self) -> dict[str, int]:
        sizes = dict(self.store.list()) if self.store.can_list else {}
        unlisted = sorted(self.manifest["files"].keys() - sizes.keys())  # a listing can be out of date

        def size(file: str) -> int:
            with contextlib.suppress(DamagedError):
                return self.store.size(file)
            return -1  # it is missing

        return sizes | dict(zip(unlisted, map_ahead(size, unlisted), strict=True))

    def verify(self) -> Iterator[str]:
        """Read every record and every byte in the store without keeping them, and yield the name of each verified file.

        Raises DamagedError at the first damaged file.
        """
        files = self.manifest["files"]
        self._verify_records()

        def verify(file: str) -> str:
            try:
                self.fetch_chunk(file)
            except MissingError as error:
                raise self._damaged(file) from error
            return file

        yield from map_ahead(verify, files)

    def _verify_records(self) -> None:
        """Read every record from the store, ignoring the local folder."""
        arrays = {file.rsplit("/", 1)[0] for file in self.manifest["files"]}
        windows = range(self.layout.n_windows)
        names = [
            *("zarr.json", "harvest.json", "manifest.json", "tokens/commit.json", "tokens/zarr.json"),
            *(f"{name}/zarr.json" for name in arrays),
            *(commit_file(window, name) for name in self.manifest["complete"] for window in windows),
        ]
        with tempfile.TemporaryDirectory(prefix="sae-verify-") as folder, naming(self.store.url, folder):
            Mirror(self.store, Path(folder)).pull_existing(names)
            for name in ("harvest.json", "tokens/commit.json", "tokens/zarr.json"):
                read_file(Path(folder) / name, REPAIR_HINT)
            verify_records(Path(folder), self.attributes)

    # --- small files -------------------------------------------------------------------------------------------------

    def _refresh(self, file: str, content: bytes | None = None) -> None:
        """Update the local copy of a record. If the store lacks the record, as in a half-written cache, the copy is
        deleted.
        """
        path = self.mirror.folder / file
        if content is None:
            content = self.store.find(file)
        if content is None:
            path.unlink(missing_ok=True)
        elif not path.exists() or path.read_bytes() != content:
            atomic_write(path, content)

    def _with_files(self, files: Callable[[], Iterable[str]], read: Callable[[], Read]) -> Read:
        """Pull the missing files, then read. If a file is damaged, pull all these files again.

        Files are replaced atomically, because other processes that share the folder may be about to read them.
        """
        names = list(files())
        self._pull(name for name in names if not (self.mirror.folder / name).is_file())
        try:
            return read()
        except DamagedError:
            self._pull(names)
            return read()

    def _pull(self, names: Iterable[str]) -> None:
        """Pull files, replacing existing ones: records, then the files that the manifest lists. A listed file is
        verified before it appears under its name.
        """
        listed: Mapping[str, Any] = self.manifest["files"] if "manifest" in self.__dict__ else {}
        names = list(dict.fromkeys(names))

        def pull(name: str) -> None:
            data = self.fetch_chunk(name) if name in listed else self.store.get(name)
            atomic_write(self.mirror.folder / name, data)

        for some in ([name for name in names if name not in listed], [name for name in names if name in listed]):
            for _ in map_ahead(pull, some):
                pass

    def _damaged(self, file: str) -> DamagedError:
        return DamagedError(
            f"{self.store.address(file)} is not the file that the cache lists: it was truncated or changed, or belongs "
            f"to another cache. Run `sae cache repair {self.place}`."
        )

    # --- chunks ------------------------------------------------------------------------------------------------------

    def stored_files(self, name: str) -> tuple[LocalFolder, list[StoredFile | None]]:
        """The local folder, and the file of each chunk of an array."""
        array, files = self.array(name), self.manifest["files"]
        listed = [array.chunk_file(chunk) for chunk in range(array.n_chunks)]
        return self.local, [
            StoredFile(self, file, f"{self.local_name}/{file}", files[file]["bytes"]) for file in listed
        ]

    def fetch_chunk(self, file: str) -> bytes:
        """The bytes of a chunk in the store, verified. Raises DamagedError if two downloads in a row are damaged."""
        name, record = file.rsplit("/", 1)[0], self.manifest["files"][file]
        for _ in range(2):
            data = self.store.get(file)
            if content_matches(data, self.array(name), record):
                return data
        raise self._damaged(file)

    def forget_chunk(self, file: str) -> None:
        """Close the memory map of a chunk, so that removing its file frees the space."""
        with self._maps_lock:
            self._maps.pop(file, None)

    def _open_chunk(self, name: str, index: int) -> np.ndarray | Shard:
        """A chunk of activations: from the local folder if it is kept there, otherwise pulled for this call."""
        array = self.array(name)
        file = array.chunk_file(index)
        if self.local.holds(f"{self.local_name}/{file}"):
            with self._maps_lock:
                opened = self._maps.pop(file, None)
                if opened is None:
                    opened = self._map(array, index)
                self._maps[file] = opened
                while len(self._maps) > self.open_chunks:
                    del self._maps[next(iter(self._maps))]
            return opened
        local, files = self.stored_files(name)
        reading = ChunkReading(local, files, lambda steps: np.array([[index, 0, 0]]), range(1), 1)
        local.begin(reading)
        try:
            with reading.step(0, [index]):
                return self._map(array, index)  # readable as long as it is mapped, even if the file is removed
        finally:
            reading.close()

    def _map(self, array: ArraySpec, index: int) -> np.ndarray | Shard:
        if array.block_rows is None:
            return map_chunk(self.folder, array, index)
        return Shard(self.folder, array, index, self.manifest["files"][array.chunk_file(index)]["bytes"])

    def verify_file(self, file: str) -> None:
        """Read a file in the local folder and raise DamagedError unless it matches its record in the manifest."""
        name, chunk = file.rsplit("/", 1)
        check_chunk(self.folder, self.array(name), int(chunk.split(".")[1]), self.manifest["files"])

    @cached_property
    def _row_reader(self) -> RowReader:
        """A reader for single rows in the store, which pulls only the bytes of these rows."""
        return stored_row_reader(self.store, self.layout, self.manifest["files"])

    def mean(self, name: str) -> np.ndarray:
        """The mean row (d_in,) float64, without outlier rows."""
        if name not in self._means:
            self._means[name] = super().mean(name)
        return self._means[name]


def read_root(store: ObjectStore) -> tuple[str, bytes]:
    """The name of a cache in the local folder, and its zarr.json.

    The name also depends on the address, because two harvests of the same text may differ in the last bits.
    """
    if (content := store.find("zarr.json")) is None:
        raise UsageError(
            f"{store.url} holds no activation cache (no zarr.json). Create one with `sae harvest --out {store.url}`."
        )
    root = parse_json(content, store.address("zarr.json"), REPAIR_HINT)
    attributes = root.get("attributes") if isinstance(root, dict) else None
    fingerprint = attributes.get("fingerprint") if isinstance(attributes, dict) else None
    label = re.sub(r"[^\w.-]+", "-", store.url.split("://")[-1].rsplit("/", 1)[-1])[:LABEL_LENGTH].lstrip(".")
    return f"{label}--{digest_of([store.url, fingerprint])[:8]}", content
