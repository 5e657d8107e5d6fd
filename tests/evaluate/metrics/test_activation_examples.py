"""The selection of passages from small arrays, and the text of passages."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae.evaluate.metrics.activation_examples import (
    BUFFER,
    BYTE_OF_CHARACTER,
    CONTINUED,
    ExampleWindow,
    TokenText,
    select_examples,
    split_characters,
    token_bytes,
)
from sae.harvest.model import find_model, load_tokenizer

CONTEXT = 40


def planted() -> tuple[np.ndarray, dict[tuple[int, int], float]]:
    """Thirty rows. Row r has a peak of 100 - r at position 12, so the first rows, except row 3, are the top ones."""
    ids = np.arange(30 * CONTEXT).reshape(30, CONTEXT)
    values = {(row, 12): 100.0 - row for row in range(30)}
    values[0, 22] = 99.5  # ten positions after (0, 12), so not chosen
    values[0, 23] = 98.5  # eleven positions after it, so chosen
    values[1, 9], values[1, 30] = 500.0, 600.0  # too close to an end of the row
    values[3, 12] = 0.5  # too small for a top passage
    values[29, 20] = 1e-9  # too small to be drawn
    return ids, values


def arrays(values: dict[tuple[int, int], float]) -> tuple[np.ndarray, np.ndarray]:
    place = sorted(values, key=lambda at: at[0] * CONTEXT + at[1])
    return np.array([r * CONTEXT + p for r, p in place]), np.array([values[at] for at in place], np.float32)


def middle(window: ExampleWindow) -> tuple[int, int]:
    return divmod(int(window.ids[BUFFER]), CONTEXT)


def test_passages_are_as_specified():
    ids, values = planted()
    found = select_examples(*arrays(values), ids, np.random.default_rng(0))
    silent_ones = [w for w in found.scored if not w.values.any()]
    firing = [w for w in found.scored if w.values.any()]
    assert (len(found.explained), len(found.scored), len(silent_ones), len(firing)) == (15, 14, 10, 4)
    top = {(row, 12) for row in (0, 1, 2, 4, 5, 6, 7, 8, 9, 10, 11)} | {(0, 23)}
    chosen = [middle(w) for w in (*found.explained, *firing)]
    assert top <= set(chosen) and len(chosen) == len(set(chosen)) == 19
    below = set(chosen) - top
    assert all(values[at] < values[11, 12] and at in values for at in below) and (29, 20) not in below
    assert sum(middle(w) in top for w in found.explained) == 10 and sum(middle(w) in top for w in firing) == 2
    peaks = [float(w.values.max()) for w in found.explained]
    assert peaks == sorted(peaks, reverse=True)
    for w in (*found.explained, *found.scored):
        row, position = middle(w)
        assert BUFFER <= position < CONTEXT - BUFFER and len(w.ids) == 21
        assert w.ids.tolist() == ids[row, position - 10 : position + 11].tolist()
    for w in (*found.explained, *firing):
        row, position = middle(w)
        assert w.values.tolist() == [values.get((row, position + i), 0) for i in range(-10, 11)]
    # (1, 9) is in the window of (1, 12) and has the largest activation, although no passage is centered on it
    assert found.threshold == pytest.approx(0.01 * 500)
    assert [i for i, w in enumerate(found.scored, 1) if w.values.max() > 5] == found.firing


def test_passages_depend_on_the_generator_alone():
    ids, values = planted()
    one, same, other = (select_examples(*arrays(values), ids, np.random.default_rng(seed)) for seed in (0, 0, 1))
    spread = [[middle(w) for w in (*found.explained, *found.scored)] for found in (one, same, other)]
    assert spread[0] == spread[1] != spread[2]


def test_weak_passages_are_drawn_by_their_square():
    """Nine weak passages have activation 0.001 and one has 1.0. The latter is nearly always among the seven drawn."""
    ids = np.arange(30 * CONTEXT).reshape(30, CONTEXT)
    values = {(row, 15): 5.0 for row in range(12)} | {(row, 15): 1e-3 for row in range(12, 21)} | {(21, 15): 1.0}
    drawn = [select_examples(*arrays(values), ids, np.random.default_rng(seed)) for seed in range(20)]
    assert all((21, 15) in [middle(w) for w in (*d.explained, *d.scored) if w.values.any()] for d in drawn)


@pytest.mark.parametrize("rows", [11, 18])
def test_a_latent_with_too_few_passages_has_none(rows):
    ids = np.arange(30 * CONTEXT).reshape(30, CONTEXT)
    assert (
        select_examples(*arrays({(row, 15): 5.0 - row / 10 for row in range(rows)}), ids, np.random.default_rng(0))
        is None
    )
    assert select_examples(*arrays({(row, 15): 5.0 - row / 10 for row in range(19)}), ids, np.random.default_rng(0))
    ties = {(row, 15): 5.0 for row in range(30)}  # no passage is below the smallest of the top passages
    assert select_examples(*arrays(ties), ids, np.random.default_rng(0)) is None


@pytest.fixture(scope="module")
def words(tiny_model) -> TokenText:
    return TokenText(load_tokenizer(find_model(str(tiny_model))[0]))


@given(st.binary(max_size=12) | st.text(max_size=5).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_bytes_are_split_into_characters_and_the_rest(data):
    found = list(split_characters(data))
    text = "".join("\ufffd" if part.startswith("⟨") else part for _, part in found)
    expected = data.decode(errors="replace").replace("⟨", "\ufffd")
    assert re.sub("\ufffd+", "\ufffd", text) == re.sub("\ufffd+", "\ufffd", expected)
    assert [start for start, _ in found] == sorted({start for start, _ in found})


def test_the_alphabet_of_bytes_is_that_of_gpt_2():
    from tokenizers.pre_tokenizers import ByteLevel

    assert set(BYTE_OF_CHARACTER) == set(ByteLevel.alphabet()) and sorted(BYTE_OF_CHARACTER.values()) == [*range(256)]
    for text in ("a b", "naïve 日本 🙂\n\t", "\x00\xad"):
        ((name, _),) = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
        assert token_bytes(name) == text.encode()


def test_names_that_are_no_bytes():
    assert token_bytes("<0xE2>") == b"\xe2" and token_bytes(b"\xe2\x80") == b"\xe2\x80" and token_bytes("▁the") is None


@pytest.fixture(scope="module")
def byte_level() -> TokenText:
    """A byte-level BPE tokenizer like GPT-2's, in which the first two bytes of 日 are one token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = sorted(pre_tokenizers.ByteLevel.alphabet())
    pair = ("æ", "Ĺ")
    bpe = models.BPE({name: n for n, name in enumerate([*names, "".join(pair)])}, [pair])
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return TokenText(PreTrainedTokenizerFast(tokenizer_object=tokenizer))


@pytest.mark.parametrize("kind", ["byte_level", "words"])
def test_a_character_of_several_tokens_is_shown_once(kind, request):
    """This holds for byte-level BPE and for SentencePiece with byte fallback."""
    found = request.getfixturevalue(kind)
    ids = found.tokenizer.encode("x 日本🙂.", add_special_tokens=False)
    shown = found.display_text(ids)
    assert "".join(shown).replace(CONTINUED, "") == "x 日本🙂." and len(shown) == len(ids)
    assert shown.count(CONTINUED) == len(ids) - sum(part != CONTINUED for part in shown) > 0
    start = next(n for n, part in enumerate(shown) if "日" in part)
    cut = found.display_text(ids[start + 1 :])  # like a context that begins within the character
    assert cut[0].startswith("⟨") and "".join(cut).endswith("本◦◦🙂◦◦◦.")


def test_a_part_of_a_character_alone_is_shown_by_its_bytes(byte_level):
    assert byte_level.display(byte_level.tokenizer.convert_tokens_to_ids("æĹ")) == "⟨E6 97⟩"


def passage_of(words: TokenText, text: str, *values: float) -> ExampleWindow:
    ids = np.array(words.tokenizer.encode(text, add_special_tokens=False))
    return ExampleWindow(ids, np.array(values or [0.0] * len(ids), np.float32))


def test_a_passage_reads_as_its_text_with_marks(words):
    window = passage_of(words, "the value of a number\n", 0, 3, 4, 0.5, 5, 0)
    assert words.passage(window) == "the value of a number\\n"
    assert words.passage(window, 1.0) == "the<< value of>> a<< number>>\\n"
