"""Read columns of JSON Lines, JSON, Parquet and Arrow files, row by row, starting at any row.

Only the requested columns are decoded; the content and type of other columns do not matter. A row that cannot be
decoded is returned with its problem, and reading continues with the next row.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from .errors import SaeError, UsageError, first_line
from .json_rows import SEARCHED_ROWS, JsonRows, ReadRow

FORMATS = {
    ".jsonl": "json", ".json": "json", ".zst": "json", ".gz": "json", ".parquet": "parquet", ".arrow": "arrow",
}  # fmt: skip  # suffix -> format
BATCH_ROWS = 256  # rows of a Parquet file decoded together


@dataclass(frozen=True)
class Unreadable:
    """A placeholder for a row that cannot be decoded, or for a cell that is not a text."""

    problem: str  # names the file and the line or row


class Row(NamedTuple):
    """A row of a file.

    Attributes:
        place: the file's name and the row, for messages: "a.jsonl line 7", or "a.parquet row 6", counted from 0.
        position: the file's number and the number of the next row in it. `read_rows` continues from there.
        values: column -> value, None where the row lacks it.
    """

    place: str
    position: tuple[int, int]
    values: dict[str, Any] | Unreadable


def read_rows(files: Sequence[Path], columns: Sequence[str], position: tuple[int, int] = (0, 0)) -> Iterator[Row]:
    """Yield the rows of `files`, which all have the same format, in order. They begin at `position`: the index of a
    file and the number of rows to skip in it.

    Raises UsageError if a file cannot be read completely.
    """
    first, start = position
    for number, file in enumerate(files):
        if number < first:
            continue
        skip = start if number == first else 0
        rows = explain_errors(file, partial(READERS[file_format(file)], file, columns, skip))
        for index, (place, values, problem) in enumerate(rows, skip + 1):
            place = f"{file.name} {place}"
            yield Row(place, (number, index), Unreadable(f"{place}: {problem}") if values is None else values)


def find_columns(files: Sequence[Path], wanted: Sequence[str]) -> list[str]:
    """The names of the columns.

    JSON rows can lack columns. So the rows are searched until all wanted columns have been found: at most the first
    SEARCHED_BYTES of each file.

    Raises UsageError if a file cannot be read, or if there are rows but none of those searched can be decoded.
    """
    if file_format(files[0]) != "json":
        return list(explain_errors(files[0], lambda: iter(schema_of(files[0]).names)))
    found: dict[str, None] = {}
    problems = []
    for file in files:
        rows = JsonRows(file, None)
        for place, values, problem in explain_errors(file, rows.search):
            found |= dict.fromkeys(values or ())
            if set(wanted) <= found.keys():
                return list(found)
            if values is None:
                problems.append(f"{file.name} {place}: {problem}")
        if not found and len(problems) >= SEARCHED_ROWS:
            break
    if problems and not found:
        raise UsageError(
            f"No row of {files[0]} can be read as JSON ({len(problems):,} tried; first: {problems[0]}). Give a JSON "
            "Lines, JSON array, Parquet or Arrow file."
        )
    return list(found)


def file_format(file: Path) -> str:
    return FORMATS[file.suffix.lower()]


def explain_errors(file: Path, open_rows: Callable[[], Iterator[Any]]) -> Iterator[Any]:
    """Yield from an iterator. Any error that the iterator raises becomes a UsageError that names the file."""
    try:
        yield from open_rows()
    except SaeError:
        raise
    except Exception as error:  # pyarrow, zlib, zstandard and the system raise errors of many types
        raise UsageError(
            f"{file} cannot be read as {file_format(file)}: {first_line(error).rstrip('.')}. "
            "It may be truncated or in another format."
        ) from error


def json_rows(file: Path, columns: Sequence[str], skip: int) -> Iterator[ReadRow]:
    return JsonRows(file, columns).read(skip)


def schema_of(file: Path) -> Any:
    """The Arrow schema of a Parquet or an Arrow file."""
    import pyarrow.parquet as pq

    with file.open("rb") as stream:
        return pq.read_schema(stream) if file_format(file) == "parquet" else open_arrow(stream)[0]


def parquet_rows(file: Path, columns: Sequence[str], skip: int) -> Iterator[ReadRow]:
    import pyarrow.parquet as pq

    with file.open("rb") as stream:
        table = pq.ParquetFile(stream, pre_buffer=False)
        present = [name for name in columns if name in table.schema_arrow.names]
        sizes = [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)]
        group = row = 0
        while group < len(sizes) and row + sizes[group] <= skip:
            row, group = row + sizes[group], group + 1
        if present:
            batches = table.iter_batches(BATCH_ROWS, list(range(group, len(sizes))), present, use_threads=False)
            yield from batch_rows(table.schema_arrow, batches, columns, row, skip)
        else:
            yield from ((f"row {index}", dict.fromkeys(columns), "") for index in range(skip, table.metadata.num_rows))


def arrow_rows(file: Path, columns: Sequence[str], skip: int) -> Iterator[ReadRow]:
    with file.open("rb") as stream:
        schema, _ = open_arrow(stream)
        stream.seek(0)
        _, batches = open_arrow(stream, [number for number, name in enumerate(schema.names) if name in columns])
        yield from batch_rows(schema, batches, columns, 0, skip)


def open_arrow(stream: Any, fields: list[int] | None = None) -> tuple[Any, Iterator[Any]]:
    """The schema and the batches of an Arrow stream or file, with only these fields."""
    import pyarrow as pa

    options = pa.ipc.IpcReadOptions(included_fields=fields)
    try:
        reader = pa.ipc.open_stream(stream, options=options)
        return reader.schema, iter(reader)
    except (OSError, pa.ArrowInvalid):
        stream.seek(0)
        file = pa.ipc.open_file(stream, options=options)
        return file.schema, (file.get_batch(number) for number in range(file.num_record_batches))


def batch_rows(schema: Any, batches: Iterator[Any], columns: Sequence[str], row: int, skip: int) -> Iterator[ReadRow]:
    """Yield the rows of `batches`, from row number `skip` to the end.

    `row` is the number of the first row of the first batch.
    """
    decoders = {name: column_decoder(schema, name) for name in columns}
    for batch in batches:
        before, row = row, row + batch.num_rows
        if row <= skip:
            continue
        batch = batch.slice(max(skip - before, 0))
        values = [
            column_values(batch.column(name)) if name in batch.schema.names else [None] * batch.num_rows
            for name in columns
        ]
        for index, cells in enumerate(zip(*values, strict=True), row - batch.num_rows):
            problem = next((cell.problem for cell in cells if isinstance(cell, Unreadable)), "")
            decoded = {name: decoders[name](cell) for name, cell in zip(columns, cells, strict=True)}
            yield f"row {index}", None if problem else decoded, problem


def column_values(array: Any) -> list[Any]:
    """The values of an Arrow array; Unreadable where a string is not UTF-8."""
    array.cast(bytes_for_strings(array.type)).validate(full=True)  # a damaged offset would end the process
    try:
        return array.to_pylist()
    except ValueError:
        return [cell_value(cell) for cell in array]


def cell_value(cell: Any) -> Any:
    try:
        return cell.as_py()
    except ValueError as error:
        return Unreadable(str(error))


def bytes_for_strings(kind: Any) -> Any:
    """The same Arrow type with bytes in place of strings, so that `validate` does not check the encoding."""
    import pyarrow as pa

    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return pa.binary() if pa.types.is_string(kind) else pa.large_binary()
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        item = kind.value_field.with_type(bytes_for_strings(kind.value_type))
        return pa.list_(item) if pa.types.is_list(kind) else pa.large_list(item)
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(bytes_for_strings(field.type)) for field in kind])
    return kind


def column_decoder(schema: Any, name: str) -> Callable[[Any], Any]:
    """A function that turns a cell into the value that was stored. `datasets` stores values of mixed types as JSON."""
    import pyarrow as pa

    field = schema.field(schema.get_field_index(name)) if schema.get_field_index(name) >= 0 else None
    if field is None or "arrow.json" not in str(field.type):
        return lambda value: value
    import datasets

    features = datasets.Features.from_arrow_schema(pa.schema([field], metadata=schema.metadata))
    return lambda value: features.decode_example({name: value})[name]


READERS: dict[str, Callable[[Path, Sequence[str], int], Iterator[ReadRow]]] = {
    "json": json_rows, "parquet": parquet_rows, "arrow": arrow_rows,
}  # fmt: skip
