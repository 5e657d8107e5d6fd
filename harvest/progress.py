"""How a harvest reports while it runs."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class HarvestProgress:
    """Callbacks of a harvest: `rows(done, total)` after each forward pass, `say(sentence)` for messages."""

    rows: Callable[[int, int], None] = lambda done, total: None
    say: Callable[[str], None] = lambda sentence: None


SILENT = HarvestProgress()
