"""The estimated cost of autointerp's questions, before the questions are known."""

from collections.abc import Sequence
from typing import Any

from .activation_examples import BUFFER, RANDOM, TOP, TOP_SCORED, WEIGHTED, WEIGHTED_SCORED
from .balanced_passages import MOST
from .explanation_scores import DETECTION_PROMPT, EXPLAIN_PROMPT, FUZZING_PROMPT, PER_QUESTION, SCORE_PROMPT
from .llm_judge import MAX_ANSWER_TOKENS

PASSAGE = 2 * BUFFER + 1 + 4  # tokens of a passage with its number and line break
MARKS = 4  # tokens of the marks in a passage
EXPLANATION = 25  # tokens of an explanation and the words before it
TEMPLATE = 12  # tokens that a chat template adds to a question

SCORED = TOP_SCORED + WEIGHTED_SCORED + RANDOM
EXPLAINED = TOP + WEIGHTED - TOP_SCORED - WEIGHTED_SCORED


def tokens_of_latent(tokenizer: Any, scores: Sequence[str]) -> list[int]:
    """The approximate number of tokens of each question about one latent."""

    def question(prompt: str, passages: int, of_each: int, more: int = 0) -> int:
        system = len(tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"])
        return TEMPLATE + system + passages * of_each + more

    found = [question(EXPLAIN_PROMPT, EXPLAINED, PASSAGE + MARKS)]
    if "saebench" in scores:
        found.append(question(SCORE_PROMPT, SCORED, PASSAGE, EXPLANATION))
    for score, prompt, of_each in (
        ("detection", DETECTION_PROMPT, PASSAGE), ("fuzzing", FUZZING_PROMPT, PASSAGE + MARKS),
    ):  # fmt: skip
        if score in scores:
            found += [question(prompt, PER_QUESTION, of_each, EXPLANATION)] * (2 * MOST // PER_QUESTION)
    return found


def describe_cost(
    tokenizer: Any, latents: int, scores: Sequence[str], *, judge: str, prices: tuple[float, float], kept: int
) -> str:
    """A line of the plan: upper bounds on the questions, input tokens and output tokens for explaining these latents.

    `judge` is the judge's name, or "" if there is no judge. `prices` are per million input and output tokens, 0 if
    unknown. `kept` is the number of answers from earlier runs. Input tokens are counted with `tokenizer`, which belongs
    to the evaluated model.
    """
    of_latent = tokens_of_latent(tokenizer, scores)
    questions, tokens_in = latents * len(of_latent), latents * sum(of_latent)
    tokens_out = questions * MAX_ANSWER_TOKENS
    who = f"{judge} gets" if judge else "none is named, so only the prompts are written; a judge would get"
    line = (
        f"judge    {who} at most {questions:,} questions ({len(of_latent)} for each of {latents:,} latents), about "
        f"{millions(tokens_in)} input tokens, and returns at most {millions(tokens_out)} output tokens"
    )
    if any(prices):
        cost = (tokens_in * prices[0] + tokens_out * prices[1]) / 1e6
        shown = f"{cost:,.2f}" if cost >= 1 else f"{cost:.2g}"
        line += f": at most about {shown} at {prices[0]:g} and {prices[1]:g} per million tokens"
    return line + (f"; {kept:,} of its answers are already stored and not requested again" if kept else "")


def millions(tokens: int) -> str:
    return f"{tokens / 1e6:.1f}M" if tokens >= 1e6 else f"{tokens / 1e3:.0f}k"
