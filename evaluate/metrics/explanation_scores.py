"""Explanations of latents, and scores of how well a judge can tell from an explanation where its latent fires.

`saebench` is the score of SAEBench 0.6.0, with reworded prompts: the judge names the passages, out of 14, on which the
latent fires. `detection` and `fuzzing` are the scores that Paulo et al. 2024 (arXiv 2410.13928) define and their
library delphi computes: the balanced accuracy over passages of which half contain a token on which the latent fires
(balanced_passages.py). Each question is about at most PER_QUESTION passages. In detection, the judge says for each
passage whether the latent fires in it. In fuzzing, some tokens of a passage are marked, and the judge says whether the
latent fires on the marked tokens.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .activation_examples import LatentExamples, TokenText
from .balanced_passages import BalancedPassage
from .base import Progress
from .llm_judge import KeptAnswers, Message

SCORES = ("saebench", "detection", "fuzzing")
BALANCED_SCORES = SCORES[1:]
EXPLANATION_PLACEHOLDER = "{explanation}"  # in prompts written without a judge
MAX_DIGITS = 6  # in the number of a passage; Python does not parse numbers with thousands of digits
PER_QUESTION = 5  # passages in one question, for detection and for fuzzing, as in delphi

EXPLAIN_PROMPT = """\
You study one latent of a sparse autoencoder that was trained on a language model. You get numbered passages of text \
on which the latent fires, the strongest first. Every token on which it fires stands between << and >>. Find what the \
marked tokens have in common: a word, a kind of word, a topic, a position in a phrase, or what comes next. Reply with \
one line of at most twenty words that begins with "This latent activates on". Say the simplest thing that fits; give \
examples only in parentheses.

Replies may look like this:
This latent activates on the last digit of a year.
This latent activates on words for bodies of water (lake, river, sea).
This latent activates on the opening bracket of a function call in source code."""
SCORE_PROMPT = """\
A latent of a sparse autoencoder is described to you in a few words. You get {count} numbered passages of text, in no \
order. On some of them the latent fires, at one token or more. Decide from the description which they are. Reply with \
their numbers, with commas between them, or with None when it fires on none of them, and with nothing else.

Replies may look like this:
2, 9, 13
None"""
DETECTION_PROMPT = """\
A latent of a sparse autoencoder is described to you in a few words. You get {count} numbered passages of text. Decide \
for each, from the description, whether the latent fires on it, at one token or more. It can be any number of them, \
also all or none. Reply with one digit for each passage, in order, 1 if it fires and 0 if not, with commas between \
them, and with nothing else.

For example, for three passages:
0, 1, 1"""
FUZZING_PROMPT = """\
A latent of a sparse autoencoder is described to you in a few words. You get {count} numbered passages of text, in \
each of which some tokens stand between << and >>. Decide for each, from the description, whether the latent fires on \
the tokens that are marked. The marks can be right in any number of passages, also in all or none. Reply with one \
digit for each passage, in order, 1 if its marks are right and 0 if not, with commas between them, and with nothing \
else.

For example, for three passages:
0, 1, 1"""


def numbered_lines(passages: Sequence[str]) -> str:
    return "\n".join(f"{number}. {passage}" for number, passage in enumerate(passages, 1))


def explain_prompt(examples: LatentExamples, words: TokenText) -> list[Message]:
    passages = numbered_lines([words.passage(window, examples.threshold) for window in examples.explained])
    return [{"role": "system", "content": EXPLAIN_PROMPT}, {"role": "user", "content": passages}]


def score_prompt(examples: LatentExamples, words: TokenText, explanation: str) -> list[Message]:
    passages = numbered_lines([words.passage(window) for window in examples.scored])
    question = f"The latent activates on {explanation}\n\n{passages}"
    system = SCORE_PROMPT.format(count=len(examples.scored))
    return [{"role": "system", "content": system}, {"role": "user", "content": question}]


def parse_explanation(answer: str) -> str:
    """The text after "activates on", or else the whole answer."""
    line = next((line for line in answer.strip().splitlines() if "activates on" in line.lower()), answer)
    return re.split("activates on", line, maxsplit=1, flags=re.IGNORECASE)[-1].strip()


def parse_predictions(answer: str, count: int) -> list[int] | None:
    """The passages that an answer names, as numbers from 1 to `count`: [] for the answer "None"; None if the answer
    cannot be parsed."""
    text = answer.strip().strip("[].").strip()
    if text.lower() == "none":
        return []
    numbers = [part.strip() for part in text.split(",")]
    if not all(number.isdecimal() and len(number) <= MAX_DIGITS and 1 <= int(number) <= count for number in numbers):
        return None
    return sorted({int(number) for number in numbers})


def detection_accuracy(predicted: Sequence[int], firing: Sequence[int], count: int) -> float:
    """The share of `count` passages for which the prediction is correct."""
    return sum((number in predicted) == (number in firing) for number in range(1, count + 1)) / count


def passages_prompt(score: str, asked: Sequence[BalancedPassage], words: TokenText, explanation: str) -> list[Message]:
    """The prompt that asks the judge about each passage in `asked`. `score` is "detection" or "fuzzing"."""
    fuzzing = score == "fuzzing"
    marked = [words.marked(one.window.ids, one.mark_W if fuzzing else one.mark_W & False) for one in asked]
    system = (FUZZING_PROMPT if fuzzing else DETECTION_PROMPT).format(count=len(asked))
    question = f"The latent activates on {explanation}\n\n{numbered_lines(marked)}"
    return [{"role": "system", "content": system}, {"role": "user", "content": question}]


def parse_verdicts(answer: str, count: int) -> list[bool] | None:
    """The answers about `count` passages, parsed from a first line of 0s and 1s separated by commas; None for anything
    else."""
    line = next(iter(answer.strip().splitlines()), "")
    digits = [part.strip() for part in line.strip("[]. ").split(",")]
    return [digit == "1" for digit in digits] if len(digits) == count and set(digits) <= {"0", "1"} else None


def balanced_scores(fires: Sequence[bool], predicted: Sequence[bool | None]) -> dict[str, float] | None:
    """A latent's rates over the passages with parsed answers; None unless these include both kinds of passages.

    The balanced accuracy is the mean of the true positive and the true negative rate: 0.5 for a judge that always gives
    the same answer and, on average, for one that guesses.
    """
    hits = [one for one, fired in zip(predicted, fires, strict=True) if fired and one is not None]
    alarms = [one for one, fired in zip(predicted, fires, strict=True) if not fired and one is not None]
    if not hits or not alarms:
        return None
    positive, negative = sum(hits) / len(hits), 1 - sum(alarms) / len(alarms)
    return {
        "balanced_accuracy": (positive + negative) / 2,
        "true_positive_rate": positive,
        "true_negative_rate": negative,
    }


class ScoreQuestion(NamedTuple):
    """A question about a latent; for detection and fuzzing, also the passages in it."""

    score: str
    messages: list[Message]
    asked: Sequence[BalancedPassage] = ()


class JudgedLatent(NamedTuple):
    """A latent's passages; `balanced` is None if there are too few."""

    examples: LatentExamples
    balanced: Sequence[BalancedPassage] | None = None

    def questions(self, scores: Sequence[str], words: TokenText, explanation: str) -> list[ScoreQuestion]:
        """The questions about the latent's explanation."""
        found = []
        if "saebench" in scores:
            found.append(ScoreQuestion("saebench", score_prompt(self.examples, words, explanation)))
        passages = self.balanced or ()
        for score in (one for one in BALANCED_SCORES if one in scores):
            for start in range(0, len(passages), PER_QUESTION):
                asked = passages[start : start + PER_QUESTION]
                found.append(ScoreQuestion(score, passages_prompt(score, asked, words, explanation), asked))
        return found


def judge_latents(
    judge: KeptAnswers | None,
    latents: Mapping[int, JudgedLatent],
    words: TokenText,
    scores: Sequence[str],
    progress: Progress,
) -> dict[str, Any]:
    """One entry per latent: numbers with SAEBench's names, one object for detection and one for fuzzing, and the
    prompts and answers.

    First the judge explains all latents. Then the questions about all explanations are asked in one call of `ask_all`.
    """
    explain = {latent: explain_prompt(one.examples, words) for latent, one in latents.items()}
    if judge is None:
        return {
            str(latent): empty_entry(latent, one)
            | {"prompts": prompts_of(explain[latent], one.questions(scores, words, EXPLANATION_PLACEHOLDER))}
            for latent, one in latents.items()
        }
    explained = dict(zip(latents, judge.ask_all(list(explain.values()), progress), strict=True))
    explanations = {latent: parse_explanation(answer) for latent, answer in explained.items()}
    questions = {
        latent: one.questions(scores, words, explanations[latent]) if explanations[latent] else []
        for latent, one in latents.items()
    }
    answers = iter(judge.ask_all([one.messages for asked in questions.values() for one in asked], progress))
    entries = {}
    for latent, one in latents.items():
        own = [next(answers) for _ in questions[latent]]
        entries[str(latent)] = (
            empty_entry(latent, one)
            | {"explanation": explanations[latent] or None}
            | score_answers(one, questions[latent], own)
            | {"prompts": prompts_of(explain[latent], questions[latent]), "answers": [explained[latent], *own]}
        )
    return entries


def empty_entry(latent: int, one: JudgedLatent) -> dict[str, Any]:
    entry: dict[str, Any] = {"latent": latent, "explanation": None, "predictions": None}
    return entry | {"correct seqs": one.examples.firing, "score": None}


def prompts_of(explain: list[Message], questions: Sequence[ScoreQuestion]) -> list[list[Message]]:
    return [explain, *(question.messages for question in questions)]


def score_answers(one: JudgedLatent, questions: Sequence[ScoreQuestion], answers: Sequence[str]) -> dict[str, Any]:
    """The fields of a latent's entry that are computed from the judge's `answers` to the `questions`."""
    entry: dict[str, Any] = {}
    for question, answer in zip(questions, answers, strict=True):
        if question.score == "saebench":
            count = len(one.examples.scored)
            entry["predictions"] = predicted = parse_predictions(answer, count)
            if predicted is not None:
                entry["score"] = detection_accuracy(predicted, one.examples.firing, count)
        else:
            part = entry.setdefault(question.score, {"fires": [], "predicted": []})
            part["fires"] += [passage.fires for passage in question.asked]
            verdicts = parse_verdicts(answer, len(question.asked))
            part["predicted"] += [None] * len(question.asked) if verdicts is None else verdicts
    for score in BALANCED_SCORES:
        if part := entry.get(score):
            part |= balanced_scores(part["fires"], part["predicted"]) or {}
    return entry
