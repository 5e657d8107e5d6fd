"""Read a column of a streamed dataset, from any row on, waiting when the network fails."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from time import sleep
from typing import Any

from ..common.errors import SaeError, UnavailableError, UsageError
from .documents import Conversation, Document, fault_of_messages, is_token_ids, parse_messages

RETRY_SECONDS = (1, 2, 4, 8, 16)  # waits before each retry after a network failure


class DatasetReader:
    """The documents in a column of a `datasets.IterableDataset`; with `chat` they are conversations.

    A network failure is retried after each of `retry_seconds`, counted anew from every row that arrives; then it raises
    UnavailableError. Any other failure raises `make_error(its first line)`.

    Raises UsageError at once if there are no rows or no such column, and at a row with ids outside the vocabulary or,
    with `chat`, with anything but messages.
    """

    def __init__(
        self, stream: Any, column: str, *, name: str, vocabulary: int, make_error: Callable[[str], SaeError],
        say: Callable[[str], None], retry_seconds: Sequence[int] = (), chat: bool = False,
    ) -> None:  # fmt: skip
        self.stream, self.column, self.name, self.vocabulary = stream, column, name, vocabulary
        self.make_error, self.say, self.retry_seconds, self.chat = make_error, say, retry_seconds, chat
        self.rows_read = 0
        rows = self._read_rows()
        first = next(rows, None)
        if first is None:
            raise UsageError(f"{name} has no rows.")
        if column not in first:
            columns = ", ".join(map(repr, first))
            other = "" if chat else ", or with --chat-column if it holds lists of messages"
            raise UsageError(
                f"{name} has no column {column!r}; its columns are {columns}. "
                f"Choose one with --{'chat' if chat else 'text'}-column{other}."
            )
        self.rows: Iterator[dict[str, Any]] = itertools.chain([first], rows)

    def __iter__(self) -> Iterator[Document]:
        for row in self.rows:
            value = row.get(self.column)
            if self.chat and value is not None:
                value = self._conversation(value)
            elif value and is_token_ids(value) and not 0 <= min(value) <= max(value) < self.vocabulary:
                bad = next(i for i in value if not 0 <= i < self.vocabulary)
                raise UsageError(
                    f"Row {self.rows_read} of {self.name} contains the id {bad}, but the model's tokenizer has the ids "
                    f"0 to {self.vocabulary - 1:,}: it was tokenized for another model. "
                    "Give a column of text with --text-column."
                )
            self.rows_read += 1
            yield Document(value)

    def _conversation(self, value: Any) -> Conversation:
        conversation = parse_messages(value)
        if conversation is None:
            raise UsageError(
                f"Row {self.rows_read} of {self.name} has {fault_of_messages(value)} in the column {self.column!r}; "
                "expected a list of messages, each with a role and content. Convert the column, or choose another with "
                "--chat-column."
            )
        return conversation

    @property
    def position(self) -> dict[str, Any] | None:
        return {"row": self.rows_read, "stream": self.stream.state_dict()} if self.rows_read else None

    def seek(self, position: dict[str, Any] | None) -> None:
        if position != self.position:
            self.rows_read = position["row"] if position else 0
            self.stream.load_state_dict(position and position["stream"])
            self.rows = self._read_rows()

    def _read_rows(self) -> Iterator[dict[str, Any]]:
        """The rows from the stream's position on."""
        rows, failures = iter(self.stream), 0
        while True:
            try:
                row = next(rows, None)
            except Exception as error:  # pyarrow, httpx, fsspec, datasets and the Hub have classes of their own
                self._wait_or_raise(error, failures)
                failures += 1
                self.stream.load_state_dict(self.stream.state_dict())
                rows = iter(self.stream)
                continue
            if row is None:
                return
            failures = 0
            yield row

    def _wait_or_raise(self, error: Exception, failures: int) -> None:
        """Wait after a network failure that followed so many others."""
        problem = first_line(error)
        if not (self.retry_seconds and is_network_error(error)):
            raise self.make_error(problem) from error
        if failures == len(self.retry_seconds):
            raise UnavailableError(
                f"{self.name} could not be read beyond row {self.rows_read:,}: {problem} The network failed "
                f"{failures + 1} times in a row, over {sum(self.retry_seconds)} seconds. Run the same command again to "
                "continue from there."
            ) from error
        seconds = self.retry_seconds[failures]
        self.say(f"Network failure at row {self.rows_read:,} of {self.name} ({problem}); retrying in {seconds} s.")
        sleep(seconds)


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its class name if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def is_network_error(error: Exception) -> bool:
    """Whether waiting may help."""
    from datasets.utils.file_utils import CONNECTION_ERRORS_TO_RETRY
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in (408, 429) or error.response.status_code >= 500
    return isinstance(error, (ConnectionError, TimeoutError, *CONNECTION_ERRORS_TO_RETRY))
