"""Open a cache wherever it is: in a folder, or at an address such as s3://bucket/pile."""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path

from .chunks import most_open_chunks
from .concat import ConcatCache
from .object_store import check_slashes, is_url
from .reader import Cache

Place = str | PathLike[str]  # an address, or a folder


def open_cache(folder: Place) -> Cache:
    """Open an activation cache for reading.

    Examples:
        >>> cache = sae.open_cache("activations/gemma-2-mini--python-stdlib--1a2b3c4d")
        >>> for x in cache.batches(layer=12, batch_size=2048, seed=0):  # one epoch, each (2048, d_in) float32
        ...     ...
        >>> rows = cache.read_chunk("layer_12", 0)  # (8192, d_in) uint16, mapped: the bits of bfloat16

    Args:
        folder: a folder that `sae harvest` wrote, or the address of one in an object store, such as s3://bucket/pile.
            Files of a cache in a store are downloaded into `activations/.pulled` when they are read.

    Raises:
        UsageError: there is no cache, or the cache has a newer format.
        DamagedError: a record of the cache is broken.
        UnavailableError: the store cannot be reached or refuses access, or the extra `remote` is not installed.
    """
    return open_place(folder)


def open_place(place: Place, open_chunks: int | None = None, local: Path | None = None) -> Cache:
    """Open the cache at a place, with at most `open_chunks` memory maps open. Raises like `open_cache`.

    `local` is the folder for downloaded files of a cache in a store; None: `activations/.pulled`.
    """
    if is_url(place):
        from .local_folder import local_folder
        from .store_cache import StoreCache

        return StoreCache(place, open_chunks, local_folder(local))
    check_slashes(place)
    return Cache(Path(place), open_chunks)


def concat_caches(places: Sequence[Place], local: Path | None = None) -> Cache | ConcatCache:
    """Open one cache, or several as one. Raises UsageError if the caches cannot be combined."""
    caches = [open_place(place, most_open_chunks(len(places)), local) for place in places]
    return caches[0] if len(caches) == 1 else ConcatCache(caches)
