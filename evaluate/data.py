"""Datasets that a metric reads: rows from a folder of the user's, or from the Hub."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..cache.errors import OutsideError, SaeError, UsageError

Row = dict[str, Any]


@dataclass(frozen=True)
class Data:
    """Rows that can be read again and again, of which none is kept; all of them have the columns asked for."""

    name: str
    rows: Callable[[], Iterator[Row]]

    def digest(self) -> str:
        """sha256 of the rows: the same from a file of either kind and from the Hub."""
        digest = hashlib.sha256()
        for row in self.rows():
            digest.update(json.dumps(row, sort_keys=True).encode() + b"\n")
        return digest.hexdigest()


def find_data(
    folder: Path | None, name: str, split: str, columns: tuple[str, ...], subset: str | None = None, alias: str = ""
) -> Data:
    """<folder>/<name>[/<subset>]/<split>.jsonl or .parquet, or <folder>/<alias>; the Hub's dataset where none is there.

    Raises OutsideError when the Hub does not give it, UsageError for a file that is not what was expected.
    """
    place = Path(name, *([subset] if subset else []))
    candidates = [place / f"{split}.jsonl", place / f"{split}.parquet", *([Path(alias)] if alias else [])]
    path = next((folder / file for file in candidates if (folder / file).is_file()), None) if folder else None
    if path:
        read = read_parquet if path.suffix == ".parquet" else read_jsonl
        return Data(str(path), lambda: with_columns(str(path), read(path), columns))
    label = f"{name} ({subset})" if subset else name
    try:
        import datasets

        found = datasets.load_dataset(name, subset, split=split).select_columns(list(columns))
    except Exception as error:  # of datasets, the Hub, httpx and pyarrow, each with classes of their own
        raise refusal(error, name, label, candidates[-1 if alias else 0]) from error
    return Data(label, lambda: with_columns(label, iter(found), columns))


def refusal(error: Exception, name: str, label: str, file: Path) -> SaeError:
    """The sentence for a dataset that the Hub does not give."""
    from huggingface_hub.errors import GatedRepoError

    causes = [error, error.__cause__, error.__context__]
    gated = any(isinstance(cause, GatedRepoError) for cause in causes) or "gated" in str(error)
    lines = str(error).strip().splitlines()
    problem = "it is gated" if gated else (lines[0].rstrip(".") if lines else type(error).__name__)
    terms = f"accept its terms at https://huggingface.co/datasets/{name} and run `hf auth login`" if gated else "check the network"  # fmt: skip
    return OutsideError(
        f"The dataset {label} could not be read from the Hub: {problem}. Either {terms}, or give --data DIR with {file} in it."
    )


def with_columns(name: str, rows: Iterator[Row], columns: tuple[str, ...]) -> Iterator[Row]:
    for number, row in enumerate(rows, 1):
        lacking = [column for column in columns if column not in row] if isinstance(row, dict) else columns
        if lacking:
            found = ", ".join(map(repr, row)) if isinstance(row, dict) else f"no columns but {type(row).__name__}"
            raise UsageError(f"Row {number} of {name} has no {lacking[0]!r}; it has {found}. Give the dataset itself.")
        yield {column: row[column] for column in columns}


def read_jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise UsageError(
                        f"Line {number} of {path} is no JSON ({error}). It may be cut off; get the file again."
                    ) from error


def read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise UsageError(f"{path} cannot be read as parquet: {str(error).splitlines()[0]} Get the file again.") from error  # fmt: skip
