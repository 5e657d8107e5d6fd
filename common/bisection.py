"""The smallest bound that serves, by halving."""

from collections.abc import Callable

HALVINGS = 50


def smallest_bound(low: float, high: float, serves: Callable[[float], bool]) -> float:
    """The smallest number between `low` and `high` that serves, where larger ones do too.

    It is `high`, which is taken to serve and is not asked for, or a number that serves: at most (high - low) / 2**50
    above the smallest.
    """
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if serves(middle) else (middle, high)
    return high
