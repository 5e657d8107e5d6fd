"""A cache in an object store that a harvest writes: files are made in a working folder and become objects of one name.

The working folder holds the tokens, the records, and the chunks of the window that is being uploaded; what is uploaded
goes. A window exists as soon as its commit does, which is asked for by its name: a listing can be out of date. The
commit comes after the chunks that it lists, and is written only where there is none; the manifest and zarr.json are
replaced only if they are as they were read, so that no worker undoes what another has completed.
"""

import contextlib
import itertools
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..common.cache_schemas import (
    CACHE_RECORD,
    CLAIM_RECORD,
    COMMIT_RECORD,
    MANIFEST_RECORD,
    REPAIR_HINT,
    TOKENS_RECORD,
)
from ..common.errors import DamagedError, UnavailableError, UsageError
from ..common.files import atomic_write, parse_json
from .chunks import (
    FileRecords,
    RowsOfChunk,
    block_index,
    check_chunk,
    check_is_readable_cache,
    content_matches,
    decode_block,
    index_bytes,
    read_array_spec,
    read_attributes,
)
from .consistency import SIDE_ARRAYS, check_same_harvest, is_array_name, layout_of
from .layout import ArraySpec, commit_file, fingerprint_of
from .mirror import Mirror, map_ahead
from .object_store import ObjectStore
from .place import FolderPlace, claim_file

OWN = {"drafts", ".lock", ".lock.holder"}  # of the working folder, never an object
DRAFT = "draft"  # in tokens/: likewise
RECORDS = ("zarr.json", "harvest.json", "manifest.json")
# What a killed harvest can leave before zarr.json.
INITIAL = {"tokens", "harvest.json"}
SEAL_ATTEMPTS = 20


class StorePlace(FolderPlace):
    """A cache under the address of `store`, with `folder` as the working folder of this process's machine."""

    def __init__(self, store: ObjectStore, folder: Path) -> None:
        super().__init__(folder)
        self.store: ObjectStore = store
        self.mirror = Mirror(store, folder)

    # --- before the first window -------------------------------------------------------------------------------------

    def fetch(self) -> None:
        """Make the working folder agree with the store: its records and tokens, and nothing that is not there.

        The caller holds the folder's lock.
        """
        self._clear()
        for name in RECORDS:
            self._refresh(name)
        record, commit = self.folder / "tokens" / "commit.json", self.store.find("tokens/commit.json")
        if commit is None or not record.exists() or record.read_bytes() != commit:
            for path in (self.folder / "tokens").glob("*"):
                if path.name != DRAFT:
                    remove(path)
        if commit is not None:
            files = TOKENS_RECORD.parse(commit, self.store.address("tokens/commit.json"))["files"]
            self.mirror.pull(f"{name}/zarr.json" for name in {"tokens", *map(array_of, files)})
            self.bring(files)
            atomic_write(record, commit)

    def fetch_damaged(self) -> None:
        self._clear(tokens=True)
        names = [name for name, _ in self.store.list() if name.endswith(".json") or name.startswith("tokens/")]
        self.mirror.pull_existing({*RECORDS, *names})
        with contextlib.suppress(DamagedError):  # zarr.json is lost, or damaged
            self.commit_files()

    def _clear(self, *, tokens: bool = False) -> None:
        """Remove from the folder what the store may have another version of."""
        for path in self.folder.iterdir():
            if path.name not in OWN | {"tokens"}:
                remove(path)
            elif path.name == "tokens" and tokens:
                remove(path)

    def _refresh(self, name: str) -> None:
        if (data := self.store.find(name)) is not None:
            atomic_write(self.folder / name, data)

    def begin(self) -> None:
        """Upload what comes before the first window, tokens first, so that a zarr.json proves that they are there."""
        if self.store.find("tokens/commit.json") != (self.folder / "tokens/commit.json").read_bytes():
            self.publish_tokens()
        self._push_if_changed("harvest.json")
        arrays = [f"{path.parent.name}/zarr.json" for path in self.folder.glob("*/zarr.json")]
        if not self.store.put_if_absent("zarr.json", (self.folder / "zarr.json").read_bytes()):
            atomic_write(self.folder / "zarr.json", self.store.get("zarr.json"))
        for name in arrays:
            self._push_if_changed(name)

    def publish_tokens(self) -> None:
        paths = (path for path in (self.folder / "tokens").rglob("*") if path.is_file())
        names = {path.relative_to(self.folder).as_posix() for path in paths} - {"tokens/commit.json"}
        self.mirror.push(name for name in names if not name.startswith(f"tokens/{DRAFT}/"))
        self.mirror.push(["tokens/commit.json"])

    def _push_if_changed(self, name: str) -> None:
        data = (self.folder / name).read_bytes()
        if self.store.find(name) != data:
            self.store.put(name, data)

    # --- windows -----------------------------------------------------------------------------------------------------

    def commit_files(self) -> list[str]:
        layout = layout_of(read_attributes(self.folder))
        files = [commit_file(window, name) for name in self._arrays() for window in range(layout.n_windows)]
        self.mirror.pull_existing(files)
        return sorted(file for file in files if (self.folder / file).exists())

    def _arrays(self) -> set[str]:
        """The arrays that can have commits: those of this harvest, and those that are complete already."""
        manifest = self.folder / "manifest.json"
        complete = MANIFEST_RECORD.read(manifest)["complete"] if manifest.exists() else []
        here = {path.parent.name for path in self.folder.glob("*/zarr.json")}
        return {*complete, *(name for name in here if is_array_name(name) and not name.endswith(SIDE_ARRAYS))}

    def has_commit(self, file: str) -> bool:
        self.mirror.pull_existing([file])
        return (self.folder / file).exists()

    def has_files(self, records: FileRecords) -> bool:
        """True: an object is whole once it is there, and a commit comes after its objects."""
        return True

    def publish(self, files: Iterable[str]) -> None:
        """Upload the chunks of a window, and delete them from the working folder."""
        files = list(files)
        self.mirror.push(files)
        self.mirror.drop(files)

    def create_commit(self, file: str, content: Mapping[str, Any]) -> bool:
        data = COMMIT_RECORD.encode(content)
        created = self.store.put_if_absent(file, data)
        atomic_write(self.folder / file, data if created else self.store.get(file))
        return created

    def remove_records(self, files: Iterable[str]) -> None:
        files = list(files)
        self.store.delete(files)
        self.mirror.drop(files)

    def chunk_errors(self, records: FileRecords) -> Iterator[tuple[str, str | None]]:
        specs = {name: read_array_spec(self.folder, name) for name in set(map(array_of, records))}

        def error(file: str) -> str | None:
            content = self.store.find(file)
            if content is not None and content_matches(content, specs[array_of(file)], records[file]):
                return None
            what = "is missing" if content is None else "is not the file that the cache lists"
            return f"{self.store.address(file)} {what}. {REPAIR_HINT}"

        yield from zip(records, map_ahead(error, records), strict=True)

    # --- claims ------------------------------------------------------------------------------------------------------

    def claim_files(self) -> list[str]:
        """Asked for by name, from the first: a listing can be out of date."""
        names = (claim_file(number) for number in itertools.count(1))
        return list(itertools.takewhile(lambda name: self.store.find(name) is not None, names))

    def read_claim(self, file: str) -> Mapping[str, Any] | None:
        data = self.store.find(file)
        return None if data is None else CLAIM_RECORD.parse(data, self.store.address(file))

    def create_claim(self, file: str, content: Mapping[str, Any]) -> bool:
        return self.store.put_if_absent(file, CLAIM_RECORD.encode(content))

    def renew_claim(self, file: str, content: Mapping[str, Any]) -> None:
        if (seen := self.store.find(file)) is not None:
            self.store.replace(file, CLAIM_RECORD.encode(content), seen)

    def remove_claims(self, files: Iterable[str]) -> None:
        for file in files:
            self.store.delete([file])

    def is_begun(self) -> bool:
        if begun := self.store.find("zarr.json") is not None:
            self.fetch()
        return begun

    # --- the end -----------------------------------------------------------------------------------------------------

    def bring(self, records: FileRecords) -> None:
        specs = {name: read_array_spec(self.folder, name) for name in set(map(array_of, records))}

        def check(file: str) -> None:
            check_chunk(self.folder, specs[array_of(file)], int(file.rsplit("/", 1)[1].split(".")[1]), records)

        self.mirror.pull(records, check)

    def drop(self, records: FileRecords) -> None:
        self.mirror.drop(file for file in records if not file.startswith("tokens/"))

    def read_rows(self, array: ArraySpec, chunks: Sequence[RowsOfChunk]) -> Iterator[np.ndarray]:
        """Rows of chunks, of which only these rows are downloaded, or the compressed blocks that hold them."""
        return map_ahead(lambda one: read_stored_rows(self.store, array, one), chunks)

    def seal(self) -> bool:
        """Upload manifest.json, then zarr.json. False, if another worker has completed other arrays in the meantime:
        their manifest is then in the folder, and the next one has to hold both.
        """
        path = self.folder / "manifest.json"
        ours = path.read_bytes()
        complete = set(MANIFEST_RECORD.parse(ours, path)["complete"])
        for _ in range(SEAL_ATTEMPTS):
            theirs = self.store.find("manifest.json")
            if theirs is None:
                done = self.store.put_if_absent("manifest.json", ours)
            elif set(MANIFEST_RECORD.parse(theirs, self.store.address("manifest.json"))["complete"]) <= complete:
                done = theirs == ours or self.store.replace("manifest.json", ours, theirs)
            else:
                atomic_write(path, theirs)
                return False
            if done and self._seal_root():
                return True
        raise UnavailableError(f"{self.store.url} is being changed by others all the time. Run the same command again.")

    def _seal_root(self) -> bool:
        """Upload zarr.json, unless the one that is there lists as many arrays; whether it does now."""
        path = self.folder / "zarr.json"
        ours, theirs = path.read_bytes(), self.store.get("zarr.json")
        wanted, listed = (set(CACHE_RECORD.parse(data, path)["attributes"]["complete"]) for data in (ours, theirs))
        return wanted <= listed or self.store.replace("zarr.json", ours, theirs)


def check_address(store: ObjectStore, identity: dict[str, Any]) -> None:
    """Raise UsageError if an address holds another harvest than the one with this identity, or other objects."""
    data = store.find("zarr.json")
    if data is None and (others := sorted(set(store.children()) - INITIAL)):
        data = store.find("zarr.json")  # of another task, which may have begun in between
        if data is None:
            raise UsageError(
                f"{store.url} holds {others[0]}, but no activation cache. Choose another address with --out."
            )
    if data is not None:
        found = read_group(store, data)
        check_same_harvest(store.url, found["fingerprint"], fingerprint_of(identity), found["identity"], identity)


def read_group(store: ObjectStore, data: bytes) -> Mapping[str, Any]:
    """The attributes of a cache from its zarr.json. Raises UsageError if it is another Zarr group."""
    address = store.address("zarr.json")
    check_is_readable_cache(store.url, parse_json(data, address))
    return CACHE_RECORD.parse(data, address)["attributes"]


def take_snapshot(store: ObjectStore, folder: Path) -> None:
    """Put into a folder what a plan looks at: zarr.json, manifest.json, and an empty file for each commit that is
    listed. A listing can be out of date, so this decides nothing.
    """
    Mirror(store, folder).pull_existing(["zarr.json", "manifest.json"])
    for name, _ in store.list("commits"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()


def read_stored_rows(store: ObjectStore, array: ArraySpec, one: RowsOfChunk) -> np.ndarray:
    """Rows of a chunk in a store, of which only these rows are read, or the compressed blocks that hold them."""
    key = array.chunk_file(one.chunk)
    if array.block_rows is None:
        size = array.chunk_bytes // array.chunk_shape[0]
        parts = store.get_ranges(key, (one.rows * size).tolist(), [size] * len(one.rows))
        return np.stack([np.frombuffer(part, array.numpy_dtype) for part in parts])
    length = index_bytes(array)
    index = block_index(store.get_ranges(key, [one.size - 4 - length], [length])[0])
    numbers = np.unique(one.rows // array.block_rows).tolist()
    starts, sizes = index[numbers].T.tolist()
    blocks = dict(zip(numbers, store.get_ranges(key, starts, sizes), strict=True))
    decoded = {number: decode_block(array, data) for number, data in blocks.items()}
    return np.stack([decoded[row // array.block_rows][row % array.block_rows] for row in one.rows.tolist()])


def array_of(file: str) -> str:
    """The array that a chunk file belongs to."""
    return file.rsplit("/", 1)[0]


def remove(path: Path) -> None:
    """Delete a file, or a folder with all that is in it."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
