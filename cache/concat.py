"""Read several caches as one. The caches must agree in their model, their computation and their held-out documents."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..common.errors import UsageError
from ..common.files import digest_of
from .layout import ArraySpec, without_name
from .reader import Cache
from .reading import Folder, StoredFile

# The held-out share and the seed decide which documents training must not see; this choice must be the same in all
# caches.
COMPATIBLE_KEYS = ("model", "dtype", "attention", "tokenizer", "context", "held_out", "skip", "pack", "seed")

# Entries of the identity that are omitted if they have their default values. The caches must agree in these entries
# too, because the tokenization affects which documents are held out.
ADDED_KEYS = ("bos", "skip_positions", "special_tokens")
ABSENT = object()


class ConcatCache:
    """The concatenated chunks of several caches, read like one cache.

    Raises UsageError if the caches differ in one of COMPATIBLE_KEYS or if a cache is given twice.
    """

    def __init__(self, caches: Sequence[Cache]) -> None:
        self.caches = list(caches)
        first = self.caches[0]
        for other in self.caches[1:]:
            different = [
                key for key in COMPATIBLE_KEYS if without_name(other.identity[key]) != without_name(first.identity[key])
            ]
            different += [k for k in ADDED_KEYS if other.identity.get(k, ABSENT) != first.identity.get(k, ABSENT)]
            if different:
                raise UsageError(
                    f"{first.place} and {other.place} cannot be combined: they differ in {', '.join(different)}. "
                    "Use caches of one model that were harvested with the same options."
                )
        if len({cache.fingerprint for cache in self.caches}) < len(self.caches):
            raise UsageError("The same cache was given twice. Give each cache once.")
        self.identity: dict[str, Any] = first.identity
        self.fingerprint = first.fingerprint
        self.rows = sum(cache.rows for cache in self.caches)
        self.chunk_rows = [rows for cache in self.caches for rows in cache.chunk_rows]
        self._chunks = [(cache, chunk) for cache in self.caches for chunk in range(len(cache.chunk_rows))]

    def require_array(self, layer: int, site: str = "resid_post") -> str:
        """The name of the array of a layer and site. Raises UsageError if the array is not complete in every cache."""
        (name,) = {cache.require_array(layer, site) for cache in self.caches}
        return name

    def array(self, name: str) -> ArraySpec:
        """The array in the first cache. All caches share its width and dtype, but not its number of rows."""
        return self.caches[0].array(name)

    def read_rows(self, name: str, index: int, start: int, count: int) -> list[np.ndarray]:
        """`count` rows of chunk number `index`, starting at row `start` of the chunk; see `Cache.read_rows`."""
        cache, chunk = self._chunks[index]
        return cache.read_rows(name, chunk, start, count)

    def stored_files(self, name: str) -> tuple[Folder, list[StoredFile | None]] | None:
        """The local folder and a list with the stored file of each chunk (None for a chunk on a disk).

        The result is None if all chunks are on a disk.
        """
        found = [cache.stored_files(name) for cache in self.caches]
        folders = [stored[0] for stored in found if stored is not None]
        if not folders:
            return None
        files: list[StoredFile | None] = []
        for cache, stored in zip(self.caches, found, strict=True):
            files += [None] * len(cache.chunk_rows) if stored is None else stored[1]
        return folders[0], files

    def outlier_rows(self, name: str) -> np.ndarray:
        """The rows that training must ignore, ascending; rows are numbered consecutively through all caches."""
        first_row = np.cumsum([0, *(cache.rows for cache in self.caches)])
        return np.concatenate(
            [cache.outlier_rows(name) + first for cache, first in zip(self.caches, first_row[:-1], strict=True)]
        )

    def norm_limit(self, name: str) -> float | None:
        """The largest norm limit among the caches: no row above it is trained on. None if a cache has no limit."""
        limits = [cache.norm_limit(name) for cache in self.caches]
        return None if None in limits else max(limit for limit in limits if limit is not None)

    def array_digest(self, name: str) -> str:
        """A digest of everything that determines the rows of an array, including the order of the caches."""
        return digest_of([cache.array_digest(name) for cache in self.caches])

    def statistics(self, name: str) -> dict[str, float]:
        """`count`, `mean_square_norm` and elementwise `variance` over the rows of all caches, without outlier rows."""
        statistics = [cache.statistics(name) for cache in self.caches]
        count = sum(s["count"] for s in statistics)
        square = sum(s["mean_square_norm"] * s["count"] for s in statistics) / count
        mean = self.mean(name)
        return {"count": count, "mean_square_norm": square, "variance": (square - float(mean @ mean)) / len(mean)}

    def mean(self, name: str) -> np.ndarray:
        """The mean row (d_in,) float64 over all caches, without outlier rows."""
        counts = np.array([cache.statistics(name)["count"] for cache in self.caches])
        return counts @ np.stack([cache.mean(name) for cache in self.caches]) / counts.sum()
