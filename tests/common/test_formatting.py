"""Numbers as text."""

import pytest

from sae.common.formatting import format_bytes, format_count, format_duration


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (119, "119 s"), (120, "2.0 min"), (7200, "2.0 h"), (172_800, "2.0 days")]
)
def test_a_duration_has_at_least_two_of_its_unit(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_counts_and_sizes() -> None:
    assert [format_count(n, "run") for n in (0, 1, 2000)] == ["0 runs", "1 run", "2,000 runs"]
    assert [format_bytes(n) for n in (5e4, 99e6, 1e8, 2.5e12)] == ["0.1 MB", "99.0 MB", "0.10 GB", "2,500.00 GB"]
