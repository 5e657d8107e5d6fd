"""Identify the language model that a cache, a run or a result belongs to.

A *model record* is {"name", "revision"}. For a model from the Hub, the name is its id and the revision is a commit. A
model in a folder is identified by the digest of its files, wherever the folder is: its revision is the digest, its name
the folder's name and the first 8 digits of the digest. (Earlier versions recorded the folder's absolute path as the
name.) If PEFT adapters were merged into the model, the record has a third key, "adapters": [{"name", "revision"}, ...].
"""

import contextlib
import hashlib
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..common.cache_schemas import HARVEST_RECORD
from ..common.errors import DamagedError, UnavailableError, UsageError
from ..common.files import sae_home
from ..common.schemas import MODELS_RECORD
from .model_files import deciding_files

ModelRecord = Mapping[str, Any]

DIGEST_LENGTH = 64  # hexadecimal digits of a sha256; a commit on the Hub has 40
SHORT_DIGEST = 8
REMEMBERED_BYTES = 64 << 20  # digests of fewer bytes are not remembered: they take a few hundredths of a second
SETTLED_NS = 1_000_000_000  # a file changed within the last second could change again with the same time stamp


# --- records ---------------------------------------------------------------------------------------------------------


def model_label(record: ModelRecord) -> str:
    """The name of a model for display; never the path of a folder."""
    name, revision = str(record.get("name", "?")), record.get("revision")
    if os.path.isabs(name):
        name = folder_label(Path(name), revision if isinstance(revision, str) else "")
    return "+".join([name, *(str(adapter["name"]) for adapter in record.get("adapters", ()))])


def folder_label(folder: Path, digest: str) -> str:
    """The name of a model in a folder: the folder's name and the first 8 digits of its digest."""
    return f"{folder.name}-{digest[:SHORT_DIGEST]}".rstrip("-")


def name_without_digest(record: ModelRecord) -> str:
    """The model's id on the Hub or its folder's name: a name that stays the same when the files change."""
    return model_label(record).removesuffix(f"-{record['revision'][:SHORT_DIGEST]}")


def is_digest(revision: object) -> bool:
    """Whether a revision is the digest of a folder's files, not a commit on the Hub."""
    return isinstance(revision, str) and len(revision) == DIGEST_LENGTH


def same_model(one: ModelRecord, other: ModelRecord) -> bool:
    """Whether two records denote the same model: equal digests of a folder, or equal ids on the Hub."""
    if [a["revision"] for a in one.get("adapters", ())] != [a["revision"] for a in other.get("adapters", ())]:
        return False
    if is_digest(one.get("revision")) and is_digest(other.get("revision")):
        return one["revision"] == other["revision"]
    return model_label(one) == model_label(other)


class GivenModel:
    """The model that a user names: a folder, an id on the Hub, or the name under which a model is shown."""

    def __init__(self, text: str | os.PathLike[str]) -> None:
        self.text = os.fspath(text)
        self.digests = folder_digests(Path(self.text)) if Path(self.text).is_dir() else ()

    def is_model_of(self, record: ModelRecord) -> bool:
        """Whether this is the model that a record describes, including any adapters."""
        if record.get("adapters"):
            return self.text == model_label(record)
        return self.is_base_of(record)

    def is_base_of(self, record: ModelRecord) -> bool:
        """Whether this is the model of a record, or the model into which its adapters were merged."""
        if self.text in (record.get("name"), model_label(record)):
            return True
        return record.get("revision") in self.digests

    def record(self) -> dict[str, Any]:
        """The record of this model; the revision of a model from the Hub is None, since the user gave none."""
        if not self.digests:
            return {"name": self.text, "revision": None}
        return {"name": folder_label(Path(self.text).resolve(), self.digests[0]), "revision": self.digests[0]}

    def describe(self) -> str:
        """The name and, for a folder, the digest, for an error message."""
        return f"{self.text} (sha256 {self.digests[0][:12]})" if self.digests else self.text


# --- digests of folders ----------------------------------------------------------------------------------------------


def folder_digests(folder: Path) -> tuple[str, ...]:
    """Digests of a model's folder: the sha256 over the names and bytes of the files that decide what the model
    computes.

    model_files.py selects the files. Earlier versions selected other files. The digests that those versions computed
    come after the current one, so that records of earlier versions still identify this folder.

    Raises UnavailableError if a file cannot be read, and DamagedError if an index of weights is invalid.
    """
    folder = folder.resolve()
    try:
        lists = deciding_files(folder)
        digests = file_digests(folder, sorted({name for names in lists for name in names}))
    except OSError as error:
        raise UnavailableError(f"The files of {folder} cannot be read: {error.strerror or error}.") from error
    return tuple(dict.fromkeys(combined_digest(names, digests) for names in lists))


def combined_digest(names: Iterable[str], digests: Mapping[str, str]) -> str:
    digest = hashlib.sha256()
    for name in names:
        digest.update(name.encode())
        digest.update(bytes.fromhex(digests[name]))
    return digest.hexdigest()


def file_digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """File name -> sha256, for files in a folder. Reads only files that changed since their digest was remembered."""
    known, fresh, hashed = read_remembered("files"), {}, 0
    digests = {}
    for name in names:
        path = folder / name
        stamp = file_stamp(path)
        entry = known.get(str(path))
        if isinstance(entry, list) and entry[:-1] == stamp:
            digests[name] = entry[-1]
            continue
        with path.open("rb") as file:
            digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
        hashed += stamp[0]
        if file_stamp(path) == stamp and time.time_ns() - max(stamp[1], stamp[2]) > SETTLED_NS:
            fresh[str(path)] = [*stamp, digests[name]]
    if fresh and hashed >= REMEMBERED_BYTES:
        remember("files", fresh)
    return digests


def file_stamp(path: Path) -> list[int]:
    """Values that change whenever a file is written or replaced: size, times of change (ns), inode and device."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev]


# --- what this machine remembers about folders -----------------------------------------------------------------------


def remembered_path() -> Path:
    return sae_home() / "activations" / ".models.json"  # hidden: activations/* lists caches


def read_remembered(part: str) -> dict[str, Any]:
    """A part of activations/.models.json: "files" (path -> stamp and sha256) or "folders" (digest -> paths)."""
    with contextlib.suppress(DamagedError):  # it can always be recreated
        content: dict[str, Any] = dict(MODELS_RECORD.read(remembered_path()))
        return content[part]
    return {}


def remember(part: str, entries: Mapping[str, Any]) -> None:
    """Add entries to a part of activations/.models.json. Does nothing if the file cannot be written."""
    content = {one: read_remembered(one) for one in ("files", "folders")}
    content[part] |= entries
    content["files"] = {path: entry for path, entry in content["files"].items() if os.path.exists(path)}
    with contextlib.suppress(UnavailableError):
        MODELS_RECORD.write_if_changed(remembered_path(), content)


def remember_folder(folder: Path, digest: str) -> None:
    """Remember the folder of a model, for later commands that read a cache of it."""
    path = str(folder.resolve())
    others = [one for one in read_remembered("folders").get(digest, ()) if one != path]
    remember("folders", {digest: [path, *others][:4]})


def recorded_folders(cache_folder: Path, key: str = "model") -> list[str]:
    """The paths of the model, or of the adapters, that were given to the last harvest into a cache."""
    with contextlib.suppress(DamagedError):
        value: Any = HARVEST_RECORD.read(cache_folder / "harvest.json").get(key)
        return [one for one in ([value] if isinstance(value, str) else value or ()) if isinstance(one, str)]
    return []


def find_folder(record: ModelRecord, candidates: Iterable[str]) -> Path:
    """The folder with the files of a recorded model: the first candidate or remembered folder whose digest matches.

    Raises UsageError if none does.
    """
    revision, tried = record["revision"], []
    for text in dict.fromkeys([*candidates, *read_remembered("folders").get(revision, ())]):
        folder = Path(text)
        if not folder.is_dir():
            tried.append(f"there is no folder {folder} any more")
        elif revision in (digests := folder_digests(folder)):
            return folder
        else:
            tried.append(f"{folder} now holds other files (sha256 {digests[0][:12]})")
    raise UsageError(f"The files of the model were not found{': ' + '; '.join(tried) if tried else ''}.")
