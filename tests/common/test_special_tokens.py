"""The special token at the start of a context, for tokenizers of many kinds."""

from typing import Any

import pytest

from sae.common.errors import UsageError
from sae.common.special_tokens import BOS_OR_EOS, choose_bos, find_token, special_token_ids, turn_markers

from ..tokenizer_shapes import SHAPES, make_tokenizer

ADDED, IN_VOCABULARY = "the tokenizer puts it before a text", "in the vocabulary; the tokenizer adds none"


@pytest.fixture(scope="module")
def shapes() -> dict[str, Any]:
    return {shape: make_tokenizer(shape) for shape in SHAPES}


@pytest.mark.parametrize(
    ("shape", "token", "reason"),
    [
        ("gemma", "<bos>", ADDED),
        ("llama-3", "<|begin_of_text|>", ADDED),
        ("unigram", "<s>", ADDED),
        ("gpt-2", "<|endoftext|>", IN_VOCABULARY),
        ("pythia", "<|endoftext|>", IN_VOCABULARY),
        ("qwen", "<|endoftext|>", IN_VOCABULARY),
        ("qwen-chat", "<|endoftext|>", IN_VOCABULARY),
        ("smollm2", "<|endoftext|>", IN_VOCABULARY),
        ("wordpiece", "[CLS]", "the tokenizer's bos_token; the tokenizer adds none"),
        ("untold", "</s>", "the tokenizer's eos_token; the tokenizer adds none"),
        ("chatml-only", None, "adds none, and <|im_start|> and <|im_end|> would begin or end a chat turn"),
        ("own-turns", None, "adds none, and <turn> and <end> would begin or end a chat turn"),
        ("llama-2", None, "adds none, and <s> and </s> would begin or end a chat turn"),
        ("nothing", None, "the tokenizer adds none, and it has none"),
    ],
)
def test_auto(shapes: dict[str, Any], shape: str, token: str | None, reason: str) -> None:
    tokenizer = shapes[shape]
    before = dict(tokenizer.special_tokens_map), tokenizer.backend_tokenizer.to_str()
    choice = choose_bos(tokenizer)
    assert (choice.id is None) if token is None else (tokenizer.convert_ids_to_tokens(choice.id) == token)
    assert choice.reason.endswith(reason)
    assert (dict(tokenizer.special_tokens_map), tokenizer.backend_tokenizer.to_str()) == before


def test_a_token_is_given_as_text_or_id_and_none_is_none(shapes: dict[str, Any]) -> None:
    tokenizer = shapes["smollm2"]
    number = tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert choose_bos(tokenizer, "<|im_start|>").id == choose_bos(tokenizer, str(number)).id == number
    assert choose_bos(tokenizer, "none") == (None, "--bos none")
    assert find_token(tokenizer, "\n", "--skip-token") == tokenizer("\n")["input_ids"][0]


def test_earlier_versions_began_with_bos_else_eos(shapes: dict[str, Any]) -> None:
    for shape, token in (("smollm2", "<|im_start|>"), ("qwen-chat", "<|im_end|>"), ("gemma", "<bos>")):
        assert shapes[shape].convert_ids_to_tokens(choose_bos(shapes[shape], BOS_OR_EOS).id) == token
    assert choose_bos(shapes["nothing"], BOS_OR_EOS).id is None


@pytest.mark.parametrize(
    ("token", "sentence"),
    [
        ("<|im_begin|>", r"--bos '<\|im_begin\|>' is not one token of this tokenizer; did you mean <\|im_\w+\|>\?"),
        ("two words", "--bos 'two words' is not one token"),
        ("9999", r"--bos 9999: the tokenizer has the ids 0 to \d+"),
        ("", "--bos '' is not one token"),
    ],
)
def test_an_unknown_token_is_refused_with_near_ones(shapes: dict[str, Any], token: str, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        choose_bos(shapes["smollm2"], token)


def test_turn_markers_come_from_the_template_and_from_well_known_names(shapes: dict[str, Any]) -> None:
    assert turn_markers(shapes["own-turns"]) == {"<turn>", "<end>"}
    assert turn_markers(shapes["untold"]) == {"<|im_start|>"}
    assert turn_markers(shapes["llama-3"]) == {"<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"}
    assert turn_markers(shapes["gemma"]) == {"<start_of_turn>", "<end_of_turn>"}
    assert turn_markers(shapes["llama-2"]) == {"<s>", "</s>"}
    assert turn_markers(shapes["gpt-2"]) == set()


def test_special_ids_are_pad_eos_and_bos(shapes: dict[str, Any]) -> None:
    assert special_token_ids(shapes["gemma"]) == [0, 1, 2] and special_token_ids(shapes["nothing"]) == []
