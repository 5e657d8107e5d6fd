"""The errors that a user can act on."""

import pytest

from sae.common.errors import first_line


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
