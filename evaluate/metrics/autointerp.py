"""Autointerp: given a short explanation of a latent, how well a judge (a language model) predicts where it fires.

Higher is better. The judge reads passages on which a latent fires and explains the latent. Then the judge reads other
passages and says, from the explanation alone, on which of them the latent fires. `scores` lists the ways to question
the judge and to score its answers:

saebench: the judge reads 14 passages and names those on which the latent fires. The score of a latent is the share of
    the 14 passages that the judge gets right; 10 of the passages are random. A judge that always answers None scores
    about 10/14.
detection, fuzzing: the balanced accuracies of Paulo et al. 2024, in explanation_scores.py. Guessing gives a score
    of 0.5.

Source: SAEBench 0.6.0, `evals/autointerp`; Paulo et al. 2024 (arXiv 2410.13928). The prompts are this project's own, so
scores agree with SAEBench's statistically but not exactly. Latents do not count as firing at outlier rows
(`EvalTarget.norm_limit`). SAEBench also shows passages at such rows; measuring both variants would double the cost.
"""

import contextlib
import math
import random
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...common.device import resolve_dtype
from ...common.errors import SaeError, UnavailableError, UsageError, did_you_mean
from ...common.files import digest_of
from ..context import EvalContext
from ..statistics import bootstrap_interval
from .activation_examples import BUFFER, RANDOM, TokenText, select_examples
from .balanced_passages import select_balanced
from .base import EvalTarget, Metric, MetricColumn, MetricResult, Outcome, Progress
from .explanation_scores import BALANCED_SCORES, SCORES, JudgedLatent, judge_latents
from .http_judge import Endpoint
from .judge_cost import describe_cost
from .latent_firings import collect_firings
from .llm_judge import MAX_ANSWER_TOKENS, Judge, KeptAnswers, Message, read_key
from .local_judge import LocalJudge
from .packing import firing_frequencies, pack_contexts

SEED = 42
LOCAL = "local"  # the endpoint of a judge that runs on this machine
TEST_QUESTION: list[Message] = [{"role": "user", "content": "Reply with None, and with nothing else."}]
TEST_WAITS = (1,)  # seconds before retries of the test question: an endpoint that exists answers quickly
SCORE_NAMES = ("autointerp_score", "autointerp_std_dev")
RATES = ("balanced_accuracy", "true_positive_rate", "true_negative_rate")
CHANCE = 0.5  # balanced accuracy of a judge that guesses or always gives the same answer


@dataclass(frozen=True)
class Autointerp(Metric):
    """The judge is `judge_model` at `endpoint`, the base URL of an OpenAI-compatible API. If it needs a key, the key is
    read from the environment variable named by `key_variable`. With the endpoint "local", `judge_model` is the Hub id
    or the folder of a chat model that transformers can load, and this model runs on the device of the evaluation.
    Without an endpoint, no judge is asked, and the result contains the prompts.

    `latents` latents are drawn from those that fire on more than `dead_latent_threshold` tokens of the text. The text
    is at most `tokens` tokens of held-out text, packed into rows of `context` tokens with EOS between documents. Each
    latent has its own random generator, so its passages do not depend on other latents. Two passes of the model serve
    all SAEs.

    `price_in` and `price_out` are the judge's prices per million tokens, which the plan's cost estimate uses.

    Memory: activations of 1,024 tokens at a time (64 MiB at 16k latents); at most 20 million activations of the drawn
    latents in one pass (0.8 GB; with more activations there are more passes); 14 KiB per latent. A local judge needs
    additional memory (local_judge.py).
    """

    endpoint: str = ""
    judge_model: str = ""
    key_variable: str = "OPENAI_API_KEY"
    latents: int = 1000
    tokens: int = 2_000_000
    context: int = 128
    dead_latent_threshold: int = 15
    scores: tuple[str, ...] = ("saebench",)
    price_in: float = 0.0
    price_out: float = 0.0

    saebench_rows = False
    name = "autointerp"
    type_id = "autointerp"
    title = "autointerp (always none: score 0.714, detection and fuzzing 0.5)"
    columns = (
        MetricColumn("score", "autointerp", "autointerp_score", ".3f", "up", RANDOM / 14, 1),
        MetricColumn("sd", "autointerp", "autointerp_std_dev", ".3f"),
        MetricColumn("detection", "detection", "detection_balanced_accuracy", ".3f", "up", CHANCE, 1),
        MetricColumn("fuzzing", "fuzzing", "fuzzing_balanced_accuracy", ".3f", "up", CHANCE, 1),
    )

    @property
    def asked(self) -> tuple[str, ...]:
        """The requested scores, in a fixed order."""
        return tuple(score for score in SCORES if score in self.scores)

    def settings(self, ctx: EvalContext) -> dict[str, Any]:
        found = {**super().settings(ctx), **ctx.text_identity, **self.local_identity(ctx), "scores": self.asked}
        left_out = ["price_in", "price_out"]
        if self.asked == Autointerp.scores:
            left_out.append("scores")  # as in results of earlier versions, which had no other scores
        return {name: value for name, value in found.items() if name not in left_out}

    def local_identity(self, ctx: EvalContext) -> dict[str, Any]:
        """The settings that affect the answers of a local judge, other than the judge's name."""
        judge = self.judge(ctx.device) if self.endpoint == LOCAL else None
        return judge.identity if isinstance(judge, LocalJudge) else {}

    def check(self) -> None:
        """Check the options, and ask the judge a test question so that a wrong key or endpoint fails at once.

        For a local judge, only the tokenizer is loaded.
        """
        self.check_options()
        judge = self.judge("cpu")
        if isinstance(judge, Endpoint):
            if not replace(judge, waits=TEST_WAITS).ask(TEST_QUESTION).strip():
                raise UnavailableError(
                    f"{self.judge_model} at {self.endpoint} gave an empty answer to the test question. An answer is "
                    f"limited to {MAX_ANSWER_TOKENS} tokens, and a model that thinks before it answers uses them up. "
                    "Choose a model that does not think, or switch thinking off on the server."
                )

    def check_options(self) -> None:
        if min(self.latents, self.tokens) < 1 or self.context <= 2 * BUFFER:
            raise UsageError(
                "autointerp.latents and autointerp.tokens must be 1 or more, and autointerp.context must be "
                f"more than {2 * BUFFER}."
            )
        for score in self.scores:
            if score not in SCORES:
                raise UsageError(
                    f"autointerp.scores={','.join(self.scores)}: there is no score {score!r}"
                    f"{did_you_mean(score, SCORES)}"
                )
        if not re.fullmatch("([A-Za-z_][A-Za-z0-9_]*)?", self.key_variable):  # not shown: it may be the key
            raise UsageError(
                "autointerp.key_variable is not the name of an environment variable. Put the key into a variable such "
                "as OPENAI_API_KEY and give its name, because the value of this option is stored with every result."
            )
        if not (0 <= self.price_in < math.inf and 0 <= self.price_out < math.inf):
            raise UsageError(
                "autointerp.price_in and autointerp.price_out are prices per million tokens and must be 0 or more."
            )

    def judge(self, device: str) -> Judge | None:
        """The judge. A local judge runs on `device`."""
        if not self.endpoint:
            return None
        if not self.judge_model:
            raise UsageError(
                f"autointerp.endpoint is {self.endpoint}, but no judge is named. Name its model with --set "
                "autointerp.judge_model=..."
            )
        if self.endpoint == LOCAL:
            return LocalJudge(self.judge_model, device, resolve_dtype("auto", device))
        return Endpoint(self.endpoint, self.judge_model, read_key(self.key_variable))

    def describe_cost(self, ctx: EvalContext, saes: int) -> list[str]:
        return [
            describe_cost(
                ctx.tokenizer,
                saes * self.latents,
                self.asked,
                judge=f"{self.judge_model} at {self.endpoint}" if self.endpoint else "",
                prices=(self.price_in, self.price_out),
                kept=self.kept_answers(ctx),
            )
        ]

    def kept_answers(self, ctx: EvalContext) -> int:
        """How many answers of this judge are already stored; 0 if they cannot be read (`measure` then reports why)."""
        with contextlib.suppress(SaeError):
            return len(KeptAnswers.read(self.answers_file(ctx))) if self.endpoint else 0
        return 0

    @torch.no_grad()
    def measure(self, ctx: EvalContext, targets: Sequence[EvalTarget], progress: Progress) -> list[Outcome]:
        self.check_options()
        judge = self.judge(ctx.device)
        kept = None if judge is None else KeptAnswers(judge, self.answers_file(ctx))
        rows = pack_contexts(ctx, self.context).first(max(1, self.tokens // self.context))
        rows_RS = rows.ids
        if not len(rows_RS):
            raise UsageError(f"The held-out text has less than one row of {self.context} tokens. Harvest more text.")
        not_trained = UsageError("Autointerp explains trained latents, which an untrained reference does not have.")
        outcomes: list[Outcome] = [not_trained] * len(targets)
        indices = [i for i, target in enumerate(targets) if is_explained(target)]
        trained = [targets[i] for i in indices]
        if not trained:
            return outcomes
        frequencies = firing_frequencies(ctx.model, rows, trained, progress)
        shares = [frequency.share_F for frequency in frequencies]
        drawn = [self.draw_latents(share_F, rows_RS.numel()) for share_F in shares]
        latents: list[dict[int, JudgedLatent]] = [{} for _ in trained]
        for number, latent, flat_P, value_P in collect_firings(ctx, rows, trained, drawn, shares, progress):
            if selected := self.select_passages(latent, flat_P, value_P, rows_RS.numpy()):
                latents[number][latent] = selected
        words = TokenText(ctx.tokenizer)
        for number, i in enumerate(indices):
            note = f"questions answered, SAE {number + 1} of {len(indices)}"
            try:
                entries = judge_latents(kept, latents[number], words, self.asked, partial(progress, note=note))
            except UnavailableError as stopped:  # the results of earlier SAEs are complete
                error = UnavailableError(
                    f"{stopped} The answers received so far are stored. Run the same command again to ask only "
                    "the remaining questions."
                )
                outcomes[i:] = [error if j in indices[number:] else not_trained for j in range(i, len(targets))]
                break
            lacking = sum(one.balanced is None for one in latents[number].values())
            result = self.result(entries, len(drawn[number]), rows_RS, judge, lacking)
            outcomes[i] = result.without_outliers(frequencies[number].outliers, frequencies[number].tokens)
        return outcomes

    def answers_file(self, ctx: EvalContext) -> Path:
        """The file that stores the answers of this judge to all questions."""
        identity = [self.endpoint, self.judge_model, *self.local_identity(ctx).values()]
        return ctx.artifacts.folder / f"judge-{digest_of(identity)[:16]}.jsonl"

    def draw_latents(self, share_F: np.ndarray, tokens: int) -> list[int]:
        """A sample of the alive latents, given the share of tokens on which each latent fires."""
        alive = [int(latent) for latent in np.flatnonzero(share_F * tokens > self.dead_latent_threshold)]
        return sorted(random.Random(SEED).sample(alive, min(self.latents, len(alive))))

    def select_passages(
        self, latent: int, flat_P: np.ndarray, value_P: np.ndarray, ids_RS: np.ndarray
    ) -> JudgedLatent | None:
        """The passages of a latent with activations `value_P` at the indices `flat_P` of `ids_RS`; None if there are
        too few."""
        examples = select_examples(flat_P, value_P, ids_RS, np.random.default_rng([SEED, latent]))
        if examples is None or not set(self.asked) & set(BALANCED_SCORES):
            return examples and JudgedLatent(examples)
        rng = np.random.default_rng([SEED, latent, 1])  # its own draws, which do not affect SAEBench's passages
        return JudgedLatent(examples, select_balanced(flat_P, value_P, ids_RS, examples, rng))

    def result(
        self, entries: dict[str, Any], drawn: int, rows_RS: Tensor, judge: Judge | None, lacking: int = 0
    ) -> MetricResult:
        """Average the scores in the entries of the judged latents. `drawn` is the number of drawn latents, and
        `lacking` is how many of them have too few passages for detection and fuzzing.
        """
        n = {"latents": drawn, "with_passages": len(entries), "tokens": rows_RS.numel()}
        metrics: dict[str, dict[str, float | None]] = {}
        intervals: dict[str, dict[str, list[float | None]]] = {}
        flags = list(self.flags(entries, drawn, rows_RS.numel(), judge))
        if judge is None:
            return MetricResult.of({}, n=n, flags=flags, extra=entries)
        if "saebench" in self.asked:
            scores = [entry["score"] for entry in entries.values() if entry["score"] is not None]
            mean, deviation, interval = mean_and_deviation(scores)
            metrics["autointerp"] = dict(zip(SCORE_NAMES, (mean, deviation), strict=True))
            if interval:
                intervals["autointerp"] = {SCORE_NAMES[0]: interval}
                n["scored"] = len(scores)
            if len(scores) < len(entries):
                flags.append(
                    f"{len(entries) - len(scores)} latents are left out, because the judge's answers about "
                    "them could not be parsed."
                )
        for score in self.asked:
            if score in BALANCED_SCORES:
                parts = [entry[score] for entry in entries.values() if score in entry]
                scored = [part for part in parts if RATES[0] in part]
                n[f"{score}_latents"] = len(scored)
                n[f"{score}_passages"] = sum(len(part["fires"]) - part["predicted"].count(None) for part in scored)
                means = {rate: mean_and_interval([part[rate] for part in scored]) for rate in RATES}
                metrics[score] = {f"{score}_{rate}": mean for rate, (mean, _) in means.items()}
                intervals[score] = {f"{score}_{rate}": list(interval) for rate, (_, interval) in means.items()}
                flags += balanced_flags(score, parts, means[RATES[0]][1], lacking)
        return MetricResult.of(metrics, intervals=intervals, n=n, flags=flags, extra=entries)

    def flags(self, entries: dict[str, Any], drawn: int, tokens: int, judge: Judge | None) -> Iterator[str]:
        if drawn < self.latents:
            yield (
                f"Only {drawn} latents fire on more than {self.dead_latent_threshold} tokens, but "
                f"autointerp.latents asks for {self.latents}."
            )
        if tokens < self.tokens // self.context * self.context:
            yield f"The held-out text has only {tokens:,} tokens, but autointerp.tokens asks for {self.tokens:,}."
        if len(entries) < drawn:
            yield f"{drawn - len(entries)} latents have too few separate passages and are left out."
        if judge is None:
            yield (
                f"No judge was asked. The prompts for {len(entries)} latents are in evaluations/{self.name}.json. Name "
                "a judge with --set autointerp.endpoint=URL --set autointerp.judge_model=NAME; with the endpoint "
                f"{LOCAL}, it is a chat model that runs on this machine."
            )


def is_explained(target: EvalTarget) -> bool:
    """Whether the target's latents are explained: true for SAEs and controls, which are loaded from run folders."""
    return not target.reference or bool(getattr(target.sae, "origin", None))


def mean_and_deviation(scores: Sequence[float]) -> tuple[float, float, list[float | None]]:
    """SAEBench's mean and standard deviation (n - 1) over latents, and a 95 % interval; NaN without scores."""
    if not scores:
        return math.nan, math.nan, []
    mean, deviation = statistics.fmean(scores), statistics.stdev(scores) if len(scores) > 1 else 0.0
    half = 1.959964 * deviation / len(scores) ** 0.5
    return mean, deviation, [mean - half, mean + half]


def mean_and_interval(values: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """The mean over latents, and its 95 % interval from a percentile bootstrap over the latents. The interval is NaN
    for fewer than two latents."""
    if len(values) < 2:
        return (values or [math.nan])[0], (math.nan, math.nan)
    if len(set(values)) == 1:  # every resample has the same mean
        return values[0], (values[0], values[0])
    low, high = bootstrap_interval([values], SEED)
    return statistics.fmean(values), (low, high)


def balanced_flags(
    score: str, parts: Sequence[dict[str, Any]], interval: tuple[float, float], lacking: int
) -> Iterator[str]:
    """Sentences about a score of detection or fuzzing."""
    if lacking:
        yield f"{lacking} latents have too few passages for {score} and are left out of it."
    if unread := sum(part["predicted"].count(None) for part in parts):
        asked = sum(len(part["predicted"]) for part in parts)
        yield (
            f"{score}: the judge's answers about {unread:,} of {asked:,} passages could not be parsed and do not count."
        )
    if interval[0] <= CHANCE <= interval[1]:
        yield (
            f"{score}: the 95 % interval, {interval[0]:.3f} to {interval[1]:.3f}, contains {CHANCE}, the score of a "
            "judge that guesses. The judge is too weak, its explanations say nothing, or the judge was "
            "asked about too few latents."
        )
