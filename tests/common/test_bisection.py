"""`smallest_bound` returns a bound that satisfies the condition, and no noticeably smaller bound does."""

import math

from hypothesis import given
from hypothesis import strategies as st

from sae.common.bisection import smallest_bound


@given(st.floats(0, 1e6), st.floats(0, 1e6), st.floats(0, 1))
def test_it_serves_and_nothing_below_it_does(low: float, width: float, part: float) -> None:
    high = low + width
    least = min(low + part * width, high)
    found = smallest_bound(low, high, lambda bound: bound >= least)
    assert least <= found <= high and found - least <= math.ldexp(width, -50) + 4 * math.ulp(high)


def test_where_only_the_largest_serves_it_is_that_one() -> None:
    assert smallest_bound(1.0, 2.0, lambda bound: False) == 2.0
