"""First-letter spelling prompts for the words in a tokenizer's vocabulary, in the form that the absorption metric uses.

    {word} has the first letter: {L}

Each line is one example. A word is a single token, with or without a leading space.
"""

import random
import string
from collections.abc import Sequence
from typing import Any, NamedTuple

TEMPLATE = " has the first letter:"


class SpellingWord(NamedTuple):
    """A word that is a single token."""

    token: int
    text: str  # decoded: " cat", "cat" and "Cat" are three words
    letter: str  # "C"


def spelling_words(tokenizer: Any) -> list[SpellingWord]:
    """Every token that consists of ASCII letters after at most one space, in the order of the vocabulary."""
    words = []
    for token in range(len(tokenizer)):
        text = tokenizer.convert_ids_to_tokens(token).replace("▁", " ")
        letters = text.removeprefix(" ")
        if letters and all(c in string.ascii_letters for c in letters):
            words.append(SpellingWord(token, text, letters[0].upper()))
    return words


def spelling_line(word: SpellingWord) -> str:
    """A complete example."""
    return f"{word.text}{TEMPLATE} {word.letter}"


def spelling_prompt(examples: Sequence[SpellingWord], word: SpellingWord) -> str:
    """A few-shot prompt: complete examples, then the word without its letter."""
    return "\n".join(["", *map(spelling_line, examples), word.text + TEMPLATE])


def sample_others(
    pool: Sequence[SpellingWord], word: SpellingWord, shots: int, rng: random.Random
) -> list[SpellingWord]:
    """`shots` other words from the pool, in random order."""
    return [other for other in rng.sample(pool, shots + 1) if other is not word][:shots]
