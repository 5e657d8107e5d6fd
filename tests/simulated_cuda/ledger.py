"""Records of what the host reads from the GPU and copies to it, each with the line of the package that does it."""

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

HERE = Path(__file__).parent
PACKAGE = f"{HERE.parents[1]}/"
SITE = "/site-packages/"
MACHINERY = {
    str(HERE / f"{name}.py")
    for name in ("cost", "counting", "functions", "graphs", "ledger", "order", "streams", "tensors", "worker")
}

READ = "the host reads from the GPU and waits for it"
PAGEABLE = "pageable memory is copied to the GPU and the host waits for it"
QUEUED = "a copy is queued"  # pinned memory, without waiting
UNORDERED = "a GPU can give other bits in a second run"


@dataclass(frozen=True)
class Entry:
    kind: str  # READ, PAGEABLE, QUEUED or UNORDERED
    what: str  # the operation and its shapes
    line: str

    def __str__(self) -> str:
        return f"{self.line}: {self.kind}: {self.what}"


@dataclass(eq=False)  # nested ledgers can have equal entries, and are told apart by identity
class Ledger:
    """The entries recorded in one `watch` context."""

    entries: list[Entry] = field(default_factory=list)

    @property
    def waits(self) -> list[str]:
        """A sentence for each line and operation that made the host wait."""
        return list(dict.fromkeys(str(entry) for entry in self.entries if entry.kind in (READ, PAGEABLE)))

    @property
    def unordered(self) -> list[str]:
        """A sentence for each line and operation whose result depends on an order that a GPU does not keep."""
        return list(dict.fromkeys(str(entry) for entry in self.entries if entry.kind == UNORDERED))

    @property
    def queued(self) -> int:
        return sum(entry.kind == QUEUED for entry in self.entries)


_open: list[Ledger] = []


@contextlib.contextmanager
def watch() -> Iterator[Ledger]:
    """Record what happens inside the context, in the new ledger and in all enclosing ones."""
    ledger = Ledger()
    _open.append(ledger)
    try:
        yield ledger
    finally:
        _open.remove(ledger)


def is_watching() -> bool:
    return bool(_open)


_refusing: dict[int, str] = {}  # thread -> the reason why it may neither wait nor copy


@contextlib.contextmanager
def refusing(why: str) -> Iterator[None]:
    """Raise RuntimeError if this thread makes the host wait, or copies between the host and the GPU."""
    thread = threading.get_ident()
    _refusing[thread] = why
    try:
        yield
    finally:
        del _refusing[thread]


def note(kind: str, what: str) -> None:
    if kind != UNORDERED and (why := _refusing.get(threading.get_ident())):
        raise RuntimeError(f"CUDA error: {why}: {Entry(kind, what, line())}")
    if _open:
        entry = Entry(kind, what, line())
        for ledger in _open:
            ledger.entries.append(entry)


def line() -> str:
    """The innermost line on the stack that is in the package or in a test, such as train/step.py:51.

    If that line called a library, the library's innermost line follows: harvest/hooked.py:125 (transformers/...).
    """
    frame: FrameType | None = sys._getframe(1)
    library = ""
    while frame is not None:
        file = frame.f_code.co_filename
        if SITE in file:
            name = file.rpartition(SITE)[2]
            if not library and not name.startswith("torch/"):
                library = f" ({name}:{frame.f_lineno})"
        elif file.startswith(PACKAGE) and file not in MACHINERY:
            return f"{file[len(PACKAGE) :]}:{frame.f_lineno}{library}"
        frame = frame.f_back
    return f"outside the package{library}"


@contextlib.contextmanager
def watched(owner: type, method: str, ledgers: list[Ledger]) -> Iterator[None]:
    """Record each call of a method in a new ledger, and append that to `ledgers`."""
    original: Callable[..., Any] = getattr(owner, method)

    @functools.wraps(original)
    def call(*args: Any) -> Any:
        with watch() as ledger:
            result = original(*args)
        ledgers.append(ledger)
        return result

    with mock.patch.object(owner, method, call):
        yield
