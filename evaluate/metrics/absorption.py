"""The absorption metric: does a first-letter latent stay silent on words where other latents have absorbed it?

Lower is better; 0 is no absorption. A silent or dead SAE also scores 0; a flag reports such an SAE.

Words from the tokenizer's vocabulary are placed in spelling prompts, and the residual stream is read at the word
(first_letter). Linear probes on the residual stream find a direction for each of the 26 letters. For each letter, small
logistic regressions find the latents that detect it, its *split latents* (letter_probes). A word is absorbed if the
probe recognizes its first letter, but the reconstruction along that probe comes from latents other than the split ones.

Source: Chanin et al. 2024, as measured by SAEBench 0.6.0 (`evals/absorption`). Mode 0.6.0 has the absorption fraction
and full absorption; mode 2024-12, the absorption rate that the five papers report. Randomness and prompts differ:
SAEBench draws without a seed from a vocabulary whose order changes from process to process. Here words are sorted by
token, and draws are seeded and equal for every SAE. Words are selected with one prompt and scored with another.

Memory: the activations at all words in the model's dtype; 8 bytes for each pair of a word and a latent that fires on
it; at most unit_decoder.MAX_DENSE_LATENTS dense latents.

Shape suffixes: N words, B words of a batch, D d_in, F latents, K candidate latents, L letters, S positions.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import stdev
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ...common.errors import SaeError, UsageError
from ..context import EvalContext
from ..statistics import bootstrap_interval, proportion_interval
from .base import EvalTarget, Metric, MetricColumn, MetricResult, Outcome, Progress, SAELike, UnitValues
from .first_letter import LETTERS, SpellingPrompts, SpellingRows, count_prompts, read_spelling_rows
from .letter_probes import (
    FeatureSplit,
    LetterProbes,
    SparseLatents,
    seeded_generator,
    split_latents,
    train_letter_probes,
)
from .unit_decoder import UnitDecoderSAE

SILENT = 1e-8  # activation below which a latent does not fire
MIN_SPELLING_F1 = 0.5  # a flag names the letters whose split latents have a lower F1
MIN_PROBE_STEPS = 300  # of the probe that proposes candidates; with Gemma's vocabulary, it makes about a thousand


@dataclass(frozen=True)
class Absorption(Metric):
    """`words` words are drawn from the vocabulary, as evenly over the letters as possible; 0 selects all words.

    Only letters that the probe on the residual stream finds with F1 above `min_GT_probe_f1` are scored. The options
    `k_sparse_probe_*` are for the probe on latents, which proposes candidates. The others are SAEBench's thresholds.
    """

    words: int = 0
    random_seed: int = 42
    f1_jump_threshold: float = 0.03
    max_k_value: int = 10
    k_sparse_probe_l1_decay: float = 0.01
    k_sparse_probe_batch_size: int = 4096
    k_sparse_probe_num_epochs: int = 50
    min_GT_probe_f1: float = 0.6
    min_feats_for_eval: int = 20
    full_absorption_probe_cos_sim_threshold: float = 0.025
    absorption_fraction_probe_cos_sim_threshold: float = 0.1
    probe_projection_proportion_threshold: float = 0.4
    absorption_fraction_max_absorbing_latents: int = 3

    name = "absorption"
    unit = "letter"
    unit_key = "first_letter"
    unit_names = {
        "mean_absorption_fraction_score": "mean_absorption_fraction",
        "mean_full_absorption_score": "full_absorption_rate",
        "mean_absorption_score": "absorption_rate",
        "mean_num_split_features": "num_split_features",
    }
    type_id = "absorption_first_letter"
    title = "absorption of first letters (a silent or dead SAE has 0 too: read the flags)"
    columns = (
        MetricColumn("fraction", "mean", "mean_absorption_fraction_score", ".4f", "down", 0, 1),
        MetricColumn("full", "mean", "mean_full_absorption_score", ".4f", "down", 0, 1),
        MetricColumn("rate (2024-12)", "mean", "mean_absorption_score", ".4f", "down", 0, 1),
        MetricColumn("split latents", "mean", "mean_num_split_features", ".2f", "down", 1),
        MetricColumn("F1, 1 latent", "k_sparse", "mean_f1_1", ".3f", "up", 0, 1),
        MetricColumn("F1, probe", "llm", "mean_f1_probe", ".3f", "up", 0, 1),
    )

    def settings(self, ctx: EvalContext) -> dict[str, Any]:
        return {**super().settings(ctx), **ctx.prompt_settings}

    def kept_bytes(self, ctx: EvalContext, targets: Sequence[EvalTarget]) -> int:
        words = self.words or ctx.embedded_tokens or len(ctx.tokenizer)  # only some tokens begin with a letter
        return count_prompts(words) * ctx.row_bytes({target.hook for target in targets})

    @classmethod
    def values_by_unit(cls, result: MetricResult, column: MetricColumn) -> UnitValues:
        """The values by letter. In mode 2024-12, letters without candidate words are left out of every mean."""
        averaged = [entry for entry in result.details if entry.get("num_candidates", 1)]
        return super().values_by_unit(replace(result, details=averaged), column)

    def measure(self, ctx: EvalContext, targets: Sequence[EvalTarget], progress: Progress) -> list[Outcome]:
        """Raises UsageError if the model's tokenizer or vocabulary is unsuitable for the metric."""
        self.check()
        prompts = SpellingPrompts.of(
            ctx.tokenizer, self.words, self.random_seed, bos_id=ctx.context_format.bos_id,
            newline=ctx.mode != "2024-12", embedded=ctx.embedded_tokens,
        )  # fmt: skip
        row_sets = list(dict.fromkeys(target.row_set for target in targets))
        rows = read_spelling_rows(ctx, prompts, row_sets, self.random_seed, progress)
        outcomes: list[Outcome] = []
        for number, target in enumerate(targets):
            progress(number, len(targets), "SAEs")
            try:
                outcomes.append(self.result(ctx.mode, target.sae, rows[target.row_set], ctx.model.device))
            except SaeError as error:
                outcomes.append(error)
        progress(len(targets), len(targets), "SAEs")
        return outcomes

    def check(self) -> None:
        """Raise UsageError for an option out of range."""
        minimum = {"words": 0, "max_k_value": 1, "absorption_fraction_max_absorbing_latents": 1}
        minimum |= {"k_sparse_probe_batch_size": 1, "k_sparse_probe_num_epochs": 1, "random_seed": 0}
        for name, lowest in minimum.items():
            if getattr(self, name) < lowest:
                raise UsageError(f"absorption.{name} is {getattr(self, name)}; give {lowest} or more.")

    @torch.no_grad()
    def result(self, mode: str, sae: SAELike, rows: SpellingRows, device: torch.device) -> MetricResult:
        """Evaluate one SAE. Raises SaeError if the metric is undefined for this SAE."""
        unit_sae = UnitDecoderSAE.of(sae, device)
        letters = self.scored_letters(mode, rows)
        train = unit_sae.sparse_latents(rows.train_ND)
        candidates = LetterCandidates.of(self.candidate_probe(train, rows), self.max_k_value, rows, train, unit_sae)
        f1_L, true_positive_NL = rows.f1_L, rows.true_positive_NL
        scored = []
        for letter in letters:
            split = candidates.split(letter, self.f1_jump_threshold)
            positive_N = true_positive_NL[:, letter]
            if not (mode == "2024-12" or positive_N.any()):
                continue  # as in SAEBench; mode 2024-12 drops the letter later, for lack of candidate words
            main = candidates.order_LK[letter, : split.size]
            scores = self.score(unit_sae, rows.fresh_ND[positive_N], rows.probe.weight_LD[letter], main)
            missed_N = torch.from_numpy(split.missed)[positive_N]
            scored.append(score_letter(mode, letter, float(f1_L[letter]), split, main, scores, missed_N))
        result = self.summary(mode, unit_sae, rows, train, scored)
        return result.without_outliers(rows.outliers, len(rows.train_ND) + len(rows.test_ND))

    def scored_letters(self, mode: str, rows: SpellingRows) -> list[int]:
        """The letters whose probe exceeds min_GT_probe_f1; in mode 2024-12, all 26. Raises SaeError if none does."""
        f1_L = rows.f1_L
        letters = [letter for letter in range(26) if mode == "2024-12" or f1_L[letter] > self.min_GT_probe_f1]
        if not letters:
            raise SaeError(
                "Absorption needs letters that a probe can read from the model's activations, but no letter's probe "
                f"has an F1 above {self.min_GT_probe_f1}: the best has {float(f1_L.max()):.2f}. Use another layer or "
                "model, or lower absorption.min_GT_probe_f1."
            )
        return letters

    def candidate_probe(self, train: SparseLatents, rows: SpellingRows) -> LetterProbes:
        """The L1 probe on latents. For each letter, the latents with the largest weights are the candidates."""
        return train_letter_probes(
            train,
            rows.train_letter_N,
            l1=self.k_sparse_probe_l1_decay,
            batch=self.k_sparse_probe_batch_size,
            epochs=self.k_sparse_probe_num_epochs,
            weight_decay=1e-6,
            generator=seeded_generator(self.random_seed, "k-sparse"),
        )

    def score(self, unit_sae: UnitDecoderSAE, fresh_ND: Tensor, probe_D: Tensor, main: Tensor) -> "AbsorptionScores":
        """Score the words that start with one given letter, batch by batch."""
        unit_D = functional.normalize(probe_D, dim=0)
        cosine_F = unit_sae.W_dec @ unit_D.to(unit_sae.W_dec.device)
        parts = [
            score_words(f_NF, x_ND.to(f_NF) @ unit_D.to(f_NF), cosine_F, main.to(f_NF.device), self)
            for x_ND, f_NF in unit_sae.encode_batches(fresh_ND)
        ]
        return AbsorptionScores(*(torch.cat(column).cpu() for column in zip(*parts, strict=True)))

    def summary(
        self,
        mode: str,
        unit_sae: UnitDecoderSAE,
        rows: SpellingRows,
        train: SparseLatents,
        scored: Sequence["ScoredLetter"],
    ) -> MetricResult:
        """Average over letters. In mode 2024-12, letters without candidate words are left out."""
        old = mode == "2024-12"
        averaged = [letter for letter in scored if not old or letter.entry["num_candidates"]]
        details = [letter.entry for letter in scored]
        draws = seeded_generator(self.random_seed, "bootstrap").initial_seed()
        mean: dict[str, float] = {}
        intervals: dict[str, list[float]] = {}
        names = ("absorption_score",) if old else ("absorption_fraction_score", "full_absorption_score")
        for name in names:
            values = [letter.scores[name] for letter in averaged]
            mean |= mean_entry(name, [float(value_N.mean()) for value_N in values], deviation=not old)
            if values:
                intervals[f"mean_{name}"] = bootstrap_interval(values, draws)
        sizes = [float(letter.entry["num_split_features"]) for letter in averaged]
        mean |= mean_entry("num_split_features", sizes, deviation=not old)
        f1_1 = [entry["f1_k_sparse"][0] for entry in details]
        f1_split = [letter.split_f1 for letter in scored]
        return MetricResult.of(
            {
                "mean": mean,
                "k_sparse": {**mean_entry("f1_1", f1_1), **mean_entry("f1_split", f1_split)},
                "llm": {"mean_f1_probe": float(rows.f1_L.mean())},
            },
            details,
            intervals={"mean": intervals},
            n={
                "words_train": len(rows.train_ND),
                "words_test": len(rows.test_ND),
                "words_put_in_by_token": rows.from_ids,
                "letters": len(averaged),
                "true_positives": sum(entry["num_probe_true_positives"] for entry in details),
            },
            flags=list(self.flags(old, unit_sae, train, scored, len(averaged))),
        )

    def flags(
        self,
        old: bool,
        unit_sae: UnitDecoderSAE,
        train: SparseLatents,
        scored: Sequence["ScoredLetter"],
        averaged: int,
    ) -> Iterator[str]:
        if unit_sae.folded:
            yield (
                f"{unit_sae.folded} of {len(unit_sae.W_dec)} rows of W_dec did not have unit length. Their "
                "norms were folded into the latents."
            )
        steps = self.k_sparse_probe_num_epochs * -(-(len(train.start_N) - 1) // self.k_sparse_probe_batch_size)
        if steps < MIN_PROBE_STEPS:
            yield (
                f"The probe that proposes latents made only {steps} steps, so it may not propose the best latents of "
                "each letter. Use more words or a smaller absorption.k_sparse_probe_batch_size."
            )
        if not len(train.latents):
            yield "No latent fires on any word, so the absorption of 0 says nothing about this SAE."
        elif weak := [letter.entry["first_letter"] for letter in scored if letter.split_f1 < MIN_SPELLING_F1]:
            yield (
                f"The split latents do not spell {len(weak)} of {len(scored)} letters (F1 below {MIN_SPELLING_F1}: "
                f"{', '.join(weak)}); so their absorption is not measured on latents that represent these letters."
            )
        if old and averaged < 26:
            letters = "No letter has" if not averaged else f"Only {averaged} of 26 letters have"
            yield (
                f"{letters} a word that the k-sparse probe misses while the letter's latents are silent. The "
                "other letters are not in the mean."
            )
        if not old and averaged < self.min_feats_for_eval:
            yield f"Only {averaged} letters are scored. SAEBench needs at least {self.min_feats_for_eval} for a number."


@dataclass(frozen=True)
class LetterCandidates:
    """The latents that the L1 probe proposes for each letter, and their activations on the words."""

    order_LK: Tensor  # candidates of each letter, best first
    columns_LK: Tensor  # the candidates' columns in train_NC and test_NC
    train_NC: np.ndarray
    test_NC: np.ndarray
    train_letter_N: np.ndarray
    test_letter_N: np.ndarray

    @classmethod
    def of(
        cls, probe: LetterProbes, count: int, rows: SpellingRows, train: SparseLatents, unit_sae: UnitDecoderSAE
    ) -> Self:
        order_LK = probe.weight_LD.sort(dim=1, descending=True, stable=True).indices[:, :count].cpu()
        candidates_C, columns_LK = order_LK.unique(return_inverse=True)
        test = unit_sae.sparse_latents(rows.test_ND)
        return cls(
            order_LK,
            columns_LK,
            train.dense_columns(candidates_C).numpy(),
            test.dense_columns(candidates_C).numpy(),
            rows.train_letter_N.numpy(),
            rows.test_letter_N.numpy(),
        )

    def split(self, letter: int, jump: float) -> FeatureSplit:
        columns = self.columns_LK[letter].numpy()
        return split_latents(
            self.train_NC[:, columns],
            self.train_letter_N == letter,
            self.test_NC[:, columns],
            self.test_letter_N == letter,
            jump,
        )


class ScoredLetter(NamedTuple):
    """One letter's entry in the details, and the scores of each of its words: name of the score -> values."""

    entry: dict[str, Any]
    scores: dict[str, Tensor]

    @property
    def split_f1(self) -> float:
        """F1 of the regression on the split latents."""
        return self.entry["f1_k_sparse"][self.entry["num_split_features"] - 1]


def score_letter(
    mode: str,
    letter: int,
    f1_probe: float,
    split: FeatureSplit,
    main: Tensor,
    scores: "AbsorptionScores",
    missed_N: Tensor,
) -> ScoredLetter:
    """`missed_N` is True for the scored words that the regression on the split latents misses."""
    entry = {
        "first_letter": LETTERS[letter],
        "num_probe_true_positives": len(scores.fraction_N),
        "num_split_features": split.size,
        "main_latents": main.tolist(),
        "f1_probe": f1_probe,
        "f1_k_sparse": split.f1,
    }
    if mode == "2024-12":
        candidate_N = (scores.main_sum_N < SILENT) & missed_N
        absorbed_N = (scores.dominated_N & candidate_N).double()
        entry |= rate_entry("absorption_rate", "num_absorption", absorbed_N)
        entry["num_candidates"] = int(candidate_N.sum())
        return ScoredLetter(entry, {"absorption_score": absorbed_N})
    full_N = (scores.dominated_N & scores.silent_N).double()
    entry |= {"mean_absorption_fraction": float(scores.fraction_N.mean())}
    entry |= rate_entry("full_absorption_rate", "num_full_absorption", full_N)
    return ScoredLetter(
        entry, {"absorption_fraction_score": scores.fraction_N.double(), "full_absorption_score": full_N}
    )


def rate_entry(name: str, count: str, hit_N: Tensor) -> dict[str, Any]:
    """A share with its count and its 95 % interval."""
    n, hits = len(hit_N), float(hit_N.sum())
    if not n:
        return {name: float("nan"), count: 0}
    return {name: hits / n, count: int(hits), f"{name}_interval": proportion_interval(int(hits), n)}


def mean_entry(name: str, values: Sequence[float], deviation: bool = False) -> dict[str, float]:
    """The mean over letters and, if `deviation` is true, the sample standard deviation; NaN for too few letters."""
    entry = {f"mean_{name}": sum(values) / len(values) if values else float("nan")}
    if deviation:
        entry[f"std_dev_{name}"] = stdev(values) if len(values) > 1 else float("nan")
    return entry


class AbsorptionScores(NamedTuple):
    """The scores of each word that starts with one given letter."""

    fraction_N: Tensor  # share of the letter's contribution that comes from absorbing latents, 0 to 1
    dominated_N: Tensor  # bool: one latent aligned with the probe contributes enough of the letter
    silent_N: Tensor  # bool: none of the letter's main latents fires
    main_sum_N: Tensor  # sum of the letter's main latents


def score_words(
    f_NF: Tensor, along_N: Tensor, cosine_F: Tensor, main: Tensor, settings: Absorption
) -> AbsorptionScores:
    """Score the words that start with one given letter (SAEBench 0.6.0, `evals/absorption`).

    `along_N` is the projection of the residual stream onto the unit-norm probe, `cosine_F` the cosine of each decoder
    row with the probe, `main` the split latents of the letter. A latent contributes its activation times its cosine.
    """
    enough = settings.probe_projection_proportion_threshold
    p_NF = f_NF * cosine_F
    main_N = p_NF[:, main].sum(1)
    absorbing_F = cosine_F >= settings.absorption_fraction_probe_cos_sim_threshold
    absorbing_F[main] = False
    most = min(settings.absorption_fraction_max_absorbing_latents, len(cosine_F))
    absorbed_N = torch.where(absorbing_F, p_NF.clamp(min=0), 0).topk(most, dim=1).values.sum(1)
    credited_N = torch.minimum(absorbed_N, along_N - main_N)
    fraction_N = torch.where(main_N > 0, (credited_N / (credited_N + main_N)).clamp(0, 1), 1)
    # SAEBench divides by `along`; a word on which `along` is not positive has no absorption.
    none_N = (main_N >= along_N) | (along_N <= 0) | (absorbed_N / along_N < enough)
    top = p_NF.topk(1, dim=1)
    top_N, cosine_N = top.values[:, 0], cosine_F[top.indices[:, 0]]
    dominated_N = (
        (cosine_N >= settings.full_absorption_probe_cos_sim_threshold) & (along_N >= 0) & (top_N / along_N >= enough)
    )
    silent_N = (f_NF[:, main] < SILENT).all(1)
    return AbsorptionScores(torch.where(none_N, 0, fraction_N), dominated_N, silent_N, f_NF[:, main].sum(1))
