"""A cache on disk for data that does not depend on an SAE: activations, probes, dataset statistics."""

import contextlib
import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import Tensor

from ..common.errors import DamagedError, UsageError
from ..common.evaluation_schemas import DATA_RECORD
from ..common.files import (
    atomic_write,
    digest_of,
    folder_bytes,
    free_space,
    temporary_process,
    utf8_path,
)
from ..common.formatting import format_bytes
from ..common.locks import acquire, held_if_possible, release
from ..common.records import as_read

FORMAT = 1  # version of the cached artifacts, increased when the way any of them is computed changes
# Kinds that contain model activations, which take most of the space and are quick to recompute. Other kinds are small.
ACTIVATIONS = ("text_pass", "held_out", "rows", "last_rows", "letters", "sample")
LIMIT_VARIABLE = "SAE_EVALUATION_GB"
STALE_SECONDS = 3600  # a dead process's temporary file is removed if nothing was written to it for this many seconds


class ArtifactCache:
    """Tensors on disk, keyed by a digest of everything that they depend on.

    An artifact whose file is truncated or does not match its checksum is computed again. Several processes can share a
    cache: each writes to its own temporary file, and the last one to rename its file wins.

    The ranks of one command (`shared`) compute each artifact once: the first rank to need it holds its lock, and the
    others wait and then read it. The operating system frees the lock of a process that dies. On a file system that does
    not support locks, every rank computes what it needs.

    Attributes:
        limit: the size in bytes above which `in_use` removes the least recently read activations.
        waiting: called with a description of an artifact before this process waits until another process has computed
            that artifact, and with "" afterwards.
    """

    def __init__(self, folder: Path, shared: bool = False) -> None:
        self.folder, self.shared, self.limit = folder, shared, kept_limit()
        self.waiting: Callable[[str], None] = lambda what: None
        self._held: set[Path] = set()  # locks that this process holds and must not wait for

    def describe(self) -> str:
        """The folder, its size, and the limit above which files are removed."""
        now, free, limit = map(format_bytes, (folder_bytes(self.folder), free_space(self.folder), self.limit))
        return f"{self.folder} ({now} now, {free} free; above {limit}, the least recently read activations are removed)"

    def get_or_compute(
        self, kind: str, depends: Mapping[str, Any], compute: Callable[[], dict[str, Tensor]], device: str = "cpu"
    ) -> dict[str, Tensor]:
        """The tensors of this kind that result from the inputs in `depends`: memory-mapped from disk if they are there,
        otherwise computed and written."""
        path = self.path(kind, depends)
        if (tensors := self._read(path, depends, device)) is not None:
            return tensors
        with self._lock(path):
            if self.shared and (tensors := self._read(path, depends, device)) is not None:
                return tensors
            data = to_safetensors({name: tensor.contiguous().cpu() for name, tensor in compute().items()})
            atomic_write(path, data)
            digest = hashlib.sha256(data).hexdigest()
            DATA_RECORD.write(path.with_suffix(".json"), {"kind": kind, "depends": dict(depends), "sha256": digest})
            with utf8_path(path) as readable:
                return load_file(readable, device)

    @contextlib.contextmanager
    def claim(self, kind: str, keys: Iterable[Mapping[str, Any]]) -> Iterator[None]:
        """Hold the locks of the missing artifacts during one pass that computes all of them.

        Inside the context, check again which artifacts are missing: another rank may have computed some of them while
        this rank waited.
        """
        missing = [self.path(kind, key) for key in keys if not self.contains(kind, key)]
        with contextlib.ExitStack() as locks:
            for path in sorted(missing):  # in the same order everywhere, so that no two ranks wait for each other
                locks.enter_context(self._lock(path))
            yield

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """While this context manager is active, no process removes artifacts. On entry, if no other process uses the
        folder, it removes the least recently read activations until the rest take up at most `limit` bytes.

        All processes that use the folder share one operating-system lock. On a file system that does not support locks,
        nothing is removed.
        """
        file = self.locks / "in_use"
        with contextlib.suppress(OSError), contextlib.ExitStack() as alone:
            alone.callback(release, acquire(file, fcntl.LOCK_EX, 0))
            self.remove_unread()
        with held_if_possible(file, fcntl.LOCK_SH):
            yield

    def remove_unread(self) -> int:
        """Remove the least recently read activations, down to the limit. Returns the number of bytes removed."""
        kept = []
        for record in (found for kind in ACTIVATIONS for found in self.folder.glob(f"{kind}-[0-9a-f]*.json")):
            with contextlib.suppress(OSError):
                kept.append((record.stat().st_mtime, record.with_suffix(".safetensors").stat().st_size, record))
        above = sum(size for _, size, _ in kept) - self.limit
        removed = 0
        for _, size, record in sorted(kept):
            if removed >= above:
                break
            with contextlib.suppress(OSError):  # remove the record first: an artifact does not exist without its record
                record.unlink()
                record.with_suffix(".safetensors").unlink()
                removed += size
        return removed

    @contextlib.contextmanager
    def turn(self, name: str, wait: bool) -> Iterator[bool]:
        """Yield whether this rank may do the work called `name`: False while another rank holds the lock for it.

        If `wait` is true, wait until the other rank has done the work or has died, and yield True.
        """
        path = self.folder / name
        lock = self._acquire(path, wait)
        try:
            yield wait or lock is not None
        finally:
            if lock is not None:
                self._release(path, lock)

    @contextlib.contextmanager
    def _lock(self, path: Path) -> Iterator[None]:
        """Wait until no other process holds the lock of an artifact, then hold it. Does nothing in a single-process
        command."""
        if not self.shared or path in self._held:
            yield
            return
        lock = self._acquire(path, wait=True)
        try:
            yield
        finally:
            if lock is not None:
                self._release(path, lock)

    def _acquire(self, path: Path, wait: bool) -> int | None:
        """The lock. None if locks are not available, or if another process holds this lock and `wait` is false."""
        file = self.locks / f"{path.stem}.lock"
        try:
            try:
                lock = acquire(file, fcntl.LOCK_EX, 0)
            except BlockingIOError:
                if not wait:
                    return None
                self.waiting(path.stem)
                lock = acquire(file, fcntl.LOCK_EX)
                self.waiting("")
        except OSError:  # read-only or full folder, or a file system without locks: each rank computes for itself
            return None
        self._held.add(path)
        return lock

    def _release(self, path: Path, lock: int) -> None:
        self._held.discard(path)
        release(lock)

    def remove_locks(self) -> None:
        """Remove the lock files of artifacts when all ranks are done. If a lock is removed while another process still
        needs it, an artifact is at worst computed twice, which is harmless."""
        for path in self.locks.glob("*.lock"):
            with contextlib.suppress(OSError):
                path.unlink()

    @property
    def locks(self) -> Path:
        return self.folder / "locks"

    def path(self, kind: str, depends: Mapping[str, Any]) -> Path:
        return self.folder / f"{kind}-{digest_of([FORMAT, kind, depends])[:16]}.safetensors"

    def contains(self, kind: str, depends: Mapping[str, Any]) -> bool:
        return self.path(kind, depends).with_suffix(".json").exists()

    def _read(self, path: Path, depends: Mapping[str, Any], device: str) -> dict[str, Tensor] | None:
        try:
            record = DATA_RECORD.read(path.with_suffix(".json"))
            if record["depends"] != as_read(depends):
                return None
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() == record["sha256"]:
                    with contextlib.suppress(OSError):  # owned by another user, or read-only
                        os.utime(path.with_suffix(".json"))  # the time of the last read, for `remove_unread`
                    with utf8_path(path) as readable:
                        return load_file(readable, device)
        except (OSError, DamagedError, SafetensorError):
            pass
        return None


def kept_limit() -> float:
    """The bytes that activations may take: $SAE_EVALUATION_GB, by default 100 GB. Raises UsageError for an invalid
    value."""
    given = os.environ.get(LIMIT_VARIABLE, "") or "100"
    try:
        if (limit := float(given)) >= 0:
            return 1e9 * limit
    except ValueError:
        pass
    raise UsageError(f"{LIMIT_VARIABLE}={given} is not a number of gigabytes. Set it to 100, for example, or unset it.")


def remove_stale_temporaries(folder: Path) -> int:
    """Remove temporary files of killed processes from a folder that has no lock. Returns how many were removed.

    Recent files stay, because a process on another machine may be writing them, and from this machine such a process
    cannot be told from a dead one.
    """
    removed = 0
    for path in folder.glob("**/*.tmp-*"):
        with contextlib.suppress(OSError):  # another process has just renamed or removed it
            process = temporary_process(path)
            if process is None or is_running(process):
                continue
            if time.time() - path.stat().st_mtime > STALE_SECONDS:
                path.unlink()
                removed += 1
    return removed


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it belongs to another user
        return True
    return True
