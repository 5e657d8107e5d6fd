"""Untrusted text has no effect where it is shown, and stays readable."""

import csv
import io
import os
import subprocess
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sae.common.escaping import (
    escape_for_csv,
    escape_for_markdown,
    escape_for_terminal,
    make_visible,
    quote,
)

FORMULA_STARTS = ("=", "+", "-", "@", "＝", "＋", "－", "＠")
HIDDEN = {"Cc", "Cf", "Cs", "Cn", "Co", "Zl", "Zp"}
paths = st.binary(min_size=1, max_size=12).map(lambda raw: os.fsdecode(raw.replace(b"\0", b"\n")))
texts = st.text() | paths


@given(texts)
def test_nothing_hides_in_what_is_visible(text):
    assert not {unicodedata.category(c) for c in make_visible(text)} & HIDDEN


def test_what_hides_is_shown_as_its_code_point():
    assert make_visible("a\nb\t\u202ec\x1b[31m\ud800\udcff") == "a↵b⇥⟨202E⟩c⟨001B⟩[31m⟨D800⟩\ufffd"
    assert make_visible("naïve e\u0301 日本 🙂") == "naïve e\u0301 日本 🙂"


@given(texts)
def test_a_terminal_obeys_nothing_but_line_breaks(text):
    shown = escape_for_terminal(text)
    assert not {unicodedata.category(c) for c in shown.replace("\n", "")} & {"Cc", "Cs", "Zl", "Zp"}
    assert shown.encode().decode() == shown == escape_for_terminal(shown)


def test_escapes_for_a_terminal_name_what_was_there():
    text = "a\x1b]0;t\x07\r\t\x9b\u202e\u2028" + os.fsdecode(b"\xff") + "\ud800"
    assert escape_for_terminal(text) == r"a\x1b]0;t\x07\r\t\u009b\u202e\u2028\xff\ud800"
    assert escape_for_terminal("[red]ü 日本 🧑‍🚀\n[/]") == "[red]ü 日本 🧑‍🚀\n[/]"


@given(paths.filter(lambda path: "\0" not in path))
@settings(max_examples=30)
def test_a_quoted_path_is_printable_and_bash_reads_it_back(path):
    word = quote(path)
    assert escape_for_terminal(word) == word and "\n" not in word
    read = subprocess.run(["bash", "-c", f"printf %s {word}"], capture_output=True, env={"LC_ALL": "C.UTF-8"})
    assert read.stdout == os.fsencode(path)


def test_a_plain_path_is_quoted_as_by_shlex():
    assert (quote("runs/a"), quote("a b"), quote("it's")) == ("runs/a", "'a b'", """'it'"'"'s'""")


@pytest.mark.parametrize("value", [-5, 0, 3.5, -1e-9, float("nan"), True, None])
def test_numbers_in_a_csv_stay_numbers(value):
    assert escape_for_csv(value) is value


@pytest.mark.parametrize(
    "text", ["=HYPERLINK(1)", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", " =1", "\n=1", "＝1", "＋1", "－1", "＠SUM(A1)"]
)
def test_text_in_a_csv_is_no_formula(text):
    cell = escape_for_csv(text)
    assert not cell.lstrip().startswith((*FORMULA_STARTS, "\t", "\r")) and cell.endswith(text.strip())


@given(texts)
def test_a_csv_of_any_text_is_one_line_of_utf8_without_controls_or_formulas(text):
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerow([escape_for_csv(text), -1])
    assert file.getvalue().encode().count(b"\n") == 1
    ((cell, number),) = csv.reader([file.getvalue()])
    assert number == "-1" and not cell.strip().startswith(FORMULA_STARTS)
    assert not {unicodedata.category(c) for c in cell} & {"Cc", "Cs"}


def test_ordinary_text_in_a_csv_is_as_it_was():
    assert escape_for_csv("topk k=64, a-b 日本") == "topk k=64, a-b 日本"


@pytest.mark.parametrize(
    ("text", "page"),
    [
        ("<img src=x>", r"\<img src=x\>"), ("a|b\nc", r"a\|b↵c"), ("[x](http://y)", r"\[x\](http://y)"),
        ("`x` **b** _i_ snake_case", r"\`x\` \*\*b\*\* \_i\_ snake_case"), ("&lt;", "&amp;lt;"), ("\x1b", "⟨001B⟩"),
    ],
)  # fmt: skip
def test_markdown_shows_text_as_it_is(text, page):
    assert escape_for_markdown(text) == page
