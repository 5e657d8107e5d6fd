"""Errors that tell the user what to do."""

import pytest

from sae.common.errors import LISTED, did_you_mean, first_line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("one"), "one"),
        (ValueError("\n  one\ntwo"), "one"),
        (AttributeError(), "AttributeError"),
        (OSError(" \n"), "OSError"),
    ],
)
def test_an_error_has_a_first_line_also_without_a_message(error: Exception, line: str) -> None:
    assert first_line(error) == line


def test_a_name_like_none_lists_what_there_is_up_to_a_number() -> None:
    assert did_you_mean("zzz", ["b", "a"]) == "; available: a, b."
    many = [f"{number:03d}" for number in range(LISTED + 2)]
    assert did_you_mean("zzz", many) == f"; available: {', '.join(many[:LISTED])} and 2 more."
    assert did_you_mean("061x", many) == "; did you mean 061?"
