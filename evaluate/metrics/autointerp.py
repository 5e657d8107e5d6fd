"""Autointerp: how well a judge, a language model that is asked in words, tells where a latent fires.

The judge reads passages on which a latent fires and explains it; then it reads 14 other passages, and from the
explanation alone names those on which the latent fires. The score of a latent is the share of the 14 that it gets
right; of them about 10 are random, so a judge that always says none has 10/14 (SAEBench; Paulo et al. 2024).

The prompts are this project's own, so scores compare with SAEBench's as samples do, and not number for number.

Shape suffixes: R rows of text, S positions, P places where a latent fires.
"""

import random
import re
import statistics
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...common.errors import UnavailableError, UsageError
from ..context import EvalContext
from .activation_examples import BUFFER, RANDOM, LatentExamples, TokenText, select_examples
from .base import EvalTarget, Metric, MetricColumn, MetricResult, Outcome, Progress
from .llm_judge import Endpoint, Judge, Message, read_key
from .packing import TOKENS_PER_ENCODE, encode_float32, firing_frequencies, forward_batches, pack_contexts

MAX_FIRINGS = 20_000_000
SEED = 42
PARALLEL_QUESTIONS = 10
EXPLANATION_PLACEHOLDER = "{explanation}"
TEST_QUESTION: list[Message] = [{"role": "user", "content": "Reply with None, and with nothing else."}]
TEST_WAITS = (1,)  # seconds: who is there answers

EXPLAIN_PROMPT = """\
You study one latent of a sparse autoencoder that was trained on a language model. You get numbered passages of text on \
which the latent fires, the strongest first. Every token on which it fires stands between << and >>. Find what the marked \
tokens have in common: a word, a kind of word, a topic, a position in a phrase, or what comes next. Reply with one line \
of at most twenty words that begins with "This latent activates on". Say the simplest thing that fits; give examples only \
in parentheses.

Replies may look like this:
This latent activates on the last digit of a year.
This latent activates on words for bodies of water (lake, river, sea).
This latent activates on the opening bracket of a function call in source code."""
SCORE_PROMPT = """\
A latent of a sparse autoencoder is described to you in a few words. You get {count} numbered passages of text, in no order. \
On some of them the latent fires, at one token or more. Decide from the description which they are. Reply with their \
numbers, with commas between them, or with None when it fires on none of them, and with nothing else.

Replies may look like this:
2, 9, 13
None"""


@dataclass(frozen=True)
class Autointerp(Metric):
    """The judge is `judge_model` at `endpoint`, a base URL of the OpenAI protocol; its key, if it needs one, is what
    the environment variable `key_variable` holds. Without an endpoint no judge is asked: the result holds the prompts.

    `latents` latents that fire on more than `dead_latent_threshold` of at most `tokens` tokens are drawn; the text is
    the held-out one, packed into rows of `context` tokens with EOS between documents. Each latent has a generator of
    its own, so its passages do not depend on the others. Two passes of the model serve all SAEs.

    Memory: activations of 1,024 tokens at a time (64 MiB at 16k); where the drawn latents fire, at most 20 million
    places in one pass (0.8 GB; more passes where they fire more often); 7 KiB a latent.
    """

    endpoint: str = ""
    judge_model: str = ""
    key_variable: str = "OPENAI_API_KEY"
    latents: int = 1000
    tokens: int = 2_000_000
    context: int = 128
    dead_latent_threshold: int = 15

    name = "autointerp"
    type_id = "autointerp"
    title = "autointerp, by detection (always none: 0.714)"
    columns = (
        MetricColumn("score", "autointerp", "autointerp_score", ".3f", "up", RANDOM / 14, 1),
        MetricColumn("sd", "autointerp", "autointerp_std_dev", ".3f"),
    )

    def settings(self, ctx: EvalContext) -> dict[str, Any]:
        return {**super().settings(ctx), **ctx.text_identity}

    def check(self) -> None:
        """Ask the judge one small question, so that a wrong key or endpoint is known before anything is measured."""
        self.check_numbers()
        if (judge := self.judge()) is not None:
            (replace(judge, waits=TEST_WAITS) if isinstance(judge, Endpoint) else judge).ask(TEST_QUESTION)

    def check_numbers(self) -> None:
        if min(self.latents, self.tokens) < 1 or self.context <= 2 * BUFFER:
            raise UsageError(
                f"autointerp.latents and autointerp.tokens have to be 1 or more, autointerp.context more than {2 * BUFFER}."
            )

    def judge(self) -> Judge | None:
        if not self.endpoint:
            return None
        if not self.judge_model:
            raise UsageError(
                f"Which model is the judge at {self.endpoint}? Name it with --set autointerp.judge_model=..."
            )
        return Endpoint(self.endpoint, self.judge_model, read_key(self.key_variable))

    @torch.no_grad()
    def measure(self, ctx: EvalContext, targets: Sequence[EvalTarget], progress: Progress) -> list[Outcome]:
        self.check_numbers()
        judge = self.judge()
        rows_RS = pack_contexts(ctx, self.context)[: max(1, self.tokens // self.context)]
        if not len(rows_RS):
            raise UsageError(f"The held-out text has less than one row of {self.context} tokens. Harvest more of it.")
        useless = UsageError("Autointerp explains latents that were trained; this row is only there to compare with.")
        outcomes: list[Outcome] = [useless] * len(targets)
        places = [i for i, target in enumerate(targets) if not target.reference]
        trained = [targets[i] for i in places]
        if not trained:
            return outcomes
        shares = firing_frequencies(ctx.model, torch.tensor(ctx.special_ids), rows_RS, trained, progress)
        drawn = [self.draw(share_F, rows_RS.numel()) for share_F in shares]
        found: list[dict[int, LatentExamples]] = [{} for _ in trained]
        for number, latent, place_P, value_P in collect_firings(ctx, rows_RS, trained, drawn, shares, progress):
            rng = np.random.default_rng([SEED, latent])
            if chosen := select_examples(place_P, value_P, rows_RS.numpy(), rng):
                found[number][latent] = chosen
        words = TokenText(ctx.tokenizer)
        for number, i in enumerate(places):
            try:
                told = partial(progress, note=f"latents before the judge, SAE {number + 1} of {len(places)}")
                extra = judge_latents(judge, found[number], words, told)
            except UnavailableError as error:  # of a judge that answers no more; what it said of earlier SAEs is kept
                outcomes[i:] = [error if j in places[number:] else useless for j in range(i, len(targets))]
                break
            outcomes[i] = self.result(extra, len(drawn[number]), rows_RS, judge)
        return outcomes

    def draw(self, share_F: np.ndarray, tokens: int) -> list[int]:
        alive = [int(latent) for latent in np.flatnonzero(share_F * tokens > self.dead_latent_threshold)]
        return sorted(random.Random(SEED).sample(alive, min(self.latents, len(alive))))

    def result(self, extra: dict[str, Any], drawn: int, rows_RS: Tensor, judge: Judge | None) -> MetricResult:
        n = {"latents": drawn, "with_passages": len(extra), "tokens": rows_RS.numel()}
        flags = []
        if drawn < self.latents:
            flags.append(
                f"{drawn} latents fire on more than {self.dead_latent_threshold} tokens, fewer than {self.latents}."
            )
        if rows_RS.numel() < self.tokens // self.context * self.context:
            flags.append(f"The held-out text has {rows_RS.numel():,} tokens, fewer than {self.tokens:,}.")
        if len(extra) < drawn:
            flags.append(f"{drawn - len(extra)} latents have too few separate passages and are left out.")
        if judge is None:
            flags.append(
                f"No judge was asked: the prompts for {len(extra)} latents are in evaluations/{self.name}.json. Name one with "
                "--set autointerp.endpoint=URL --set autointerp.judge_model=NAME."
            )
            return MetricResult.of({}, n=n, flags=flags, extra=extra)
        scores = [entry["score"] for entry in extra.values() if entry["score"] is not None]
        if len(scores) < len(extra):
            flags.append(f"{len(extra) - len(scores)} latents are left out: the judge's answers could not be read.")
        if not scores:
            return MetricResult.of({"autointerp": dict.fromkeys(NAMES, float("nan"))}, n=n, flags=flags, extra=extra)
        mean, deviation = statistics.fmean(scores), statistics.stdev(scores) if len(scores) > 1 else 0.0
        spread = 1.959964 * deviation / len(scores) ** 0.5
        return MetricResult.of(
            {"autointerp": dict(zip(NAMES, (mean, deviation), strict=True))},
            intervals={"autointerp": {NAMES[0]: [mean - spread, mean + spread]}},
            n={**n, "scored": len(scores)},
            flags=flags,
            extra=extra,
        )


NAMES = ("autointerp_score", "autointerp_std_dev")


def collect_firings(
    ctx: EvalContext, rows_RS: Tensor, targets: Sequence[EvalTarget], drawn: Sequence[Sequence[int]],
    shares: Sequence[np.ndarray], progress: Progress,
) -> Iterator[tuple[int, int, np.ndarray, np.ndarray]]:  # fmt: skip
    """(number of the subject, latent, flat places, activations there) of every drawn latent, in few passes."""
    parts: list[list[list[int]]] = []  # of each pass, the latents of each subject
    total = MAX_FIRINGS + 1.0
    for number, latents in enumerate(drawn):
        for latent in latents:
            count = float(shares[number][latent]) * rows_RS.numel()
            if total + count > MAX_FIRINGS:
                parts.append([[] for _ in drawn])
                total = 0.0
            parts[-1][number].append(latent)
            total += count
    for each, part in enumerate(parts):
        told = partial(progress, note=f"rows for passages, pass {each + 1} of {len(parts)}")
        for number, found in enumerate(collect_in_one_pass(ctx, rows_RS, targets, part, told)):
            for latent, (place_P, value_P) in zip(part[number], found, strict=True):
                yield number, latent, place_P, value_P


def collect_in_one_pass(
    ctx: EvalContext,
    rows_RS: Tensor,
    targets: Sequence[EvalTarget],
    latents: Sequence[list[int]],
    progress: Progress,
) -> list[list[tuple[np.ndarray, np.ndarray]]]:
    device = ctx.model.device
    layers = sorted({target.layer for target, own in zip(targets, latents, strict=True) if own})
    found: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in targets]
    skip, done = torch.tensor(ctx.special_ids, device=device), 0
    for ids_NS in forward_batches(rows_RS.to(device)):
        kept_NS = ~torch.isin(ids_NS, skip)
        place_T = kept_NS.flatten().nonzero().squeeze(1) + done * ids_NS.shape[1]
        residual = ctx.model.capture(ids_NS, layers)
        for target, own, into in zip(targets, latents, found, strict=True):
            if own:
                x_TD = residual[target.layer][kept_NS]
                for x_BD, place_B in zip(x_TD.split(TOKENS_PER_ENCODE), place_T.split(TOKENS_PER_ENCODE), strict=True):
                    f_BK = encode_float32(target.sae, x_BD)[:, own]
                    token, k = (f_BK > 0).nonzero(as_tuple=True)
                    into.append((place_B[token].cpu(), k.to(torch.int32).cpu(), f_BK[token, k].cpu()))
        done += len(ids_NS)
        progress(done, len(rows_RS))
    return [group_by_latent(parts, len(own)) for parts, own in zip(found, latents, strict=True)]


def group_by_latent(parts: list[tuple[Tensor, Tensor, Tensor]], latents: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(place, latent, value) triples in the order of places -> places and values of each latent."""
    if not latents:
        return []
    place, k, value = (torch.cat(each) for each in zip(*parts, strict=True))
    order = k.argsort(stable=True)
    ends = torch.bincount(k, minlength=latents).cumsum(0)[:-1].numpy()
    return list(zip(np.split(place[order].numpy(), ends), np.split(value[order].numpy(), ends), strict=True))


def numbered_lines(passages: Sequence[str]) -> str:
    return "\n".join(f"{number}. {passage}" for number, passage in enumerate(passages, 1))


def explain_prompt(found: LatentExamples, words: TokenText) -> list[Message]:
    passages = numbered_lines([words.passage(window, found.threshold) for window in found.shown])
    return [{"role": "system", "content": EXPLAIN_PROMPT}, {"role": "user", "content": passages}]


def score_prompt(found: LatentExamples, words: TokenText, explanation: str) -> list[Message]:
    passages = numbered_lines([words.passage(window) for window in found.scored])
    asked = f"The latent activates on {explanation}\n\n{passages}"
    system = SCORE_PROMPT.format(count=len(found.scored))
    return [{"role": "system", "content": system}, {"role": "user", "content": asked}]


def parse_explanation(answer: str) -> str:
    """What comes after "activates on", or all of it; empty where there is nothing."""
    line = next((line for line in answer.strip().splitlines() if "activates on" in line.lower()), answer)
    return re.split("activates on", line, maxsplit=1, flags=re.IGNORECASE)[-1].strip()


def parse_predictions(answer: str, count: int) -> list[int] | None:
    """The numbers of passages, from 1 to `count`; [] for None; None for what is neither."""
    text = answer.strip().strip("[].").strip()
    if text.lower() == "none":
        return []
    numbers = [part.strip() for part in text.split(",")]
    if not all(number.isdecimal() and 1 <= int(number) <= count for number in numbers):
        return None
    return sorted({int(number) for number in numbers})


def detection_accuracy(predicted: Sequence[int], firing: Sequence[int], count: int) -> float:
    """The share of the passages of which it was said rightly whether the latent fires."""
    return sum((number in predicted) == (number in firing) for number in range(1, count + 1)) / count


def judge_latents(
    judge: Judge | None, found: dict[int, LatentExamples], words: TokenText, progress: Progress
) -> dict[str, Any]:
    """One entry per latent, with SAEBench's names: what was asked, what the judge answered, what is right."""

    def one(latent: int) -> dict[str, Any]:
        own, count = found[latent], len(found[latent].scored)
        asked = explain_prompt(own, words)
        entry = {"latent": latent, "explanation": None, "predictions": None, "correct seqs": own.firing, "score": None}
        if judge is None:
            return {**entry, "prompts": [asked, score_prompt(own, words, EXPLANATION_PLACEHOLDER)]}
        said = [judge.ask(asked)]
        prompts = [asked]
        entry["explanation"] = parse_explanation(said[0]) or None
        if entry["explanation"]:
            prompts.append(score_prompt(own, words, entry["explanation"]))
            said.append(judge.ask(prompts[1]))
            entry["predictions"] = parse_predictions(said[1], count)
        if entry["predictions"] is not None:
            entry["score"] = detection_accuracy(entry["predictions"], own.firing, count)
        return {**entry, "prompts": prompts, "answers": said}

    entries: dict[str, Any] = {}
    with ThreadPoolExecutor(PARALLEL_QUESTIONS if judge else 1) as pool:
        try:
            for entry in pool.map(one, found):
                entries[str(entry["latent"])] = entry
                progress(len(entries), len(found))
        except BaseException:  # Ctrl-C too: no further question
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return entries
