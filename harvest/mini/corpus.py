"""The text of the running Python's own standard library: help topics, docstrings and source.

Nothing is copied into the repository, since every machine that runs this code already has the text. A document is a
help topic, the docstrings of a module, or the source of a module. A hash of the module's name decides what is held out,
so that the docstrings and the source of a module are always on the same side, on every machine and in every run. Help
topics and the tables of `encodings` are never held out: they repeat each other almost word for word.
"""

import ast
import functools
import hashlib
import os
import sysconfig
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

HELD_OUT_ONE_IN = 10
# Tests and vendored wheels are missing from some installations (Debian packages them separately), so they are left out.
SKIPPED_FOLDERS = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "ensurepip",
    "__pycache__",
    "pydoc_data",
}
# The fields of a syntax tree's nodes that contain statements, in the order in which a node lists them.
BLOCKS = ("body", "cases", "handlers", "orelse", "finalbody")


class StdlibDocument(NamedTuple):
    name: str
    text: str
    held_out: bool


def is_held_out(path: str) -> bool:
    """Whether a module is held out: one in ten, chosen by a hash of its path, independent of other modules."""
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:4], "little") % HELD_OUT_ONE_IN == 0


@functools.cache
def stdlib_documents() -> tuple[StdlibDocument, ...]:
    """Every document, sorted by name. Reading the library takes some seconds, so the result is cached."""
    return tuple(read_documents())


def read_documents() -> Iterator[StdlibDocument]:
    for name in sorted(topics):
        yield StdlibDocument(f"topic:{name}", topics[name], held_out=False)
    root = Path(sysconfig.get_path("stdlib"))
    for path in library_files(root):
        relative = path.relative_to(root)
        try:
            source = path.read_text(encoding="utf-8")
            prose = docstrings(source)
        except (UnicodeDecodeError, SyntaxError):  # a few files of the library are broken on purpose
            continue
        held_out = relative.parts[0] != "encodings" and is_held_out(relative.as_posix())
        if prose:
            yield StdlibDocument(f"docstrings:{relative.as_posix()}", prose, held_out)
        if source.strip():
            yield StdlibDocument(f"source:{relative.as_posix()}", source, held_out)


def library_files(root: Path) -> list[Path]:
    """The modules below `root`, sorted. SKIPPED_FOLDERS, which often have most of the files, are not looked through."""
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS]
        found += [Path(folder, name) for name in files if name.endswith(".py")]
    return sorted(found)


def docstrings(source: str) -> str:
    """The docstrings of a module, its classes and its functions, each under its name, in the order of `ast.walk`."""
    sections = []
    for node in walk_statements(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                sections.append(f"{getattr(node, 'name', 'module')}: {text}")
    return "\n\n".join(sections)


def walk_statements(module: ast.Module) -> Iterator[ast.AST]:
    """The module and its statements, in the order of `ast.walk`. `ast.walk` is slower: it visits expressions."""
    found: deque[ast.AST] = deque([module])
    while found:
        node = found.popleft()
        yield node
        for name in BLOCKS:
            found.extend(getattr(node, name, ()))
