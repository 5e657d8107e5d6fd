"""Passages for detection and fuzzing.

Half of the passages have the latent. None of these overlaps with a passage for the explanation, their activations have
all strengths, and both halves have the same marks.
"""

from dataclasses import dataclass

import numpy as np
import pytest

from sae.evaluate.metrics.activation_examples import BUFFER, LatentExamples, cut_window, select_examples
from sae.evaluate.metrics.balanced_passages import FEWEST, MOST, select_balanced

CONTEXT = 128


@dataclass
class Text:
    """A text, and a latent that fires on `count` random tokens of it. `dense` (R, S) has its activations."""

    flat: np.ndarray
    value: np.ndarray
    ids: np.ndarray
    dense: np.ndarray

    @classmethod
    def of(cls, rows: int, count: int, seed: int = 0) -> "Text":
        rng = np.random.default_rng(seed)
        ids = rng.integers(8000, size=(rows, CONTEXT))
        flat = np.sort(rng.choice(ids.size, count, replace=False))
        value = rng.gamma(1.0, 1.0, count).astype(np.float32)
        dense = np.zeros(ids.shape, np.float32)
        dense.reshape(-1)[flat] = value
        return cls(flat, value, ids, dense)

    def examples(self) -> LatentExamples:
        found = select_examples(self.flat, self.value, self.ids, np.random.default_rng(1))
        assert found is not None
        return found

    def select(self, examples: LatentExamples, seed: int = 2):
        return select_balanced(self.flat, self.value, self.ids, examples, np.random.default_rng(seed))


@pytest.fixture(scope="module")
def text() -> Text:
    return Text.of(rows=400, count=1200)


def test_half_of_the_passages_have_the_latent_and_half_have_none_of_it(text):
    examples = text.examples()
    found = text.select(examples)
    assert [sum(one.fires for one in found), len(found)] == [MOST, 2 * MOST]
    for one in found:
        around = slice(one.window.middle - BUFFER, one.window.middle + BUFFER + 1)
        assert np.array_equal(one.window.values, text.dense.reshape(-1)[around])
        assert np.array_equal(one.window.ids, text.ids.reshape(-1)[around])
        assert BUFFER <= one.window.middle % CONTEXT < CONTEXT - BUFFER
        assert (one.window.values[BUFFER] > examples.threshold) == one.fires
        assert one.fires or not one.window.values.any()
    assert [one.fires for one in found] != [True, False] * MOST  # shuffled, so that the order gives no hint
    assert 1 < sum(one.fires for one in found[:MOST]) < MOST - 1


def test_no_passage_shares_a_token_with_another_of_its_kind_or_with_one_that_explains(text):
    examples = text.examples()
    for seed in range(5):
        found = text.select(examples, seed)
        explained = [window.middle for window in examples.explained]
        for kind in (True, False):
            middles = [one.window.middle for one in found if one.fires == kind]
            taken = np.array([*middles, *(explained if kind else [])])
            apart = np.abs(taken[:, None] - np.array(middles)[None])
            assert sorted(apart[apart <= 2 * BUFFER]) == [0] * MOST  # each with itself


def test_passages_with_the_latent_come_from_each_tenth_of_its_activations(text):
    examples = text.examples()
    explained = np.array([window.middle for window in examples.explained])
    whole = (text.flat % CONTEXT >= BUFFER) & (text.flat % CONTEXT < CONTEXT - BUFFER)
    apart = (np.abs(text.flat[:, None] - explained) > 2 * BUFFER).all(1)
    others = np.sort(text.value[whole & apart & (text.value > examples.threshold)])
    drawn = set()
    for seed in range(20):
        strengths = sorted(one.window.values[BUFFER] for one in text.select(examples, seed) if one.fires)
        tenth = np.searchsorted(others, strengths) * MOST // len(others)
        assert np.abs(tenth - np.arange(MOST)).max() <= 1 and np.mean(tenth == np.arange(MOST)) >= 0.8
        drawn |= set(strengths)
    assert len(drawn) > 15 * MOST  # each passage is drawn from anywhere in its tenth


def test_marks_are_right_where_the_latent_fires_and_elsewhere_the_same_marks(text):
    examples = text.examples()
    found = text.select(examples)
    marks = {kind: sorted(one.mark_W.tobytes() for one in found if one.fires == kind) for kind in (True, False)}
    assert marks[True] == marks[False] and len(set(marks[True])) > 1
    for one in found:
        if one.fires:
            assert np.array_equal(one.mark_W, one.window.values > examples.threshold) and one.mark_W[BUFFER]


def test_a_latent_with_few_passages_has_as_many_of_each_kind_or_none():
    sizes = set()
    for count in range(24, 60, 2):
        text = Text.of(rows=60, count=count, seed=count)
        examples = select_examples(text.flat, text.value, text.ids, np.random.default_rng(1))
        if examples is None:
            continue
        found = text.select(examples)
        if found is not None:
            firing = sum(one.fires for one in found)
            assert FEWEST <= firing <= MOST and len(found) == 2 * firing
        sizes.add(None if found is None else len(found) // 2)
    assert None in sizes and len(sizes) > 2


def test_a_latent_that_fires_everywhere_has_no_passages_without_it():
    text = Text.of(rows=60, count=60 * CONTEXT)
    assert text.select(text.examples()) is None


def test_the_passages_do_not_change_those_of_saebench_and_depend_on_the_generator_only(text):
    first, again, other = text.select(text.examples()), text.select(text.examples()), text.select(text.examples(), 3)
    assert [one.window.middle for one in first] == [one.window.middle for one in again]
    assert [one.window.middle for one in first] != [one.window.middle for one in other]


def test_a_window_knows_its_middle_and_is_silent_where_nothing_fires(text):
    middle = int(text.flat[np.flatnonzero(text.flat % CONTEXT == 50)[0]])
    window = cut_window(middle, text.flat, text.value, text.ids)
    assert window.middle == middle and window.values[BUFFER] > 0 and len(window.ids) == 2 * BUFFER + 1
    assert not cut_window(middle, text.flat[:0], text.value, text.ids).values.any()
