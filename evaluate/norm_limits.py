"""The norm above which an SAE's input rows are outliers. Outliers are left out of the evaluation (cache.outliers)."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..cache.hooks import Hook
from ..cache.layout import is_ring_cache
from ..cache.outliers import norm_limit
from ..cache.reader import Cache
from .rows import EvalRow, placed


def norm_limit_of(origin: Mapping[str, Any], cache: Cache, hook: Hook, max_norm: float | None = None) -> float | None:
    """The limit for an SAE with this `origin` (from sae.json) on the text of a cache; None if no row is an outlier.

    If `max_norm` is given, the limit is that multiple of the median norm of the cache's rows at the hook. Otherwise the
    limit is taken from sae.json. For a run of an earlier version, the limit is that of the cache if the run was trained
    on this cache.

    Raises UsageError if `max_norm` is given and the cache does not contain the rows of the hook.
    """
    if max_norm is not None:
        if math.isinf(max_norm):
            return None
        return norm_limit(cache.row_norms(cache.require_array(hook.layer, hook.site)), max_norm)
    if "norm_limit" in origin:
        return origin["norm_limit"]
    return cached_norm_limit(cache, hook) if origin.get("fingerprint") == cache.fingerprint else None


def cached_norm_limit(cache: Cache, hook: Hook) -> float | None:
    """The limit that a cache records for a hook; None if the cache has no rows of the hook."""
    if is_ring_cache(cache.folder) or hook not in cache.hooks:
        return None
    return cache.statistics(hook.array)["norm_limit"]


def describe_norm_limits(rows: Sequence[EvalRow]) -> list[str]:
    """Lines of a plan that say which rows are left out for which SAEs."""
    lines = []
    for hook, limit in sorted({(row.target.hook, row.target.norm_limit or math.inf) for row in rows}):
        names = [r.name for r in rows if r.target.hook == hook and (r.target.norm_limit or math.inf) == limit]
        if math.isinf(limit):
            shown = f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
            lines.append(f"masked   no rows: {shown} {'has' if len(names) == 1 else 'have'} no norm limit")
        else:
            lines.append(f"masked   outlier rows {placed(hook)}, with a norm over {limit:.4g}")
    return lines
