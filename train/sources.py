"""Open the caches that a TrainConfig names, in folders or stores."""

from ..cache.catalog import find_cache
from ..cache.concat import ConcatCache
from ..cache.hooks import Hook
from ..cache.models import GivenModel, model_label
from ..cache.object_store import is_url
from ..cache.opening import concat_caches
from ..cache.planned import PlannedCache
from ..cache.reader import Cache
from ..cache.ring import RingCache
from ..common.errors import UsageError
from .config import TrainConfig

AnyCache = Cache | ConcatCache | RingCache | PlannedCache


def open_source(config: TrainConfig, hook: Hook) -> AnyCache:
    """The cache for a config: `source`, `caches`, or the only cache with activations of the model at the hook."""
    if config.source is not None:
        return config.source
    if not config.caches:
        return find_cache(config.model, hook)
    cache = concat_caches(config.caches, config.local_folder)
    record = cache.identity["model"]
    if config.model is not None and not (given := GivenModel(config.model)).is_model_of(record):
        raise UsageError(
            f"The cache contains activations of {model_label(record)}, not of {given.describe()}. Leave --model out."
        )
    return cache


def known_variance(cache: AnyCache, array: str) -> float | None:
    """The elementwise variance of an array; None if its rows do not exist yet."""
    return cache.statistics(array)["variance"] if isinstance(cache, Cache | ConcatCache) else None


def places_of(cache: AnyCache) -> list[str]:
    """The folder path or address of a cache, or of each cache if several are read as one."""
    caches = cache.caches if isinstance(cache, ConcatCache) else [cache]
    return [one.place if isinstance(one, Cache) and is_url(one.place) else str(one.folder.resolve()) for one in caches]


def describe_masked_rows(cache: AnyCache, array: str) -> str | None:
    """The plan's line about the outlier rows of an array; None if the array has none, or no rows yet."""
    if not isinstance(cache, Cache | ConcatCache) or not (masked := len(cache.outlier_rows(array))):
        return None
    rows = f"{masked:,} of {sum(cache.chunk_rows):,} rows of {array}"
    return f"masked   {rows}, whose norm exceeds the limit set by `sae harvest --max-norm`"
