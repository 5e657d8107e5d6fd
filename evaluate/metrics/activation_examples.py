"""Example passages of a latent for autointerp, sampled like SAEBench 0.6.0's, and the text of tokens.

Shape suffixes: R rows of text, S positions, P tokens on which a latent fires.
"""

import contextlib
import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

BUFFER = 10  # tokens on each side of the middle of a passage
TOP, WEIGHTED, RANDOM = 12, 7, 10  # passages of each kind
TOP_SCORED, WEIGHTED_SCORED = 2, 2  # how many of these are held back for scoring the explanation
CONTINUED = "◦"  # shown for a token that only contains more bytes of the previous token's character
FIRING_SHARE = 0.01  # a latent fires above this share of its largest activation in the top passages


class ExampleWindow(NamedTuple):
    """A passage of 2 * BUFFER + 1 tokens, and the latent's activation at each."""

    ids: np.ndarray
    values: np.ndarray
    middle: int = -1  # flat index of its middle token in the text


class LatentExamples(NamedTuple):
    """One latent's passages: 15 to explain it, strongest first, and 14 to score the explanation, shuffled."""

    explained: list[ExampleWindow]
    scored: list[ExampleWindow]
    threshold: float  # activation above which the latent fires

    @property
    def firing(self) -> list[int]:
        """The scored passages in which the latent fires, as indices that start at 1."""
        return [i for i, window in enumerate(self.scored, 1) if (window.values > self.threshold).any()]


def select_examples(
    flat_P: np.ndarray, value_P: np.ndarray, ids_RS: np.ndarray, rng: np.random.Generator
) -> LatentExamples | None:
    """Select the passages of a latent, or return None if it has too few.

    At the flat indices `flat_P` (ascending) of `ids_RS`, the latent has the activations `value_P`, all above 0. At all
    other tokens it is 0. The middle of a passage is at least BUFFER tokens from either end of its row.

    First, `TOP` passages with the largest activations are selected; within a row, their middle tokens are more than
    BUFFER tokens apart. Then the middle tokens of `WEIGHTED` more passages are drawn from the tokens with smaller
    activations, in proportion to the squared activation. Finally, `RANDOM` passages are drawn from the whole text. In
    these, the latent is treated as silent, even if it fires.
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
        nowhere = flat_P[:0]
        return cut_window(flat, nowhere if silent else flat_P, value_P, ids_RS)

    anywhere = rng.integers(rows, size=RANDOM) * context + rng.integers(BUFFER, context - BUFFER, size=RANDOM)
    strongest = [window(int(flat_P[i])) for i in rng.permutation(top)]
    weaker = [window(int(flat_P[i])) for i in rng.permutation(weighted)]
    threshold = FIRING_SHARE * max(float(passage.values.max()) for passage in strongest)
    explained = strongest[TOP_SCORED:] + weaker[WEIGHTED_SCORED:]
    scored = strongest[:TOP_SCORED] + weaker[:WEIGHTED_SCORED] + [window(int(flat), True) for flat in anywhere]
    explained.sort(key=lambda passage: -float(passage.values.max()))
    return LatentExamples(explained, [scored[i] for i in rng.permutation(len(scored))], threshold)


def cut_window(flat: int, flat_P: np.ndarray, value_P: np.ndarray, ids_RS: np.ndarray) -> ExampleWindow:
    """The passage around the token at a flat index. This token is at least BUFFER tokens from either end of its row."""
    start = flat - BUFFER
    values = np.zeros(2 * BUFFER + 1, np.float32)
    low, high = np.searchsorted(flat_P, [start, start + len(values)])
    values[flat_P[low:high] - start] = value_P[low:high]
    return ExampleWindow(ids_RS.reshape(-1)[start : start + len(values)], values, flat)


def split_characters(data: bytes) -> Iterator[tuple[int, str]]:
    """The characters of UTF-8 text, each with the index of its first byte. Bytes that form no character become ⟨E2
    80⟩."""
    start = 0
    while start < len(data):
        end = start
        while end < len(data) and not (size := character_size(data[end:])):
            end += 1
        if end > start:
            yield start, f"⟨{data[start:end].hex(' ').upper()}⟩"
        else:
            yield start, data[start : (end := start + size)].decode()
        start = end


def character_size(data: bytes) -> int:
    """How many bytes the first UTF-8 character of `data` has; 0 if `data` does not begin with a complete character."""
    for size in range(1, 5):
        with contextlib.suppress(UnicodeDecodeError):
            return len(data[:size].decode().encode())
    return 0


def byte_alphabet() -> dict[str, int]:
    """The byte that each character represents in the tokens of a byte-level BPE such as GPT-2's.

    Visible Latin-1 characters represent themselves; the other 68 bytes are represented, in order, by the characters
    from U+0100.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


BYTE_OF_CHARACTER = byte_alphabet()


def token_bytes(name: str | bytes) -> bytes | None:
    """The bytes of a token, from its name in a byte-level BPE or in SentencePiece (<0xE2>); None for other names."""
    if isinstance(name, bytes):
        return name
    if found := re.fullmatch("<0x([0-9A-Fa-f]{2})>", name):
        return bytes.fromhex(found[1])
    return bytes(map(BYTE_OF_CHARACTER.__getitem__, name)) if set(name) <= BYTE_OF_CHARACTER.keys() else None


class TokenText:
    """Converts tokens to text: a single token, or a passage on one line."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        (self.before, *_) = tokenizer.encode("a", add_special_tokens=False)
        self.tokens = len(tokenizer)
        self.cache: dict[int, str] = {}

    def text(self, token: int) -> str:
        """A token's text with its leading space, which some tokenizers drop from the first token of a text."""
        if token >= self.tokens:  # the embedding can have more rows than the tokenizer has tokens
            return ""
        if token not in self.cache:
            alone, both = self.tokenizer.decode([self.before]), self.tokenizer.decode([self.before, token])
            self.cache[token] = both.removeprefix(alone)
        return self.cache[token]

    def word(self, token: int) -> str:
        """A token's text on one line."""
        return self.text(token).replace("\n", "\\n")

    def display(self, token: int) -> str:
        """A token's text for a page or a terminal; bytes that form no whole character are shown as ⟨E2 80⟩."""
        return self.display_text([token])[0]

    def display_text(self, tokens: Sequence[int]) -> list[str]:
        """The texts of successive tokens for a page or a terminal.

        A character that several tokens share is shown at the first of them; the other tokens are shown as CONTINUED.
        """
        shown: list[str] = []
        for incomplete, group in groupby(tokens, lambda token: "\ufffd" in self.text(token)):
            some = list(group)
            shown += self._join_bytes(some) if incomplete else [self.text(token) for token in some]
        return shown

    def _join_bytes(self, tokens: Sequence[int]) -> list[str]:
        """The texts of successive tokens, some of which begin or end inside a character."""
        parts = [token_bytes(self.tokenizer.convert_ids_to_tokens(token)) for token in tokens]
        whole = b"".join(part or b"" for part in parts)
        owner = [place for place, part in enumerate(parts) for _ in part or b""]
        shown = [CONTINUED if part else self.text(token) for part, token in zip(parts, tokens, strict=True)]
        for start, text in split_characters(whole):
            shown[owner[start]] = shown[owner[start]].replace(CONTINUED, "") + text
        return shown

    def passage(self, window: ExampleWindow, threshold: float | None = None) -> str:
        """The text of a passage; with a threshold, tokens above it are enclosed in << and >>."""
        return self.marked(window.ids, window.values > (np.inf if threshold is None else threshold))

    def marked(self, ids: np.ndarray, marks: np.ndarray) -> str:
        """The text of tokens, with marked tokens enclosed in << and >>; adjacent marked tokens share one pair."""
        text = ""
        for token, mark in zip(ids.tolist(), marks.tolist(), strict=True):
            text += f"<<{self.word(token)}>>" if mark else self.word(token)
        return text.replace(">><<", "")
