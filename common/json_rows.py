"""Read the objects in a JSON Lines file or a single JSON array, decoding only the requested columns.

pyarrow's parser, which `datasets` uses, infers a type for every column and crashes the process on deep nesting.
"""

import gzip
import io
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import msgspec

MAX_DEPTH = 200  # of nesting; the limit of the parsers depends on how deep the stack is
MAX_LINE = 2**28  # bytes; a longer line is not read into memory
MAX_JOINED = 2**26  # bytes of a file whose objects span several lines
ZSTD_BLOCK = 2**13  # compressed bytes; decompressed, at most 2**28
SEARCHED_ROWS, SEARCHED_BYTES = 100, 2**24  # searched for a column
NOT_JSON = "it is not JSON"
BLANKS = re.compile(r"\s*")
STRUCTURE = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*\\?(?:"|\Z)|[\[{]|[\]}]', re.DOTALL)  # strings, brackets

ReadRow = tuple[str, dict[str, Any] | None, str]  # "line 7", values or None, the reason for None


class JsonRows:
    """The rows of a file, compressed or not, with the given columns, or with all columns if `columns` is None.

    A row is a line, an element of an array, or one of several objects that may span several lines each. Blank lines are
    skipped. A string in an array is a row with the column "text".
    """

    def __init__(self, file: Path, columns: Sequence[str] | None) -> None:
        self.file, self.columns = file, columns
        self.bytes_read = 0
        self.decoder: msgspec.json.Decoder[Any] = msgspec.json.Decoder(dict[str, msgspec.Raw])
        if columns is not None:
            fields = [(f"column{number}", Any, None) for number in range(len(columns))]
            names = {f"column{number}": name for number, name in enumerate(columns)}
            self.decoder = msgspec.json.Decoder(msgspec.defstruct("Columns", fields, rename=names))

    def read(self, skip: int = 0) -> Iterator[ReadRow]:
        """Yield the rows that remain after skipping the first `skip` rows.

        If the file is damaged, the error that occurs while reading it is raised, such as EOFError. If the file is a
        malformed array, ValueError is raised.
        """
        with open_binary(self.file) as stream:
            lines = self._lines(stream)
            first = next(lines, None)
            if first is None:
                return
            if first[1].lstrip().startswith(b"["):
                yield from self._elements(split_array(first[1] + stream.read()), skip)
                return
            if self.decode(first[1])[1].startswith(NOT_JSON) and (objects := self._joined_objects()):
                yield from self._elements(objects, skip)
                return
            if not skip:
                yield f"line {first[0]}", *self.decode(first[1])
            for row, (number, line) in enumerate(lines, 1):
                if row >= skip:
                    yield f"line {number}", *self.decode(line)

    def search(self) -> Iterator[ReadRow]:
        """The rows in the first SEARCHED_BYTES; stops after SEARCHED_ROWS rows if none of these could be decoded."""
        readable = False
        for number, row in enumerate(self.read(), 1):
            yield row
            readable |= row[1] is not None
            if self.bytes_read > SEARCHED_BYTES or (number >= SEARCHED_ROWS and not readable):
                return

    def decode(self, line: bytes) -> tuple[dict[str, Any] | None, str]:
        """The row's values and an empty string, or None and the reason why the row cannot be decoded."""
        if line.count(b"[") + line.count(b"{") > MAX_DEPTH and too_deep(line) is not None:
            return None, f"it is nested more than {MAX_DEPTH} levels deep"
        if len(line) == MAX_LINE:
            return None, f"it has more than {MAX_LINE:,} bytes"
        try:
            row = self.decoder.decode(line)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            return self._decode_leniently(line)
        if self.columns is None:
            return row, ""
        return dict(zip(self.columns, msgspec.structs.astuple(row), strict=True)), ""

    def _decode_leniently(self, line: bytes) -> tuple[dict[str, Any] | None, str]:
        """Like `decode`, but uses Python's parser, which accepts NaN, numbers of any size, and tabs in strings."""
        try:
            row = json.loads(line.rstrip().decode(), strict=False)
        except UnicodeDecodeError as error:
            return None, f"byte {error.start} is not UTF-8"
        except json.JSONDecodeError as error:
            return None, f"{NOT_JSON} ({error.msg} at character {error.pos})"
        except (ValueError, RecursionError) as error:
            return None, f"{NOT_JSON} ({error})"
        if not isinstance(row, dict):
            return None, f"expected an object, found {json.dumps(row):.40}"
        values = row if self.columns is None else {name: row.get(name) for name in self.columns}
        try:
            json.dumps(list(values.values()), ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return None, "it has half of a surrogate pair"
        return values, ""

    def _lines(self, stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
        """The lines that are not blank, with their line numbers, counted from 1. Lines that are too long are cut."""
        number = 0
        while line := stream.readline(MAX_LINE):
            rest = line
            while len(rest) == MAX_LINE and not rest.endswith(b"\n"):
                rest = stream.readline(MAX_LINE)
            number += 1
            self.bytes_read += len(line)
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")  # a byte order mark
            if not line.isspace() and line:
                yield number, line

    def _elements(self, elements: list[bytes], skip: int) -> Iterator[ReadRow]:
        for index, element in enumerate(elements[skip:], skip):
            self.bytes_read += len(element)
            if element.startswith(b'"'):
                element = b'{"text":' + element + b"}"
            yield f"row {index}", *self.decode(element)

    def _joined_objects(self) -> list[bytes]:
        """The objects of a file, each of which may span several lines; empty if the file contains other values too."""
        with open_binary(self.file) as stream:
            data = stream.read(MAX_JOINED + 1).removeprefix(b"\xef\xbb\xbf")
        if len(data) > MAX_JOINED:
            return []
        objects, decoder = [], json.JSONDecoder(strict=False)
        try:
            text = data.decode().strip()
            end = 0
            while end < len(text):
                start = BLANKS.match(text, end).end()  # type: ignore[union-attr]
                value, end = decoder.raw_decode(text, start)
                if not isinstance(value, dict):
                    return []
                objects.append(text[start:end].encode())
        except (ValueError, RecursionError):
            return []
        return objects


def split_array(data: bytes) -> list[bytes]:
    """The elements of a JSON array. Raises ValueError if it is not an array."""
    try:
        return [bytes(element) for element in msgspec.json.decode(data, type=list[msgspec.Raw])]
    except (msgspec.MsgspecError, ValueError, RecursionError):
        pass  # it may contain NaN
    try:
        array = json.loads(data.decode(), strict=False)
    except RecursionError as error:
        line = data.count(b"\n", 0, too_deep(data) or 0) + 1
        raise ValueError(f"line {line} is nested more than {MAX_DEPTH} levels deep") from error
    if not isinstance(array, list):
        raise ValueError("it begins with [ but is not an array")
    return [json.dumps(element).encode() for element in array]


def too_deep(data: bytes) -> int | None:
    """The byte at which JSON is nested more than MAX_DEPTH levels deep, or None."""
    depth = 0
    for token in STRUCTURE.finditer(data):
        if (kind := data[token.start()]) in b"[{":
            depth += 1
            if depth > MAX_DEPTH:
                return token.start()
        elif kind in b"]}":
            depth -= 1
    return None


@contextmanager
def open_binary(file: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, decompressed if it is a .gz or .zst file. A truncated file raises EOFError at its end."""
    with file.open("rb") as raw:
        if file.suffix.lower() == ".gz":
            yield cast(BinaryIO, gzip.GzipFile(fileobj=raw))
        elif file.suffix.lower() == ".zst":
            yield cast(BinaryIO, io.BufferedReader(ZstdReader(raw), 2**20))
        else:
            yield raw


class ZstdReader(io.RawIOBase):
    """The decompressed bytes of a Zstandard file of one or more frames.

    The reader in the zstandard package does not notice truncated files.
    """

    def __init__(self, raw: BinaryIO) -> None:
        self.raw = raw
        self.data = memoryview(b"")
        self.unused = b""
        self._new_frame()

    def _new_frame(self) -> None:
        import zstandard

        self.frame, self.begun = zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj(), False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.data:
            compressed = self.unused or self.raw.read(ZSTD_BLOCK)
            if not compressed:
                if self.begun:
                    raise EOFError("the compressed file ends in the middle")
                return 0
            if self.frame.eof:
                self._new_frame()
            self.data, self.begun = memoryview(self.frame.decompress(compressed)), not self.frame.eof
            self.unused = self.frame.unused_data if self.frame.eof else b""
        count = min(len(buffer), len(self.data))
        buffer[:count], self.data = self.data[:count], self.data[count:]
        return count
