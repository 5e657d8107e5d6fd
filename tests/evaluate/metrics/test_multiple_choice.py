"""The prompts of multiple-choice questions, the choice that is read from logits, and rows that are not questions."""

from itertools import permutations

import pytest
import torch
from transformers import AutoTokenizer

from sae.common.errors import UsageError
from sae.evaluate.metrics.multiple_choice import MultipleChoiceModel, Question, parse_question
from sae.harvest.mini import WEIGHTS

TEMPLATE = "{{ bos_token }}{% for m in messages %}user\n{{ m['content'] }}\n{% endfor %}{{ 'model\n' }}"


@pytest.fixture(scope="module")
def chat_model(loaded_tiny_model) -> MultipleChoiceModel:
    tokenizer = AutoTokenizer.from_pretrained(WEIGHTS)
    tokenizer.chat_template = TEMPLATE
    return MultipleChoiceModel(loaded_tiny_model[1], tokenizer, {"name": "tiny"}, tokenizer.bos_token_id)


def test_a_prompt_has_one_bos_the_subject_and_the_choices_in_order(chat_model):
    item = Question("Which?", ("one", "two", "three", "four"), 2)
    ids = chat_model.prompt("human aging", item)
    assert ids.count(2) == 1 and ids[0] == 2
    assert chat_model.tokenizer.decode(ids[1:]) == (
        "user\nThe following are multiple choice questions (with answers) about human aging.\n"
        "Which?\nA. one\nB. two\nC. three\nD. four\nmodel\nAnswer: ("
    )
    for order in permutations(range(4)):
        shown = item.reorder(order)
        assert shown.choices[shown.answer] == "three" and sorted(shown.choices) == sorted(item.choices)


def test_the_larger_of_a_letter_s_two_tokens_counts(chat_model):
    logits = torch.zeros(2, 8192)
    logits[0, chat_model.letters[1, 0]], logits[0, chat_model.letters[2, 1]] = 3, 4  # "B", " C"
    logits[1, chat_model.letters[3, 0]], logits[1, 5] = 1, 9  # "D", and a token that is no letter
    assert chat_model.letters[2].tolist() == [295, 518]
    assert chat_model.pick(logits).tolist() == [2, 3]


@pytest.mark.parametrize(
    "row", [{"question": 1}, {"choices": ["a", "b"]}, {"choices": "abcd"}, {"answer": 4}, {"answer": "A"}]
)
def test_a_row_that_is_no_question_is_a_sentence(row):
    with pytest.raises(UsageError, match="Row 5 of wmdp is not a question. Expected a text, 4 choices and an answer"):
        parse_question({"question": "Which?", "choices": ["a", "b", "c", "d"], "answer": 0, **row}, 5, "wmdp")
