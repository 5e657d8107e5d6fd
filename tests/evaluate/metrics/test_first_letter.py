"""The first-letter task: prompts equal the tokens of their text, and rows equal those of whole prompts."""

import pytest
import torch

from sae.cache.hooks import Hook
from sae.common.errors import UsageError
from sae.evaluate.metrics.base import RowSet
from sae.evaluate.metrics.first_letter import LETTERS, SpellingPrompts, read_spelling_rows


def silent(done, total, note=""):
    pass


@pytest.mark.parametrize("newline", [True, False])
def test_prompts_are_what_the_tokenizer_makes_of_their_text(tokenizer, newline):
    spelling = SpellingPrompts.of(tokenizer, 300, 0, newline=newline, bos_id=2)
    chosen, fresh = spelling.all_prompts(0)
    assert (len(chosen), len(fresh)) == (300, 60)
    train = {word.text for word in spelling.words[: spelling.train]}
    test = {word.text for word in spelling.words[spelling.train :]}
    assert len(train) == 240
    assert not train & test
    seen = set()
    for ids, word in zip([*chosen, *fresh], [*spelling.words, *spelling.words[spelling.train :]], strict=True):
        text = tokenizer.decode(ids[1:]) + " has the first letter:"
        whole = tokenizer(text)["input_ids"]
        assert whole[:-5] == ids.tolist()
        assert whole[-6] == word.token  # where SAEBench reads
        assert len(whole) == (88 if newline else 87)
        *examples, last = text.split("\n")[1 if newline else 0 :]
        assert last == f"{word.text} has the first letter:"
        assert word.letter == LETTERS.index(word.text.strip()[0].lower())
        assert len(examples) == 10
        for example in examples:
            other, _, letter = example.partition(" has the first letter: ")
            assert letter == other.strip()[0].upper()
            assert other != word.text
            seen.add((word.text in train, other in train))
    assert seen == {(True, True), (False, False), (False, True)}  # the last kind occurs in fresh prompts only


def test_words_are_the_vocabulary_s_entries_of_letters_by_token(tokenizer):
    everything = sorted(SpellingPrompts.of(tokenizer, 0, 0, bos_id=2).words)
    pieces = [tokenizer.convert_ids_to_tokens(token).replace("▁", " ") for token in range(len(tokenizer))]
    expected = [
        (token, piece)
        for token, piece in enumerate(pieces)
        if all(c in LETTERS + LETTERS.upper() for c in piece.removeprefix(" ")) and piece.strip()
    ]
    assert [(word.token, word.text) for word in everything] == expected
    assert len({word.text for word in everything}) == len(everything)


def test_a_seed_decides_words_and_prompts(tokenizer):
    first, again, other = (SpellingPrompts.of(tokenizer, 260, seed, bos_id=2) for seed in (1, 1, 3))
    assert first == again
    assert first.words != other.words
    assert [[word.letter for word in first.words].count(letter) for letter in range(26)] == [10] * 26
    capped = SpellingPrompts.of(tokenizer, 1300, 0, bos_id=2)
    assert all(3 <= [word.letter for word in capped.words[capped.train :]].count(letter) <= 20 for letter in range(26))
    assert all(map(torch.equal, first.all_prompts(1), again.all_prompts(1)))
    assert not torch.equal(first.all_prompts(1)[0], first.all_prompts(2)[0])


class Pieces:
    """A tokenizer that takes the longest piece at each position and skips characters that begin no piece."""

    bos_token_id, all_special_ids = None, ()

    def __init__(self, pieces: list[str]) -> None:
        self.pieces = pieces

    def __len__(self) -> int:
        return len(self.pieces)

    def decode(self, ids, **_):
        return "".join(self.pieces[i] for i in ids)

    def __call__(self, text, **_):
        if isinstance(text, list):
            return {"input_ids": [self(one)["input_ids"] for one in text]}
        ids, at = [], 0
        while at < len(text):
            fitting = [piece for piece in self.pieces if text.startswith(piece, at)]
            if not fitting:
                at += 1
                continue
            best = max(fitting, key=len)
            ids.append(self.pieces.index(best))
            at += len(best)
        return {"input_ids": ids}


def pieces(*more: str, newline: str = "\n") -> list[str]:
    frame = [newline, " has", " the", " first", " letter", ":", *(" " + letter for letter in LETTERS.upper())]
    return [*frame, *(first + second for first in LETTERS for second in LETTERS), *more]


def test_a_word_that_its_text_would_not_give_is_put_in_by_its_token():
    known = pieces("ab\n", "ca has", "ab")  # "ab" twice, and a piece that merges a word with the question
    spelling = SpellingPrompts.of(Pieces(known), 0, 0, bos_id=None)
    token = {word.text: word.token for word in spelling.words}
    assert token["ab"] == known.index("ab")
    assert len(token) == len(spelling.words)
    assert spelling.from_ids == 1
    chosen, _ = spelling.all_prompts(0)
    assert known.index("ca") in chosen[:, -1]
    assert chosen.shape[1] == 1 + 10 * 8 + 1


def test_tokenizers_and_vocabularies_that_cannot_serve_get_one_sentence(tokenizer):
    with pytest.raises(UsageError, match=r"no word of its vocabulary is a single token in a line"):
        SpellingPrompts.of(Pieces(pieces(newline="\r")), 0, 0, bos_id=2)
    with pytest.raises(UsageError, match=r"prompts would have unequal lengths"):
        SpellingPrompts.of(Pieces([" " if piece == " Q" else piece for piece in pieces("Q")]), 0, 0, bos_id=2)
    with pytest.raises(
        UsageError, match=r"for training \(none begins with q, z\) .* Use a model with a larger vocabulary"
    ):
        SpellingPrompts.of(
            Pieces([piece for piece in pieces() if piece[0] not in "qz" and piece not in (" Q", " Z")]),
            0,
            0,
            bos_id=2,
        )
    with pytest.raises(
        UsageError,
        match=r"The 40 sampled words are too few .* 8 for testing\. .*than 10 .* Use more words \(absorption\.words\)",
    ):
        SpellingPrompts.of(tokenizer, 40, 1, bos_id=2)


def test_rows_are_those_of_whole_prompts_and_made_once(ctx, monkeypatch):
    passes = []
    capture = ctx.model.capture_hooks
    monkeypatch.setattr(
        ctx.model, "capture_hooks", lambda ids, hooks: passes.append([h.layer for h in hooks]) or capture(ids, hooks)
    )
    spelling = SpellingPrompts.of(ctx.tokenizer, 260, 0, bos_id=2)
    words = read_spelling_rows(ctx, spelling, [RowSet(Hook(0)), RowSet(Hook(1))], 0, silent)
    assert {tuple(layers) for layers in passes} == {(0, 1)}
    count = len(passes)
    second = RowSet(Hook(1))
    again = read_spelling_rows(ctx, spelling, [second], 0, silent)[second]
    assert len(passes) == count
    assert torch.equal(again.fresh_ND, words[second].fresh_ND)
    assert torch.equal(again.probe.weight_LD, words[second].probe.weight_LD)
    chosen, fresh = spelling.all_prompts(0)
    ends = torch.tensor([spelling.question])
    for hook in (Hook(0), Hook(1)):
        for prompts, rows in ((chosen[:3], words[RowSet(hook)].train_ND), (fresh[:3], words[RowSet(hook)].fresh_ND)):
            whole = torch.cat([prompts, ends.expand(3, -1)], 1)
            x = ctx.model.forward(whole, [hook]).activations[hook][:, -6]
            torch.testing.assert_close(x, rows[:3])
