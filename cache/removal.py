"""Delete a cache, and prevent the deletion of caches that are being read."""

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..common.errors import UsageError
from ..common.files import folder_bytes, os_error
from ..common.locks import LOCK_FILES, no_readers, reader_lock, writer_lock
from .object_store import is_url

PROOFS = ("harvest.json", "tokens/commit.json")  # a cache, or the remains of one, has at least one of these
DRAFT = "tokens/draft/"  # another proof
# Without zarr.json a folder is not a cache, and without commits a harvest ignores the other files.
FIRST = ("zarr.json", "manifest.json", "commits/", "tokens/commit.json")


def removal_order(files: Iterable[str]) -> tuple[list[str], list[str]]:
    """The files of a cache in the order of deletion; the file to delete last is in a second list.

    If the deletion is interrupted, the remaining files are not a cache but are recognized as the remains of a cache.
    """
    files = {*files}
    last = [file for file in PROOFS if file in files][:1]

    def place(file: str) -> tuple[int, str]:
        first = (number for number, part in enumerate(FIRST) if file.startswith(part))
        return next(first, len(FIRST) + file.startswith(DRAFT)), file

    return sorted(files - set(last), key=place), last


def require_cache_folder(folder: Path) -> None:
    """Raise UsageError unless the folder is a cache, complete or not, or the remains of one."""
    if folder.is_symlink() and not folder.exists():
        raise UsageError(
            f"{folder} is a link to {folder.readlink()}, which does not exist; nothing was deleted. If the target is "
            "on a disk that is not mounted, mount the disk. If the target was deleted, delete the link too."
        )
    if not (any((folder / proof).exists() for proof in (*PROOFS, DRAFT)) or is_emptied(folder)):
        raise UsageError(f"{folder} holds no activation cache; nothing was deleted.")


def is_emptied(folder: Path) -> bool:
    """Whether a folder is empty or holds only its lock: the remains of a deletion that was killed near its end."""
    if not folder.is_dir():
        return False
    return not any(folder.iterdir()) or {".lock"} <= {*files_of(folder)} <= {*LOCK_FILES}


def files_of(folder: Path) -> list[str]:
    """The files under a folder, relative to it; a link to a folder counts as a file."""
    found = []
    for parent, folders, names in os.walk(folder):
        links = (name for name in folders if os.path.islink(os.path.join(parent, name)))
        found += [Path(parent, name).relative_to(folder).as_posix() for name in (*names, *links)]
    return found


def remove_cache(folder: Path) -> int:
    """Delete a cache, complete or not; returns the bytes freed. Another call finishes an interrupted deletion.

    Raises UsageError if the folder is not a cache, UnavailableError if a process is writing or reading it.
    """
    require_cache_folder(folder)
    with writer_lock(folder, "sae cache rm"), no_readers(folder):
        size = folder_bytes(folder)
        files, last = removal_order({*files_of(folder)} - {*LOCK_FILES})
        try:
            for file in (*files, *last):
                (folder / file).unlink(missing_ok=True)
            for parent, _, _ in os.walk(folder, topdown=False):
                if Path(parent) != folder:
                    os.rmdir(parent)
            for file in LOCK_FILES:
                (folder / file).unlink(missing_ok=True)
            os.rmdir(folder.resolve())
            if folder.is_symlink():
                folder.unlink()
        except OSError as error:
            raise os_error(error, Path(error.filename or folder)) from error
    return size


@contextlib.contextmanager
def kept_caches(places: Iterable[str], command: str) -> Iterator[None]:
    """Protect the caches in these folders from deletion while they are read. Caches at an address are not locked.

    Raises UsageError if a cache has been deleted since it was opened, UnavailableError if a cache is being deleted.
    """
    with contextlib.ExitStack() as stack:
        for folder in (Path(place) for place in sorted(set(places)) if not is_url(place)):
            stack.enter_context(reader_lock(folder, command))
            if not (folder / "zarr.json").exists():
                raise UsageError(f"{folder} holds no activation cache any more: it has been deleted.")
        yield
