"""A folder that holds some of the files of a cache in an object store. A file and its object have the same name."""

import contextlib
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from ..common.errors import DamagedError
from ..common.files import atomic_write, digest_of, sae_home
from .object_store import ObjectStore

Item = TypeVar("Item")
Result = TypeVar("Result")

THREADS = 8  # requests at a time; each keeps in memory a few MiB of a download, or the whole object of an upload
RECORD_THREADS = 32  # for records, and for other objects of at most a few MiB


def working_folder(url: str, task: str = "") -> Path:
    """The folder on this machine for a cache being written to an address; its name ends with `task`."""
    name = re.sub(r"[^\w.-]+", "-", url.split("://")[1]).strip("-")
    return sae_home() / "uploads" / f"{name}--{digest_of(url)[:8]}{task}"


def working_folders(url: str) -> list[Path]:
    """The working folders on this machine for an address, one for each task."""
    folder = working_folder(url)
    return sorted(folder.parent.glob(f"{folder.name}*"))


class Mirror:
    """A folder beside a store, with methods that move files between them. Names are relative, such as `layer_12/c.3.0`.

    Files appear whole or not at all, in the folder and in the store. The methods raise the errors of the store. Threads
    can share a mirror as long as no two of them move the same file.
    """

    def __init__(self, store: ObjectStore, folder: Path) -> None:
        self.store, self.folder = store, folder

    def __repr__(self) -> str:
        return f"Mirror({self.store.url!r}, {str(self.folder)!r})"

    def pull(self, names: Iterable[str], check: Callable[[str], None] | None = None, threads: int = THREADS) -> None:
        """Download the files that the folder lacks.

        `check` is called with the name of each downloaded file and raises DamagedError if its content is wrong. The
        file is then downloaded again; if it is still wrong, it is deleted and the error is raised.
        """
        missing = [name for name in dict.fromkeys(names) if not (self.folder / name).is_file()]
        self._each(lambda name: self._pull(name, check), missing, threads)

    def _pull(self, name: str, check: Callable[[str], None] | None) -> None:
        path = self.folder / name
        for last in (False, True):
            self.store.get_to(name, path)
            try:
                if check is not None:
                    check(name)
                return
            except DamagedError:
                path.unlink(missing_ok=True)
                if last:
                    raise

    def pull_existing(self, names: Iterable[str]) -> None:
        """Download those small files that the store has and the folder lacks."""

        def pull(name: str) -> None:
            if (data := self.store.find(name)) is not None:
                atomic_write(self.folder / name, data)

        self._each(pull, [name for name in names if not (self.folder / name).is_file()], RECORD_THREADS)

    def push(self, names: Iterable[str]) -> None:
        """Upload the files. When the call returns, all files are in the store."""
        self._each(lambda name: self.store.put(name, self.folder / name), names)

    def drop(self, names: Iterable[str]) -> None:
        """Delete the files from the folder. Their objects stay."""
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                (self.folder / name).unlink()

    def _each(self, action: Callable[[str], None], names: Iterable[str], threads: int = THREADS) -> None:
        """Run an action for each file, several at a time. After the first error no further action is begun."""
        for _ in map_ahead(action, names, threads):
            pass


def map_ahead(action: Callable[[Item], Result], items: Iterable[Item], threads: int = THREADS) -> Iterator[Result]:
    """Apply an action to each item and yield the results in order. `threads` threads work at most `2 * threads` items
    ahead of the caller.

    Raises the first error, after which no further action is started.
    """
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(action, item))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for one in waiting:
                one.cancel()
