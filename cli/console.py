"""Terminal output: lines and one progress bar on stderr, tables on stdout; errors become one line and an exit code.

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 damaged data, 4 something outside is missing (access, disk, GPU), 130
interrupted, 141 the reader of the output closed the pipe (128 + SIGPIPE, as shells report it).
"""

import contextlib
import functools
import io
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ..common.escaping import escape_for_terminal
from ..common.signals import sigterm_as_ctrl_c
from .config_file import with_config
from .options import refuse_addresses
from .printing import print_error, print_line

if TYPE_CHECKING:
    from ..common.errors import SaeError

SECONDS_PER_LINE = 10  # between progress lines, which replace the bar if stderr is not a terminal
TABLE_WIDTH = 200  # if stdout is not a terminal
BROKEN_PIPE = 141
LOWER = (
    "Everything committed is safe. Use a smaller --window, --context or --batch-contexts (harvest), --accumulate or "
    "--batch-size (train), or fewer runs in one command (evaluate)."
)

RANK = int(os.environ.get("RANK", "0"))
QUIET = RANK > 0  # whether this process prints only problems; false for the first of the launched processes


def echo(text: str) -> None:
    """Print a line on stderr; if several processes were launched, only the first one prints."""
    if not QUIET:
        print_line(text, err=True)


def echo_problem(text: str) -> None:
    """Print a problem on stderr, in every launched process; all but the first add their rank."""
    print_error(f"rank {RANK}: {text}" if QUIET else text)


def cli_command(command: Callable[..., None]) -> Callable[..., None]:
    """Decorate a command so that it accepts --config, and its errors become one line and an exit code."""
    return with_config(report_errors(command))


def report_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Turn errors that a user can act on into one line and an exit code. Other errors are bugs and show a traceback."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # an encoding may lack ↑, ± or a letter of a file name
        try:
            with sigterm_as_ctrl_c(), warnings_as_notes():
                _run_command(command, args, kwargs)
        except KeyboardInterrupt:  # even if it arrives while another error is being reported
            ignore_interrupts()
            echo("stopped: interrupted. Everything committed is safe; run the same command again to continue.")
            raise typer.Exit(130) from None
        except BrokenPipeError:
            discard_output()
            raise typer.Exit(BROKEN_PIPE) from None

    return run


@contextlib.contextmanager
def warnings_as_notes() -> Iterator[None]:
    """Print warnings of this package as notes, each once."""
    show, shown = warnings.showwarning, set()

    def print_note(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
    ) -> None:
        if category.__module__.split(".")[0] != __package__.split(".")[0]:
            show(message, category, filename, lineno, file, line)
        elif str(message) not in shown:
            shown.add(str(message))
            echo(f"note     {message}")

    with warnings.catch_warnings():
        warnings.showwarning = print_note
        yield


def _run_command(command: Callable[..., None], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    from ..common.errors import SaeError, first_line
    from ..common.files import os_error
    from ..common.open_files import explaining_files_limit, raise_files_limit
    from ..common.packages import outdated_packages

    raise_files_limit()
    outdated = outdated_packages()
    for sentence in outdated:
        echo(f"note     {sentence}")
    try:
        refuse_addresses(kwargs.values())
        with explaining_files_limit():
            command(*args, **kwargs)
        sys.stdout.flush()
    except SaeError as error:
        if error.exit_code == 130 or isinstance(error.__context__, KeyboardInterrupt):
            ignore_interrupts()
        report(error)
        raise typer.Exit(error.exit_code) from None
    except UnicodeEncodeError as error:
        if not any("\ud800" <= character <= "\udfff" for character in str(error.object)):
            raise
        echo_problem(
            f"error: A library does not accept the name {error.object}, which is not UTF-8. Rename the file or folder, "
            "or give a link to it with another name."
        )
        raise typer.Exit(2) from None
    except BrokenPipeError:
        raise
    except OSError as error:
        # Most of these errors come from the terminal or a pipe, since this package raises SaeErrors for its files.
        if error.filename:
            echo_problem(f"error: {os_error(error, Path(error.filename))}")
        else:
            echo_problem(f"error: {error.strerror or error}. Free some space, or check the pipe.")
        raise typer.Exit(4) from None
    except Exception as error:
        from ..common.memory import out_of_memory

        if out_of_memory(error):
            echo_problem(f"error: Out of memory: {first_line(error).rstrip('.')}. {LOWER}")
            raise typer.Exit(4) from None
        if not outdated:
            raise
        echo_problem(f"error: {type(error).__name__}: {error}. Update the packages in the notes above and try again.")
        raise typer.Exit(4) from None


def report(error: "SaeError", say: Callable[[str], None] = echo_problem) -> None:
    """Print an error, unless this process has already printed it or another process reports it."""
    from ..common.errors import ReportedElsewhere

    if not (error.is_reported or isinstance(error, ReportedElsewhere)):
        say(error_line(error))
    error.is_reported = True


def error_line(error: "SaeError") -> str:
    """An error as one line: "error: ..." or "stopped: ...", without a second "Stopped" from the message itself."""
    if error.exit_code != 130:
        return f"error: {error}"
    return f"stopped: {str(error).removeprefix('Stopped').lstrip('. ')}"


def ignore_interrupts() -> None:
    """Ignore further Ctrl-C: one is being handled, and another would interrupt the exit and print a traceback."""
    with contextlib.suppress(ValueError):  # signal.signal fails outside the main thread; the handlers stay unchanged
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def discard_output() -> None:
    """Discard the rest of the output, so that flushing at exit does not fail on a closed pipe."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
            continue
        os.dup2(devnull, stream.fileno())


class BarAndTable(Progress):
    """A progress display with a table under its bar."""

    table: Table | None = None

    def get_renderables(self) -> Iterator[Any]:
        yield from super().get_renderables()
        if self.table is not None:
            yield self.table


class Bar:
    """A live progress bar; if stderr is not a terminal, a line every ten seconds.

    Call it with the work done, the total and a note. If the work done is less than in the previous call, a new stage
    begins.
    """

    def __init__(self, title: str, unit: str) -> None:
        self.title, self.unit = escape_for_terminal(title), unit
        self.done = 0
        self.started = self.last_line = time.monotonic()
        console = Console(stderr=True)
        self.live = console.is_terminal
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            TimeRemainingColumn(),
        )
        self.progress = BarAndTable(*columns, console=console, disable=not self.live or QUIET, transient=True)
        self.task = self.progress.add_task(self.title, total=None, note="")

    def __call__(self, done: int, total: int, note: str = "") -> None:
        if done < self.done:
            self.started = time.monotonic()
            self.progress.reset(self.task, total=total)
        self.done, note = done, escape_for_terminal(note)
        seconds = max(time.monotonic() - self.started, 1e-9)
        rate = f"{done / seconds:,.0f} {self.unit}/s {note}" if self.unit else note
        self.progress.update(self.task, completed=done, total=total, note=rate)
        if not self.live and time.monotonic() - self.last_line > SECONDS_PER_LINE:
            self.last_line = time.monotonic()
            eta = seconds * (total - done) / max(done, 1)
            echo(f"{self.title} {done}/{total} {100 * done / total:.1f}% {rate} eta={eta:.0f}s")

    def table(self, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Show a table under the bar, in place of the previous one."""
        self.progress.table = make_table(heads, rows)

    def say(self, sentence: str) -> None:
        """Print a line above the bar."""
        if not QUIET:
            self.progress.console.print(escape_for_terminal(sentence), highlight=False, markup=False, soft_wrap=True)

    def say_problem(self, sentence: str) -> None:
        """Like `say`, but for a problem, which every launched process prints."""
        if QUIET:
            echo_problem(sentence)
        else:
            self.say(sentence)


@contextlib.contextmanager
def bar(title: str, unit: str) -> Iterator[Bar]:
    """A progress bar, shown while the block runs."""
    shown = Bar(title, unit)
    with shown.progress:
        yield shown


def make_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table whose first column is aligned to the left and the others to the right."""
    table = Table(box=None, pad_edge=False)
    for number, head in enumerate(heads):
        table.add_column(plain_text(head), justify="left" if number == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(plain_text, row))
    return table


def plain_text(text: str, style: str = "") -> Text:
    """Text that rich shows verbatim: brackets in a name are not markup, and escape sequences are escaped."""
    return Text(escape_for_terminal(text), style)


def show_table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table on stdout, wide enough that no number is broken."""
    table = make_table(heads, rows)
    console = Console()
    width = console.width if console.is_terminal else TABLE_WIDTH
    full_width = Console(width=10_000).measure(table).maximum  # a narrower table would break numbers in two
    # A title of the table itself would be wrapped to the table's width.
    console.print(plain_text(title, "italic"), soft_wrap=True)
    Console(width=max(width, full_width)).print(table, crop=False)
