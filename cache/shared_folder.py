"""A folder of pulled files that several processes share: what each of them reads and pulls, for the others to respect.

Each process holds a record lock on a byte of one file and states beside it, in a file of its own, the names of what it
reads and pulls. The system frees the lock when the process ends, however it ends, and what it stated no longer counts.
"""

import errno
import fcntl
import json
import os
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from ..common.files import make_folder, os_error

MUTEX, SLOTS = 0, 128  # bytes 1 to SLOTS - 1: one for each process
BUSY = (errno.EACCES, errno.EAGAIN)


class Statement(NamedTuple):
    """What a process reads, so that no other removes it, and what it pulls, so that no other pulls it too."""

    pinned: frozenset[str] = frozenset()
    pulling: frozenset[str] = frozenset()


class SharedFolder:
    """This process's place in a shared folder, which is created if needed. A process has one object for each folder.

    All methods but `mutex` are called inside of `mutex`.

    Raises UnavailableError if the folder cannot be written, its disk has no locks, or too many processes share it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / ".lock"
        try:
            make_folder(folder)
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise os_error(error, self.path) from error
        self._threads = threading.Lock()
        self._slot: int | None = None
        self._stated = Statement()
        self._read: dict[int, tuple[tuple[int, int], Statement]] = {}  # slot -> stamp of its file, and what it says

    @contextmanager
    def mutex(self) -> Iterator[None]:
        """The exclusive right to decide what the folder holds. Waits for others, who need it for moments."""
        with self._threads:
            self._lock(fcntl.LOCK_EX, MUTEX)
            try:
                yield
            finally:
                self._lock(fcntl.LOCK_UN, MUTEX)

    def join(self) -> None:
        """Count this process among those that read."""
        if self._slot is None:
            self._slot = next((slot for slot in range(1, SLOTS) if self._try(slot)), None)
            if self._slot is None:
                raise os_error(OSError(errno.EBUSY, f"{SLOTS - 1} processes share it already"), self.folder)
            self._stated = Statement(frozenset({""}))  # of nobody: the file of a process that ended is replaced
            self.state(Statement())

    def leave(self) -> None:
        """Count this process no longer."""
        if self._slot is not None:
            self._statement(self._slot).unlink(missing_ok=True)
            self._lock(fcntl.LOCK_UN, self._slot)
            self._slot = None

    def others(self) -> list[Statement]:
        """What the other processes state that read now."""
        slots = [slot for slot in range(1, SLOTS) if slot != self._slot and self._statement(slot).exists()]
        return [self._read_statement(slot) for slot in slots if self._is_locked(slot)]

    def state(self, statement: Statement) -> None:
        """Tell the others what this process, which has joined, reads and pulls."""
        if statement == self._stated or self._slot is None:
            return
        path = self._statement(self._slot)
        temporary = path.with_suffix(".new")
        try:
            temporary.write_text(json.dumps([sorted(names) for names in statement]))
            temporary.replace(path)
        except OSError as error:
            raise os_error(error, path) from error
        self._stated = statement

    def close(self) -> None:
        """Free all locks."""
        os.close(self._file)

    def _statement(self, slot: int) -> Path:
        return self.folder / f".reader-{slot}.json"

    def _read_statement(self, slot: int) -> Statement:
        try:
            stat = self._statement(slot).stat()
            stamp = stat.st_ino, stat.st_mtime_ns
            if slot not in self._read or self._read[slot][0] != stamp:
                names = json.loads(self._statement(slot).read_bytes())
                self._read[slot] = stamp, Statement(*map(frozenset, names))
            return self._read[slot][1]
        except (OSError, ValueError, TypeError):
            return Statement()  # a disk that was full: that process goes without, and pulls again what others remove

    def _is_locked(self, byte: int) -> bool:
        if not self._try(byte):
            return True
        self._lock(fcntl.LOCK_UN, byte)
        return False

    def _try(self, byte: int) -> bool:
        """Lock a byte, unless another process has locked it."""
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
        except OSError as error:
            if error.errno in BUSY:
                return False
            raise os_error(error, self.path) from error
        return True

    def _lock(self, kind: int, byte: int) -> None:
        try:
            fcntl.lockf(self._file, kind, 1, byte)
        except OSError as error:
            raise os_error(error, self.path) from error


def union(statements: Collection[Statement]) -> Statement:
    """What any of some processes states."""
    return Statement(
        frozenset().union(*(one.pinned for one in statements)), frozenset().union(*(one.pulling for one in statements))
    )
