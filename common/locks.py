"""Folder locks from the operating system (flock): a lock is released as soon as its holder ends, however it ends.

The lock is on the file `.lock` in a folder; this file is never removed. Either one process holds the lock alone
(`writer_lock`), or several processes hold it together and each adds its own files (`shared_lock`). `.lock.holder` tells
other processes which process holds the lock. Readers block processes that delete the folder, but they do not block
writers. Readers share another lock (`reader_lock`), on the file `.lock.readers`, to which each reader adds a line with
its name. The last reader to leave removes this file.
"""

import contextlib
import errno
import fcntl
import math
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from .errors import UnavailableError, UsageError
from .files import make_folder, os_error, remove_stale_files

LOCK_FILES = (".lock.request", ".lock.readers", ".lock.shared", ".lock.holder", ".lock")
WITHOUT = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)  # if a file system does not support locks
LOOK_SECONDS = 0.2  # how long checks by other processes (`is_locked`) can block a lock
POLL_SECONDS = 0.01, 0.2  # between two attempts to lock: at first, and at most


@contextlib.contextmanager
def writer_lock(folder: Path, command: str, say: Callable[[str], None] = lambda message: None) -> Iterator[None]:
    """Hold the exclusive right to write into `folder`, which is created if needed.

    `command` is shown in the error of any other process that needs the lock in the meantime.

    If the previous holder has died, `say` is called with a message. On entry, the temporary files of dead writers are
    deleted, so check that the folder belongs to this package before you take the lock.

    Raises UnavailableError if another process holds the lock (the message names it), if the folder is not writable, or
    if its file system does not support locks. Raises UsageError if a file is in the way.
    """
    note = folder / ".lock.holder"
    with locking(folder):
        lock = acquire(folder / ".lock", fcntl.LOCK_EX, LOOK_SECONDS)
    try:
        if note.exists():  # its process died; a process that ends normally deletes its note
            say(f"{folder} was locked by {lock_holder(note)}, which no longer runs; its lock was taken over.")
        remove_stale_files(folder)
        write_note(note, command)
        yield
    finally:
        note.unlink(missing_ok=True)
        release(lock)


@contextlib.contextmanager
def shared_lock(folder: Path, command: str) -> Iterator[None]:
    """Hold a shared lock on `folder`, which is created if needed. Several processes can hold this lock at once. As long
    as any process holds it, none can hold `writer_lock`.

    The last process to leave deletes the temporary files of dead writers. A process is the last if it can get an
    exclusive lock on a second file, `.lock.shared`. A process that arrives meanwhile waits for this lock. If the file
    system does not support locks, nothing is locked and nothing is deleted.

    Raises UnavailableError if a process holds the exclusive lock or if the folder is not writable, and UsageError if a
    file is in the way.
    """
    note, all_of_them = folder / ".lock.holder", folder / ".lock.shared"
    with contextlib.ExitStack() as stack:
        with locking(folder, without=True):
            lock = acquire(folder / ".lock", fcntl.LOCK_SH, 0)
            stack.callback(release, lock)
            together = acquire(all_of_them, fcntl.LOCK_SH)
            stack.callback(release, together)
            stack.callback(leave, folder, all_of_them, together)
        write_note(note, command)
        yield


@contextlib.contextmanager
def reader_lock(folder: Path, command: str) -> Iterator[None]:
    """Keep `folder` from being deleted by a process that uses `no_readers`. Several readers can share this lock.

    Nothing is locked if the folder is not writable or its file system does not support locks.

    Raises UnavailableError if the folder is being deleted.
    """
    path = folder / ".lock.readers"
    with contextlib.ExitStack() as stack:
        try:
            lock = acquire(path, fcntl.LOCK_SH, LOOK_SECONDS, in_new_folder=False)
        except BlockingIOError:
            raise UnavailableError(f"{folder} is being deleted by {lock_holder(folder / '.lock.holder')}.") from None
        except OSError:
            pass
        else:
            stack.callback(release, lock)
            stack.callback(leave_readers, path, lock)
            with contextlib.suppress(OSError), path.open("a") as names:
                names.write(f"{describe_process(command)}\n")
        yield


@contextlib.contextmanager
def no_readers(folder: Path) -> Iterator[None]:
    """Exclude `reader_lock` on `folder`. Raises UnavailableError, which names a reader, if there are readers."""
    path = folder / ".lock.readers"
    try:
        lock = acquire(path, fcntl.LOCK_EX, LOOK_SECONDS, in_new_folder=False)
    except BlockingIOError:
        raise UnavailableError(
            f"{folder} is being read by {last_reader(path)}. Wait until it ends, or stop it first."
        ) from None
    except OSError as error:
        raise os_error(error, folder) from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        release(lock)


def last_reader(path: Path) -> str:
    """Of the readers that may still run, the one that began last. A killed process leaves its line in the file."""
    with contextlib.suppress(OSError):
        for name in reversed(path.read_text().splitlines()):
            match = re.match(r"process (\d+) on (\S+) ", name)
            if match and not (match[2] == socket.gethostname() and not Path(f"/proc/{match[1]}").exists()):
                return name
    return "another process"


def leave_readers(path: Path, lock: int) -> None:
    """Remove the readers' file if this process was the last reader."""
    with contextlib.suppress(OSError):
        flock(lock, fcntl.LOCK_EX)
        path.unlink(missing_ok=True)


def leave(folder: Path, all_of_them: Path, together: int) -> None:
    """Clean up a folder if no other process shares it."""
    with contextlib.suppress(BlockingIOError):
        flock(together, fcntl.LOCK_EX)
        remove_stale_files(folder)
        all_of_them.unlink(missing_ok=True)
        (folder / ".lock.holder").unlink(missing_ok=True)


@contextlib.contextmanager
def brief_lock(path: Path) -> Iterator[None]:
    """Wait for the lock of a file and hold it briefly. Does nothing if the file system does not support locks."""
    lock = None
    try:
        lock = acquire(path, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in WITHOUT:
            raise os_error(error, path) from error
    try:
        yield
    finally:
        if lock is not None:
            release(lock)


def is_locked(folder: Path) -> bool:
    """Whether a process, maybe this one, holds the exclusive lock of a folder. Several processes can check at the same
    time.
    """
    try:
        descriptor = os.open(folder / ".lock", os.O_RDONLY)
    except OSError:  # it was never locked, or it has been removed
        return False
    try:
        flock(descriptor, fcntl.LOCK_SH)
    except BlockingIOError:
        return True
    except OSError:  # locks are not supported, so no process holds one
        return False
    finally:
        os.close(descriptor)
    return False


def was_abandoned(folder: Path) -> bool:
    """Whether the last process that held the lock of a folder died. A process that ends normally removes its note."""
    return (folder / ".lock.holder").exists() and not is_locked(folder)


def is_abandoned(path: Path) -> bool:
    """Whether a dead process left this file. A live process holds an exclusive lock on its file, and removes the file
    when done.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        flock(descriptor, fcntl.LOCK_SH)
        return is_file_of(path, descriptor)
    except OSError:
        return False
    finally:
        os.close(descriptor)


def acquire(path: Path, mode: int, patience: float = math.inf, *, in_new_folder: bool = True) -> int:
    """A file descriptor with a lock on `path`. Creates the file if needed, and with `in_new_folder` also its folder.

    A process that holds the file's exclusive lock may delete the file; this function then creates and locks a new file.

    Raises BlockingIOError if other processes hold the lock for `patience` seconds, and another OSError if the file
    cannot be opened or its file system does not support locks.
    """
    ends, (pause, longest) = time.monotonic() + patience, POLL_SECONDS
    while True:
        if in_new_folder:
            make_folder(path.parent)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            flock(descriptor, mode)
            if is_file_of(path, descriptor):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            if time.monotonic() >= ends:
                raise
            time.sleep(pause)
            pause = min(2 * pause, longest)
        except BaseException:
            os.close(descriptor)
            raise
        else:
            os.close(descriptor)


@contextlib.contextmanager
def held_if_possible(path: Path, mode: int = fcntl.LOCK_EX) -> Iterator[None]:
    """Wait for a lock on `path` and hold it. Does nothing if the file cannot be created or locks are not supported."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            stack.callback(release, acquire(path, mode))
        yield


def flock(descriptor: int, mode: int) -> None:
    """Take or change a lock without waiting. Raises BlockingIOError if others hold it, and OSError if locks are not
    supported.
    """
    try:
        fcntl.flock(descriptor, mode | fcntl.LOCK_NB)
    except PermissionError as error:  # raised by some file systems
        raise BlockingIOError(*error.args) from error


def is_file_of(path: Path, descriptor: int) -> bool:
    """Whether an open file is still the one at `path`."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def release(descriptor: int) -> None:
    """Release a lock, even if a forked process has a copy of the descriptor."""
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


@contextlib.contextmanager
def locking(folder: Path, *, without: bool = False) -> Iterator[None]:
    """Raise an error that explains why `folder` cannot be locked. If `without` is set, no error is raised if the file
    system does not support locks.
    """
    try:
        yield
    except BlockingIOError:
        raise locked_error(folder) from None
    except (FileExistsError, NotADirectoryError):
        raise UsageError(f"{folder} is not a folder: a file is in its place. Choose a new folder with --out.") from None
    except OSError as error:
        if error.errno not in WITHOUT:
            raise os_error(error, folder) from error
        if not without:
            raise without_locks(folder, error) from error


def without_locks(folder: Path, error: OSError) -> UnavailableError:
    """The error about a file system that does not support locks, with the remedy."""
    return UnavailableError(
        f"{folder} cannot be locked ({error.strerror}), so two commands could write into it at once. Mount its file "
        "system with locks (Lustre: -o flock; NFS: without nolock), or choose a folder on another file system with "
        "--out or SAE_HOME."
    )


def locked_error(folder: Path) -> UnavailableError:
    """The error for a locked folder, which names the process that writes into it."""
    holder = lock_holder(folder / ".lock.holder")
    return UnavailableError(f"{folder} is being written by {holder}. Wait until it ends, or stop it first.")


def write_note(note: Path, command: str) -> None:
    """Record which process holds the lock of a folder."""
    with contextlib.suppress(OSError):  # a full disk is reported when something has to be written
        note.write_text(describe_process(command))


def describe_process(command: str) -> str:
    """A description of this process, for messages in other processes."""
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return f"process {os.getpid()} on {socket.gethostname()} ({command}) since {since}"


def lock_holder(note: Path) -> str:
    """The process named in a note, or "another process".

    The note is missing if the process has just ended, and empty if the disk was full when it was written.
    """
    with contextlib.suppress(OSError):
        if holder := note.read_text():
            return holder
    return "another process"
