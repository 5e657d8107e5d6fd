"""Files that are whole or absent: written under a temporary name, flushed, renamed; and a lock for one writer.

Every file of a cache and of a run folder is written through `publish`, so a kill at any instant leaves either the old
file, the new one, or none, and perhaps a stray `*.tmp-*`, which `sweep` removes.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock

from .errors import DamagedError, UnavailableError, UsageError


def atomic_write(path: Path, *parts: bytes | memoryview) -> None:
    """Write the parts, one after the other, as the file `path`: all or nothing, and on the disk when this returns.

    Raises OutsideError when the disk is full or cannot be written.
    """
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        make_folder(path.parent)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            for part in parts:
                rest = memoryview(part).cast("B")
                while rest:
                    rest = rest[os.write(descriptor, rest) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise os_error(error, path) from error
    fsync_folder(path.parent)


def os_error(error: OSError, path: Path) -> UnavailableError:
    """The sentence for a disk that refuses."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UnavailableError(
            f"The disk is full: {path} could not be written. Free space and run the same command again; what is committed is safe."
        )
    return UnavailableError(
        f"Cannot write {path}: {error.strerror or error}. Check the folder's permissions and that it is not read-only."
    )


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, so that they survive a power cut."""
    if not folder.exists():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        fsync_folder(folder.parent)


def fsync_folder(folder: Path) -> None:
    """Make the renames in a folder survive a power cut."""
    with contextlib.suppress(OSError):  # some network file systems refuse to flush a folder
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_stale_files(folder: Path) -> int:
    """Remove what killed writers left half-written; the folder is ours and the caller holds the lock. Returns how many files."""
    strays = [p for p in folder.rglob("*.tmp-*") if p.suffix.removeprefix(".tmp-").isdecimal() and p.is_file()]
    for stray in strays:
        stray.unlink(missing_ok=True)
    return len(strays)


def write_json(path: Path, content: Any, *, indent: int | None = 2) -> None:
    atomic_write(path, (json.dumps(content, indent=indent, sort_keys=False) + "\n").encode())


def write_json_if_changed(path: Path, content: Any) -> None:
    """Write a record unless it is there already, as it should be."""
    with contextlib.suppress(DamagedError):  # of a missing one too
        if read_json(path) == content:
            return
    write_json(path, content)


def read_json(path: Path, *keys: str) -> Any:
    """The content of a JSON file; DamagedError when it is missing, no JSON, or lacks a key that it has to have."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DamagedError(f"{path} is missing. Run the command that wrote it again.") from None
    except (ValueError, OSError) as error:
        raise DamagedError(
            f"{path} cannot be read ({error}); it was cut off or overwritten. "
            "Remove it and run the command that wrote it again."
        ) from error
    lacking = [key for key in keys if not isinstance(content, dict) or key not in content]
    if lacking:
        raise DamagedError(
            f"{path} has no {lacking[0]!r}; it was overwritten. Remove it and run the command that wrote it again."
        )
    return content


def digest_of(content: Any) -> str:
    """sha256 of the canonical JSON of `content`."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@contextlib.contextmanager
def writer_lock(folder: Path, doing: str, say: Callable[[str], None] = lambda sentence: None) -> Iterator[None]:
    """Hold the only right to write into `folder`; OutsideError names the holder when somebody else has it.

    The lock is the operating system's, so a dead holder's lock is free at once. Whether the folder is ours at all is to
    be looked at before: what a dead holder left half-written in it is removed.
    """
    lock, note = filelock.FileLock(folder / ".lock"), folder / ".lock.holder"
    try:
        make_folder(folder)
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise UnavailableError(
            f"{folder} is being written by {lock_holder(note)}. Wait for it, or stop it first."
        ) from None
    except (FileExistsError, NotADirectoryError):
        raise UsageError(f"{folder} is no folder: a file is in its place. Give a new folder with --out.") from None
    except OSError as error:
        raise os_error(error, folder) from error
    try:
        if note.exists():  # a holder that lives no more: one that comes to its end takes its note away
            say(f"{folder} was left by {lock_holder(note)}, which is gone; its lock was taken over.")
        remove_stale_files(folder)
        with contextlib.suppress(OSError):  # a full disk has its own sentence when something has to be written
            note.write_text(
                f"process {os.getpid()} on {socket.gethostname()} ({doing}) since {time.strftime('%Y-%m-%d %H:%M:%S')}"
            )
        yield
    finally:
        note.unlink(missing_ok=True)
        lock.release()


def lock_holder(note: Path) -> str:
    """Who holds a lock; on a full disk the note is empty."""
    return (note.read_text() if note.exists() else "") or "another process"


def folder_bytes(folder: Path) -> int:
    """Bytes of the files under `folder`; none where there is no such folder, nor of a file that goes meanwhile."""
    size = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                size += os.stat(os.path.join(parent, name)).st_size
    return size


def existing_parent(folder: Path) -> Path:
    """What is there of a folder that is still to be made: itself, or the nearest above it."""
    while not folder.exists():
        folder = folder.parent
    return folder


def free_space(folder: Path) -> int:
    """Bytes free on the disk that will hold `folder`."""
    return shutil.disk_usage(existing_parent(folder)).free


def sae_home() -> Path:
    """Where `activations/` and `runs/` are: $SAE_HOME, or the working directory."""
    import os

    return Path(os.environ.get("SAE_HOME", "."))
