"""The lock of a folder that several processes hold at once, each adding files of its own."""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from .files import locked_error, locking, remove_stale_files, write_note


@contextlib.contextmanager
def shared_lock(folder: Path, command: str) -> Iterator[None]:
    """Hold `folder`, which is created if needed, against `writer_lock`, together with others that do the same.

    The last one to leave deletes the temporary files of dead writers.

    Raises UnavailableError if a process holds the exclusive lock or the folder cannot be written, UsageError if a file
    is in the way.
    """
    note = folder / ".lock.holder"
    with locking(folder):
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if not flock(descriptor, fcntl.LOCK_SH):
            raise locked_error(folder)
        write_note(note, command)
        yield
        if flock(descriptor, fcntl.LOCK_EX):
            remove_stale_files(folder)
            note.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def flock(descriptor: int, mode: int) -> bool:
    """Take or change a lock of the operating system, without waiting; False if others' locks are in the way.

    Does nothing on a file system without such locks.
    """
    try:
        fcntl.flock(descriptor, mode | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN)
    return True
