"""Print the lines of a command. Escape sequences, which a malicious name may contain, are shown as text, so the
terminal does not obey them. `sae --help` imports this module and must start quickly, so the only third-party package
that the module imports is typer.
"""

import contextlib
from collections.abc import Iterator

import typer

from ..common.escaping import escape_for_terminal
from ..common.formatting import shorten_values


def print_line(text: str = "", *, err: bool = False) -> None:
    """Print one or more lines on stdout, or on stderr if `err` is set."""
    typer.echo(escape_for_terminal(text), err=err)


def print_error(text: str) -> None:
    """Print an error on stderr; values that are thousands of characters long are shortened."""
    print_line(shorten_values(text), err=True)


def ask(question: str) -> bool:
    """Ask a yes-or-no question on stderr. Raises typer.Abort at Ctrl-C, or when stdin is closed."""
    return typer.confirm(escape_for_terminal(question), err=True)


@contextlib.contextmanager
def printable_usage_errors() -> Iterator[None]:
    """Escape the messages of the command-line parser, which quote words that may be file names."""
    try:
        yield
    except Exception as error:
        if isinstance(message := getattr(error, "message", None), str) and hasattr(error, "format_message"):
            error.message = escape_for_terminal(shorten_values(message))  # type: ignore[attr-defined]
        raise
