"""Untrusted names are shown on the terminal: control codes and markup in them have no effect."""

import ast
import re
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from sae.cache.object_store import StoreWarning
from sae.cli import console
from sae.cli.console import bar, cli_command, echo, show_table, warnings_as_notes
from sae.cli.main import app
from sae.common.errors import UsageError

ROOT = Path(__file__).parents[2]
HOSTILE = "[red]x[/]\x1b[2J\x1b]0;title\x07\r\udcff[/nothing]"
SHOWN = r"[red]x[/]\x1b[2J\x1b]0;title\x07\r\xff[/nothing]"


def test_every_line_of_a_command_is_printed_by_one_of_three_modules():
    """No other module writes to the terminal, so no name can reach the terminal unescaped."""
    printers = ("cli/printing.py", "cli/console.py", "evaluate/pages/terminal.py")
    by_hand = ("harvest/mini/pretrain.py", "harvest/mini/quality.py", "__main__.py")  # scripts; a fixed message
    folders = ("cache", "cli", "common", "evaluate", "harvest", "train", "workflows")
    writing = {"print", "typer.echo", "typer.secho", "typer.confirm", "typer.prompt", "Console"}
    last = re.compile(rf"\b({'|'.join(name.rpartition('.')[2] for name in writing)})\b")
    found = set()
    for path in [*ROOT.glob("*.py"), *(p for folder in folders for p in (ROOT / folder).rglob("*.py"))]:
        source = path.read_text()
        if not last.search(source):  # no need to take it apart
            continue
        for node in ast.walk(ast.parse(source)):
            called = node.func if isinstance(node, ast.Call) else None
            name = getattr(called, "id", getattr(called, "attr", ""))
            if last.fullmatch(name) and ast.unparse(called) in writing:
                found.add(path.relative_to(ROOT).as_posix())
    assert found == {*printers, *by_hand}


def test_lines_errors_tables_and_bars_show_names_as_they_are(capsys):
    @cli_command
    def command() -> None:
        echo(f"note     {HOSTILE}")
        show_table(HOSTILE, ["run", HOSTILE], [[HOSTILE, "1"]])
        with bar(HOSTILE, "steps") as shown:
            shown(1, 2, HOSTILE)
            shown.table([HOSTILE], [[HOSTILE]])
            shown.say(HOSTILE)
        raise UsageError(HOSTILE)

    with pytest.raises(BaseException) as stopped:
        command()
    assert getattr(stopped.value, "exit_code", None) == 2
    out, err = capsys.readouterr()
    assert out.count(SHOWN) == 3
    assert err.splitlines() == [f"note     {SHOWN}", SHOWN, f"error: {SHOWN}"]


def test_a_live_bar_neither_styles_nor_obeys_a_name(monkeypatch):
    import io

    from rich.console import Console

    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=200, color_system="standard")
    monkeypatch.setattr("sae.cli.console.Console", lambda **_: terminal)
    with bar(HOSTILE, "steps") as shown:
        shown(1, 2, HOSTILE)
        shown.progress.refresh()
    written = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue())
    assert written.count(SHOWN) >= 2 and "\x1b]0" not in screen.getvalue() and "\x1b[2J" not in screen.getvalue()


@pytest.mark.parametrize(
    "words", [["--\x1b[2J"], ["\x1b[2J"], ["harvest", "--tokens", "\x1b[2J"], ["evaluate", "\x1b[2J"]]
)
def test_words_of_the_command_line_are_quoted_without_escapes(words):
    result = CliRunner().invoke(app, words, env={"TERM": "dumb", "COLUMNS": "120"})
    assert result.exit_code == 2
    assert r"\x1b[2J" in result.stderr and "\x1b" not in result.stderr


def test_a_config_file_is_quoted_without_escapes(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text('[train]\n"\\u001b[2J" = 1\n')
    result = CliRunner().invoke(app, ["variants", "--config", str(path)])
    assert result.exit_code == 2 and "\x1b" not in result.stderr and r"\x1b[2J" in result.stderr


def test_a_warning_is_a_note_and_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings_as_notes():
        warnings.simplefilter("always")
        for number in (1, 1, 2):
            warnings.warn(f"Store {number} fails.", StoreWarning, stacklevel=1)
    assert capsys.readouterr().err == "note     Store 1 fails.\nnote     Store 2 fails.\n"


def test_the_rate_of_a_new_stage_counts_from_its_beginning(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with bar("get", "rows") as shown:
        for now[0], done in ((100.0, 100), (200.0, 1), (220.0, 20)):
            shown(done, 100)
    assert capsys.readouterr().err.splitlines()[-1] == "get 20/100 20.0% 1 rows/s  eta=80s"
