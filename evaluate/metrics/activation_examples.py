"""Passages of text in which a latent fires, and others: what autointerp shows of one latent.

Shape suffixes: R rows of text, S positions, P places where a latent fires.
"""

from typing import Any, NamedTuple

import numpy as np

BUFFER = 10  # tokens on each side of the middle of a passage
TOP, WEIGHTED, RANDOM = 12, 7, 10  # passages of each kind
TOP_SCORED, WEIGHTED_SCORED = 2, 2  # of those, the ones that are not shown with the explanation
FIRING_SHARE = 0.01  # of the largest activation in the top passages


class ExampleWindow(NamedTuple):
    """A passage of 2 * BUFFER + 1 tokens, and the latent's activation at each."""

    ids: np.ndarray
    values: np.ndarray


class LatentExamples(NamedTuple):
    """Of one latent: 15 passages to explain it by, the strongest first; 14 to score the explanation on, shuffled."""

    shown: list[ExampleWindow]
    scored: list[ExampleWindow]
    threshold: float  # of an activation that counts

    @property
    def firing(self) -> list[int]:
        """The numbers, from 1, of the scored passages on which the latent fires."""
        return [i for i, window in enumerate(self.scored, 1) if (window.values > self.threshold).any()]


def select_examples(
    place_P: np.ndarray, value_P: np.ndarray, ids_RS: np.ndarray, rng: np.random.Generator
) -> LatentExamples | None:
    """The passages of a latent that is `value_P` > 0 at the flat places `place_P` (ascending); None where too few.

    The middle of a passage is never within BUFFER of either end of its row. TOP passages have the largest activations,
    the next within BUFFER of a chosen one in the same row passed over; WEIGHTED are drawn by the square of what is
    strictly below the least of those; RANDOM are anywhere, and count as if the latent were silent there.
    """
    rows, context = ids_RS.shape
    row_P, position_P = np.divmod(place_P, context)
    whole_P = (position_P >= BUFFER) & (position_P < context - BUFFER)
    top: list[int] = []
    taken: dict[int, list[int]] = {}
    candidates = np.flatnonzero(whole_P)
    for i in candidates[np.argsort(-value_P[candidates], kind="stable")]:
        beside = taken.setdefault(int(row_P[i]), [])
        if all(abs(int(position_P[i]) - other) > BUFFER for other in beside):
            beside.append(int(position_P[i]))
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

    def window(place: int, silent: bool = False) -> ExampleWindow:
        start = place - BUFFER
        values = np.zeros(2 * BUFFER + 1, np.float32)
        if not silent:
            low, high = np.searchsorted(place_P, [start, start + len(values)])
            values[place_P[low:high] - start] = value_P[low:high]
        return ExampleWindow(ids_RS.reshape(-1)[start : start + len(values)], values)

    anywhere = rng.integers(rows, size=RANDOM) * context + rng.integers(BUFFER, context - BUFFER, size=RANDOM)
    strongest = [window(int(place_P[i])) for i in rng.permutation(top)]
    weaker = [window(int(place_P[i])) for i in rng.permutation(weighted)]
    threshold = FIRING_SHARE * max(float(one.values.max()) for one in strongest)
    shown = strongest[TOP_SCORED:] + weaker[WEIGHTED_SCORED:]
    scored = strongest[:TOP_SCORED] + weaker[:WEIGHTED_SCORED] + [window(int(place), True) for place in anywhere]
    shown.sort(key=lambda one: -float(one.values.max()))
    return LatentExamples(shown, [scored[i] for i in rng.permutation(len(scored))], threshold)


class TokenText:
    """Tokens as text; a passage is one line."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        (self.before, *_) = tokenizer.encode("a", add_special_tokens=False)
        self.known: dict[int, str] = {}

    def text(self, token: int) -> str:
        """With the space that it begins with, which some tokenizers drop from the first token of a text."""
        if token not in self.known:
            alone, both = self.tokenizer.decode([self.before]), self.tokenizer.decode([self.before, token])
            self.known[token] = both.removeprefix(alone)
        return self.known[token]

    def word(self, token: int) -> str:
        """A token's text on one line."""
        return self.text(token).replace("\n", "\\n")

    def display(self, token: int) -> str:
        """A token's text for a page or a terminal; the tokenizer's own name of one that is a part of a character."""
        text = self.text(token)
        return self.tokenizer.convert_ids_to_tokens(token) if "\ufffd" in text else text

    def passage(self, window: ExampleWindow, threshold: float | None = None) -> str:
        """Tokens above the threshold, where there is one, stand between << and >>."""
        text = ""
        for token, value in zip(window.ids.tolist(), window.values.tolist(), strict=True):
            word = self.word(token)
            text += f"<<{word}>>" if threshold is not None and value > threshold else word
        return text.replace(">><<", "")
