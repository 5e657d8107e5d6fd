"""Read documents from a column of local files or of a streamed dataset; wait and retry when the network fails."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import sleep
from typing import Any

from ..common.errors import SaeError, UnavailableError, UsageError, first_line
from ..common.tables import Row, Unreadable, find_columns, read_rows
from .documents import Document, fault_of_messages, is_token_ids, parse_messages

RETRY_SECONDS = (1, 2, 4, 8, 16)  # waits before each retry after a network failure


class Column:
    """Turns the cells of a column into documents; if `chat` is set, into conversations.

    Attributes:
        name: the name of the column.
        source: the name of the text.
        vocabulary: the number of ids in the model's tokenizer.
    """

    def __init__(self, name: str, *, source: str, vocabulary: int, chat: bool) -> None:
        self.name, self.source, self.vocabulary, self.chat = name, source, vocabulary, chat

    def check(self, columns: Sequence[str]) -> None:
        """Raise UsageError unless `columns` contains this column."""
        if self.name not in columns:
            other = "" if self.chat else ", or with --chat-column if it holds lists of messages"
            raise UsageError(
                f"{self.source} has no column {self.name!r}; its columns are {', '.join(map(repr, columns))}. "
                f"Choose one with --{'chat' if self.chat else 'text'}-column{other}."
            )

    def document(self, value: Any, row: int, place: str) -> Document:
        """The document in a cell; Unreadable if the cell holds something else. Raises UsageError for an unknown id."""
        if value is None or isinstance(value, Unreadable):
            return Document(value)
        if self.chat:
            fault = fault_of_messages(value)
            expected = "a list of messages, each with a role and content"
            if not fault:
                return Document(parse_messages(value))
        elif is_token_ids(value):
            if value and not 0 <= min(value) <= max(value) < self.vocabulary:
                bad = next(i for i in value if not 0 <= i < self.vocabulary)
                raise UsageError(
                    f"Row {row} of {self.source} contains the id {bad}, but the model's tokenizer only has the ids "
                    f"0 to {self.vocabulary - 1:,}, so the text was tokenized for another model. "
                    "Name a column of plain text with --text-column."
                )
            return Document(value)
        elif isinstance(value, str) or (isinstance(value, list) and set(map(type, value)) <= {int, type(None)}):
            return Document(value)
        else:
            fault, expected = f"{value!r:.60}", "text or a list of token ids"
        return Document(Unreadable(f"{place} has {fault} in the column {self.name!r}; expected {expected}"))


class FileReader:
    """The documents in one column of local files, which all have the same format.

    The constructor raises UsageError if there are no rows or no such column. Iterating raises UsageError at a row with
    ids outside the vocabulary.
    """

    def __init__(self, files: Sequence[Path], column: Column) -> None:
        self.files, self.column = files, column
        self.rows_read, self.place = 0, (0, 0)
        self.rows: Iterator[Row] = iter(())
        if next(read_rows(files, [column.name]), None) is None:
            raise UsageError(f"{column.source} has no rows.")
        column.check(find_columns(files, [column.name]))
        self.seek(None)

    def __iter__(self) -> Iterator[Document]:
        for row in self.rows:
            values = row.values
            value = values if isinstance(values, Unreadable) else values[self.column.name]
            document = self.column.document(value, self.rows_read, row.place)
            self.rows_read, self.place = self.rows_read + 1, row.position
            yield document

    @property
    def position(self) -> dict[str, Any] | None:
        return {"row": self.rows_read, "place": list(self.place)} if self.rows_read else None

    def seek(self, position: dict[str, Any] | None) -> None:
        """Continue at a saved position. Earlier versions saved only the number of rows read."""
        self.rows_read, self.place = (position["row"] if position else 0), (0, 0)
        skip = self.rows_read
        if position and "place" in position:
            self.place, skip = tuple(position["place"]), 0
        rows = read_rows(self.files, [self.column.name], self.place)
        self.rows = itertools.islice(rows, skip, None)


class DatasetReader:
    """The documents in a column of a `datasets.IterableDataset`.

    After a network failure, the reader waits and retries, up to len(retry_seconds) times in a row. After n earlier
    failures, it waits `retry_seconds[n]` seconds; every row that arrives resets n to 0. After the last retry the reader
    raises UnavailableError. After any other failure it raises `make_error(first line of the failure's message)`.

    The constructor raises UsageError if there are no rows or no such column. Iterating raises UsageError at a row with
    ids outside the vocabulary.
    """

    def __init__(
        self, stream: Any, column: Column, *, make_error: Callable[[str], SaeError], say: Callable[[str], None],
        retry_seconds: Sequence[int] = (),
    ) -> None:  # fmt: skip
        self.stream, self.column, self.name = stream, column, column.source
        self.make_error, self.say, self.retry_seconds = make_error, say, retry_seconds
        self.rows_read = 0
        rows = self._read_rows()
        first = next(rows, None)
        if first is None:
            raise UsageError(f"{self.name} has no rows.")
        column.check(list(first))
        self.rows: Iterator[dict[str, Any]] = itertools.chain([first], rows)

    def __iter__(self) -> Iterator[Document]:
        for row in self.rows:
            value = row.get(self.column.name)
            document = self.column.document(value, self.rows_read, f"{self.name} row {self.rows_read}")
            self.rows_read += 1
            yield document

    @property
    def position(self) -> dict[str, Any] | None:
        return {"row": self.rows_read, "stream": self.stream.state_dict()} if self.rows_read else None

    def seek(self, position: dict[str, Any] | None) -> None:
        if position != self.position:
            self.rows_read = position["row"] if position else 0
            self.stream.load_state_dict(position and position["stream"])
            self.rows = self._read_rows()

    def _read_rows(self) -> Iterator[dict[str, Any]]:
        """The rows starting at the stream's position."""
        rows, failures = iter(self.stream), 0
        while True:
            try:
                row = next(rows, None)
            except Exception as error:  # pyarrow, httpx, fsspec, datasets and the Hub each have their own classes
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
        """Wait after a network failure, or raise.

        `failures` is the number of failures since the last row arrived, not counting this one.
        """
        problem = first_line(error)
        if not (self.retry_seconds and is_network_error(error)):
            raise self.make_error(problem) from error
        if failures == len(self.retry_seconds):
            raise UnavailableError(
                f"{self.name} could not be read beyond row {self.rows_read:,}: {problem} The network failed "
                f"{failures + 1} times in a row, with waits of {sum(self.retry_seconds)} seconds in all. Run the same "
                "command again to continue from there."
            ) from error
        seconds = self.retry_seconds[failures]
        self.say(f"Network failure at row {self.rows_read:,} of {self.name} ({problem}); retrying in {seconds} s.")
        sleep(seconds)


def is_network_error(error: Exception) -> bool:
    """Whether an error comes from the network, so that waiting may help."""
    from datasets.utils.file_utils import CONNECTION_ERRORS_TO_RETRY
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in (408, 429) or error.response.status_code >= 500
    return isinstance(error, (ConnectionError, TimeoutError, *CONNECTION_ERRORS_TO_RETRY))
