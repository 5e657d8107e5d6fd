"""First-letter spelling: words of a tokenizer's vocabulary in prompts, the residual at each, and where its letter is.

    {word} has the first letter: {L}

Words are sorted by token and every draw is seeded. Prompts are made of token ids and end at the word asked for.

Shape suffixes: N words or prompts, S positions, D d_in, L letters.
"""

import hashlib
import random
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ...common.errors import UsageError
from ..context import EvalContext
from .base import Progress
from .letter_probes import DenseRows, LetterProbes, f1_score, seeded_generator, train_letter_probes

LETTERS = string.ascii_lowercase
TEMPLATE = " has the first letter:"
EXAMPLES = 10  # answered in each prompt
TRAIN_SHARE = 0.8
PROMPTS_PER_FORWARD = 64


class VocabularyWord(NamedTuple):
    token: int
    text: str  # " cat", "cat" and "Cat" are three words
    letter: int


@dataclass(frozen=True)
class SpellingPrompts:
    """The words in the order of a seeded shuffle, the first `train` of them to fit on; prompts as token ids.

    All prompts are of one length: a word is one token, and each part between words is the same. Prompts end at the word
    that they ask for: what comes after it cannot change the residual there.

    Paper: two entries of the vocabulary with the same text (a letter, and a byte that is that letter) are one word here.
    """

    words: list[VocabularyWord]
    train: int
    prefix: list[int]  # BOS, and a newline but in mode 2024-12
    question: list[int]  # after a word
    answers: list[list[int]]  # after the question, by letter, with the newline
    from_ids: int  # words whose text the tokenizer would cut otherwise

    @classmethod
    def of(cls, tokenizer: Any, words: int, seed: int, *, newline: bool = True) -> Self:
        """Raises UsageError when the tokenizer has no such prompts, or too few words."""

        def ids_of(texts: list[str]) -> list[list[int]]:
            return tokenizer(texts, add_special_tokens=False)["input_ids"]

        start = ids_of(["\n"])[0]
        chosen = draw_words(vocabulary_words(tokenizer, start), words, random.Random(f"{seed} words"))
        train = int(TRAIN_SHARE * len(chosen))
        lacking = sorted(set(range(26)) - {word.letter for word in chosen[:train]})
        if lacking or len(chosen) - train <= EXAMPLES:
            none = f" (none begins with {', '.join(LETTERS[letter] for letter in lacking)})" if lacking else ""
            raise UsageError(
                f"The {len(chosen)} words {'taken' if words else 'of this vocabulary_words'} cannot serve absorption: they are {train} to "
                f"fit on{none} and {len(chosen) - train} to test on; every letter, and more than {EXAMPLES} to test on, are needed. "
                f"Take {'more with absorption.words' if words else 'a model with more'}."
            )
        lines = ids_of([f"\n{word.text}{TEMPLATE}" for word in chosen])
        head = [[*start, word.token] for word in chosen]
        after = [tuple(line[len(h) :]) if line[: len(h)] == h else () for line, h in zip(lines, head, strict=True)]
        question = Counter(filter(None, after)).most_common(1)
        if not start or not question:
            raise UsageError(
                "This tokenizer cannot serve absorption: in a line such as 'cat has the first letter:' no word of its vocabulary "
                "is one token, behind a newline that it keeps."
            )
        usual = question[0][0]
        first = after.index(usual)
        answered = ids_of([f"\n{chosen[first].text}{TEMPLATE} {letter}\n" for letter in LETTERS.upper()])
        answers = [line[len(head[first]) + len(usual) :] for line in answered]
        if len({len(answer) for answer in answers}) > 1:
            raise UsageError(
                "This tokenizer cannot serve absorption: its answers ' A' to ' Z' differ in their number of tokens, so prompts "
                "would be of unequal lengths."
            )
        bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        from_ids = sum(tokens != usual for tokens in after)
        return cls(chosen, train, bos + (start if newline else []), list(usual), answers, from_ids)

    def prompts(self, words: Sequence[VocabularyWord], pool: Sequence[VocabularyWord], draw: random.Random) -> Tensor:
        """A prompt for each word, with examples from the pool, never the word itself: (N, S) int64."""
        part = len(self.question) + len(self.answers[0]) + 1
        ids_NS = np.empty((len(words), len(self.prefix) + EXAMPLES * part + 1), np.int64)
        for row_S, word in zip(ids_NS, words, strict=True):
            examples = [other for other in draw.sample(pool, EXAMPLES + 1) if other != word][:EXAMPLES]
            asked = [i for other in examples for i in (other.token, *self.question, *self.answers[other.letter])]
            row_S[:] = [*self.prefix, *asked, word.token]
        return torch.from_numpy(ids_NS)

    def all_prompts(self, seed: int) -> tuple[Tensor, Tensor]:
        """A prompt for each word, with examples of its own split; fresh ones for the test words, with any examples."""
        train, test = self.words[: self.train], self.words[self.train :]
        draw = random.Random(f"{seed} examples")
        chosen = torch.cat([self.prompts(train, train, draw), self.prompts(test, test, draw)])
        return chosen, self.prompts(test, self.words, random.Random(f"{seed} fresh examples"))


def draw_words(pool: Sequence[VocabularyWord], count: int, draw: random.Random) -> list[VocabularyWord]:
    """All words in random order, or `count` of them: the same number of each letter, as far as it has them."""
    order, seen, rank = draw.sample(pool, len(pool)), Counter[int](), {}
    for word in order:
        rank[word] = seen[word.letter]
        seen[word.letter] += 1
    taken = sorted(order, key=rank.__getitem__)[: count or None]
    return draw.sample(taken, len(taken))


def vocabulary_words(tokenizer: Any, start: list[int]) -> list[VocabularyWord]:
    """Every entry that is ASCII letters after at most one space, by token. `start` are the ids of a newline.

    An entry is decoded behind a newline: at the beginning of a text some tokenizers drop its space.
    """
    newline, special = tokenizer.decode(start), set(tokenizer.all_special_ids)
    found: dict[str, VocabularyWord] = {}
    for token in range(len(tokenizer)):
        text = tokenizer.decode([*start, token], clean_up_tokenization_spaces=False).removeprefix(newline)
        bare = text.removeprefix(" ")
        if not (bare.isascii() and bare.isalpha()) or token in special:
            continue
        usual = [*start, token]
        if text not in found or tokenizer(f"\n{text}", add_special_tokens=False)["input_ids"] == usual:
            found[text] = VocabularyWord(token, text, LETTERS.index(bare[0].lower()))
    return sorted(found.values())


@dataclass(frozen=True)
class SpellingRows:
    """The residual at the words behind one layer, and the model's own probe. Letters are 0 to 25."""

    train_ND: Tensor
    train_letter_N: Tensor
    test_ND: Tensor
    test_letter_N: Tensor
    fresh_ND: Tensor  # of the test words, on other prompts: what is scored
    probe: LetterProbes
    from_ids: int = 0  # words whose text the tokenizer would cut otherwise

    @property
    def positive_NL(self) -> Tensor:
        """Which letters the probe finds in the test words."""
        return self.probe.logits(self.test_ND) > 0

    @property
    def true_positive_NL(self) -> Tensor:
        return self.positive_NL & functional.one_hot(self.test_letter_N, 26).bool()

    @property
    def f1_L(self) -> Tensor:
        answer_NL, positive_NL = functional.one_hot(self.test_letter_N, 26).bool(), self.positive_NL
        return torch.tensor([f1_score(positive_NL[:, n].numpy(), answer_NL[:, n].numpy()) for n in range(26)])


def read_spelling_rows(
    ctx: EvalContext, spelling: SpellingPrompts, layers: Sequence[int], seed: int, progress: Progress
) -> dict[int, SpellingRows]:
    """The rows of every word after each layer and the probe on them: from the shelf, or one pass of the model."""
    chosen_NS, fresh_NS = spelling.all_prompts(seed)
    ids_NS = torch.cat([chosen_NS, fresh_NS])
    pinned = {**ctx.model_identity, "prompts": hashlib.sha256(ids_NS.numpy().tobytes()).hexdigest()}
    lacking = [layer for layer in layers if not ctx.artifacts.contains("letters", {**pinned, "layer": layer})]
    made = last_token_rows(ctx, ids_NS, lacking, progress) if lacking else {}
    letter_N = torch.tensor([word.letter for word in spelling.words])
    found = {}
    for layer in layers:

        def rows(layer: int = layer) -> dict[str, Tensor]:
            return {"x": made[layer] if layer in made else last_token_rows(ctx, ids_NS, [layer], progress)[layer]}

        at = {**pinned, "layer": layer}
        x_ND = ctx.artifacts.get_or_compute("letters", at, rows)["x"]
        train_ND, test_ND, fresh_ND = x_ND.tensor_split([spelling.train, len(chosen_NS)])
        settings = {"batch": 64, "epochs": 50, "weight_decay": 1e-4}

        def probe(train_ND: Tensor = train_ND, settings: dict[str, Any] = settings) -> dict[str, Tensor]:
            rows = DenseRows(train_ND.to(ctx.model.device).float())
            generator = seeded_generator(seed, "letters")
            fitted = train_letter_probes(
                rows, letter_N[: spelling.train], **settings, generator=generator, progress=progress
            )
            return {"weight": fitted.weight_LD, "bias": fitted.bias_L}

        kept = ctx.artifacts.get_or_compute(
            "letters-probe", {**at, **settings, "seed": seed, "train": spelling.train}, probe
        )
        own = LetterProbes(kept["weight"], kept["bias"])
        train_letter_N, test_letter_N = letter_N.tensor_split([spelling.train])
        found[layer] = SpellingRows(train_ND, train_letter_N, test_ND, test_letter_N, fresh_ND, own, spelling.from_ids)
    return found


def last_token_rows(ctx: EvalContext, ids_NS: Tensor, layers: Sequence[int], progress: Progress) -> dict[int, Tensor]:
    """The residual at the last position of each prompt, (N, D) in the model's dtype, after each layer."""
    found: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    for start in range(0, len(ids_NS), PROMPTS_PER_FORWARD):
        part_NS = ids_NS[start : start + PROMPTS_PER_FORWARD].to(ctx.model.device)
        for layer, x_NSD in ctx.model.capture(part_NS, layers).items():
            found[layer].append(x_NSD[:, -1].cpu())
        progress(min(start + PROMPTS_PER_FORWARD, len(ids_NS)), len(ids_NS), "prompts through the model")
    return {layer: torch.cat(parts) for layer, parts in found.items()}
