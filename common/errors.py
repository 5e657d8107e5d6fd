"""What can go wrong, and the exit code that it means. Every message says what was found, what was expected, what to do."""

import difflib
from collections.abc import Iterable


class SaeError(Exception):
    """A failure that the user can understand and act on (exit code 1)."""

    exit_code = 1


class UsageError(SaeError):
    """What was asked for does not make sense or does not exist (exit code 2)."""

    exit_code = 2


class DamagedError(SaeError):
    """A file is missing, short, or of another checksum than its record says (exit code 3)."""

    exit_code = 3


class UnavailableError(SaeError):
    """Something outside this program is missing: access, network, disk, a lock, a GPU (exit code 4)."""

    exit_code = 4


class Interrupted(SaeError):
    """Stopped on request, with everything saved; the message holds the command that goes on (exit code 130)."""

    exit_code = 130


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a sentence about a name that is unknown: the nearest known one, or all of them."""
    known = sorted(known)
    if not known:
        return "; there are none."
    close = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {close[0]}?" if close else f"; there are {', '.join(known)}."
