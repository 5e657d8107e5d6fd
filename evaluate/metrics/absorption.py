"""Absorption, first letter: does the latent of a letter fall silent on words whose own latent has swallowed the letter?

Words of the tokenizer's vocabulary stand in spelling prompts, and the residual is read at the word. A linear probe of
the model says where the 26 letters are; small logistic regressions on the latents say which latents spell each letter;
absorbed is a word whose letter is there by the probe and comes from other latents. After Chanin et al. 2024, as SAEBench
measures it: fraction and full absorption in mode 0.6.0, the rate behind the five papers' numbers in mode 2024-12.

SAEBench draws without a seed, from a vocabulary in an order that changes by process. Here words are sorted by token and
every draw is seeded, the same for every SAE. A word is scored on another prompt than the one that it was chosen on.

Memory: the rows of all words in the model's dtype; 8 bytes for each latent that fires on one of them; the latents of
CELLS cells' worth of words, dense.

Shape suffixes: N words, B words of a batch, D d_in, F latents, K candidate latents, L letters, S positions.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import stdev
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.nn import functional

from ...common.errors import SaeError, UsageError
from ..context import EvalContext
from .base import EvalTarget, Metric, MetricColumn, MetricResult, Outcome, Progress, SAELike
from .first_letter import LETTERS, SpellingPrompts, SpellingRows, read_spelling_rows
from .letter_probes import SparseLatents, seeded_generator, split_latents, train_letter_probes
from .probes import wilson_interval

MAX_DENSE_LATENTS = 2**25  # words x latents that are dense at one time
SILENT = 1e-8
NORM_TOLERANCE = 1e-5  # by how much the norm of a row of W_dec may differ from 1
MIN_SPELLING_F1 = 0.5  # the F1 below which latents are not called those of a letter
MIN_PROBE_STEPS = 300  # of the probe that proposes latents; Gemma's vocabulary gives it about a thousand
RESAMPLES = 1000


@dataclass(frozen=True)
class Absorption(Metric):
    """`words` of the vocabulary are drawn, the same number of each letter where it has them; 0 takes all. The letters that count are those that the model's probe finds.

    `k_sparse_probe_*` are of the probe that proposes latents; the rest are the thresholds of SAEBench.
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

    def measure(self, ctx: EvalContext, targets: Sequence[EvalTarget], progress: Progress) -> list[Outcome]:
        """Raises UsageError when the tokenizer or its vocabulary cannot serve."""
        self.check()
        spelling = SpellingPrompts.of(ctx.tokenizer, self.words, self.random_seed, newline=ctx.mode != "2024-12")
        layers = sorted({target.layer for target in targets})
        spelled = read_spelling_rows(ctx, spelling, layers, self.random_seed, progress)
        outcomes: list[Outcome] = []
        for number, target in enumerate(targets):
            progress(number, len(targets), "SAEs")
            try:
                outcomes.append(self.result(ctx.mode, target.sae, spelled[target.layer], ctx.model.device))
            except SaeError as error:
                outcomes.append(error)
        progress(len(targets), len(targets), "SAEs")
        return outcomes

    def check(self) -> None:
        least = {"words": 0, "max_k_value": 1, "absorption_fraction_max_absorbing_latents": 1}
        least |= {"k_sparse_probe_batch_size": 1, "k_sparse_probe_num_epochs": 1, "random_seed": 0}
        for name, lowest in least.items():
            if getattr(self, name) < lowest:
                raise UsageError(f"absorption.{name} is {getattr(self, name)}; the least is {lowest}.")

    @torch.no_grad()
    def result(self, mode: str, sae: SAELike, words: "SpellingRows", device: torch.device) -> MetricResult:
        """Everything that depends on the SAE. Raises SaeError where the metric does not exist for it."""
        coder = UnitDecoderSAE.of(sae, device)
        old = mode == "2024-12"
        counted = [letter for letter in range(26) if old or words.f1_L[letter] > self.min_GT_probe_f1]
        if not counted:
            raise SaeError(
                f"Absorption needs letters that the model spells, and a probe finds none at F1 above {self.min_GT_probe_f1}: "
                f"the best has {float(words.f1_L.max()):.2f}. Take another layer or model, or lower absorption.min_GT_probe_f1."
            )
        train, test = coder.codes(words.train_ND), coder.codes(words.test_ND)
        probe = train_letter_probes(
            train,
            words.train_letter_N,
            l1=self.k_sparse_probe_l1_decay,
            batch=self.k_sparse_probe_batch_size,
            epochs=self.k_sparse_probe_num_epochs,
            weight_decay=1e-6,
            generator=seeded_generator(self.random_seed, "k-sparse"),
        )
        order_LK = probe.weight_LD.sort(dim=1, descending=True, stable=True).indices[:, : self.max_k_value].cpu()
        candidates, place = order_LK.unique(return_inverse=True)
        train_NK, test_NK = train.columns(candidates).numpy(), test.columns(candidates).numpy()
        details, scores = [], []
        for letter in counted:
            split = split_latents(
                train_NK[:, place[letter].numpy()],
                (words.train_letter_N == letter).numpy(),
                test_NK[:, place[letter].numpy()],
                (words.test_letter_N == letter).numpy(),
                self.f1_jump_threshold,
            )
            main = order_LK[letter, : split.count]
            positive_N = words.true_positive_NL[:, letter]
            if not (old or positive_N.any()):
                continue  # as in SAEBench; old: it is without candidates too
            own = self.score(coder, words.fresh_ND[positive_N], words.probe.weight_LD[letter], main)
            entry = {
                "first_letter": LETTERS[letter],
                "num_probe_true_positives": len(own.fraction_N),
                "num_split_features": split.count,
                "main_latents": main.tolist(),
                "f1_probe": float(words.f1_L[letter]),
                "f1_k_sparse": split.f1,
            }
            if old:
                candidate_N = (own.main_sum_N < SILENT) & torch.from_numpy(split.missed)[positive_N]
                absorbed_N = (own.dominated_N & candidate_N).double()
                entry |= rate_entry("absorption_rate", "num_absorption", absorbed_N)
                entry["num_candidates"] = int(candidate_N.sum())
                scores.append({"absorption_score": absorbed_N})
            else:
                full_N = (own.dominated_N & own.silent_N).double()
                entry |= {"mean_absorption_fraction": float(own.fraction_N.mean())}
                entry |= rate_entry("full_absorption_rate", "num_full_absorption", full_N)
                scores.append({"absorption_fraction_score": own.fraction_N.double(), "full_absorption_score": full_N})
            details.append(entry)
        return self.summary(old, coder, words, train, details, scores)

    def score(self, coder: "UnitDecoderSAE", fresh_ND: Tensor, probe_D: Tensor, main: Tensor) -> "AbsorptionScores":
        """Score the words of one letter, a part at a time."""
        unit_D = functional.normalize(probe_D, dim=0)
        cosine_F = coder.W_dec @ unit_D.to(coder.W_dec.device)
        parts = [
            score_words(f_NF, x_ND.to(f_NF) @ unit_D.to(f_NF), cosine_F, main.to(f_NF.device), self)
            for x_ND, f_NF in coder.encoded(fresh_ND)
        ]
        return AbsorptionScores(*(torch.cat(column).cpu() for column in zip(*parts, strict=True)))

    def summary(
        self,
        old: bool,
        coder: "UnitDecoderSAE",
        words: "SpellingRows",
        train: "SparseLatents",
        details: list[dict[str, Any]],
        scores: list[dict[str, Tensor]],
    ) -> MetricResult:
        kept = [number for number, entry in enumerate(details) if not old or entry["num_candidates"]]
        generator = seeded_generator(self.random_seed, "bootstrap")
        mean: dict[str, float] = {}
        intervals: dict[str, list[float]] = {}
        names = ("absorption_score",) if old else ("absorption_fraction_score", "full_absorption_score")
        for name in names:
            values = [scores[number][name] for number in kept]
            mean |= mean_entry(name, [float(value_N.mean()) for value_N in values], deviation=not old)
            if values:
                intervals[f"mean_{name}"] = bootstrap_interval(values, generator)
        mean |= mean_entry(
            "num_split_features", [float(details[n]["num_split_features"]) for n in kept], deviation=not old
        )
        f1_1 = [entry["f1_k_sparse"][0] for entry in details]
        f1_k = [entry["f1_k_sparse"][entry["num_split_features"] - 1] for entry in details]
        return MetricResult.of(
            {
                "mean": mean,
                "k_sparse": {**mean_entry("f1_1", f1_1), **mean_entry("f1_split", f1_k)},
                "llm": {"mean_f1_probe": float(words.f1_L.mean())},
            },
            details,
            intervals={"mean": intervals},
            n={
                "words_train": len(words.train_ND),
                "words_test": len(words.test_ND),
                "words_put_in_by_token": words.from_ids,
                "letters": len(kept),
                "true_positives": sum(entry["num_probe_true_positives"] for entry in details),
            },
            flags=list(self.flags(old, coder, train, details, kept)),
        )

    def flags(
        self, old: bool, coder: "UnitDecoderSAE", train: "SparseLatents", details: list[dict[str, Any]], kept: list[int]
    ) -> Iterator[str]:
        if coder.folded:
            yield f"The rows of W_dec were not of unit length ({coder.folded} of {len(coder.W_dec)}); their norms were folded into the latents."
        steps = self.k_sparse_probe_num_epochs * -(-(len(train.start_N) - 1) // self.k_sparse_probe_batch_size)
        if steps < MIN_PROBE_STEPS:
            yield (
                f"The probe that proposes latents made only {steps} steps, so those proposed may not be the letters' best; "
                "more words or a smaller absorption.k_sparse_probe_batch_size give it more."
            )
        if not len(train.latents):
            yield "No latent fires on any word: an absorption of 0 says nothing of such an SAE."
        elif mute := [
            entry["first_letter"]
            for entry in details
            if entry["f1_k_sparse"][entry["num_split_features"] - 1] < MIN_SPELLING_F1
        ]:
            yield (
                f"The latents chosen do not spell {len(mute)} of {len(details)} letters (F1 below {MIN_SPELLING_F1}: {', '.join(mute)}); "
                "absorption there is not of a latent for the letter."
            )
        if old and len(kept) < 26:
            lacking = "No letter has" if not kept else f"Only {len(kept)} of 26 letters have"
            yield f"{lacking} a word that the k-sparse probe misses while its latents are silent; the others are not in the mean."
        if not old and len(kept) < self.min_feats_for_eval:
            yield f"Only {len(kept)} letters count; SAEBench gives no number below {self.min_feats_for_eval}."


def rate_entry(name: str, count: str, hit_N: Tensor) -> dict[str, Any]:
    """A share, its count, and its 95 % interval."""
    n, hits = len(hit_N), float(hit_N.sum())
    if not n:
        return {name: float("nan"), count: 0}
    return {name: hits / n, count: int(hits), f"{name}_interval": wilson_interval(hits / n, n)}


def mean_entry(name: str, values: Sequence[float], deviation: bool = False) -> dict[str, float]:
    """The unweighted mean over letters, and the sample standard deviation; NaN where there are too few."""
    found = {f"mean_{name}": sum(values) / len(values) if values else float("nan")}
    return found | ({f"std_dev_{name}": stdev(values) if len(values) > 1 else float("nan")} if deviation else {})


def bootstrap_interval(values: Sequence[Tensor], generator: torch.Generator) -> list[float]:
    """95 % of the mean over letters of means over words, when each letter's words are drawn anew."""
    draws = torch.zeros(RESAMPLES, dtype=torch.float64)
    for value_N in values:
        draws += value_N[torch.randint(len(value_N), (RESAMPLES, len(value_N)), generator=generator)].mean(1)
    return torch.quantile(draws / len(values), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()


# --- what depends on the SAE -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class UnitDecoderSAE:
    """An SAE whose decoder rows are of unit length: each latent times its row's norm, after the activation."""

    sae: SAELike
    W_dec: Tensor  # (F, D) float32
    norm_F: Tensor
    folded: int  # how many rows were not

    @classmethod
    def of(cls, sae: SAELike, device: torch.device) -> Self:
        W_dec = getattr(sae, "W_dec", None)
        if W_dec is None:
            raise SaeError(f"Absorption is of latents with directions, and {type(sae).__name__} has no W_dec.")
        W_dec = W_dec.detach().to(device).float()
        norm_F = W_dec.norm(dim=1)
        folded = int(((norm_F - 1).abs() > NORM_TOLERANCE).sum())
        unit = W_dec / torch.where(norm_F > 0, norm_F, 1)[:, None]
        return cls(sae, unit, norm_F if folded else torch.ones_like(norm_F), folded)

    def encoded(self, x_ND: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows and their latents, as many at a time as CELLS allows; float32."""
        for part_ND in x_ND.split(max(1, MAX_DENSE_LATENTS // len(self.W_dec))):
            yield part_ND, self.sae.encode(part_ND.to(self.W_dec.device).float()).float() * self.norm_F

    def codes(self, x_ND: Tensor) -> SparseLatents:
        return SparseLatents.of((f_NF for _, f_NF in self.encoded(x_ND)), len(self.W_dec))


class AbsorptionScores(NamedTuple):
    """Of each word of a letter."""

    fraction_N: Tensor  # how much of the letter comes from absorbing latents, 0 to 1
    dominated_N: Tensor  # bool: one latent along the probe carries enough of the letter
    silent_N: Tensor  # bool: no latent of the letter fires
    main_sum_N: Tensor  # the sum of the letter's latents


def score_words(
    f_NF: Tensor, along_N: Tensor, cosine_F: Tensor, main: Tensor, settings: Absorption
) -> AbsorptionScores:
    """Absorption of words of one letter.

    `along_N` is the residual along the unit probe, `cosine_F` each decoder row's cosine with it, `main` the letter's
    latents. What a latent contributes is its activation times its cosine.
    """
    enough = settings.probe_projection_proportion_threshold
    p_NF = f_NF * cosine_F
    main_N = p_NF[:, main].sum(1)
    absorbing_F = cosine_F >= settings.absorption_fraction_probe_cos_sim_threshold
    absorbing_F[main] = False
    most = min(settings.absorption_fraction_max_absorbing_latents, len(cosine_F))
    absorbed_N = torch.where(absorbing_F, p_NF.clamp(min=0), 0).topk(most, dim=1).values.sum(1)
    taken_N = torch.minimum(absorbed_N, along_N - main_N)
    fraction_N = torch.where(main_N > 0, (taken_N / (taken_N + main_N)).clamp(0, 1), 1)
    # SAEBench divides by `along`; where that is not positive nothing is absorbed.
    none_N = (main_N >= along_N) | (along_N <= 0) | (absorbed_N / along_N < enough)
    top = p_NF.topk(1, dim=1)
    top_N, cosine_N = top.values[:, 0], cosine_F[top.indices[:, 0]]
    dominated_N = (
        (cosine_N >= settings.full_absorption_probe_cos_sim_threshold) & (along_N >= 0) & (top_N / along_N >= enough)
    )
    silent_N = (f_NF[:, main] < SILENT).all(1)
    return AbsorptionScores(torch.where(none_N, 0, fraction_N), dominated_N, silent_N, f_NF[:, main].sum(1))
