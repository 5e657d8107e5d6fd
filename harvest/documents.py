"""Documents, and the sources that they are read from.

A document is a row of a dataset, or a run of paragraphs of a text file. Rows into which several documents were packed
before are treated as one.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

MAX_DOCUMENT = 20_000_000  # characters or ids; anything longer is a dump whose tokens would fill the memory


class Document(NamedTuple):
    text: Any  # str, or a list of token ids; a document of any other type is skipped
    held_out: bool | None = None  # None: decided by a hash of its tokens


class DocumentReader(Protocol):
    """Yields documents in order, from any position on.

    `position` says how far the reader is and can be stored as JSON. None is the beginning.
    """

    @property
    def position(self) -> Any: ...
    def __iter__(self) -> Iterator[Document]: ...
    def seek(self, position: Any) -> None: ...


class ListedDocuments:
    """Documents from a function that lists them all. The position is a count, and seeking skips so many of them."""

    def __init__(self, list_documents: Callable[[], Iterable[Document]]) -> None:
        self.list_documents = list_documents
        self.seek(None)

    def __iter__(self) -> Iterator[Document]:
        for document in self.documents:
            self.position += 1
            yield document

    def seek(self, position: int | None) -> None:
        self.position = position or 0
        self.documents = itertools.islice(self.list_documents(), self.position, None)


@dataclass
class TextSource:
    """A text: its documents, the identity that pins it, and how many documents were skipped for each reason."""

    name: str
    identity: dict[str, Any]
    reader: DocumentReader
    say: Callable[[str], None] = lambda sentence: None  # receives messages for the user
    skipped: dict[str, int] = field(default_factory=lambda: {"empty": 0, "not text": 0, "huge": 0})

    @property
    def documents(self) -> Iterator[Document]:
        """The usable documents, from the current position on."""
        for document in self.reader:
            if reason := skip_reason(document.text):
                self.skipped[reason] += 1
            else:
                yield document

    @property
    def state(self) -> dict[str, Any]:
        return {"position": self.reader.position, "skipped": dict(self.skipped)}

    def seek(self, state: dict[str, Any] | None) -> None:
        """Return to where `state` was taken, or to the beginning."""
        self.reader.seek(state and state["position"])
        self.skipped |= state["skipped"] if state else dict.fromkeys(self.skipped, 0)


def skip_reason(text: Any) -> str | None:
    """Why a document is skipped, or None if it is not."""
    if not (isinstance(text, str) or is_token_ids(text)):
        return "not text"
    if len(text) > MAX_DOCUMENT:
        return "huge"
    return "empty" if not text or (isinstance(text, str) and text.isspace()) else None


def is_token_ids(value: Any) -> bool:
    return isinstance(value, list) and set(map(type, value)) <= {int}
