"""Documents, and the sources that they are read from.

A document is a row of a dataset, or a run of paragraphs of a text file. A row into which several documents were already
packed counts as one document.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from ..common.errors import UsageError
from ..common.formatting import format_count
from ..common.tables import Unreadable

UNREADABLE = "unreadable"
CHECKED_ROWS = 100  # once this many rows are read, at most a hundredth of them may be unreadable
TOLERATED_ROWS = 10  # additional unreadable rows that are allowed until the whole text is read
REFUSED = "untemplated"  # conversations that the chat template does not render
MAX_DOCUMENT = 20_000_000  # characters or ids; anything longer is a dump whose tokens would fill the memory


@dataclass(frozen=True)
class Conversation:
    """Messages, each a dictionary with a role and content. The length of a conversation is the number of characters in
    the contents.
    """

    messages: list[dict[str, Any]]

    def __len__(self) -> int:
        return sum(len(content) for message in self.messages if isinstance(content := message["content"], str))


class Document(NamedTuple):
    text: Any  # str, a list of token ids, a Conversation, or Unreadable; a document of any other type is skipped
    held_out: bool | None = None  # None: decided by a hash of its tokens


class DocumentReader(Protocol):
    """Yields documents in order, starting at any position.

    `position` is the reader's position, as a value that can be stored as JSON. None is the beginning.
    """

    @property
    def position(self) -> Any: ...
    def __iter__(self) -> Iterator[Document]: ...
    def seek(self, position: Any) -> None: ...


class ListedDocuments:
    """Documents from a function that lists them all. The position is the number of documents to skip."""

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
    """A text: its documents, the identity that pins it, and how many documents were skipped for each reason.

    Attributes:
        read: the number of documents read so far, including skipped ones.
        first_unreadable: why the first unreadable document could not be read.
    """

    name: str
    identity: dict[str, Any]
    reader: DocumentReader
    say: Callable[[str], None] = lambda sentence: None  # called with messages for the user
    skipped: dict[str, int] = field(default_factory=lambda: {"empty": 0, "not text": 0, "huge": 0})
    # False if the text certainly contains none of these strings; True otherwise, for example if it is not searched.
    may_contain: Callable[[Sequence[str]], bool] = lambda strings: True
    remarks: list[str] = field(default_factory=list)  # messages, repeated in the error if there is nothing to harvest
    read: int = 0
    first_unreadable: str = ""

    @property
    def documents(self) -> Iterator[Document]:
        """The usable documents, starting at the current position.

        Raises UsageError if so many documents cannot be read that this is probably not the intended text.
        """
        for document in self.reader:
            self.read += 1
            reason = skip_reason(document.text)
            if reason:
                self.skipped[reason] = self.skipped.get(reason, 0) + 1
            if isinstance(document.text, Unreadable):
                self.first_unreadable = self.first_unreadable or document.text.problem
            self.check_readable(TOLERATED_ROWS)
            if not reason:
                yield document

    def check_readable(self, tolerated: int = 0) -> None:
        """Raise UsageError if the unreadable rows, minus `tolerated`, are more than a hundredth of the rows read so
        far.
        """
        unreadable = self.skipped.get(UNREADABLE, 0)
        if self.read >= CHECKED_ROWS and 100 * (unreadable - tolerated) > self.read:
            raise UsageError(
                f"{unreadable:,} of the first {self.read:,} rows of {self.name} cannot be read, so this is probably "
                f"the wrong file or column (first such row: {self.first_unreadable}). Correct or remove these rows, or "
                "choose another column with --text-column or --chat-column."
            )

    @property
    def unreadable_rows(self) -> dict[str, Any]:
        """What the cache records about unreadable rows: how many there are, and what is wrong with the first one.

        Empty if there are none.
        """
        count = self.skipped.get(UNREADABLE, 0)
        return {"rows": count, "first": self.first_unreadable} if count else {}

    def refuse(self, why: str) -> None:
        """Count a conversation that the chat template does not render. For the first one, tell the user why."""
        if not self.skipped.get(REFUSED):
            self.remark(
                f"The chat template rejects a conversation of {self.name}: {why.rstrip('.')}. Conversations that it "
                "rejects are skipped."
            )
        self.skipped[REFUSED] = self.skipped.get(REFUSED, 0) + 1

    def remark(self, sentence: str) -> None:
        """Print a message about the documents now, and repeat it in the error if the text has no tokens to harvest."""
        self.remarks.append(sentence)
        self.say(sentence)

    @property
    def state(self) -> dict[str, Any]:
        return {
            "position": self.reader.position, "skipped": dict(self.skipped), "read": self.read,
            "first_unreadable": self.first_unreadable,
        }  # fmt: skip

    def seek(self, state: dict[str, Any] | None) -> None:
        """Return to the position of `state`, or to the beginning."""
        self.reader.seek(state and state["position"])
        state = state or {"skipped": {}}
        self.skipped |= dict.fromkeys(self.skipped, 0) | state["skipped"]
        self.read, self.first_unreadable = state.get("read", 0), state.get("first_unreadable", "")


def describe_unreadable(rows: dict[str, Any]) -> str:
    """A sentence about the rows that could not be read; empty if there are none."""
    if not rows:
        return ""
    were = "was" if rows["rows"] == 1 else "were"
    return f"{format_count(rows['rows'], 'row')} could not be read and {were} skipped (first: {rows['first']})."


def skip_reason(text: Any) -> str | None:
    """The reason why a document is skipped, or None if it is not."""
    if isinstance(text, Unreadable):
        return UNREADABLE
    if isinstance(text, Conversation):
        return "huge" if len(text) > MAX_DOCUMENT else None if text.messages else "empty"
    if not (isinstance(text, str) or is_token_ids(text)):
        return "not text"
    if len(text) > MAX_DOCUMENT:
        return "huge"
    return "empty" if not text or (isinstance(text, str) and text.isspace()) else None


def is_token_ids(value: Any) -> bool:
    return isinstance(value, list) and set(map(type, value)) <= {int}


def parse_messages(value: Any) -> Conversation | None:
    """A conversation from a cell of a table: a list of messages, or a dictionary of lists of equal length.

    Returns None if the cell is neither, or if a message has no role or no content.
    """
    value = list_of_messages(value)
    return None if fault_of_messages(value) else Conversation(value)


def list_of_messages(value: Any) -> Any:
    """Convert a dictionary of equally long lists to a list of messages. Any other value is returned unchanged."""
    if not isinstance(value, dict) or not all(isinstance(one, list) for one in value.values()):
        return value
    if len({len(one) for one in value.values()}) != 1:
        return value
    return [dict(zip(value, one, strict=True)) for one in zip(*value.values(), strict=True)]


def fault_of_messages(value: Any) -> str:
    """What is wrong with a cell that should be a list of messages with a role and content; empty if it is valid."""
    value = list_of_messages(value)
    if not isinstance(value, list):
        return f"{value!r:.60}"
    for one in value:
        if not isinstance(one, dict):
            return f"{value!r:.60}"
        if "role" not in one or "content" not in one:
            return f"a message with the keys {', '.join(map(str, one))}"
        if not isinstance(one["role"], str):
            return f"a message with the role {one['role']!r:.60}"
        if not isinstance(one["content"], str | list | None):
            return f"a message with the content {one['content']!r:.60}"
    return ""
