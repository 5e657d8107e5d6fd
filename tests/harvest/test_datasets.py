"""Texts are opened from files, the embedded corpus and the Hub; whatever cannot be read is rejected with a message."""

import ast
import asyncio.tasks
import contextlib
import functools
import inspect
import itertools
import json
import traceback
import typing
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from sae.common.errors import UnavailableError, UsageError
from sae.harvest.datasets import EMBEDDED_TEXT, open_text, split_paragraphs
from sae.harvest.documents import TextSource, describe_unreadable
from sae.harvest.mini.corpus import StdlibDocument, docstrings, stdlib_documents

TEXTS = ["the quick brown fox jumps over the lazy dog " * 3, "seven zebras", "read their yellow books in june " * 5]

NESTED = """
try:
    def f(): 'deep'
except E:
    def f(): 'deep'
else:
    def f(): 'deep'
finally:
    def f(): 'deep'
for x in y:
    class C:
        'deep'
        async def g(): 'deep'
else:
    def f(): 'deep'
match x:
    case 1:
        def f(): 'deep'
with x:
    while y:
        def f(): 'deep'
if (lambda: 1)():
    def f(): 'deep'
else:
    def f(): 'deep'
"""


# Files


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_every_file_format_yields_its_documents(tmp_path: Path, read) -> None:
    rows = [{"text": t, "other": 1} for t in TEXTS]
    lines = write_lines(tmp_path / "a.jsonl", rows)
    packed = tmp_path / "a.jsonl.zst"
    packed.write_bytes(zstandard.compress(lines.read_bytes()))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for path in (lines, packed, tmp_path / "a.parquet"):
        text = read(path)
        assert [d.text for d in text.documents] == TEXTS and text.name == "a"
    (tmp_path / "a.txt").write_text(TEXTS[0])
    assert [d.text for d in read(tmp_path / "a.txt").documents] == [TEXTS[0]]


def test_a_folder_is_its_files_in_order(tmp_path: Path, read) -> None:
    (tmp_path / "deeper").mkdir()
    for name, text in zip(("b.jsonl", "a.jsonl", "deeper/c.jsonl"), TEXTS, strict=True):
        write_lines(tmp_path / name, [{"text": text}])
    (tmp_path / "README").write_text("not text of the data set")
    assert [d.text for d in read(tmp_path).documents] == [TEXTS[1], TEXTS[0], TEXTS[2]]


def test_a_digest_is_of_the_bytes_and_the_column(tmp_path: Path, read) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"text": "one", "other": "two"}])
    first = read(path).identity
    assert read(path).identity == first != read(path, "other").identity
    write_lines(path, [{"text": "One", "other": "two"}])
    assert read(path).identity != first


def test_documents_that_are_not_text_are_skipped_and_counted(tmp_path: Path, read) -> None:
    rows = [{"text": t} for t in ("one", "", None, "  \n", "two", None)]
    text = read(write_lines(tmp_path / "a.jsonl", rows))
    assert [d.text for d in text.documents] == ["one", "two"] and text.skipped == {"empty": 2, "not text": 2, "huge": 0}


@settings(max_examples=50)
@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=60), max_size=12), st.integers(1, 80))
def test_splitting_into_sections_loses_nothing(paragraphs: list[str], at_least: int) -> None:
    text = "\n\n".join(paragraphs)
    found = list(split_paragraphs(text, at_least))
    assert "\n\n".join(found).rstrip() == text.rstrip()  # trailing blank lines are not a document
    assert all(
        len(section.replace("\n\n", "")) >= at_least for section in found[:-1] if "\n" not in "".join(paragraphs)
    )


def mixed(folder: Path) -> Path:
    (folder / "a.txt").write_text("a")
    (folder / "b.jsonl").write_text('{"text": "b"}\n')
    return folder


def broken_json(folder: Path) -> Path:
    (folder / "a.json").write_text('[{"text": "one"},\n{"text": \n')
    return folder / "a.json"


def not_json(folder: Path) -> Path:
    (folder / "a.jsonl").write_text("one\n" * 200)
    return folder / "a.jsonl"


def broken_parquet(folder: Path) -> Path:
    (folder / "a.parquet").write_bytes(b"PAR1 no more")
    return folder / "a.parquet"


def unknown_kind(folder: Path) -> Path:
    (folder / "a.docx").write_text("a")
    return folder / "a.docx"


def other_columns(folder: Path) -> Path:
    return write_lines(folder / "a.jsonl", [{"content": "a", "id": 3}])


def no_suffix(folder: Path) -> Path:
    (folder / "a").write_text("a")
    return folder / "a"


def empty(folder: Path) -> Path:
    (folder / "a.jsonl").write_text("")
    return folder / "a.jsonl"


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (mixed, r"has .jsonl and .txt; expected files of one format"),
        (broken_json, "a.json cannot be read as json: "),
        (not_json, "No row of .*a.jsonl can be read as JSON .100 tried; first: a.jsonl line 1: it is not"),
        (broken_parquet, "a.parquet cannot be read as parquet: "),
        (unknown_kind, r"has .docx; expected files of one format"),
        (no_suffix, "has files without a suffix; expected files of one format"),
        (lambda folder: folder, "has no files; expected files of one format"),
        (other_columns, "has no column 'text'; its columns are 'content', 'id'. Choose one with --text-column, or"),
        (empty, "a.jsonl is empty. Give a text"),
        (lambda folder: folder / "gone.jsonl", "There is no file .*gone.jsonl. Give a .txt, .jsonl"),
        (lambda folder: "./gone", "There is no file ./gone"),
    ],
)  # fmt: skip
def test_bad_input_raises_a_clear_error(
    tmp_path: Path, read, make: Callable[[Path], Path | str], sentence: str
) -> None:
    with pytest.raises(UsageError, match=sentence) as refused:
        list(read(make(tmp_path)).documents)
    assert refused.value.exit_code == 2


# Rows that cannot be read


def test_text_that_is_not_utf_8_is_skipped_by_section(tmp_path: Path, read) -> None:
    sections = [f"{n} " + "word " * 500 for n in range(5)]
    (tmp_path / "a.txt").write_bytes("\n\n".join(sections).encode().replace(b"3 word", b"3\nw\xf6rd"))
    text = read(tmp_path / "a.txt")
    assert [d.text for d in text.documents] == [*sections[:3], sections[4]]
    assert text.unreadable_rows == {"rows": 1, "first": "a.txt line 8: the byte 0xf6 is not UTF-8"}


def numbered(count: int, bad: dict[int, str]) -> str:
    return "".join(bad.get(n, json.dumps({"text": f"row {n}"})) + "\n" for n in range(count))


def test_rows_that_cannot_be_read_are_skipped_and_counted(tmp_path: Path, read) -> None:
    bad = {150: "{broken", 260: '{"text": 1984}', 390: '{"text": {"a": 1}}'}
    (tmp_path / "a.jsonl").write_text(numbered(400, bad))
    text = read(tmp_path / "a.jsonl")
    found = [d.text for d in text.documents]
    assert found == [f"row {n}" for n in range(400) if n not in bad]
    assert text.skipped == {"empty": 0, "not text": 0, "huge": 0, "unreadable": 3} and text.read == 400
    first = "a.jsonl line 151: it is not JSON (Expecting property name enclosed in double quotes at character 1)"
    assert text.unreadable_rows == {"rows": 3, "first": first}
    assert describe_unreadable(text.unreadable_rows) == (f"3 rows could not be read and were skipped (first: {first}).")
    text.seek(None)
    assert text.unreadable_rows == {} and [d.text for d in text.documents] == found


@pytest.mark.parametrize(
    ("count", "bad", "refused_at"),
    [
        (99, range(1, 99), None), (100, [7], None), (100, [7, 60], 100), (400, [2, 9, 11, 20], None),
        (400, [2, 9, 11, 20, 21], 400), (300, range(0, 300, 3), 100), (5000, range(0, 5000, 101), None),
        (5000, range(300, 320), 314), (5000, range(0, 1100, 20), 241),
    ],
)  # fmt: skip
def test_more_than_a_hundredth_of_unreadable_rows_is_refused(
    tmp_path: Path, read, cut_up, count: int, bad: Sequence[int], refused_at: int | None
) -> None:
    """The dataset is refused as soon as there are ten more unreadable rows than that, or else at its end."""
    rows = ["3" if n in set(bad) else f'{{"text": "fox {n}"}}' for n in range(count)]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    text = read(tmp_path / "a.jsonl")
    if refused_at is None:
        assert len(cut_up(text).length) == count - len(bad)
        return
    sentence = f" of the first {refused_at} rows of a cannot be read, so this is probably the wrong file or column"
    with pytest.raises(UsageError, match=sentence):
        cut_up(text)


def test_skipped_rows_are_counted_from_any_place(tmp_path: Path, read) -> None:
    (tmp_path / "a.jsonl").write_text(numbered(300, {120: "3", 240: "null"}))
    whole = read(tmp_path / "a.jsonl")
    expected = [d.text for d in whole.documents]
    for stop in (1, 119, 120, 121, 200, 297):
        text, other = read(tmp_path / "a.jsonl"), read(tmp_path / "a.jsonl")
        before = [d.text for d in islice(text.documents, stop)]
        other.seek(json.loads(json.dumps(text.state)))
        assert before + [d.text for d in other.documents] == expected and other.state == whole.state


def test_a_place_that_an_earlier_version_saved_is_a_number_of_rows(tmp_path: Path, read) -> None:
    (tmp_path / "a.jsonl").write_text(numbered(30, {}))
    text = read(tmp_path / "a.jsonl")
    text.seek({"position": {"row": 12, "stream": {"examples_iterable": {"shard_idx": 0}}}, "skipped": {"empty": 1}})
    assert next(text.documents).text == "row 12" and text.skipped["empty"] == 1


def test_an_unreachable_dataset_raises_a_clear_error(read) -> None:
    with pytest.raises(UnavailableError, match="nobody/nothing could not be read.*--dataset python-stdlib") as refused:
        read("nobody/nothing")
    assert refused.value.exit_code == 4
    assert ". Check the network" in str(refused.value)  # the sentence of the library is followed by one full stop
    assert ".." not in str(refused.value)


# The embedded text


def test_the_two_documents_of_a_module_are_on_one_side() -> None:
    side: dict[str, set[bool]] = {}
    for document in stdlib_documents():
        side.setdefault(document.name.split(":", 1)[1], set()).add(document.held_out)
    assert len(side) > 300 and all(len(sides) == 1 for sides in side.values())


def test_every_harvested_document_is_followed_by_its_spelling_and_none_is_held_out(read) -> None:
    found = list(read("python-stdlib").documents)
    spelled = [document.text.count(" has the first letter: ") == 40 for document in found]
    plain = [document for document, spells in zip(found, spelled, strict=True) if not spells]
    assert len(plain) > 600 and 0.05 < np.mean([document.held_out for document in plain]) < 0.2
    for number, document in enumerate(found):
        followed = number + 1 < len(found) and spelled[number + 1]
        assert not (spelled[number] and document.held_out)
        assert spelled[number] or followed == (not document.held_out)


def test_the_embedded_text_continues_from_any_document(read, monkeypatch: pytest.MonkeyPatch) -> None:
    """The spelling, which is drawn at random, also continues."""
    few = [StdlibDocument(f"source:{n}.py", f"number {n}", held_out=n % 3 == 0) for n in range(9)]
    monkeypatch.setattr("sae.harvest.mini.corpus.stdlib_documents", lambda: iter(few))
    text = read("python-stdlib")
    whole = list(text.documents)
    assert len(whole) == 15
    for number in range(15):
        text.seek({"position": number, "skipped": text.skipped})
        assert list(text.documents) == whole[number:] and text.reader.position == 15


def test_repeated_documents_are_never_held_out() -> None:
    repeated = [d for d in stdlib_documents() if d.name.startswith("topic:") or ":encodings/" in d.name]
    assert len(repeated) > 100 and not any(document.held_out for document in repeated)


# Subsets of a Hub dataset


@pytest.fixture
def with_subsets(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., TextSource]:
    """with_subsets(subset, names) opens a dataset with these configurations; number n holds row n."""

    def opened(subset: str | None, names: Sequence[str] = ("en", "fr")) -> TextSource:
        folder = tmp_path / "set"
        folder.mkdir()
        for name, text in zip(names, itertools.cycle(TEXTS)):
            (folder / f"{name}.jsonl").write_text(json.dumps({"text": text}))
        card = "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in names)
        (folder / "README.md").write_text(f"---\nconfigs:\n{card}---\n")
        load = datasets.load_dataset
        monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: SimpleNamespace(sha="c0ffee"))
        monkeypatch.setattr(datasets, "load_dataset", lambda _, *words, **more: load(str(folder), *words, **more))
        return open_text(
            "some/set", tokenizer=tokenizer, revision=None, subset=subset, split="train", column="text", seed=0
        )

    return opened


def test_a_subset_is_read_and_pinned(with_subsets) -> None:
    text = with_subsets("fr")
    assert [d.text for d in text.documents] == TEXTS[1:2]
    assert text.identity == {
        "name": "some/set",
        "revision": "c0ffee",
        "split": "train",
        "column": "text",
        "subset": "fr",
    }


def test_a_subset_that_is_not_given_pins_nothing(with_subsets) -> None:
    assert "subset" not in with_subsets(None, ["default"]).identity


@pytest.mark.parametrize(
    ("subset", "names", "sentence"),
    [
        (None, ["en", "fr"], "The dataset some/set has several configurations. Choose one with --subset: 'en', 'fr'"),
        ("de", ["en", "fr"], "The dataset some/set has no such configuration. Choose one with --subset: 'en', 'fr'"),
        (None, [f"n{n}" for n in range(23)], "Choose one with --subset: 'n0', .*'n19' and 3 more."),
    ],
)  # fmt: skip
def test_subsets_are_listed_where_one_is_needed(
    with_subsets, subset: str | None, names: list[str], sentence: str
) -> None:
    with pytest.raises(UsageError, match=sentence):
        with_subsets(subset, names)


def test_a_text_that_is_one_has_no_split(tmp_path: Path, tokenizer: Any) -> None:
    for name in (str(write_lines(tmp_path / "a.jsonl", [{"text": "a"}])), EMBEDDED_TEXT):
        with pytest.raises(UsageError, match="--split"):
            open_text(name, tokenizer=tokenizer, revision=None, split="test", column="text", seed=0)


def test_docstrings_are_found_in_the_order_of_ast_walk() -> None:
    """The order determines the text of the embedded corpus, and therefore the content of caches of it."""
    modules = [ast, asyncio.tasks, contextlib, functools, traceback, typing]
    for source in [*map(inspect.getsource, modules), NESTED]:
        sections = []
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                if text := ast.get_docstring(node):
                    sections.append(f"{getattr(node, 'name', 'module')}: {text}")
        assert docstrings(source) == "\n\n".join(sections)
    assert docstrings(NESTED).count("deep") == 11


def test_a_file_has_no_subset(tmp_path: Path, tokenizer: Any) -> None:
    for name in (str(write_lines(tmp_path / "a.jsonl", [{"text": "a"}])), EMBEDDED_TEXT):
        with pytest.raises(UsageError, match="--subset selects a configuration of a dataset, but .* has none"):
            open_text(name, tokenizer=tokenizer, revision=None, subset="en", split="train", column="text", seed=0)


def test_a_section_ends_with_the_paragraph_that_fills_it() -> None:
    """A section ends when it has 2,000 characters, without the blank lines between paragraphs."""
    a, b, c = "a" * 1000, "b" * 999, "c" * 2000
    assert list(split_paragraphs("\n\n".join([a, b, a, c, b]))) == [f"{a}\n\n{b}\n\n{a}", c, b]
    assert list(split_paragraphs(f"{a}\n\n{b}b\n\n{c}")) == [f"{a}\n\n{b}b", c]
