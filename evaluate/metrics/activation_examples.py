"""Example passages of a latent for autointerp, sampled like SAEBench 0.6.0's, and the text of tokens.

Shape suffixes: R rows of text, S positions, P tokens on which a latent fires.
"""

from typing import Any, NamedTuple

import numpy as np

BUFFER = 10  # tokens on each side of the middle of a passage
TOP, WEIGHTED, RANDOM = 12, 7, 10  # passages of each kind
TOP_SCORED, WEIGHTED_SCORED = 2, 2  # how many of them are held back to score the explanation
FIRING_SHARE = 0.01  # of the largest activation in the top passages: a latent fires above it


class ExampleWindow(NamedTuple):
    """A passage of 2 * BUFFER + 1 tokens, and the latent's activation at each."""

    ids: np.ndarray
    values: np.ndarray


class LatentExamples(NamedTuple):
    """One latent's passages: 15 to explain it by, the strongest first; 14 to score the explanation on, shuffled."""

    explained: list[ExampleWindow]
    scored: list[ExampleWindow]
    threshold: float  # activation above which the latent fires

    @property
    def firing(self) -> list[int]:
        """The numbers, from 1, of the scored passages in which the latent fires."""
        return [i for i, window in enumerate(self.scored, 1) if (window.values > self.threshold).any()]


def select_examples(
    flat_P: np.ndarray, value_P: np.ndarray, ids_RS: np.ndarray, rng: np.random.Generator
) -> LatentExamples | None:
    """Select the passages of a latent, or return None if it has too few.

    The latent is `value_P` > 0 at the flat indices `flat_P` (ascending) of `ids_RS`. The middle of a passage is at
    least BUFFER from either end of its row. TOP passages have the largest activations, skipping those within BUFFER of
    one already selected in the same row. WEIGHTED passages are drawn among activations below all of those, with weights
    of their square. RANDOM passages are drawn anywhere and count as if the latent were silent there.
    """
    rows, context = ids_RS.shape
    row_P, position_P = np.divmod(flat_P, context)
    whole_P = (position_P >= BUFFER) & (position_P < context - BUFFER)
    top: list[int] = []
    selected: dict[int, list[int]] = {}  # row -> positions
    candidates = np.flatnonzero(whole_P)
    for i in candidates[np.argsort(-value_P[candidates], kind="stable")]:
        in_row = selected.setdefault(int(row_P[i]), [])
        if all(abs(int(position_P[i]) - other) > BUFFER for other in in_row):
            in_row.append(int(position_P[i]))
            top.append(int(i))
            if len(top) == TOP:
                break
    if len(top) < TOP:
        return None
    below = np.flatnonzero(whole_P & (value_P < value_P[top].min()) & (value_P >= 1e-6))
    if len(below) < WEIGHTED:
        return None
    weight = value_P[below].astype(np.float64) ** 2
    weighted = rng.choice(below, WEIGHTED, replace=False, p=weight / weight.sum())

    def window(flat: int, silent: bool = False) -> ExampleWindow:
        start = flat - BUFFER
        values = np.zeros(2 * BUFFER + 1, np.float32)
        if not silent:
            low, high = np.searchsorted(flat_P, [start, start + len(values)])
            values[flat_P[low:high] - start] = value_P[low:high]
        return ExampleWindow(ids_RS.reshape(-1)[start : start + len(values)], values)

    anywhere = rng.integers(rows, size=RANDOM) * context + rng.integers(BUFFER, context - BUFFER, size=RANDOM)
    strongest = [window(int(flat_P[i])) for i in rng.permutation(top)]
    weaker = [window(int(flat_P[i])) for i in rng.permutation(weighted)]
    threshold = FIRING_SHARE * max(float(passage.values.max()) for passage in strongest)
    explained = strongest[TOP_SCORED:] + weaker[WEIGHTED_SCORED:]
    scored = strongest[:TOP_SCORED] + weaker[:WEIGHTED_SCORED] + [window(int(flat), True) for flat in anywhere]
    explained.sort(key=lambda passage: -float(passage.values.max()))
    return LatentExamples(explained, [scored[i] for i in rng.permutation(len(scored))], threshold)


class TokenText:
    """The text of tokens, each on its own and in passages of one line."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        (self.before, *_) = tokenizer.encode("a", add_special_tokens=False)
        self.cache: dict[int, str] = {}

    def text(self, token: int) -> str:
        """A token's text with its leading space, which some tokenizers drop from the first token of a text."""
        if token not in self.cache:
            alone, both = self.tokenizer.decode([self.before]), self.tokenizer.decode([self.before, token])
            self.cache[token] = both.removeprefix(alone)
        return self.cache[token]

    def word(self, token: int) -> str:
        """A token's text on one line."""
        return self.text(token).replace("\n", "\\n")

    def display(self, token: int) -> str:
        """A token's text for a page or a terminal; for a part of a character, the tokenizer's name of the token."""
        text = self.text(token)
        return self.tokenizer.convert_ids_to_tokens(token) if "\ufffd" in text else text

    def passage(self, window: ExampleWindow, threshold: float | None = None) -> str:
        """The text of a passage; with a threshold, tokens above it are enclosed in << and >>."""
        text = ""
        for token, value in zip(window.ids.tolist(), window.values.tolist(), strict=True):
            word = self.word(token)
            text += f"<<{word}>>" if threshold is not None and value > threshold else word
        return text.replace(">><<", "")
