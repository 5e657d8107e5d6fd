"""The first-letter task of the absorption metric: spelling prompts, activations at their words, and letter probes.

A prompt repeats the line

    {word} has the first letter: {L}

for ten example words and ends at the word in question. Words come from the tokenizer's vocabulary, sorted by token, and
every draw is seeded. Prompts are built from token ids. The task follows `sae-spelling` (Chanin et al. 2024), which
SAEBench also uses.

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

from ...cache.hooks import Hook
from ...cache.outliers import outlier_mask
from ...common.device import copy_to_device
from ...common.errors import UsageError
from ..context import EvalContext
from .base import Progress, RowSet
from .letter_probes import DenseRows, LetterProbes, f1_score, seeded_generator, train_letter_probes

LETTERS = string.ascii_lowercase
TEMPLATE = " has the first letter:"
EXAMPLES = 10  # example lines with answers before the word in question
TRAIN_SHARE = 0.8
PROMPTS_PER_FORWARD = 64


class VocabularyWord(NamedTuple):
    token: int
    text: str  # " cat", "cat" and "Cat" are three words
    letter: int


@dataclass(frozen=True)
class SpellingPrompts:
    """Words in a seeded random order, of which the first `train` are for training, and their prompts as token ids.

    All prompts have one length, because a word is one token and the parts between words are the same. A prompt ends at
    the word in question, because later tokens cannot change the activations there.

    Paper: two vocabulary entries with the same text (a letter, and the byte of that letter) count as one word here.
    """

    words: list[VocabularyWord]
    train: int
    prefix: list[int]  # BOS, then a newline except in mode 2024-12
    question: list[int]  # the tokens after a word
    answers: list[list[int]]  # by letter: the tokens after the question, newline included
    from_ids: int  # number of words whose text the tokenizer would split differently

    @classmethod
    def of(
        cls, tokenizer: Any, words: int, seed: int, *, bos_id: int | None, newline: bool = True,
        embedded: int | None = None,
    ) -> Self:  # fmt: skip
        """Draw `words` words (0: all) and tokenize the template. Prompts begin with `bos_id`.

        `embedded` is the number of tokens that have an embedding in the model; the tokenizer can have more tokens.

        Raises UsageError if the tokenizer cannot build such prompts or has too few words.
        """
        start = token_ids(tokenizer, ["\n"])[0]
        drawn = draw_words(vocabulary_words(tokenizer, start, embedded), words, random.Random(f"{seed} words"))
        train = int(TRAIN_SHARE * len(drawn))
        check_words(drawn, train, sampled=bool(words))
        lines = token_ids(tokenizer, [f"\n{word.text}{TEMPLATE}" for word in drawn])
        head = [[*start, word.token] for word in drawn]
        after = [tuple(line[len(h) :]) if line[: len(h)] == h else () for line, h in zip(lines, head, strict=True)]
        question = Counter(filter(None, after)).most_common(1)
        if not start or not question:
            raise UsageError(
                "This tokenizer is unsuitable for absorption: no word of its vocabulary is a single token "
                "in a line such as 'cat has the first letter:' after a newline."
            )
        usual = question[0][0]
        first = after.index(usual)
        answered = token_ids(tokenizer, [f"\n{drawn[first].text}{TEMPLATE} {letter}\n" for letter in LETTERS.upper()])
        answers = [line[len(head[first]) + len(usual) :] for line in answered]
        if len({len(answer) for answer in answers}) > 1:
            raise UsageError(
                "This tokenizer is unsuitable for absorption: it splits the answers ' A' to ' Z' into different "
                "numbers of tokens, so prompts would have unequal lengths."
            )
        bos = [] if bos_id is None else [bos_id]
        from_ids = sum(tokens != usual for tokens in after)
        return cls(drawn, train, bos + (start if newline else []), list(usual), answers, from_ids)

    def prompts(self, words: Sequence[VocabularyWord], pool: Sequence[VocabularyWord], rng: random.Random) -> Tensor:
        """One prompt per word, (N, S) int64. Its examples are drawn from `pool`, but are never the word itself."""
        line = len(self.question) + len(self.answers[0]) + 1
        ids_NS = np.empty((len(words), len(self.prefix) + EXAMPLES * line + 1), np.int64)
        for row_S, word in zip(ids_NS, words, strict=True):
            examples = [other for other in rng.sample(pool, EXAMPLES + 1) if other != word][:EXAMPLES]
            lines = [i for other in examples for i in (other.token, *self.question, *self.answers[other.letter])]
            row_S[:] = [*self.prefix, *lines, word.token]
        return torch.from_numpy(ids_NS)

    def all_prompts(self, seed: int) -> tuple[Tensor, Tensor]:
        """Two sets of prompts: one for all words, with examples from the word's own split, and a fresh one for the test
        words, with examples from all words."""
        train, test = self.words[: self.train], self.words[self.train :]
        rng = random.Random(f"{seed} examples")
        own_split = torch.cat([self.prompts(train, train, rng), self.prompts(test, test, rng)])
        return own_split, self.prompts(test, self.words, random.Random(f"{seed} fresh examples"))


def count_prompts(words: int) -> int:
    """How many prompts `SpellingPrompts.all_prompts` makes for `words` words."""
    return 2 * words - int(TRAIN_SHARE * words)


def token_ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def check_words(words: Sequence[VocabularyWord], train: int, *, sampled: bool) -> None:
    """Raise UsageError unless every letter has training words and there are enough test words."""
    missing = sorted(set(range(26)) - {word.letter for word in words[:train]})
    if not missing and len(words) - train > EXAMPLES:
        return
    none = f" (none begins with {', '.join(LETTERS[letter] for letter in missing)})" if missing else ""
    subject = f"The {len(words)} sampled words" if sampled else f"The {len(words)} words of the vocabulary"
    raise UsageError(
        f"{subject} are too few for absorption: {train} are for training{none} and {len(words) - train} for "
        f"testing. Expected at least one training word for each letter and more than {EXAMPLES} test words. Use "
        f"{'more words (absorption.words)' if sampled else 'a model with a larger vocabulary'}."
    )


def draw_words(pool: Sequence[VocabularyWord], count: int, rng: random.Random) -> list[VocabularyWord]:
    """All words in random order, or `count` of them, distributed over letters as evenly as the pool allows."""
    order, seen, rank = rng.sample(pool, len(pool)), Counter[int](), {}
    for word in order:
        rank[word] = seen[word.letter]
        seen[word.letter] += 1
    drawn = sorted(order, key=rank.__getitem__)[: count or None]
    return rng.sample(drawn, len(drawn))


def vocabulary_words(tokenizer: Any, start: list[int], embedded: int | None = None) -> list[VocabularyWord]:
    """Every vocabulary entry that consists of ASCII letters, with or without a leading space, sorted by token.

    `start` contains the ids of a newline. Entries are decoded after a newline, because some tokenizers drop the leading
    space of the first token of a text.
    """
    newline, special = tokenizer.decode(start), set(tokenizer.all_special_ids)
    words: dict[str, VocabularyWord] = {}
    for token in range(min(len(tokenizer), embedded or len(tokenizer))):
        text = tokenizer.decode([*start, token], clean_up_tokenization_spaces=False).removeprefix(newline)
        bare = text.removeprefix(" ")
        if not (bare.isascii() and bare.isalpha()) or token in special:
            continue
        usual = [*start, token]
        if text not in words or tokenizer(f"\n{text}", add_special_tokens=False)["input_ids"] == usual:
            words[text] = VocabularyWord(token, text, LETTERS.index(bare[0].lower()))
    return sorted(words.values())


@dataclass(frozen=True)
class SpellingRows:
    """The activations at one hook, read at the last word of each prompt, and probes that use these activations to
    predict the first letter of that word. Letters are numbered from 0 to 25."""

    train_ND: Tensor
    train_letter_N: Tensor
    test_ND: Tensor
    test_letter_N: Tensor
    fresh_ND: Tensor  # absorption is scored on these rows: the test words in fresh prompts
    probe: LetterProbes
    from_ids: int = 0  # see SpellingPrompts
    outliers: int = 0  # words that were left out because of the norm of a row

    @property
    def positive_NL(self) -> Tensor:
        """The letters that the probes predict for the test words."""
        return self.probe.logits(self.test_ND) > 0

    @property
    def true_positive_NL(self) -> Tensor:
        return self.positive_NL & functional.one_hot(self.test_letter_N, 26).bool()

    @property
    def f1_L(self) -> Tensor:
        answer_NL, positive_NL = functional.one_hot(self.test_letter_N, 26).bool(), self.positive_NL
        return torch.tensor([f1_score(positive_NL[:, n].numpy(), answer_NL[:, n].numpy()) for n in range(26)])


def read_spelling_rows(
    ctx: EvalContext, prompts: SpellingPrompts, row_sets: Sequence[RowSet], seed: int, progress: Progress
) -> dict[RowSet, SpellingRows]:
    """Activation rows and letter probes for each row set, from the artifact cache or one pass of the model.

    A word is left out if its row is an outlier in either of its prompts.

    Raises UsageError if a letter has no training words left.
    """
    own_split_NS, fresh_NS = prompts.all_prompts(seed)
    ids_NS = torch.cat([own_split_NS, fresh_NS])
    depends = {**ctx.model_identity, "prompts": hashlib.sha256(ids_NS.numpy().tobytes()).hexdigest()}
    word_rows = read_word_rows(ctx, ids_NS, sorted({row_set.hook for row_set in row_sets}), depends, progress)
    train_letter_N, test_letter_N = torch.tensor([word.letter for word in prompts.words]).tensor_split([prompts.train])
    by_row_set = {}
    for row_set in row_sets:
        hook, x_ND = row_set.hook, word_rows[row_set.hook]
        cuts = [prompts.train, len(own_split_NS)]
        train_ND, test_ND, fresh_ND = x_ND.tensor_split(cuts)
        train_N, test_N, fresh_N = (~outlier_mask(x_ND, row_set.norm_limit)).tensor_split(cuts)
        test_N = test_N & fresh_N
        outliers, letter_N = int((~train_N).sum() + (~test_N).sum()), train_letter_N[train_N]
        if outliers and len(letter_N.unique()) < len(LETTERS):
            raise UsageError(
                f"{outliers:,} of {len(prompts.words):,} words are outliers because of the norm of their activations "
                f"at {hook}. The other words are too few for absorption. To count all words, pass --max-norm none."
            )
        key = {**depends, **row_set.record(outliers)}
        probe = read_letter_probes(ctx, key, train_ND[train_N], letter_N, seed, progress)
        kept = train_ND[train_N], letter_N, test_ND[test_N], test_letter_N[test_N], fresh_ND[test_N]
        by_row_set[row_set] = SpellingRows(*kept, probe, prompts.from_ids, outliers)
    return by_row_set


def read_word_rows(
    ctx: EvalContext, ids_NS: Tensor, hooks: Sequence[Hook], depends: dict[str, Any], progress: Progress
) -> dict[Hook, Tensor]:
    """The activations at the last position of each prompt (N, D) at each hook, from the artifact cache or one pass."""
    captured: dict[Hook, Tensor] = {}

    def rows_of(hook: Hook) -> Tensor:
        def make() -> dict[str, Tensor]:
            in_memory = hook in captured
            return {"x": captured[hook] if in_memory else last_token_rows(ctx, ids_NS, [hook], progress)[hook]}

        return ctx.artifacts.get_or_compute("letters", {**depends, **hook.record}, make)["x"]

    with ctx.artifacts.claim("letters", ({**depends, **hook.record} for hook in hooks)):
        missing = [hook for hook in hooks if not ctx.artifacts.contains("letters", {**depends, **hook.record})]
        captured |= last_token_rows(ctx, ids_NS, missing, progress) if missing else {}
        return {hook: rows_of(hook) for hook in hooks}


def read_letter_probes(
    ctx: EvalContext, depends: dict[str, Any], train_ND: Tensor, train_letter_N: Tensor, seed: int, progress: Progress
) -> LetterProbes:
    """The letter probes for the activations at one hook, read from the artifact cache or else trained."""
    settings: dict[str, Any] = {"batch": 64, "epochs": 50, "weight_decay": 1e-4}

    def make() -> dict[str, Tensor]:
        rows = DenseRows(train_ND.to(ctx.model.device).float())
        generator = seeded_generator(seed, "letters")
        fitted = train_letter_probes(rows, train_letter_N, **settings, generator=generator, progress=progress)
        return {"weight": fitted.weight_LD, "bias": fitted.bias_L}

    depends = {**depends, **settings, "seed": seed, "train": len(train_ND)}
    arrays = ctx.artifacts.get_or_compute("letters-probe", depends, make)
    return LetterProbes(arrays["weight"], arrays["bias"])


def last_token_rows(ctx: EvalContext, ids_NS: Tensor, hooks: Sequence[Hook], progress: Progress) -> dict[Hook, Tensor]:
    """The activations at the last position of each prompt, (N, D) in the model's dtype, at each hook."""
    parts: dict[Hook, list[Tensor]] = {hook: [] for hook in hooks}
    for start in range(0, len(ids_NS), PROMPTS_PER_FORWARD):
        batch_NS = copy_to_device(ids_NS[start : start + PROMPTS_PER_FORWARD], ctx.model.device)
        for hook, x_NSD in ctx.model.capture_hooks(batch_NS, hooks).items():
            parts[hook].append(x_NSD[:, -1].cpu())
        progress(min(start + PROMPTS_PER_FORWARD, len(ids_NS)), len(ids_NS), "prompts through the model")
    return {hook: torch.cat(rows) for hook, rows in parts.items()}
