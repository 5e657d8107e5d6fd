"""The caches in an object store: list and delete them."""

import shutil

from ..common.errors import SaeError, UnavailableError, UsageError
from ..common.files import remove
from ..common.locks import LOCK_FILES, is_locked, locked_error, writer_lock
from .catalog import open_or_error
from .consistency import is_array_name
from .mirror import working_folder, working_folders
from .object_store import ObjectStore, open_store
from .reader import Cache
from .removal import PROOFS, removal_order

RECORDS = ("zarr.json", "manifest.json", "harvest.json")
FOLDERS = ("commits", "largest", "row_ctx", "row_pos", "tokens")
LIST_ATTEMPTS = 5


def list_stored_caches(url: str) -> dict[str, Cache | SaeError]:
    """{address: cache} for the cache at an address or, if there is none, for each cache one level below the address.
    `list_caches` does the same for folders.
    """
    store = open_store(url)
    names = store.children()
    if "zarr.json" in names:
        return {store.url: open_or_error(store.url)}
    below = [f"{store.url}/{name}" for name in names if store.exists(f"{name}/zarr.json")]
    return {address: open_or_error(address) for address in below}


def stored_files(store: ObjectStore) -> dict[str, int]:
    """{key: bytes} of the listed objects that belong to the cache at an address, complete or not.

    Raises UsageError if there is no cache.
    """
    found = {key: size for key, size in store.list() if belongs(key)}
    if not {*PROOFS} & found.keys():  # any Zarr group has a zarr.json
        raise UsageError(f"{store.url} holds no activation cache; nothing was deleted.")
    return found


def belongs(key: str) -> bool:
    """Whether a key is a valid file name in a cache. Other objects under the address do not belong to the cache."""
    top = key.split("/")[0]
    return key in RECORDS or (key != top and (top in FOLDERS or is_array_name(top)))


def remove_stored_cache(store: ObjectStore) -> int:
    """Delete the cache at an address, complete or not; returns the bytes freed. Other objects there stay.

    zarr.json is deleted first and harvest.json last: after an interruption the remaining objects are not a cache, and
    the next call deletes them. Raises UsageError if there is no cache, UnavailableError if a process on this machine is
    writing it.
    """
    size, folder = sum(stored_files(store).values()), working_folder(store.url)
    with writer_lock(folder, "sae cache rm"):
        tasks = [task for task in working_folders(store.url) if task != folder]
        if busy := next(filter(is_locked, tasks), None):
            raise locked_error(busy)
        store.delete(RECORDS[:2])
        for _ in range(LIST_ATTEMPTS):  # a listing can be out of date
            files, last = removal_order(key for key, _ in store.list() if belongs(key))
            if not files:
                break
            store.delete(files)
        else:
            raise UnavailableError(f"{store.url} still lists objects of the cache. Run the same command again.")
        # The working folders have to be removed before the last object is deleted, because without that object another
        # call would find nothing to delete.
        for one in (*tasks, *(path for path in folder.iterdir() if path.name not in LOCK_FILES)):
            remove(one)
        store.delete(last)
        shutil.rmtree(folder, ignore_errors=True)
    return size
