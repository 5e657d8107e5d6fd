"""First-letter spelling prompts over the words of a tokenizer's own vocabulary, in the form that absorption uses.

    {word} has the first letter: {L}

One example a line; a word is a single vocabulary piece, with or without its leading space.
"""

import random
import string
from collections.abc import Sequence
from typing import NamedTuple

TEMPLATE = " has the first letter:"


class SpellingWord(NamedTuple):
    token: int
    text: str  # as decoded: " cat", "cat" and "Cat" are three words
    letter: str  # "C"


def spelling_words(tokenizer) -> list[SpellingWord]:
    """Every vocabulary entry that is one optional space and ASCII letters, by token id."""
    found = []
    for token in range(len(tokenizer)):
        text = tokenizer.convert_ids_to_tokens(token).replace("▁", " ")
        bare = text.removeprefix(" ")
        if bare and all(c in string.ascii_letters for c in bare):
            found.append(SpellingWord(token, text, bare[0].upper()))
    return found


def spelling_line(word: SpellingWord) -> str:
    return f"{word.text}{TEMPLATE} {word.letter}"


def spelling_prompt(examples: Sequence[SpellingWord], word: SpellingWord) -> str:
    """The examples, answered, and then the question, unanswered."""
    return "\n".join(["", *map(spelling_line, examples), word.text + TEMPLATE])


def sample_others(
    pool: Sequence[SpellingWord], word: SpellingWord, shots: int, rng: random.Random
) -> list[SpellingWord]:
    """`shots` words of the pool that are not `word`, in random order."""
    return [other for other in rng.sample(pool, shots + 1) if other is not word][:shots]
