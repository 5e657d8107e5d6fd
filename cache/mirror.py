"""A folder that holds some of the files of a cache in an object store. A file and its object have the same name."""

import contextlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..common.errors import DamagedError
from .object_store import ObjectStore

THREADS = 8  # requests at a time; each holds a few MiB of a download, or the whole object of an upload


class Mirror:
    """A folder beside a store, with methods that move files between them. Names are relative, such as `layer_12/c.3.0`.

    Files appear whole or not at all, in the folder and in the store. The methods raise what the store raises. Threads
    can share a mirror as long as no two of them move the same file.
    """

    def __init__(self, store: ObjectStore, folder: Path) -> None:
        self.store, self.folder = store, folder

    def __repr__(self) -> str:
        return f"Mirror({self.store.url!r}, {str(self.folder)!r})"

    def pull(self, names: Iterable[str], check: Callable[[str], None] | None = None) -> None:
        """Download those of the files that the folder lacks.

        `check` is called with the name of each file that arrived and raises DamagedError if it is not what it should
        be. Then the file is downloaded once more, and if that is no better it is deleted and the error raised.
        """
        missing = [name for name in dict.fromkeys(names) if not (self.folder / name).is_file()]
        self._each(lambda name: self._pull(name, check), missing)

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

    def push(self, names: Iterable[str]) -> None:
        """Upload the files. All of them are in the store when this returns."""
        self._each(lambda name: self.store.put(name, self.folder / name), names)

    def drop(self, names: Iterable[str]) -> None:
        """Delete the files from the folder. Their objects stay."""
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                (self.folder / name).unlink()

    def _each(self, action: Callable[[str], None], names: Iterable[str]) -> None:
        """Run an action for each file, several at a time. After the first error no further one is begun."""
        with ThreadPoolExecutor(THREADS) as pool:
            try:
                for _ in pool.map(action, names):
                    pass
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
