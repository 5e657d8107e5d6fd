"""Text is cut into contexts, each with BOS and one document, and with exactly as many rows as requested."""

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sae.cache.context_format import ContextFormat
from sae.cache.contexts import Contexts
from sae.common.errors import UsageError
from sae.harvest.contexts import ContextCutter, is_held_out
from sae.harvest.documents import Document, ListedDocuments, TextSource

FORM = ContextFormat(2, (0, 1, 2))  # of gemma-2-mini: BOS, and pad, EOS, BOS
TEXTS = ["the quick brown fox jumps over the lazy dog " * 3, "seven zebras", "read their yellow books in june " * 5]


def test_contexts_begin_with_bos_and_hold_one_document(cut_up, tokenizer: Any) -> None:
    contexts = cut_up(TEXTS)
    assert (contexts.ids[:, 0] == tokenizer.bos_token_id).all() and contexts.ids.shape[1] == 8
    whole = tokenizer(TEXTS, add_special_tokens=False)["input_ids"]
    for number, ids in enumerate(whole):
        mine = contexts.select(contexts.document == number)
        pieces = sorted(tuple(c[1:n].tolist()) for c, n in zip(mine.ids, mine.length, strict=True))
        assert pieces == sorted(tuple(ids[start : start + 7]) for start in range(0, len(ids), 7))
    assert all((c[n:] == tokenizer.pad_token_id).all() for c, n in zip(contexts.ids, contexts.length, strict=True))


@pytest.mark.parametrize("tokens", [1, 6, 7, 8, 20, 40])
@pytest.mark.parametrize("keep_special", [False, True])
def test_there_are_exactly_as_many_rows_as_requested(cut_up, tokenizer: Any, tokens: int, keep_special: bool) -> None:
    form = ContextFormat.choose(tokenizer, keep_special=keep_special)
    contexts = cut_up(TEXTS, tokens, exactly=True, form=form)
    assert form.row_mask(contexts).sum() == tokens and contexts.length.min() >= 1


def test_a_text_that_is_too_short_names_the_tokens_that_it_has(cut_up, tokenizer: Any) -> None:
    rows = sum(map(len, tokenizer(TEXTS, add_special_tokens=False)["input_ids"]))
    with pytest.raises(
        UsageError, match=f"has only {rows} of the requested 1,000 tokens. Use --tokens {rows} or fewer"
    ):
        cut_up(TEXTS, 1000, exactly=True)
    assert FORM.row_mask(cut_up(TEXTS, rows, exactly=True)).sum() == rows
    assert FORM.row_mask(cut_up(TEXTS, 1000)).sum() == rows  # "up to"


def test_special_tokens_among_ids_are_not_rows(cut_up, tokenizer: Any) -> None:
    contexts = cut_up(tokenizer(["one<eos>two<bos><pad>three"])["input_ids"], context=64)
    ids = contexts.ids[0, : contexts.length[0]]
    assert {0, 1, 2} < set(ids.tolist())
    assert not np.isin(ids[FORM.row_mask(contexts)[0, : len(ids)]], [0, 1, 2]).any()
    assert ContextFormat(2, ()).row_mask(contexts).sum() == len(ids)


def test_held_out_documents_come_last_and_are_chosen_by_their_tokens(cut_up, tokenizer) -> None:
    texts = [f"number {n} reads the yellow books" for n in range(200)]
    contexts, other = cut_up(texts, held_out=0.3), cut_up(texts, held_out=0.3, seed=1)
    expected = [is_held_out(ids, 0, 0.3) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    assert [expected[d] for d in contexts.document] == contexts.held_out.tolist() == sorted(contexts.held_out)
    assert 0.2 < np.mean(expected) < 0.4
    assert set(other.document[other.held_out].tolist()) != set(contexts.document[contexts.held_out].tolist())


def test_a_document_is_on_the_same_side_as_text_and_as_ids(cut_up, tokenizer) -> None:
    texts = [f"number {n} reads the yellow books" for n in range(100)]
    tokenised = tokenizer(texts, add_special_tokens=True)["input_ids"]  # with a BOS, which is not part of the document
    as_text, as_ids = cut_up(texts, held_out=0.3), cut_up(tokenised, held_out=0.3)
    assert np.array_equal(as_text.held_out, as_ids.held_out) and np.array_equal(as_text.ids, as_ids.ids)


def test_the_order_of_contexts_is_that_of_the_seed(cut_up) -> None:
    one, same, other = cut_up(TEXTS), cut_up(TEXTS), cut_up(TEXTS, seed=1)
    assert np.array_equal(one.ids, same.ids) and not np.array_equal(one.ids, other.ids)
    assert sorted(map(tuple, one.ids.tolist())) == sorted(map(tuple, other.ids.tolist()))


@pytest.mark.parametrize(
    ("texts", "why"),
    [([], "it is empty"), (["", None, " "], r"all of its documents were skipped \(2 empty, 1 not text\)")],
)
def test_an_empty_text_is_rejected(cut_up, texts: list[Any], why: str) -> None:
    with pytest.raises(UsageError, match=f"The text some has no tokens to harvest: {why}. Give another --dataset"):
        cut_up(texts)


def test_a_document_that_occurs_twice_is_on_one_side(cut_up) -> None:
    texts = [f"number {n} reads the yellow books" for n in range(100)] * 2
    contexts = cut_up(texts, held_out=0.3)
    side = dict(zip(contexts.document.tolist(), contexts.held_out.tolist(), strict=True))
    assert all(side[n] == side[n + 100] for n in range(100)) and len(set(side.values())) == 2


# Token ids instead of text


def test_ids_give_the_same_contexts_as_their_text(same, cut_up, tokenizer: Any) -> None:
    ids = tokenizer(TEXTS, add_special_tokens=False)["input_ids"]
    with_bos = [[tokenizer.bos_token_id, *body] for body in ids]
    for tokenised in (ids, with_bos, [ids[0], TEXTS[1], with_bos[2]]):
        assert same(cut_up(tokenised), cut_up(TEXTS))


def test_a_row_as_long_as_a_context_is_that_context(cut_up) -> None:
    row = [2, 40, 41, 1, 2, 42, 43, 44]
    contexts = cut_up([row])
    assert contexts.ids.tolist() == [row] and contexts.length.tolist() == [8]
    assert FORM.row_mask(contexts).tolist() == [[False, True, True, False, False, True, True, True]]
    assert cut_up([row[1:]]).ids.tolist() == [row]


def test_ids_are_held_out_by_their_hash(same, cut_up) -> None:
    ids = [[2, n, n + 1, 9] for n in range(100, 300)]
    contexts, without_bos = cut_up(ids, held_out=0.3), cut_up([row[1:] for row in ids], held_out=0.3)
    assert 0.2 < contexts.held_out.mean() < 0.4 and same(contexts, without_bos)
    assert [is_held_out(ids[d][1:], 0, 0.3) for d in contexts.document] == contexts.held_out.tolist()


def test_documents_that_are_too_long_are_counted_not_read(cut_up, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sae.harvest.documents.MAX_DOCUMENT", 10)
    documents = ["0123456789", "0123456789a", [5] * 10, [5] * 11, "", [], [1.5], ["a"], [True], 7, "  "]
    text = TextSource("some", {}, ListedDocuments(lambda: map(Document, documents)))
    assert [d.text for d in text.documents] == ["0123456789", [5] * 10]
    assert text.skipped == {"empty": 3, "not text": 4, "huge": 2}


# Packing


def packed(
    documents: list[tuple[list[int], bool]], context: int, tokens: int = 10**6
) -> list[tuple[list[int], int, bool]]:
    """Return (ids, first document, held out) of each context, in the order in which they are cut."""
    cutter = ContextCutter(FORM, context, tokens, pack=True)
    for number, (body, held_out) in enumerate(documents):
        cutter.add(body, number, held_out)
    cutter.flush()
    part = cutter.take()
    pieces = np.split(part["ids"], np.cumsum(part["length"])[:-1])
    return [(p.tolist(), d, bool(h)) for p, d, h in zip(pieces, part["document"], part["held_out"], strict=True)]


def test_packing_by_hand() -> None:
    documents = [
        ([10, 11, 12, 13, 14], False),
        ([], False),
        ([20, 21], False),
        ([90, 91], True),
        ([30, 31, 32, 33], False),
        ([92], True),
    ]
    expected = [
        ([2, 10, 11, 12], 0, False),
        ([2, 13, 14, 2], 0, False),
        ([2, 20, 21, 2], 2, False),
        ([2, 30, 31, 32], 4, False),
        ([2, 90, 91, 2], 3, True),
        ([2, 33], 4, False),
        ([2, 92], 5, True),
    ]
    assert sorted(packed(documents, 4)) == sorted(expected)
    assert [c[0] for c in packed(documents, 4, tokens=6) if not c[2]] == [[2, 10, 11, 12], [2, 13, 14, 2], [2, 20]]


@settings(max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 30), st.booleans()), max_size=20), st.integers(2, 12))
def test_packing_keeps_every_token_once_and_in_order(sizes: list[tuple[int, bool]], context: int) -> None:
    number = itertools.count(10)
    documents = [(list(itertools.islice(number, size)), held_out) for size, held_out in sizes]
    if not any(body for body, _ in documents):
        return
    contexts = packed(documents, context)
    for side in (False, True):
        mine = [ids for ids, _, held_out in contexts if held_out == side]
        wanted = [token for body, held_out in documents if held_out == side for token in body]
        assert [token for ids in mine for token in ids if token != 2] == wanted
        assert all(len(ids) == context for ids in mine[:-1]) and all(ids[0] == 2 for ids in mine)
    before = {token: previous for ids, _, _ in contexts for previous, token in itertools.pairwise(ids)}
    assert all(before[body[0]] == 2 for body, _ in documents if body)
    for ids, first, _ in contexts:
        assert ids[1] in documents[first][0]


@pytest.mark.parametrize("tokens", [1, 6, 7, 8, 20, 40])
def test_packed_contexts_have_as_many_rows_as_requested(cut_up, tokenizer: Any, tokens: int) -> None:
    contexts = cut_up(TEXTS, tokens, exactly=True, pack=True)
    assert FORM.row_mask(contexts).sum() == tokens


def test_packing_fills_contexts(cut_up) -> None:
    assert len(cut_up(["seven zebras"] * 20, context=64)) == 20
    # Each document has 7 tokens with its BOS, and two contexts begin with another BOS inside a document.
    assert sorted(cut_up(["seven zebras"] * 20, context=64, pack=True).length) == [14, 64, 64]


def test_packing_keeps_held_out_documents_to_themselves(cut_up) -> None:
    ids = [[n, n, n] for n in range(100, 300)]
    side = {n: is_held_out([n, n, n], 0, 0.3) for n in range(100, 300)}
    contexts = cut_up(ids, held_out=0.3, pack=True, context=32)
    for row, length, held_out in zip(contexts.ids, contexts.length, contexts.held_out, strict=True):
        assert {side[n] for n in row[:length].tolist() if n != 2} == {bool(held_out)}


def test_what_contexts_begin_with_is_written_by_no_role() -> None:
    """This also holds if special tokens are rows."""
    cutter = ContextCutter(ContextFormat(2, ()), 4, 100, pack=True, marked=True)
    cutter.add([5, 6, 7, 8], 0, False, [1, 0, 1, 1])
    cutter.add([9], 1, False, [1])
    cutter.flush()
    columns = cutter.take()
    assert columns["ids"].tolist() == [2, 5, 6, 7, 2, 8, 2, 9]
    assert columns["rows"].tolist() == [0, 1, 0, 1, 0, 1, 0, 1] and cutter.rows == 4


@settings(max_examples=200)
@given(
    documents=st.lists(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 1)), max_size=12), max_size=5),
    bos_id=st.sampled_from([None, 0, 2]), skip_positions=st.integers(0, 3), context=st.integers(4, 6),
    tokens=st.integers(1, 12), pack=st.booleans(), marked=st.booleans(),
)  # fmt: skip
def test_rows_are_counted_as_the_mask_counts_them(
    documents: list, bos_id: int | None, skip_positions: int, context: int, tokens: int, pack: bool, marked: bool
) -> None:
    """There are as many rows as requested, if the documents have enough, and they are those of the mask."""

    def cut(tokens: int) -> tuple[int, np.ndarray]:
        form = ContextFormat(bos_id, (1, 2), skip_positions)
        cutter = ContextCutter(form, context, tokens, pack, marked)
        for number, document in enumerate(documents):
            cutter.add([token for token, _ in document], number, False, [mark for _, mark in document])
        cutter.flush()
        columns = cutter.take()
        length = columns["length"].astype(np.int64)
        shape = (len(length), context)
        inside = np.arange(context) < length[:, None]
        ids, rows = np.zeros(shape, np.uint32), np.zeros(shape, bool)
        ids[inside] = columns["ids"]
        if marked:
            rows[inside] = columns["rows"]
        assert bos_id is None or (ids[:, 0] == bos_id).all()
        held_out = columns["held_out"].astype(bool)
        contexts = Contexts(ids, columns["length"], columns["document"], held_out, rows if marked else None)
        return cutter.rows, form.row_mask(contexts)

    counted, mask = cut(tokens)
    assert counted == mask.sum() == min(tokens, cut(10**6)[0])
