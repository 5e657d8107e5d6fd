"""A column of a dataset, read as a stream that can go on from anywhere, also after a network that failed."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from time import sleep
from typing import Any

from ..common.errors import SaeError, UnavailableError, UsageError
from .contexts import Document, is_token_ids

RETRY_SECONDS = (1, 2, 4, 8, 16)  # seconds, before a network that failed is tried again


class DatasetReader:
    """The documents in the column of a datasets.IterableDataset.

    Raises UsageError at once when it has no rows or no such column, and at a row of ids that the tokenizer does not
    have. A network that fails is waited for, as often as there are `waits` after the last row that came, then
    OutsideError; any other failure is `sentence` of its first line.
    """

    def __init__(
        self, stream: Any, column: str, *, name: str, vocabulary: int, sentence: Callable[[str], SaeError],
        tell: Callable[[str], None], waits: Sequence[int] = (),
    ) -> None:  # fmt: skip
        self.stream, self.column, self.name, self.vocabulary = stream, column, name, vocabulary
        self.sentence, self.tell, self.waits = sentence, tell, waits
        self.number = 0  # of rows read
        rows = self.read()
        first = next(rows, None)
        if first is None:
            raise UsageError(f"{name} has no rows.")
        if column not in first:
            raise UsageError(
                f"{name} has no column {column!r}; its columns are {', '.join(map(repr, first))}. Choose one with --text-column."
            )
        self.rows: Iterator[dict[str, Any]] = itertools.chain([first], rows)

    def __iter__(self) -> Iterator[Document]:
        for row in self.rows:
            value = row.get(self.column)
            if value and is_token_ids(value) and not 0 <= min(value) <= max(value) < self.vocabulary:
                raise UsageError(
                    f"Row {self.number} of {self.name} holds the id {next(i for i in value if not 0 <= i < self.vocabulary)}, but the model's tokenizer has the ids 0 to "
                    f"{self.vocabulary - 1:,}: it was tokenised for another model. Give a column of text with --text-column."
                )
            self.number += 1
            yield Document(value)

    @property
    def position(self) -> dict[str, Any] | None:
        return {"row": self.number, "stream": self.stream.state_dict()} if self.number else None

    def go_to(self, position: dict[str, Any] | None) -> None:
        if position != self.position:
            self.number = position["row"] if position else 0
            self.stream.load_state_dict(position and position["stream"])
            self.rows = self.read()

    def read(self) -> Iterator[dict[str, Any]]:
        """The rows from where the stream stands."""
        rows, failures = iter(self.stream), 0
        while True:
            try:
                row = next(rows, None)
            except Exception as error:  # pyarrow, httpx, fsspec, datasets and the Hub have classes of their own
                problem = first_line(error)
                if not (self.waits and is_network_error(error)):
                    raise self.sentence(problem) from error
                if failures == len(self.waits):
                    raise UnavailableError(
                        f"{self.name} could not be read further than row {self.number:,}: {problem} The network failed {failures + 1} times, "
                        f"over {sum(self.waits)} seconds. The same command goes on from where it stopped."
                    ) from error
                wait = self.waits[failures]
                failures += 1
                self.tell(
                    f"Trying again in {wait} s: the network failed at row {self.number:,} of {self.name} ({problem})."
                )
                sleep(wait)
                self.stream.load_state_dict(self.stream.state_dict())
                rows = iter(self.stream)
                continue
            if row is None:
                return
            failures = 0
            yield row


def first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def is_network_error(error: Exception) -> bool:
    """Whether waiting may help."""
    from datasets.utils.file_utils import CONNECTION_ERRORS_TO_RETRY
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in (408, 429) or error.response.status_code >= 500
    return isinstance(error, (ConnectionError, TimeoutError, *CONNECTION_ERRORS_TO_RETRY))
