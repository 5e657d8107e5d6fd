"""Special tokens spelled out in a text are encoded as text by every kind of tokenizer. Other texts do not change."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sae.common.special_tokens import special_tokens
from sae.harvest.documents import Document
from sae.harvest.encode import DocumentEncoder, encode_as_text

from ..tokenizer_shapes import TEXT, make_tokenizer

KINDS = ("gemma", "llama-3", "smollm2", "unigram", "wordpiece")
PLAIN = ["", " ", "a < b > c </ s > <|", "[ CLS ] x[0] <s  >", "im_start|> ok", "zebra\n\nzebra <", "é ü 東京 🙂"]
PLAIN += TEXT[1:]


@pytest.fixture(scope="module")
def kinds() -> dict[str, Any]:
    return {kind: make_tokenizer(kind) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_texts_that_spell_no_special_token_keep_their_ids(kinds: dict[str, Any], kind: str) -> None:
    tokenizer = kinds[kind]
    assert encode_as_text(tokenizer, PLAIN) == tokenizer(PLAIN, add_special_tokens=False)["input_ids"]


@settings(max_examples=100)
@given(st.text(alphabet="ab <|>_/s[]CLSimend\n", max_size=40))
def test_random_texts_that_spell_none_keep_their_ids(kinds: dict[str, Any], text: str) -> None:
    for tokenizer in kinds.values():
        if not any(token in text for token in special_tokens(tokenizer)):
            assert encode_as_text(tokenizer, [text])[0] == tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("kind", KINDS)
def test_spelled_special_tokens_become_their_characters(kinds: dict[str, Any], kind: str) -> None:
    tokenizer = kinds[kind]
    special = special_tokens(tokenizer)
    for token in special:
        for text in (token, f"the {token} fox", f"fox{token}fox", f"{token}{token} zebras", f"{token}\n{token}"):
            before = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert special[token] in before  # what earlier versions did
            (ids,) = encode_as_text(tokenizer, [text])
            assert not ({*special.values()} - {tokenizer.unk_token_id}) & {*ids}
            spelled = "".join(tokenizer.decode(ids, skip_special_tokens=False).split())
            if tokenizer.unk_token_id not in ids or kind in ("gemma", "llama-3", "smollm2"):
                assert spelled.replace("##", "") == "".join(text.split())


def test_the_beginning_of_a_context_is_removed_from_ids_only(kinds: dict[str, Any]) -> None:
    tokenizer = kinds["gemma"]
    encode = DocumentEncoder(tokenizer, bos_id=2)
    text, with_bos, without = encode([Document("<bos>fox"), Document([2, 300, 2]), Document([300])])
    assert 2 not in text.ids and tokenizer.decode(text.ids) == "<bos>fox"
    assert (with_bos.ids, without.ids) == ([300, 2], [300])
    assert DocumentEncoder(tokenizer, bos_id=None)([Document([2, 300])])[0].ids == [2, 300]


def test_earlier_versions_made_them_special_tokens(kinds: dict[str, Any]) -> None:
    old = DocumentEncoder(kinds["gemma"], bos_id=2, literals_are_text=False)
    assert old([Document("<bos>fox")])[0].ids[0] == 2


def test_gemma_2_mini(tokenizer: Any) -> None:
    text = "one<eos>two<bos><pad>three <unk>"
    (ids,) = encode_as_text(tokenizer, [text])
    assert not {0, 1, 2, 3} & {*ids} and tokenizer.decode(ids) == text


def test_a_file_is_searched_for_special_tokens(read: Any, tmp_path: Path) -> None:
    """False is certain. Large and compressed files count as files with special tokens."""
    contents = {
        "plain.jsonl": ('{"text": "a < b > c"}', False), "spelled.jsonl": ('{"text": "a<bos>"}', True),
        "escaped.jsonl": ('{"text": "a\\u003cbos\\u003e"}', True), "slash.jsonl": ('{"text": "a<\\/s>"}', True),
        "plain.txt": ("a \\u003c b", False), "spelled.txt": ("</s>", True),
    }  # fmt: skip
    for name, (content, found) in contents.items():
        (tmp_path / name).write_text(content)
        assert read(tmp_path / name).may_contain(["<bos>", "</s>"]) is found, name
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet").may_contain(["<bos>"])
