"""A cache that a harvest writes to an object store: files are created in a working folder and uploaded from there.

The working folder holds the tokens, the records, and the chunks of the window being uploaded; uploaded chunks are
deleted. A window exists as soon as its commit does. A listing can be out of date, so a commit that is not listed is
requested by name. A commit is written after the chunks that it lists, and only if there is none yet. The manifest and
zarr.json are replaced only if they have not changed since they were read, so that no worker undoes the work of another.
"""

import contextlib
import itertools
import secrets
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..common.cache_schemas import (
    CACHE_RECORD,
    CLAIM_RECORD,
    COMMIT_RECORD,
    HARVEST_RECORD,
    MANIFEST_RECORD,
    REPAIR_HINT,
    TOKENS_RECORD,
)
from ..common.errors import DamagedError, UnavailableError, UsageError
from ..common.files import atomic_write, parse_json, remove
from .chunks import (
    FileRecords,
    RowReader,
    check_chunk,
    check_is_readable_cache,
    content_matches,
    read_array_spec,
    read_attributes,
)
from .consistency import SIDE_ARRAYS, check_same_harvest, check_same_text, is_array_name, layout_of
from .largest_rows import encode_largest, largest_file, stored_row_reader
from .layout import Layout, commit_file, fingerprint_of
from .mirror import RECORD_THREADS, Mirror, map_ahead
from .object_store import ObjectStore
from .place import FolderPlace, claim_file

OWN = {"drafts", ".lock", ".lock.holder"}  # only in the working folder, never uploaded
DRAFT = "draft"  # in tokens/; never uploaded either
OWNER = "tokens/owner"  # identifies the harvest whose tokens are being uploaded; exists until there is a zarr.json
RECORDS = ("zarr.json", "harvest.json", "manifest.json")
# What a harvest can leave if it is killed before it has written zarr.json.
INITIAL = {"tokens", "harvest.json"}
SEAL_ATTEMPTS = 20


class StorePlace(FolderPlace):
    """A cache under the address of `store`, with `folder` as the working folder on this machine."""

    def __init__(self, store: ObjectStore, folder: Path) -> None:
        super().__init__(folder)
        self.store: ObjectStore = store
        self.is_checked = False
        self.mirror = Mirror(store, folder)

    # --- before the first window -------------------------------------------------------------------------------------

    def fetch(self) -> None:
        """Make the working folder match the store: it then holds the store's records and tokens and nothing else.

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
            windows = range(layout_of(read_attributes(self.folder)).n_windows)
            self.mirror.pull_existing(commit_file(window, name) for name in self._arrays() for window in windows)

    def _clear(self, *, tokens: bool = False) -> None:
        """Remove from the folder every file that may differ from the store's version."""
        for path in self.folder.iterdir():
            if path.name not in OWN | {"tokens"}:
                remove(path)
            elif path.name == "tokens" and tokens:
                remove(path)

    def _refresh(self, name: str) -> None:
        if (data := self.store.find(name)) is not None:
            atomic_write(self.folder / name, data)

    def begin(self) -> None:
        """Upload the files that precede the windows; tokens first, so that a zarr.json proves that the tokens exist.

        Raises UsageError or DamagedError, and changes nothing, if another harvest has begun at this address, or if this
        harvest has begun there with other tokens.
        """
        ours = self.folder / "zarr.json"
        if (theirs := self.store.find("zarr.json")) is None:
            self.check_writes()
            theirs = self._claim_address(ours)
        if theirs is not None:
            self._check_same_start(ours, theirs)
        if self.store.find("tokens/commit.json") != (self.folder / "tokens/commit.json").read_bytes():
            self.publish_tokens()
        self._push_request()
        arrays = [f"{path.parent.name}/zarr.json" for path in self.folder.glob("*/zarr.json")]
        if theirs is None and not self.store.put_if_absent("zarr.json", ours.read_bytes()):
            theirs = self.store.get("zarr.json")  # written by another worker of this harvest
        if theirs is not None:
            atomic_write(ours, theirs)
        for name in arrays:
            self._push_if_changed(name)
        if self.store.exists(OWNER):
            self.store.delete([OWNER])

    def check_writes(self) -> None:
        """Raise UnavailableError unless the store is writable and supports conditional writes. Checked only once."""
        if not self.is_checked:
            self.store.check_conditional_writes(f"tokens/test-of-conditional-writes-{secrets.token_hex(4)}")
            self.is_checked = True

    def _claim_address(self, ours: Path) -> bytes | None:
        """Record in the store that this harvest uploads its tokens. Returns the zarr.json if another task wrote it."""
        attributes = CACHE_RECORD.read(ours)["attributes"]
        if not self.store.put_if_absent(OWNER, f"{attributes['fingerprint']} {attributes['tokens']}".encode()):
            raise UsageError(
                f"A harvest with other options or other tokens is starting at {self.store.url}. Use another --out. If "
                f"that harvest will not be continued, delete {self.store.address(OWNER)} first."
            )
        return self.store.find("zarr.json")

    def _check_same_start(self, ours: Path, theirs: bytes) -> None:
        try:
            mine, found = CACHE_RECORD.read(ours)["attributes"], read_group(self.store, theirs)
            check_same_harvest(
                self.store.url, found["fingerprint"], mine["fingerprint"], found["identity"], mine["identity"]
            )
            check_same_text(self.store.url, found, mine["rows"], mine["tokens"])
        except (UsageError, DamagedError):
            if self.store.exists(OWNER):
                self.store.delete([OWNER])
            raise

    def publish_tokens(self) -> None:
        files = TOKENS_RECORD.read(self.folder / "tokens/commit.json")["files"]
        records = {f"{name}/zarr.json" for name in {"tokens", *map(array_of, files)}}
        self.mirror.push([*sorted(records), *files])
        self.mirror.push(["tokens/commit.json"])

    def _push_request(self) -> None:
        """Upload harvest.json, after adding to its `modules` the entries that other tasks have uploaded in the
        meantime.
        """
        path, address = self.folder / "harvest.json", self.store.address("harvest.json")
        for _ in range(SEAL_ATTEMPTS):
            theirs = self.store.find("harvest.json")
            if theirs is None:
                done = self.store.put_if_absent("harvest.json", path.read_bytes())
            else:
                with contextlib.suppress(DamagedError):  # an unreadable record is replaced
                    there, ours = HARVEST_RECORD.parse(theirs, address), HARVEST_RECORD.read(path)
                    modules = there.get("modules", {}) | ours.get("modules", {})
                    HARVEST_RECORD.write_if_changed(path, {**ours, "modules": dict(sorted(modules.items()))})
                ours_now = path.read_bytes()
                done = theirs == ours_now or self.store.replace("harvest.json", ours_now, theirs)
            if done:
                return
        raise UnavailableError(f"Other processes keep changing {self.store.url}. Run the same command again.")

    def _push_if_changed(self, name: str) -> None:
        data = (self.folder / name).read_bytes()
        if self.store.find(name) != data:
            self.store.put(name, data)

    def _arrays(self) -> set[str]:
        """The arrays that can have commits: the arrays of this harvest, and those that are already complete."""
        manifest = self.folder / "manifest.json"
        complete = MANIFEST_RECORD.read(manifest)["complete"] if manifest.exists() else []
        here = {path.parent.name for path in self.folder.glob("*/zarr.json")}
        return {*complete, *(name for name in here if is_array_name(name) and not name.endswith(SIDE_ARRAYS))}

    # --- windows -----------------------------------------------------------------------------------------------------

    def commit_files(self) -> list[str]:
        """The listed commits; the listing can be out of date."""
        return sorted(name for name, _ in self.store.list("commits") if name.endswith(".json"))

    def has_commits(self, files: Iterable[str]) -> bool:
        """Unlisted commits are requested by name, up to the first that is missing."""
        listed = set(self.commit_files())
        return all(self.store.exists(file) for file in files if file not in listed)

    def read_commits(self, files: Iterable[str]) -> Iterator[Mapping[str, Any] | None]:
        files = list(files)
        for file, data in zip(files, map_ahead(self.store.find, files, RECORD_THREADS), strict=True):
            yield None if data is None else COMMIT_RECORD.parse(data, self.folder / file)

    def has_files(self, records: FileRecords) -> bool:
        """Always True: an object is complete once it exists, and a commit is written after its objects."""
        return True

    def publish(self, files: Iterable[str]) -> None:
        """Upload the chunks of a window, and delete them from the working folder."""
        files = list(files)
        self.check_writes()
        self.mirror.push(files)
        self.mirror.drop(files)

    def keep_largest(
        self, window: int, name: str, files: FileRecords, norms: np.ndarray, bits: np.ndarray
    ) -> list[str]:
        atomic_write(self.folder / (file := largest_file(window, name)), encode_largest(files, norms, bits))
        return [file]

    def create_commit(self, file: str, content: Mapping[str, Any]) -> bool:
        return self.store.put_if_absent(file, COMMIT_RECORD.encode(content))

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
        """The claims, requested by name starting at the first, since a listing can be out of date."""
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

        self.mirror.pull(records, check, RECORD_THREADS)

    def drop(self, records: FileRecords) -> None:
        self.mirror.drop(file for file in records if not file.startswith("tokens/"))

    def row_reader(self, layout: Layout, files: FileRecords) -> RowReader:
        """A reader that downloads only the requested rows of chunks, or the compressed blocks that hold them."""
        return stored_row_reader(self.store, layout, files)

    def read_record(self, name: str) -> bytes | None:
        data = self.store.find(name)
        if data is None:
            (self.folder / name).unlink(missing_ok=True)
        else:
            atomic_write(self.folder / name, data)
        return data

    def seal(self, manifest: bytes, root: bytes, seen: bytes | None) -> bool:
        if seen is None:
            done = self.store.put_if_absent("manifest.json", manifest)
        else:
            done = manifest == seen or self.store.replace("manifest.json", manifest, seen)
        if not done:
            return False
        atomic_write(self.folder / "manifest.json", manifest)
        for _ in range(SEAL_ATTEMPTS):
            if self._seal_root(root):
                return True
        raise UnavailableError(f"Other processes keep changing {self.store.url}. Run the same command again.")

    def _seal_root(self, root: bytes) -> bool:
        """Upload zarr.json unless the stored one already lists these arrays; returns whether it lists them now."""
        theirs = self.store.get("zarr.json")
        wanted, listed = (
            set(CACHE_RECORD.parse(data, "zarr.json")["attributes"]["complete"]) for data in (root, theirs)
        )
        done = wanted <= listed or self.store.replace("zarr.json", root, theirs)
        if done:
            atomic_write(self.folder / "zarr.json", theirs if wanted <= listed else root)
        return done


def check_address(store: ObjectStore, identity: dict[str, Any]) -> None:
    """Raise UsageError if an address holds a harvest with another identity, or other objects."""
    data = store.find("zarr.json")
    if data is None and (others := sorted(set(store.children()) - INITIAL)):
        data = store.find("zarr.json")  # another task may have written it in between
        if data is None:
            raise UsageError(
                f"{store.url} holds {others[0]}, but no activation cache. Choose another address with --out."
            )
    if data is not None:
        found = read_group(store, data)
        check_same_harvest(store.url, found["fingerprint"], fingerprint_of(identity), found["identity"], identity)


def read_group(store: ObjectStore, data: bytes) -> Mapping[str, Any]:
    """The attributes of a cache from its zarr.json. Raises UsageError if zarr.json describes another kind of Zarr
    group.
    """
    address = store.address("zarr.json")
    check_is_readable_cache(store.url, parse_json(data, address))
    return CACHE_RECORD.parse(data, address)["attributes"]


def take_snapshot(store: ObjectStore, folder: Path) -> None:
    """Write into a folder what a plan reads: zarr.json, manifest.json, and an empty file for each listed commit. The
    listing can be out of date, so no decision depends on it.
    """
    Mirror(store, folder).pull_existing(["zarr.json", "manifest.json"])
    for name, _ in store.list("commits"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()


def array_of(file: str) -> str:
    """The array that a chunk file belongs to."""
    return file.rsplit("/", 1)[0]
