"""A folder of pulled files shared by several processes: which process keeps, pulls and needs which files.

The protocol:

1. A process holds the folder's lock (`mutex`) while it lists the folder and acts on the listing: while it removes a
   chunk, creates or removes a part, renames a part to its chunk, or changes its statement. So no process acts on
   outdated information.
2. A process that reads has a file `.reader-<owner>`, which it keeps locked, and beside it a *statement* of the chunks
   that it keeps and pulls. `owner` is random and differs between processes. The operating system releases the lock when
   the process ends for any reason; after that, its statement is ignored.
3. Before a process reads a chunk, it states that it keeps the chunk. It makes this statement either before the chunk
   exists, or before it releases the lock that it held when it found the chunk in the listing. It removes the chunk
   from its statement once its memory maps of the chunk are closed.
4. No process removes a chunk that another keeps. A damaged chunk is replaced; processes that read it keep the old file.
5. A chunk is pulled into a *part*, a file with the owner's name that only the owner writes. Once the owner no longer
   runs, other processes remove this file.
6. A process states the number of bytes that one of its steps needs. The folder has room for one step of every process,
   and the remaining room is divided equally, so no process has to wait until another one ends.
"""

import contextlib
import errno
import fcntl
import json
import os
import secrets
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from ..common.errors import UnavailableError
from ..common.files import make_folder, os_error

READER = ".reader-"
BUSY = (errno.EACCES, errno.EAGAIN)


class Statement(NamedTuple):
    """The chunks that a process keeps, so that no other removes them, and those it pulls, so that no other pulls them
    too.
    """

    kept: frozenset[str] = frozenset()
    pulling: frozenset[str] = frozenset()
    least: int = 0  # bytes that one step needs


class SharedFolder:
    """This process's access to a shared folder, which is created if needed.

    All methods except `mutex` and `close` must be called inside `mutex`.

    Raises UnavailableError if the folder is not writable, its disk does not support locks, or a statement is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / ".lock"
        self.owner = ""  # set while joined
        try:
            make_folder(folder)
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise os_error(error, self.path) from error
        self._own_file = -1
        self._threads = threading.Lock()
        self._stated: Statement | None = None
        self._read: dict[str, tuple[bytes, Statement]] = {}  # owner -> its statement, as bytes and parsed

    @contextmanager
    def mutex(self) -> Iterator[None]:
        """Hold the exclusive right to list and change the folder. Other processes hold this right only briefly."""
        with self._threads:
            self._lock(self._file, fcntl.LOCK_EX)
            try:
                yield
            finally:
                self._lock(self._file, fcntl.LOCK_UN)

    def join(self, least: int) -> None:
        """Register this process as a reader."""
        if not self.owner:
            owner = secrets.token_hex(8)
            path = self.folder / f"{READER}{owner}"
            try:
                self._own_file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
            except OSError as error:
                raise os_error(error, path) from error
            self._lock(self._own_file, fcntl.LOCK_EX)
            self.owner, self._stated = owner, None
        self.state(Statement(least=least) if self._stated is None else self._stated._replace(least=least))

    def leave(self) -> None:
        """Unregister this process."""
        if self.owner:
            self._remove(self.owner)
            os.close(self._own_file)
            self.owner = ""

    def others(self) -> dict[str, Statement]:
        """{owner: statement} for the other processes that read. Removes the statements of processes that have ended."""
        names = [path.name.removeprefix(READER) for path in self.folder.glob(f"{READER}*")]
        owners = {name.partition(".")[0] for name in names} - {self.owner}
        alive = {owner for owner in owners if self._is_alive(owner)}
        for owner in owners - alive:
            self._remove(owner)
        self._read = {owner: read for owner, read in self._read.items() if owner in alive}
        return {owner: self._read_statement(owner) for owner in sorted(alive)}

    def state(self, statement: Statement) -> None:
        """Tell the other processes what this process keeps, pulls and needs. Requires `join`."""
        if statement == self._stated:
            return
        path = self._statement(self.owner)
        temporary = path.with_suffix(".new")
        try:
            temporary.write_text(json.dumps([sorted(statement.kept), sorted(statement.pulling), statement.least]))
            temporary.replace(path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise os_error(error, path) from error
        self._stated = statement

    def close(self) -> None:
        """Free all locks."""
        if self.owner:
            os.close(self._own_file)
            self.owner = ""
        os.close(self._file)

    def _statement(self, owner: str) -> Path:
        return self.folder / f"{READER}{owner}.json"

    def _remove(self, owner: str) -> None:
        for suffix in (".new", ".json", ""):
            with contextlib.suppress(OSError):
                (self.folder / f"{READER}{owner}{suffix}").unlink()

    def _read_statement(self, owner: str) -> Statement:
        path = self._statement(owner)
        try:
            content = path.read_bytes()
            if owner not in self._read or self._read[owner][0] != content:
                kept, pulling, least = json.loads(content)
                self._read[owner] = content, Statement(frozenset(kept), frozenset(pulling), int(least))
            return self._read[owner][1]
        except FileNotFoundError:  # its statement was not written, because the disk was full when it joined
            return Statement()
        except OSError as error:
            raise os_error(error, path, "read") from error
        except (ValueError, TypeError) as error:
            raise UnavailableError(
                f"{path}, which lists the chunks that a process reads, is damaged. Stop the commands that use "
                f"{self.folder}, then run them again."
            ) from error

    def _is_alive(self, owner: str) -> bool:
        """Whether a process still holds the lock of an owner's file."""
        try:
            file = os.open(self.folder / f"{READER}{owner}", os.O_RDWR)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise os_error(error, self.folder / f"{READER}{owner}") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in BUSY:
                return True
            raise os_error(error, self.path) from error
        finally:
            os.close(file)
        return False

    def _lock(self, file: int, kind: int) -> None:
        try:
            fcntl.flock(file, kind)
        except OSError as error:
            raise os_error(error, self.path) from error


def kept_by(statements: Iterable[Statement]) -> frozenset[str]:
    """The chunks that at least one of these processes keeps."""
    return frozenset().union(*(one.kept for one in statements))
