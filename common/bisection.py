"""Find the smallest sufficient bound by bisection."""

from collections.abc import Callable

HALVINGS = 50


def smallest_bound(low: float, high: float, serves: Callable[[float], bool]) -> float:
    """The smallest number between `low` and `high` for which `serves` is true, assuming it is true for all larger
    numbers.

    `serves` is assumed to be true for `high` and is not called for `high`. `serves` is true for the result, which is at
    most (high - low) / 2**50 above the exact smallest number.
    """
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if serves(middle) else (middle, high)
    return high
