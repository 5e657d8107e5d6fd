"""The files and objects that a harvest has written, for comparison with those of another harvest."""

from pathlib import Path

from sae.cache.object_store import open_store


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file of a cache except the lock."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def objects_of(url: str) -> dict[str, bytes]:
    """Every object below an address except the largest rows of windows, which a cache on disk does not have."""
    store = open_store(url)
    return {key: store.get(key) for key, _ in store.list() if not key.startswith("largest/")}
