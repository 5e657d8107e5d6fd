"""The part of a planned harvest that its folder already contains: nothing, some windows, other layers, or all of it."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..cache.hooks import Hook
from ..cache.layout import commit_file
from ..cache.reader import Cache
from ..common.errors import SaeError


@dataclass(frozen=True)
class ExistingRows:
    """The cache that a harvest continues or adds to, and what is still to be done.

    Attributes:
        cache: None if nothing has been begun.
        missing: the hooks of the harvest that are not complete.
        windows: the windows still to be harvested for these hooks, with `rows_left` rows; empty if there is no cache.
        statistics_differ: whether the statistics of a complete hook were computed with another --max-norm, or are lost.
    """

    cache: Cache | None
    missing: list[Hook]
    windows: Sequence[int] = ()
    rows_left: int = 0
    statistics_differ: bool = False

    @property
    def windows_left(self) -> int:
        """The number of windows still to be harvested."""
        return len(self.windows)

    @property
    def is_finished(self) -> bool:
        """Whether every hook of the harvest is complete."""
        return self.cache is not None and not self.missing

    def describe(self, folder: str, max_norm: float | None) -> str:
        """Describe the folder and what a harvest into it will do."""
        if (cache := self.cache) is None:
            return folder
        held, missing = (", ".join(map(str, hooks)) for hooks in (cache.hooks, self.missing))
        if self.is_finished:
            statistics = f"only the statistics are computed again, for --max-norm {max_norm or 'none'}"
            rest = statistics if self.statistics_differ else "nothing is left to do"
            return f"{folder} is finished: it holds {held}, {cache.rows:,} rows; {rest}"
        added = f"holds {held}; {missing} {'is' if len(self.missing) == 1 else 'are'} added" if held else "is begun"
        windows = cache.layout.n_windows
        part = "" if self.windows_left == windows else f"{self.windows_left} of {windows} windows, "
        return f"{folder} {added}: {part}{self.rows_left:,} rows to harvest"


def find_existing(folder: Path, fingerprint: str, hooks: Sequence[Hook], max_norm: float | None) -> ExistingRows:
    """Find which part of the harvest with this fingerprint and these hooks a folder already contains.

    Returns an empty part for a damaged cache, because the harvest itself reports the damage.
    """
    with contextlib.suppress(SaeError):
        cache = Cache(folder)
        if cache.fingerprint == fingerprint:
            missing = [hook for hook in hooks if hook not in cache.hooks]
            left = [w for w in range(cache.layout.n_windows) if not is_committed(folder, w, missing)]
            rows_left = cache.layout.rows_in(left)
            return ExistingRows(cache, missing, left, rows_left, statistics_differ(cache, hooks, max_norm))
    return ExistingRows(None, list(hooks))


def is_committed(folder: Path, window: int, hooks: Sequence[Hook]) -> bool:
    return all((folder / commit_file(window, hook.array)).exists() for hook in hooks)


def statistics_differ(cache: Cache, hooks: Sequence[Hook], max_norm: float | None) -> bool:
    try:
        return any(cache.statistics(hook.array)["max_norm"] != max_norm for hook in hooks if hook in cache.hooks)
    except SaeError:  # the manifest is lost or damaged
        return True
