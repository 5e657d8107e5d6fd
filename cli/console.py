"""What the command line shows: sentences and one live bar on stderr, tables on stdout."""

import contextlib
import functools
import io
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from .config_file import configured

PLAIN_SECONDS = 10  # between the lines that stand for the bar where stderr is no terminal
PLAIN_WIDTH = 200


QUIET = int(os.environ.get("RANK", "0")) > 0  # of several launched processes the first speaks for all


def echo(text: str) -> None:
    if not QUIET:
        typer.echo(text, err=True)


def cli_command(command: Callable[..., None]) -> Callable[..., None]:
    """A verb: it takes --config, and speaks."""
    return configured(report_errors(command))


def report_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Errors of ours become a sentence and an exit code; any other is a bug and shows its traceback."""

    @functools.wraps(command)
    def run(*arguments: Any, **keywords: Any) -> None:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # not every encoding has ↑ and ±, nor every file's name
        from ..common.errors import SaeError
        from ..common.files import os_error

        try:
            try:
                command(*arguments, **keywords)
            except SaeError as error:
                if isinstance(error.__context__, KeyboardInterrupt):
                    no_more_interrupts()
                typer.echo(f"{'stopped' if error.exit_code == 130 else 'error'}: {error}", err=True)
                raise typer.Exit(error.exit_code) from None
            except MemoryError as error:
                echo(
                    f"error: The memory is too small: {error}. A smaller --window or --context takes less; what was committed is safe."
                )
                raise typer.Exit(4) from None
            except BrokenPipeError:
                with contextlib.suppress(OSError):
                    echo("stopped: whoever read the output has closed it.")
                close_output()
                raise typer.Exit(4) from None
            except OSError as error:  # of the terminal or a pipe, mostly: our own files have their own sentences
                if error.filename:
                    echo(f"error: {os_error(error, Path(error.filename))}")
                else:
                    echo(f"error: {error.strerror or error}. Free space, or check the pipe.")
                raise typer.Exit(4) from None
        except KeyboardInterrupt:  # also one that came while another was answered
            no_more_interrupts()
            echo("stopped: interrupted. What was committed is safe, and the same command goes on from there.")
            raise typer.Exit(130) from None

    return run


def no_more_interrupts() -> None:
    """Ctrl-C was understood: one more would break into the exit and print a traceback."""
    with contextlib.suppress(ValueError):  # in a thread: whoever runs us there keeps the signals
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def close_output() -> None:
    """Nobody reads it: what is still to be said goes nowhere, and not into an error at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
            continue
        os.dup2(nowhere, stream.fileno())


class BarAndTable(Progress):
    table: Table | None = None

    def get_renderables(self) -> Iterator[Any]:
        yield from super().get_renderables()
        if self.table is not None:
            yield self.table


class Bar:
    """One live bar; where stderr is no terminal, a line every ten seconds."""

    def __init__(self, title: str, unit: str) -> None:
        self.done = 0
        self.title, self.unit, self.started, self.told = title, unit, time.monotonic(), time.monotonic()
        console = Console(stderr=True)
        self.live = console.is_terminal
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
        )
        self.progress = BarAndTable(*columns, console=console, disable=not self.live or QUIET, transient=True)
        self.task = self.progress.add_task(title, total=None, note="")

    def __call__(self, done: int, total: int, note: str = "") -> None:
        if done < self.done:  # another stage of the same work
            self.started = time.monotonic()
            self.progress.reset(self.task, total=total)
        self.done = done
        spent = max(time.monotonic() - self.started, 1e-9)
        rate = f"{done / spent:,.0f} {self.unit}/s {note}" if self.unit else note
        self.progress.update(self.task, completed=done, total=total, note=rate)
        if not self.live and time.monotonic() - self.told > PLAIN_SECONDS:
            self.told = time.monotonic()
            left = spent * (total - done) / max(done, 1)
            echo(f"{self.title} {done}/{total} {100 * done / total:.1f}% {rate} eta={left:.0f}s")

    def table(self, heads: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
        """Show a table under the bar, until the next one."""
        self.progress.table = table_of(heads, lines)

    def say(self, sentence: str) -> None:
        """A line above the bar."""
        if not QUIET:
            self.progress.console.print(sentence, highlight=False, markup=False, soft_wrap=True)


@contextlib.contextmanager
def bar(title: str, unit: str) -> Iterator[Bar]:
    shown = Bar(title, unit)
    with shown.progress:
        yield shown


def table_of(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> Table:
    table = Table(box=None, pad_edge=False)
    for number, head in enumerate(heads):
        table.add_column(head, justify="left" if number == 0 else "right", overflow="fold")
    for line in lines:
        table.add_row(*map(Text, line))  # a name is no markup
    return table


def show_table(title: str, heads: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    table = table_of(heads, lines)
    console = Console()
    width = console.width if console.is_terminal else PLAIN_WIDTH
    wide = Console(width=10_000).measure(table).maximum  # a narrower one would break numbers in two
    console.print(Text(title, "italic"), soft_wrap=True)  # as a part of the table it would be folded to its width
    Console(width=max(width, wide)).print(table, crop=False)
