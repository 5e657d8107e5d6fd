"""Substitutes for the labeled datasets of the Hub, made from the running Python's standard library.

Using them requires neither network access nor a license.

    library   the package that a piece comes from; each package is half prose (docstrings and comments), half code
    kind      whether a piece comes from a docstring, a comment, code, or a help topic
    subject   the topic of a piece's module: network, numbers, files, Python itself, or text; each subject is
              half docstrings, half code

A piece is a few whole lines, about 200 characters. Pieces are ordered by a hash of their text, and every third is for
testing. The embedded model was trained on most of this text, and the text differs between releases of Python. Results
therefore serve only to compare SAEs on one machine, and are not comparable with SAEBench's.
"""

import ast
import functools
import hashlib
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

LIBRARIES = ("asyncio", "email", "xml", "importlib", "logging")
KINDS = ("docstring", "comment", "code", "topic")
SUBJECTS = {
    "network": "http urllib socket ssl smtplib ftplib imaplib poplib xmlrpc socketserver ipaddress".split(),
    "numbers": "_pydecimal fractions statistics random numbers colorsys datetime calendar".split(),
    "files": "shutil tarfile zipfile pathlib os glob tempfile _pyio gzip bz2 lzma posixpath ntpath filecmp".split(),
    "python": "ast inspect dis tokenize pdb bdb traceback doctest pydoc typing".split(),
    "text": "string textwrap difflib csv configparser json html re optparse argparse gettext plistlib".split(),
}
PIECE_CHARACTERS, MIN_CHARACTERS = 200, 60  # approximate and minimum length of a piece
TEST_EVERY = 3
DocumentedNode = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@functools.cache
def labeled_rows(task: str, split: str) -> tuple[dict[str, str], ...]:
    """The rows of a split: `text` with the labels of the task, such as `library` and `kind`."""
    read_rows = {"library": library_rows, "kind": kind_rows, "subject": subject_rows}[task]
    groups: dict[tuple[tuple[str, str], ...], dict[str, None]] = {}  # labels -> distinct texts
    for text, labels in read_rows():
        groups.setdefault(tuple(labels.items()), {})[text] = None
    rows = []
    for group, texts in groups.items():
        for number, text in enumerate(sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())):
            if (number % TEST_EVERY == 0) == (split == "test"):
                rows.append({"text": text, **dict(group)})
    return tuple(rows)


def library_rows() -> Iterator[tuple[str, dict[str, str]]]:
    for library in LIBRARIES:
        for kind, text in module_pieces(library):
            yield text, {"library": library, "kind": "code" if kind == "code" else "prose"}


def kind_rows() -> Iterator[tuple[str, dict[str, str]]]:
    for module in (*LIBRARIES, *(module for modules in SUBJECTS.values() for module in modules)):
        for kind, text in module_pieces(module):
            yield text, {"kind": kind}
    for name in sorted(topics):
        for text in split_into_pieces(topics[name]):
            yield text, {"kind": "topic"}


def subject_rows() -> Iterator[tuple[str, dict[str, str]]]:
    for subject, modules in SUBJECTS.items():
        for module in modules:
            for kind, text in module_pieces(module):
                yield text, {"subject": subject, "kind": kind}


@functools.cache
def module_pieces(module: str) -> tuple[tuple[str, str], ...]:
    """(kind, text) of every piece of a module or package; empty if this Python has no such module."""
    root = Path(sysconfig.get_path("stdlib"))
    pieces = []
    for path in sorted({root / f"{module}.py", *(root / module).rglob("*.py")}):
        if not path.is_file() or "test" in path.relative_to(root).parts:
            continue
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
        for node in ast.walk(tree):
            if isinstance(node, DocumentedNode) and (docstring := ast.get_docstring(node)):
                pieces += [("docstring", text) for text in split_into_pieces(docstring)]
                node.body = node.body[1:] or [ast.Pass()]
        for comment in re.findall(r"(?:^[ \t]*#.*\n)+", source, re.MULTILINE):
            pieces += [
                ("comment", text) for text in split_into_pieces(re.sub(r"^[ \t]*#+ ?", "", comment, flags=re.MULTILINE))
            ]
        pieces += [("code", text) for text in split_into_pieces(ast.unparse(tree))]
    return tuple(pieces)


def split_into_pieces(text: str) -> Iterator[str]:
    """Split text into groups of consecutive lines with about PIECE_CHARACTERS characters each, without blank lines."""
    piece = ""
    for line in text.splitlines():
        piece += line.rstrip() + "\n" if line.strip() else ""
        if len(piece) >= PIECE_CHARACTERS:
            yield piece.rstrip()
            piece = ""
    if len(piece) > MIN_CHARACTERS:
        yield piece.rstrip()
