"""The errors that a user can act on, with their exit codes. Each message states what was found, what was expected and
what to do.
"""

import contextlib
import difflib
import warnings
from collections.abc import Iterable, Iterator

LISTED = 60  # names that an error lists


class SaeError(Exception):
    """Base class of all errors that this package raises on purpose (exit code 1)."""

    exit_code = 1
    is_reported = False  # whether it has been printed


class UsageError(SaeError):
    """Invalid arguments, or something named in them that does not exist (exit code 2)."""

    exit_code = 2


class DamagedError(SaeError):
    """A file is missing, too short, or does not match its recorded checksum (exit code 3)."""

    exit_code = 3


class UnavailableError(SaeError):
    """Something outside this program is not available: access, network, disk space, a lock, a GPU (exit code 4)."""

    exit_code = 4


class Interrupted(SaeError):
    """Stopped on request after saving everything; the message says how to continue (exit code 130)."""

    exit_code = 130


class ReportedElsewhere(SaeError):
    """An error that another of the launched processes reports. This process prints nothing and ends with the exit code
    of that error.
    """

    def __init__(self, exit_code: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class LeftOutWarning(UserWarning):
    """A cache, run or result cannot be opened, and the command leaves it out."""


def warn_left_out(what: object, error: SaeError) -> None:
    """Warn that a command leaves out a folder or file: `what` names it, and `error` says why it cannot be opened."""
    warnings.warn(f"{what} is left out: {error}", LeftOutWarning, stacklevel=3)


@contextlib.contextmanager
def naming(place: str, folder: object) -> Iterator[None]:
    """In the message of a DamagedError or UsageError, name `place` instead of the local `folder` that holds its files:
    for example, the address of a cache instead of the folder with its local copy.
    """
    try:
        yield
    except (DamagedError, UsageError) as error:
        raise type(error)(str(error).replace(str(folder), place)) from error


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its class name if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of an error message about an unknown name: the closest known name, or a list of the known names."""
    known = sorted(known)
    if not known:
        return "; none are available."
    close = difflib.get_close_matches(name, known, 1)
    if close:
        return f"; did you mean {close[0]}?"
    more = f" and {len(known) - LISTED} more" if len(known) > LISTED else ""
    return f"; available: {', '.join(known[:LISTED])}{more}."
