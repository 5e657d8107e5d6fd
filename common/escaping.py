"""Make untrusted text (names of folders, models and datasets, contents of files) harmless where it is shown.

A terminal obeys control characters, a spreadsheet evaluates cells that look like formulas, and Markdown interprets
HTML. In all of these places, some characters hide or reorder the text around them. If a byte of a path cannot
be decoded as UTF-8, Python represents the byte as a lone surrogate (U+DC80 to U+DCFF), which no file or terminal
accepts.
"""

import os
import re
import shlex
import unicodedata
from typing import Any

PAGE_REPLACEMENTS = {"\n": "↵", "\t": "⇥", "\r": "␍"}
HIDDEN_CATEGORIES = ("Cc", "Cf", "Cs", "Cn", "Co", "Zl", "Zp")  # of Unicode
# Control characters except the line break; also line separators, bidirectional marks and surrogates.
TERMINAL_UNSAFE = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
FORMULA_STARTS = tuple("=+-@＝＋－＠")  # of a cell, for Excel, LibreOffice Calc and Google Sheets
MARKDOWN_SPECIAL = re.compile(r"[\\`*\[\]<>|~#]|(?<!\w)_|_(?!\w)")  # an underscore inside a word is not markup


def is_byte(character: str) -> bool:
    """Whether a character of a path represents a byte that cannot be decoded as UTF-8."""
    return "\udc80" <= character <= "\udcff"


def make_visible(text: str) -> str:
    """Show invisible characters (controls, bidi marks, lone surrogates, unassigned code points) as codes like ⟨202E⟩.

    A line break is shown as ↵, a tab as ⇥, and a byte that cannot be decoded as UTF-8 as �. Letters, combining marks
    and emoji are kept.
    """
    return "".join(_visible(character) for character in text)


def _visible(character: str) -> str:
    if is_byte(character):
        return "\ufffd"
    hidden = unicodedata.category(character) in HIDDEN_CATEGORIES
    return PAGE_REPLACEMENTS.get(character) or (f"⟨{ord(character):04X}⟩" if hidden else character)


def escape_for_terminal(text: str) -> str:
    r"""Replace control characters and unprintable characters by visible escapes: `\x1b`, `\r` or `\u202e`.

    Line breaks are kept. A byte that cannot be decoded as UTF-8 is shown by its value: 0xff as `\xff`.
    """
    return TERMINAL_UNSAFE.sub(lambda match: _escape(match[0]), text)


def _escape(character: str) -> str:
    if is_byte(character):
        return f"\\x{ord(character) - 0xDC00:02x}"
    return {"\t": "\\t", "\r": "\\r"}.get(character) or (
        f"\\x{ord(character):02x}" if character < "\x80" else f"\\u{ord(character):04x}"
    )


def quote(text: str | os.PathLike[str]) -> str:
    r"""Quote a word for a shell, like `shlex.quote`, but so that a terminal can show the word and a user can copy it.

    Control characters use the syntax of bash and zsh: a folder whose name is the byte 0xff becomes `$'\xff'`.
    """
    text = os.fspath(text)
    if "\n" not in text and not TERMINAL_UNSAFE.search(text):
        return shlex.quote(text)
    return "$'" + "".join(map(_shell_character, text)) + "'"


def _shell_character(character: str) -> str:
    if character in "'\\":
        return f"\\{character}"
    if character != "\n" and not TERMINAL_UNSAFE.match(character):
        return character
    data = bytes([ord(character) - 0xDC00]) if is_byte(character) else character.encode("utf-8", "surrogatepass")
    return "".join(f"\\x{byte:02x}" for byte in data)


def escape_for_csv(value: Any) -> Any:
    """A cell of a CSV file: numbers and None unchanged, text changed so that no spreadsheet takes it for a formula.

    Text that begins like a formula gets a leading apostrophe, which spreadsheets do not show. Control characters become
    visible escapes.
    """
    if value is None or isinstance(value, (bool, int, float)):
        return value
    text = escape_for_terminal(str(value).replace("\n", " "))
    return f"'{text}" if text.lstrip().startswith(FORMULA_STARTS) else text


def escape_for_markdown(text: str) -> str:
    """Escape text for Markdown, including tables: no markup, no HTML, one line, and nothing invisible."""
    return MARKDOWN_SPECIAL.sub(lambda match: f"\\{match[0]}", make_visible(text)).replace("&", "&amp;")
