"""Several caches of one class read as one: same model, same way of computing, same choice of held-out documents."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..common.errors import UsageError
from ..common.files import digest_of
from .layout import Array
from .reader import Cache

# The held-out share and the seed decide which documents training must not see, wherever they turn up.
COMPATIBLE_KEYS = ("model", "dtype", "attention", "tokenizer", "context", "held_out", "skip", "pack", "seed")


class ConcatCache:
    """Caches as one: their chunks stand one after the other. UsageError when they are not of one class."""

    def __init__(self, caches: Sequence[Cache]) -> None:
        self.caches = list(caches)
        first = self.caches[0]
        for other in self.caches[1:]:
            different = [key for key in COMPATIBLE_KEYS if other.identity[key] != first.identity[key]]
            if different:
                raise UsageError(
                    f"{first.folder} and {other.folder} cannot be read as one: they differ in {', '.join(different)}. "
                    "Give caches of one model, harvested with the same options."
                )
        if len({cache.fingerprint for cache in self.caches}) < len(self.caches):
            raise UsageError("One cache was given twice. Name each once.")
        self.identity: dict[str, Any] = first.identity
        self.fingerprint = first.fingerprint
        self.rows = sum(cache.rows for cache in self.caches)
        self.chunk_rows = [rows for cache in self.caches for rows in cache.chunk_rows]
        self._place = [(cache, chunk) for cache in self.caches for chunk in range(len(cache.chunk_rows))]

    def require(self, layer: int, site: str = "resid_post") -> str:
        (name,) = {cache.require(layer, site) for cache in self.caches}
        return name

    def array(self, name: str) -> Array:
        return self.caches[0].array(name)

    def rows_of(self, name: str, index: int, start: int, count: int) -> list[np.ndarray]:
        cache, chunk = self._place[index]
        return cache.rows_of(name, chunk, start, count)

    def marked(self, name: str) -> np.ndarray:
        before = np.cumsum([0, *(cache.rows for cache in self.caches)])
        return np.concatenate([cache.marked(name) + at for cache, at in zip(self.caches, before[:-1], strict=True)])

    def digest(self, name: str) -> str:
        return digest_of([cache.digest(name) for cache in self.caches])

    def statistics(self, name: str) -> dict[str, float]:
        """Of all rows: `count`, `mean_square_norm` and the elementwise `variance`."""
        found = [cache.statistics(name) for cache in self.caches]
        count = sum(s["count"] for s in found)
        square = sum(s["mean_square_norm"] * s["count"] for s in found) / count
        mean = self.mean(name)
        return {"count": count, "mean_square_norm": square, "variance": (square - float(mean @ mean)) / len(mean)}

    def mean(self, name: str) -> np.ndarray:
        counts = np.array([cache.statistics(name)["count"] for cache in self.caches])
        return counts @ np.stack([cache.mean(name) for cache in self.caches]) / counts.sum()


def concat_caches(folders: Sequence[Path]) -> Cache | ConcatCache:
    """One cache, or several as one."""
    caches = [Cache(folder) for folder in folders]
    return caches[0] if len(caches) == 1 else ConcatCache(caches)
