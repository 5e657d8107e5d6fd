"""Detection and fuzzing: scores of judges that are right, wrong or guessing; prompts, and the parsing of answers."""

import random
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from sae.evaluate.metrics.activation_examples import TokenText, select_examples
from sae.evaluate.metrics.autointerp import Autointerp
from sae.evaluate.metrics.balanced_passages import MOST, select_balanced
from sae.evaluate.metrics.explanation_scores import (
    PER_QUESTION,
    JudgedLatent,
    balanced_scores,
    judge_latents,
    parse_verdicts,
    passages_prompt,
)
from sae.evaluate.metrics.llm_judge import KeptAnswers

BOTH = ("detection", "fuzzing")
LATENTS = tuple(range(12))


def silent(done, total, note=""):
    pass


@pytest.fixture(scope="module")
def words(tokenizer) -> TokenText:
    return TokenText(tokenizer)


@pytest.fixture(scope="module")
def latents(words) -> dict[int, JudgedLatent]:
    rng = np.random.default_rng(0)
    plain = [token for token in range(300, 1500) if words.word(token).strip().isalnum()]
    ids = rng.choice(plain, (200, 64))
    found = {}
    for latent in LATENTS:
        flat = np.sort(rng.choice(ids.size, 400, replace=False))
        value = rng.uniform(1, 9, 400).astype(np.float32)
        examples = select_examples(flat, value, ids, rng)
        found[latent] = JudgedLatent(examples, select_balanced(flat, value, ids, examples, rng))
    assert all(len(one.balanced) == 2 * MOST for one in found.values())
    return found


@dataclass
class Scripted:
    """A judge that explains each latent by its number and answers for each passage with the digit `verdict(fires)`."""

    latents: dict
    words: TokenText
    verdict: object
    asked: list = field(default_factory=list)

    def __post_init__(self):
        self.truth = {}
        for latent, one in self.latents.items():
            for question in one.questions(BOTH, self.words, f"number {latent}"):
                self.truth[str(question.messages)] = [passage.fires for passage in question.asked]

    def answer_all(self, questions, keep):
        self.asked += questions
        for index, messages in enumerate(questions):
            truth = self.truth.get(str(messages))
            if truth is None:
                keep(index, f"This latent activates on number {index}")
            else:
                keep(index, ", ".join(self.verdict(fires) for fires in truth))


def result_of(judge: Scripted, scores=BOTH, tmp=None):
    kept = KeptAnswers(judge, tmp / "kept.jsonl")
    entries = judge_latents(kept, judge.latents, judge.words, scores, silent)
    metric = Autointerp(latents=len(LATENTS), tokens=128, scores=scores)
    return metric.result(entries, len(LATENTS), torch.zeros(1, 128), judge)


@pytest.mark.parametrize(
    ("verdict", "numbers"),
    [
        (lambda fires: str(int(fires)), (1, 1, 1)),
        (lambda fires: "1", (0.5, 1, 0)),
        (lambda fires: "0", (0.5, 0, 1)),
        (lambda fires: str(int(not fires)), (0, 0, 0)),
        (lambda fires: "1" if fires else random.choice("01"), (0.75, 1, 0.5)),
        (lambda fires: random.choice("01"), (0.5, 0.5, 0.5)),
        (lambda fires: random.choice("0001"), (0.5, 0.25, 0.75)),
    ],
    ids=["right", "always yes", "always no", "wrong", "half right", "guesses", "guesses no"],
)
def test_a_judge_has_the_score_that_it_deserves(latents, words, verdict, numbers, tmp_path):
    random.seed(0)
    result = result_of(Scripted(latents, words, verdict), tmp=tmp_path)
    sure = numbers in ((1, 1, 1), (0.5, 1, 0), (0.5, 0, 1), (0, 0, 0))
    for score in BOTH:
        found = result.metrics[score]
        rates = [found[f"{score}_{n}"] for n in ("balanced_accuracy", "true_positive_rate", "true_negative_rate")]
        assert rates == pytest.approx(numbers, abs=1e-12 if sure else 0.12)
        low, high = result.intervals[score][f"{score}_balanced_accuracy"]
        assert (low == high == numbers[0]) if sure else (low < rates[0] < high and high - low < 0.2)
        chance = [flag for flag in result.flags if flag.startswith(f"{score}: the 95 % interval")]
        assert len(chance) == (numbers[0] == 0.5)
    assert result.n["detection_latents"] == result.n["fuzzing_latents"] == len(LATENTS)
    assert result.n["fuzzing_passages"] == len(LATENTS) * 2 * MOST
    assert "autointerp" not in result.metrics and "scored" not in result.n


def test_a_right_judge_of_one_score_says_nothing_about_the_other(latents, words, tmp_path):
    judge = Scripted(latents, words, lambda fires: str(int(fires)))
    for one in latents.values():
        for question in one.questions(["fuzzing"], words, f"number {one.examples.firing}"):
            assert str(question.messages) not in judge.truth
    result = result_of(judge, ("detection",), tmp_path)
    assert result.metrics.keys() == {"detection"} and result.metrics["detection"]["detection_balanced_accuracy"] == 1
    assert len(judge.asked) == len(LATENTS) * (1 + 2 * MOST // PER_QUESTION)


def test_the_interval_is_over_latents(latents, words, tmp_path):
    """The answers about a latent are all right or all wrong. The interval is the binomial one for 8 of 12 latents."""
    right = set(LATENTS[:8])
    judge = Scripted(latents, words, lambda fires: str(int(fires)))
    for latent, one in latents.items():
        if latent not in right:
            for question in one.questions(BOTH, words, f"number {latent}"):
                judge.truth[str(question.messages)] = [not passage.fires for passage in question.asked]
    result = result_of(judge, tmp=tmp_path)
    assert result.metrics["detection"]["detection_balanced_accuracy"] == pytest.approx(2 / 3)
    low, high = result.intervals["detection"]["detection_balanced_accuracy"]
    half = 1.96 * (2 / 3 * 1 / 3 / 12) ** 0.5
    assert [low, high] == pytest.approx([2 / 3 - half, 2 / 3 + half], abs=0.09)


def test_passages_without_a_readable_answer_do_not_count(latents, words, tmp_path):
    """The first question about each latent is answered with a sentence, so the rates are over the other passages."""
    judge = Scripted(latents, words, lambda fires: str(int(fires)))
    for latent, one in latents.items():
        first = one.questions(["fuzzing"], words, f"number {latent}")[0]
        judge.truth[str(first.messages)] = ["sentence"]
    judge.verdict = lambda fires: "The marks are right." if fires == "sentence" else str(int(fires))
    result = result_of(judge, tmp=tmp_path)
    assert result.metrics["fuzzing"]["fuzzing_balanced_accuracy"] == 1
    assert result.n["fuzzing_passages"] == len(LATENTS) * (2 * MOST - PER_QUESTION)
    assert result.n["detection_passages"] == len(LATENTS) * 2 * MOST
    (flag,) = [flag for flag in result.flags if "could not be parsed" in flag]
    assert flag.startswith(f"fuzzing: the judge's answers about {5 * len(LATENTS)} of {20 * len(LATENTS)} passages")


def test_a_judge_whose_every_answer_is_unreadable_has_no_score(latents, words, tmp_path):
    result = result_of(Scripted(latents, words, lambda fires: "yes"), tmp=tmp_path)
    assert set(result.metrics["detection"].values()) == {None} and result.n["detection_latents"] == 0


@pytest.mark.parametrize(
    ("fires", "predicted", "expected"),
    [
        ([True, True, False, False], [True, False, False, False], (0.75, 0.5, 1)),
        ([True, False, False, False, False], [True, True, False, False, False], (0.875, 1, 0.75)),
        ([True, True, False], [None, True, False], (1, 1, 1)),
        ([True, True, False], [True, True, None], None),
        ([True, False], [None, None], None),
    ],
)
def test_balanced_accuracy_by_hand(fires, predicted, expected):
    found = balanced_scores(fires, predicted)
    assert (found and tuple(found.values())) == expected


@pytest.mark.parametrize(
    ("answer", "verdicts"),
    [
        ("0, 1,1", [False, True, True]), ("[1,1,1]", [True] * 3), (" 1, 0, 0.\nBecause", [True, False, False]),
        ("0, 1", None), ("0, 1, 1, 0", None), ("0 1 1", None), ("", None), ("1, 2, 0", None), ("yes, no, no", None),
        ("1,,1", None), ("None", None), ("٠, 1, 1", None),
    ],
)  # fmt: skip
def test_verdicts_are_a_digit_for_each_passage(answer, verdicts):
    assert parse_verdicts(answer, 3) == verdicts


def test_only_fuzzing_shows_marks_and_both_show_the_explanation(latents, words):
    asked = latents[0].balanced[:5]
    (system, detection), (marks_system, fuzzing) = (passages_prompt(score, asked, words, "x") for score in BOTH)
    assert detection["content"].startswith("The latent activates on x\n\n1. ")
    assert "<<" not in detection["content"] and detection["content"].count("\n") == 6
    assert fuzzing["content"].replace("<<", "").replace(">>", "") == detection["content"]
    for line, passage in zip(fuzzing["content"].splitlines()[2:], asked, strict=True):
        groups = int(np.diff(np.r_[False, passage.mark_W].astype(int)).clip(0).sum())
        assert line.count("<<") == line.count(">>") == groups > 0
        start = int(np.flatnonzero(passage.mark_W)[0])
        before = "".join(words.word(int(token)) for token in passage.window.ids[:start])
        assert line.split(". ", 1)[1].startswith(before + "<<")
    assert "5 numbered passages" in system["content"] and "<< and >>" in marks_system["content"]


def test_a_latent_without_an_explanation_is_not_asked_about(latents, words, tmp_path):
    @dataclass
    class Mute:
        asked: int = 0

        def answer_all(self, questions, keep):
            self.asked += len(questions)
            for index in range(len(questions)):
                keep(index, "")

    judge = Mute()
    entries = judge_latents(KeptAnswers(judge, tmp_path / "kept.jsonl"), latents, words, BOTH, silent)
    assert judge.asked == len(LATENTS) and all(entry["explanation"] is None for entry in entries.values())
    assert all("fuzzing" not in entry for entry in entries.values())


def test_latents_with_too_few_passages_are_counted(latents, words, tmp_path):
    some = {latent: one._replace(balanced=None) if latent < 3 else one for latent, one in latents.items()}
    judge = Scripted(some, words, lambda fires: str(int(fires)))
    entries = judge_latents(KeptAnswers(judge, tmp_path / "kept.jsonl"), some, words, BOTH, silent)
    metric = Autointerp(latents=len(LATENTS), tokens=128, scores=BOTH)
    result = metric.result(entries, len(LATENTS), torch.zeros(1, 128), judge, lacking=3)
    assert result.n["detection_latents"] == len(LATENTS) - 3
    assert "3 latents have too few passages for fuzzing and are left out of it." in result.flags


def test_one_latent_has_no_interval(latents, words, tmp_path):
    judge = Scripted({4: latents[4]}, words, lambda fires: str(int(fires)))
    kept = KeptAnswers(judge, tmp_path / "kept.jsonl")
    judge.truth |= {
        str(question.messages): [passage.fires for passage in question.asked]
        for question in latents[4].questions(BOTH, words, "number 0")
    }
    entries = judge_latents(kept, judge.latents, words, BOTH, silent)
    result = Autointerp(latents=1, tokens=128, scores=BOTH).result(entries, 1, torch.zeros(1, 128), judge)
    assert result.metrics["fuzzing"]["fuzzing_balanced_accuracy"] == 1
    assert result.intervals["fuzzing"]["fuzzing_balanced_accuracy"] == [None, None] and not result.flags
