"""Rows of foreign files: only requested columns are read, and reading goes on after a row that cannot be decoded."""

import gzip
import json
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from sae.common import json_rows
from sae.common.errors import UsageError
from sae.common.tables import Unreadable, find_columns, read_rows

DEEP = "[" * 20_000 + "]" * 20_000


@pytest.fixture
def rows_of(tmp_path: Path) -> Callable[..., list[Any]]:
    """rows_of(data, name="a.jsonl") returns the cells of the column "text"; for an unreadable row, the problem."""

    def read(data: bytes | str, name: str = "a.jsonl") -> list[Any]:
        file = tmp_path / name
        file.write_bytes(data.encode() if isinstance(data, str) else data)
        return cells([file])

    return read


def cells(files: Sequence[Path], column: str = "text") -> list[Any]:
    rows = [row.values for row in read_rows(files, [column])]
    return [row.problem if isinstance(row, Unreadable) else row[column] for row in rows]


# JSON


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(st.characters(codec="utf-8")),
    lambda part: st.lists(part, max_size=3) | st.dictionaries(st.text(max_size=3), part, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150)
@given(rows=st.lists(st.dictionaries(st.sampled_from(["text", "a", "b"]), json_values), max_size=6), how=st.booleans())
def test_every_row_is_what_json_loads_gives(tmp_path_factory, rows: list[dict[str, Any]], how: bool) -> None:
    """Rows are lines or the elements of an array. Non-ASCII characters are written literally or as escapes."""
    file = tmp_path_factory.mktemp("rows") / "a.json"
    lines = [json.dumps(row, ensure_ascii=how) for row in rows]
    for content in ("\n\n".join(lines), f"[{','.join(lines)}]"):
        file.write_text(content, encoding="utf-8")
        assert repr(cells([file])) == repr([json.loads(line).get("text") for line in lines])  # repr, as NaN != NaN


def test_other_columns_do_not_matter(rows_of) -> None:
    others = [1, 1.5, "x", None, [], ["x"], {"a": 1}, {"b": "q"}, [[{}], 2], float("nan"), 10**40]
    lines = "".join(json.dumps({"text": f"row {n}", "other": one}) + "\n" for n, one in enumerate(others))
    assert rows_of(lines + '{"new": 1, "text": "last"}') == [f"row {n}" for n in range(len(others))] + ["last"]
    assert rows_of(b'{"text": "a", "other": "\xff"}') == ["a"]
    assert rows_of('{"text": "a", "other": "\\ud800"}') == ["a"]
    assert rows_of('{"text": "a", "other": ' + "9" * 5000 + "}") == ["a"]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"text": ', "it is not JSON (Expecting value at character 8)"),
        (b'{"text": "caf\xe9"}', "byte 13 is not UTF-8"),
        (b'{"text": "\\ud800"}', "it has half of a surrogate pair"),
        (b"null", "expected an object, found null"),  # crashes the process if pyarrow reads it
        (b'"text"', "expected an object, found \"text\""),
        (b'{"text": ' + b"9" * 5000 + b"}", "it is not JSON (Exceeds the limit"),
        (('{"text": "a", "x": ' + DEEP + "}").encode(), "it is nested more than 200 levels deep"),
        (('{"text": ' + DEEP + "}").encode(), "it is nested more than 200 levels deep"),
        ((DEEP.replace("[", '{"a":').replace("]", "}")).encode(), "it is nested more than 200 levels deep"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_decoded_has_its_line(rows_of, line: bytes, problem: str) -> None:
    first, bad, last = rows_of(b'{"text": "a"}\n\n' + line + b'\n{"text": "b"}\n')
    assert (first, last) == ("a", "b") and bad.startswith(f"a.jsonl line 3: {problem}")


def test_depth_is_counted_outside_strings(rows_of) -> None:
    brackets = "[{" * 3000
    quoted = json.dumps({"text": brackets + '\\" \\', "x": 1})
    assert rows_of(quoted) == [brackets + '\\" \\']
    for depth, read in ((199, "a"), (200, None)):  # 200 and 201 levels, counting the object
        row = '{"x": %s, "text": "a"}' % ("[" * depth + "]" * depth)
        (found,) = rows_of(row)
        assert found == read or (read is None and "nested more than 200" in found)
    (found,) = rows_of('{"x": "' + "[" * 300)
    assert found == "a.jsonl line 1: it is not JSON (Unterminated string starting at at character 6)"


def test_a_nested_array_is_refused_with_its_line(rows_of) -> None:
    with pytest.raises(UsageError, match="a.json cannot be read as json: line 201 is nested more than 200 levels deep"):
        rows_of("[\n" * 30_000, "a.json")


def test_objects_on_several_lines_and_strings_in_an_array(rows_of) -> None:
    assert rows_of('{\n "text": "a"\n}\n{"text":\n"b"} {"text": "c"}\n') == ["a", "b", "c"]
    assert rows_of('["a", {"text": "b"}, 3]', "a.json") == ["a", "b", "a.json row 2: expected an object, found 3"]
    assert rows_of(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n \n{"text": "b"}') == ["a", "b"]
    assert rows_of('{"text": "tab\there"}') == ["tab\there"]
    with pytest.raises(UsageError, match="a.json cannot be read as json: Expecting ',' delimiter"):
        rows_of('[{"text": "a"}', "a.json")


def test_a_line_that_does_not_fit_into_memory_is_one_row(rows_of, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_rows, "MAX_LINE", 50)
    found = rows_of(json.dumps({"text": "x" * 500}) + '\n{"text": "b"}\n')
    assert found == ["a.jsonl line 1: it has more than 50 bytes", "b"]


def test_compressed_files_are_read_to_the_end_of_the_last_frame(rows_of) -> None:
    frames = [zstandard.compress(b'{"text": "a"}\n' * 3), zstandard.compress(b'{"text": "b"}\n')]
    skippable = struct.pack("<II", 0x184D2A50, 5) + b"hello"
    assert rows_of(skippable.join([b"", *frames, b""]), "a.jsonl.zst") == ["a"] * 3 + ["b"]
    assert rows_of(gzip.compress(b'{"text": "a"}\n') + gzip.compress(b'{"text": "b"}\n'), "a.jsonl.gz") == ["a", "b"]
    for name, packed in (("a.jsonl.zst", b"".join(frames)), ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n'))):
        for cut in (1, 4, len(packed) // 3):
            with pytest.raises(UsageError, match=f"{name} cannot be read as json: .* It may be truncated"):
                rows_of(packed[:-cut], name)


# Tables


def bad_strings(count: int, bad: int) -> pa.Array:
    """An array of strings, in which the string at index `bad` is not valid UTF-8."""
    raw = pa.array([f"row {n}".encode() + b"\xff" * (n == bad) for n in range(count)], pa.binary())
    return pa.Array.from_buffers(pa.string(), count, raw.buffers())


@pytest.fixture(params=["a.parquet", "stream.arrow", "file.arrow"])
def table(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """20 rows in several groups or batches; the string of row 5 is not UTF-8, alone and inside messages."""
    strings = bad_strings(20, 5)
    messages = pa.StructArray.from_arrays([pa.array(["user"] * 20), strings], ["role", "content"])
    content = pa.table({
        "text": strings, "messages": pa.ListArray.from_arrays(pa.array(range(21), pa.int32()), messages),
        "ids": [[n, n + 1] for n in range(20)], "other": list(range(20)),
    })  # fmt: skip
    file = tmp_path / request.param
    if file.suffix == ".parquet":
        pq.write_table(content, file, row_group_size=6)
    else:
        kind = pa.ipc.new_stream if file.name.startswith("stream") else pa.ipc.new_file
        with kind(file, content.schema) as written:
            written.write_table(content, max_chunksize=6)
    return file


def test_a_table_has_the_same_rows_in_every_format(table: Path) -> None:
    assert find_columns([table], ["text"]) == ["text", "messages", "ids", "other"]
    assert cells([table], "ids") == [[n, n + 1] for n in range(20)] and cells([table], "absent") == [None] * 20
    bad = f"{table.name} row 5: 'utf-8' codec can't decode byte 0xff in position 5"
    for column, value in (("text", "row {}".format), ("messages", lambda n: [{"role": "user", "content": f"row {n}"}])):
        found = cells([table], column)
        assert found[5].startswith(bad)
        assert found[:5] + found[6:] == [value(n) for n in range(20) if n != 5]


@pytest.mark.parametrize("skip", [0, 1, 5, 6, 7, 12, 19, 20])
def test_a_table_is_read_from_any_row(table: Path, skip: int) -> None:
    rows = list(read_rows([table, table], ["text", "ids"]))
    assert list(read_rows([table, table], ["text", "ids"], (0, skip))) == rows[skip:]
    assert list(read_rows([table, table], ["text", "ids"], (1, skip))) == rows[20 + skip :]


def test_files_with_other_columns_follow_each_other(tmp_path: Path) -> None:
    texts = pa.array(["a", "b"])
    for name, columns in (
        ("1", {"text": texts}), ("2", {"score": [1, 2], "text": texts.cast(pa.large_string())}), ("3", {"score": [1]}),
        ("4", {"text": texts.dictionary_encode()}),
    ):  # fmt: skip
        pq.write_table(pa.table(columns), tmp_path / f"{name}.parquet")
    assert cells(sorted(tmp_path.iterdir())) == ["a", "b", "a", "b", None, "a", "b"]


def test_values_that_datasets_stores_as_json_are_decoded(tmp_path: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    talk = [{"role": "user", "content": "a"}, {"role": "tool", "content": "b", "call": {"x": 1}}]
    mixed = datasets.Dataset.from_dict({"messages": [talk, talk]}, on_mixed_types="use_json")
    mixed.to_parquet(tmp_path / "a.parquet")
    mixed.save_to_disk(tmp_path / "saved")
    datasets.enable_progress_bars()
    for file in (tmp_path / "a.parquet", *(tmp_path / "saved").glob("*.arrow")):
        assert cells([file], "messages") == [talk, talk]


# Columns


def test_a_column_can_first_appear_in_a_later_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"id": 1}\n' * 50 + '{"id": 2, "text": "a"}\n' + '{"late": 1}\n' * 50)
    assert find_columns([file], ["text"]) == ["id", "text"] and find_columns([file], ["x"]) == ["id", "text", "late"]
    monkeypatch.setattr(json_rows, "SEARCHED_BYTES", 200)
    assert find_columns([file], ["text"]) == ["id"]


def test_a_file_without_a_readable_row_is_refused(tmp_path: Path) -> None:
    utf_16 = "né\n".encode("utf-16")
    for name, content in (("a.jsonl", b"\x00\x01PK\n" * 500), ("b.json", b"no\njson\n"), ("c.jsonl", utf_16)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UsageError, match=f"No row of .*{name} can be read .* tried; first: {name} line 1: "):
            find_columns([tmp_path / name], ["text"])
