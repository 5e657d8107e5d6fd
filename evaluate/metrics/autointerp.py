"""Autointerp: how well a judge, a language model, predicts where a latent fires from a short explanation of it.

Higher is better; a judge that always answers None scores about 10/14.

The judge reads passages on which a latent fires and explains it. Then it reads 14 other passages and, from the
explanation alone, names those on which the latent fires. The score of a latent is the share of the 14 passages that the
judge gets right; 10 of them are random.

Source: SAEBench 0.6.0, `evals/autointerp` (detection, Paulo et al. 2024). The prompts are this project's own, so scores
agree with SAEBench's statistically, not digit for digit. Latents do not count as firing at outlier rows
(`EvalTarget.norm_limit`), of which SAEBench shows the judge passages too: asking it twice would cost twice.

Shape suffixes: R rows of text, S positions, P tokens on which a latent fires, T counted tokens, B tokens of one encode,
K latents.
"""

import contextlib
import random
import re
import statistics
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...cache.outliers import outlier_mask
from ...common.errors import UnavailableError, UsageError
from ...common.files import digest_of
from ..context import EvalContext
from .activation_examples import BUFFER, RANDOM, LatentExamples, TokenText, select_examples
from .base import EvalTarget, Metric, MetricColumn, MetricResult, Outcome, Progress
from .llm_judge import Endpoint, Judge, KeptAnswers, Message, read_key
from .packing import TOKENS_PER_ENCODE, PackedRows, encode_float32, firing_frequencies, forward_batches, pack_contexts

MAX_FIRINGS = 20_000_000  # activations held in memory in one pass of the model
SEED = 42
PARALLEL_QUESTIONS = 10
EXPLANATION_PLACEHOLDER = "{explanation}"  # in prompts written without a judge
TEST_QUESTION: list[Message] = [{"role": "user", "content": "Reply with None, and with nothing else."}]
MAX_DIGITS = 6  # of the number of a passage; Python refuses to read numbers of thousands of digits
TEST_WAITS = (1,)  # seconds before retries of the test question: an endpoint that exists answers soon
SCORE_NAMES = ("autointerp_score", "autointerp_std_dev")

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


@dataclass(frozen=True)
class Autointerp(Metric):
    """The judge is `judge_model` at `endpoint`, the base URL of an OpenAI-compatible API. Its key, if it needs one, is
    read from the environment variable named by `key_variable`. Without an endpoint no judge is asked, and the result
    holds the prompts.

    `latents` latents are drawn among those that fire on more than `dead_latent_threshold` of at most `tokens` tokens of
    the held-out text, packed into rows of `context` tokens with EOS between documents. Each latent has its own random
    generator, so its passages do not depend on the others. Two passes of the model serve all SAEs.

    Memory: activations of 1,024 tokens at a time (64 MiB at 16k latents); where the drawn latents fire, at most 20
    million activations in one pass (0.8 GB; more passes if they fire more often); 7 KiB a latent.
    """

    endpoint: str = ""
    judge_model: str = ""
    key_variable: str = "OPENAI_API_KEY"
    latents: int = 1000
    tokens: int = 2_000_000
    context: int = 128
    dead_latent_threshold: int = 15

    saebench_rows = False
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
        """Check the options and ask the judge a test question, so that a wrong key or endpoint fails at once."""
        self.check_options()
        if (judge := self.judge()) is not None:
            (replace(judge, waits=TEST_WAITS) if isinstance(judge, Endpoint) else judge).ask(TEST_QUESTION)

    def check_options(self) -> None:
        if min(self.latents, self.tokens) < 1 or self.context <= 2 * BUFFER:
            raise UsageError(
                "autointerp.latents and autointerp.tokens must be 1 or more, "
                f"autointerp.context more than {2 * BUFFER}."
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
        self.check_options()
        judge = self.judge()
        kept = None if judge is None else KeptAnswers(judge, self.answers_file(ctx))
        rows = pack_contexts(ctx, self.context).first(max(1, self.tokens // self.context))
        rows_RS = rows.ids
        if not len(rows_RS):
            raise UsageError(f"The held-out text has less than one row of {self.context} tokens. Harvest more of it.")
        not_trained = UsageError("Autointerp explains trained latents; reference rows have none.")
        outcomes: list[Outcome] = [not_trained] * len(targets)
        indices = [i for i, target in enumerate(targets) if not target.reference]
        trained = [targets[i] for i in indices]
        if not trained:
            return outcomes
        frequencies = firing_frequencies(ctx.model, rows, trained, progress)
        shares = [frequency.share_F for frequency in frequencies]
        drawn = [self.draw_latents(share_F, rows_RS.numel()) for share_F in shares]
        examples: list[dict[int, LatentExamples]] = [{} for _ in trained]
        for number, latent, flat_P, value_P in collect_firings(ctx, rows, trained, drawn, shares, progress):
            rng = np.random.default_rng([SEED, latent])
            if selected := select_examples(flat_P, value_P, rows_RS.numpy(), rng):
                examples[number][latent] = selected
        words = TokenText(ctx.tokenizer)
        for number, i in enumerate(indices):
            try:
                note = f"latents before the judge, SAE {number + 1} of {len(indices)}"
                with kept.kept_if_interrupted() if kept else contextlib.nullcontext():
                    entries = judge_latents(kept, examples[number], words, partial(progress, note=note))
            except UnavailableError as stopped:  # the results of earlier SAEs are whole
                error = UnavailableError(f"{stopped} The answers so far are kept: the same command asks only the rest.")
                outcomes[i:] = [error if j in indices[number:] else not_trained for j in range(i, len(targets))]
                break
            result = self.result(entries, len(drawn[number]), rows_RS, judge)
            outcomes[i] = result.without_outliers(frequencies[number].outliers, frequencies[number].tokens)
        else:
            self.answers_file(ctx).unlink(missing_ok=True)
        return outcomes

    def answers_file(self, ctx: EvalContext) -> Path:
        """Where the answers of a judge that stopped answering are kept until all its latents are judged."""
        return ctx.artifacts.folder / f"judge-{digest_of([self.endpoint, self.judge_model])[:16]}.json"

    def draw_latents(self, share_F: np.ndarray, tokens: int) -> list[int]:
        """A sample of the latents that are alive, from the share of tokens on which each latent fires."""
        alive = [int(latent) for latent in np.flatnonzero(share_F * tokens > self.dead_latent_threshold)]
        return sorted(random.Random(SEED).sample(alive, min(self.latents, len(alive))))

    def result(self, entries: dict[str, Any], drawn: int, rows_RS: Tensor, judge: Judge | None) -> MetricResult:
        """Average the scores in the entries of the judged latents, `drawn` of which were drawn."""
        n = {"latents": drawn, "with_passages": len(entries), "tokens": rows_RS.numel()}
        scores = [entry["score"] for entry in entries.values() if entry["score"] is not None]
        flags = list(self.flags(entries, drawn, rows_RS.numel(), judge, len(scores)))
        if judge is None:
            return MetricResult.of({}, n=n, flags=flags, extra=entries)
        if not scores:
            undefined = dict.fromkeys(SCORE_NAMES, float("nan"))
            return MetricResult.of({"autointerp": undefined}, n=n, flags=flags, extra=entries)
        mean, deviation = statistics.fmean(scores), statistics.stdev(scores) if len(scores) > 1 else 0.0
        half = 1.959964 * deviation / len(scores) ** 0.5
        return MetricResult.of(
            {"autointerp": dict(zip(SCORE_NAMES, (mean, deviation), strict=True))},
            intervals={"autointerp": {SCORE_NAMES[0]: [mean - half, mean + half]}},
            n={**n, "scored": len(scores)},
            flags=flags,
            extra=entries,
        )

    def flags(
        self, entries: dict[str, Any], drawn: int, tokens: int, judge: Judge | None, scored: int
    ) -> Iterator[str]:
        if drawn < self.latents:
            yield f"{drawn} latents fire on more than {self.dead_latent_threshold} tokens, fewer than {self.latents}."
        if tokens < self.tokens // self.context * self.context:
            yield f"The held-out text has {tokens:,} tokens, fewer than {self.tokens:,}."
        if len(entries) < drawn:
            yield f"{drawn - len(entries)} latents have too few separate passages and are left out."
        if judge is None:
            yield (
                f"No judge was asked: the prompts for {len(entries)} latents are in evaluations/{self.name}.json. Name "
                "one with --set autointerp.endpoint=URL --set autointerp.judge_model=NAME."
            )
        elif scored < len(entries):
            yield f"{len(entries) - scored} latents are left out: the judge's answers could not be parsed."


def collect_firings(
    ctx: EvalContext,
    rows: PackedRows,
    targets: Sequence[EvalTarget],
    drawn: Sequence[Sequence[int]],
    shares: Sequence[np.ndarray],
    progress: Progress,
) -> Iterator[tuple[int, int, np.ndarray, np.ndarray]]:
    """Yield (index of the target, latent, flat positions in rows_RS, activations there) of every drawn latent.

    Takes as few passes of the model as MAX_FIRINGS allows, estimated from the `shares` of tokens on which latents fire.
    """
    passes: list[list[list[int]]] = []  # for each pass, the latents of each target
    total = MAX_FIRINGS + 1.0
    for number, latents in enumerate(drawn):
        for latent in latents:
            count = float(shares[number][latent]) * rows.ids.numel()
            if total + count > MAX_FIRINGS:
                passes.append([[] for _ in drawn])
                total = 0.0
            passes[-1][number].append(latent)
            total += count
    for pass_number, latents_of_target in enumerate(passes, 1):
        report = partial(progress, note=f"rows for passages, pass {pass_number} of {len(passes)}")
        firings = collect_in_one_pass(ctx, rows, targets, latents_of_target, report)
        for number, of_target in enumerate(firings):
            for latent, (flat_P, value_P) in zip(latents_of_target[number], of_target, strict=True):
                yield number, latent, flat_P, value_P


def collect_in_one_pass(
    ctx: EvalContext,
    rows: PackedRows,
    targets: Sequence[EvalTarget],
    latents_of_target: Sequence[list[int]],
    progress: Progress,
) -> list[list[tuple[np.ndarray, np.ndarray]]]:
    """For each target and each of its latents, the flat positions where it fires and its activations there."""
    device = ctx.model.device
    hooks = sorted({target.hook for target, latents in zip(targets, latents_of_target, strict=True) if latents})
    parts: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in targets]
    ids, counted, done = forward_batches(rows.ids.to(device)), forward_batches(rows.counted.to(device)), 0
    for ids_NS, counted_NS in zip(ids, counted, strict=True):
        flat_T = counted_NS.flatten().nonzero().squeeze(1) + done * ids_NS.shape[1]
        activations = ctx.model.capture_hooks(ids_NS, hooks)
        for target, latents, of_target in zip(targets, latents_of_target, parts, strict=True):
            if latents:
                x_TD = activations[target.hook][counted_NS]
                kept_T = ~outlier_mask(x_TD, target.norm_limit)
                kept = zip(*(part.split(TOKENS_PER_ENCODE) for part in (x_TD[kept_T], flat_T[kept_T])), strict=True)
                for x_BD, flat_B in kept:
                    f_BK = encode_float32(target.sae, x_BD)[:, latents]
                    token, k = (f_BK > 0).nonzero(as_tuple=True)
                    of_target.append((flat_B[token].cpu(), k.to(torch.int32).cpu(), f_BK[token, k].cpu()))
        done += len(ids_NS)
        progress(done, len(rows.ids))
    return [
        group_by_latent(of_target, len(latents)) for of_target, latents in zip(parts, latents_of_target, strict=True)
    ]


def group_by_latent(parts: list[tuple[Tensor, Tensor, Tensor]], latents: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Group (position, latent, value) triples by latent. Positions stay in ascending order."""
    if not latents:
        return []
    flat, k, value = (torch.cat(column) for column in zip(*parts, strict=True))
    order = k.argsort(stable=True)
    ends = torch.bincount(k, minlength=latents).cumsum(0)[:-1].numpy()
    return list(zip(np.split(flat[order].numpy(), ends), np.split(value[order].numpy(), ends), strict=True))


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
    """The numbers of passages, from 1 to `count`; [] for the answer "None"; None if the answer cannot be parsed."""
    text = answer.strip().strip("[].").strip()
    if text.lower() == "none":
        return []
    numbers = [part.strip() for part in text.split(",")]
    if not all(number.isdecimal() and len(number) <= MAX_DIGITS and 1 <= int(number) <= count for number in numbers):
        return None
    return sorted({int(number) for number in numbers})


def detection_accuracy(predicted: Sequence[int], firing: Sequence[int], count: int) -> float:
    """The share of `count` passages for which it is predicted correctly whether the latent fires."""
    return sum((number in predicted) == (number in firing) for number in range(1, count + 1)) / count


def judge_latents(
    judge: Judge | None, examples: dict[int, LatentExamples], words: TokenText, progress: Progress
) -> dict[str, Any]:
    """One entry per latent with SAEBench's names, plus the prompts and the judge's answers."""
    entries: dict[str, Any] = {}
    with ThreadPoolExecutor(PARALLEL_QUESTIONS if judge else 1) as pool:
        try:
            for entry in pool.map(lambda latent: judge_latent(judge, latent, examples[latent], words), examples):
                entries[str(entry["latent"])] = entry
                progress(len(entries), len(examples))
        except BaseException:  # Ctrl-C included: ask no further question
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return entries


def judge_latent(judge: Judge | None, latent: int, examples: LatentExamples, words: TokenText) -> dict[str, Any]:
    """Have one latent explained and its explanation scored."""
    explain, count = explain_prompt(examples, words), len(examples.scored)
    entry: dict[str, Any] = {"latent": latent, "explanation": None, "predictions": None}
    entry |= {"correct seqs": examples.firing, "score": None}
    if judge is None:
        return {**entry, "prompts": [explain, score_prompt(examples, words, EXPLANATION_PLACEHOLDER)]}
    answers, prompts = [judge.ask(explain)], [explain]
    entry["explanation"] = parse_explanation(answers[0]) or None
    if entry["explanation"]:
        prompts.append(score_prompt(examples, words, entry["explanation"]))
        answers.append(judge.ask(prompts[1]))
        entry["predictions"] = parse_predictions(answers[1], count)
    if entry["predictions"] is not None:
        entry["score"] = detection_accuracy(entry["predictions"], examples.firing, count)
    return {**entry, "prompts": prompts, "answers": answers}
