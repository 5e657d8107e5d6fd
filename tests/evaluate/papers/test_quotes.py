"""Finding the numbers in a quoted line."""

import pytest

from sae.evaluate.papers.quotes import printed_numbers


@pytest.mark.parametrize(
    ("quote", "expected"),
    [
        ("L0: 42.05 vs baseline 90.60", [(42.05, 2), (90.6, 2)]),
        ("Active features: 320 \\rightarrow 1,735 (5.4x increase)", [(320, 0), (1735, 0), (5.4, 1)]),
        ("85.3% vs 70.1%, a 3.5× gain", [(85.3, 1), (70.1, 1), (3.5, 1)]),
        ("0.0088 (± 0.0002)", [(0.0088, 4), (0.0002, 4)]),
        ("-0.008 (baseline 0.168)", [(-0.008, 3), (0.168, 3)]),
        ("range 68.43-90.03%", [(68.43, 2), (90.03, 2)]),
        ("Tracking -31.2% and +12.4%", [(-31.2, 1), (12.4, 1)]),
        ("a rate of $3 \\times 10^{-4}$ or 3×10^{-4}", [(3e-4, 4), (3e-4, 4)]),
        ("k 1,2,5,10", [(1, 0), (2, 0), (5, 0), (10, 0)]),
        ("through nine runs", [(9, 0)]),
        ("in none of the papers", []),
    ],
)
def test_numbers_of_a_line(quote, expected):
    found = [pair for pair in printed_numbers(quote) if pair[0] not in (0.0,)]
    assert [places for _, places in found] == [places for _, places in expected]
    assert [number for number, _ in found] == pytest.approx([number for number, _ in expected])
