"""Stability: how similar an SAE is to SAEs trained in the same way with other seeds.

PW-MCC (Song et al. 2025, arXiv 2505.20254) matches the latents of two SAEs one to one, optimally, and averages the
absolute cosine of the decoder rows over the matched pairs. This metric also computes a second number in the same way,
with the absolute Pearson correlation of activations on the same held-out tokens instead of the cosine. An SAE's number
is the mean over the other seeds, so the mean over the SAEs of a system is the mean over all pairs. In the authors' code
(examples/evaluate_mcc.py), the cosines keep their sign. The two definitions agree if the best matches have positive
cosines.

Recurring latents (Paulo and Belrose 2025, arXiv 2501.16615) come from a separate matching by signed cosines, because a
latent and its opposite mean different things. In an SAE with negative latents, the sign of a decoder row has no
meaning, so the matching by absolute cosines is used, as for PW-MCC. The authors also require that the encoder rows
match. This is not required here, because not every SAE has encoder rows.

Each number is compared with the same number for matched random dictionaries. The rows of a random dictionary are also
used as its encoder, with thresholds at which each latent fires as often as the SAE's latent of the same index. The
random dictionaries thus have the same width and firing rates, and they read the same activations, in which a few large
directions cause correlations between any two dictionaries. There are two kinds (random_dictionaries.py): the SAE's own
decoder rows with the entries of each row in random order, which preserves large entries; and Gaussian rows with the
second moment of the other seeds' decoder rows. The null is the larger of the two numbers. The second moment is
computed from the decoder rows of the other seeds, because that of the SAE's own rows would also reflect chance
properties of these rows. If the random rows have the second moment of another decoder, the mean squared cosine between
them and the SAE's rows equals exactly the mean squared cosine between the rows of that decoder and the SAE's rows.

Dead latents are those that do not vary on these tokens. The rows of dead latents are included in the decoder PW-MCC, as
in the authors' code. Dead latents have no correlation, so the activation PW-MCC is computed over the other latents, and
unmatched latents of the larger set count as 0.

Shape suffixes: F latents, D d_in.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import t
from torch import Tensor

from ...common.errors import SaeError, UnavailableError, UsageError
from ..context import EvalContext
from .base import EvalTarget, Metric, MetricColumn, MetricResult, Outcome, Progress, RowSet
from .held_out_rows import missing_bytes
from .latent_correlation import HeldOutRows, Latents, read_latents
from .latent_matching import CANDIDATES, EXACT_LATENTS
from .matched_pairs import Pair, match_pair, matched_values, recurring_cosines, unit_rows
from .random_dictionaries import gaussian_rows, random_latents, second_moment, shuffle_rows

NULLS = ("shuffled", "gaussian")  # kinds of random dictionaries
EXACT_RANDOM = 2048  # random dictionaries of at most this many latents are matched optimally
NULL_QUANTILE = 0.99  # no latent recurs below this quantile of the cosines of matches with random dictionaries
SAME_DECODER = 0.9999  # decoder PW-MCC of two seeds above which a flag is added
MANY_DEAD = 0.1  # share of dead latents above which a flag is added


NamedPair = tuple[str, Pair]  # the name of the other seed, and the matchings with it


@dataclass(frozen=True)
class Stability(Metric):
    """`tokens` held-out tokens are read, in batches of `batch_contexts` contexts.

    A latent recurs in another seed if the cosine with its match is at least `threshold` (0.7, as in Paulo and Belrose
    2025, arXiv 2501.16615) and is also high compared with random dictionaries. There are two kinds of random
    dictionaries. For each kind, the SAE is matched with `draws` of them, and the cosine must be at least the
    NULL_QUANTILE quantile of the absolute cosines of these matches. Up to `exact_latents` latents, the matching of
    two seeds is optimal.
    """

    tokens: int = 32_768
    batch_contexts: int = 16
    threshold: float = 0.7
    draws: int = 3
    exact_latents: int = EXACT_LATENTS

    knows_what_is_kept = True
    definition = 2
    independent_seeds = False
    name = "stability"
    type_id = "stability"
    saebench_rows = False
    title = "stability: similarity to the SAEs of other seeds (PW-MCC; null: random dictionaries)"
    columns = (
        MetricColumn("decoder PW-MCC", "stability", "decoder_pw_mcc", ".3f", "up", 0, 1, shared=False),
        MetricColumn("null", "stability", "decoder_pw_mcc_null", ".3f"),
        MetricColumn("activation PW-MCC", "stability", "activation_pw_mcc", ".3f", "up", 0, 1, shared=False),
        MetricColumn("null", "stability", "activation_pw_mcc_null", ".3f"),
        MetricColumn("recurring", "stability", "recurring", ".3f", "up", 0, 1),
        MetricColumn("in all seeds", "stability", "recurring_in_all", ".3f", "up", 0, 1, shared=False),
        MetricColumn("alive", "stability", "frac_alive", ".3f", "up", 0, 1, shared=False),
    )

    def settings(self, ctx: EvalContext) -> dict[str, Any]:
        settings = {**super().settings(ctx), **ctx.text_identity}
        del settings["mode"]  # SAEBench has no such metric
        return settings

    def settings_of(self, target: EvalTarget, targets: Sequence[EvalTarget]) -> dict[str, Any]:
        """The weights of the other seeds. Raises UnavailableError if there are no other seeds."""
        if seeds := other_seeds(target, targets):
            return {"seeds": sorted(seed.weights for seed in seeds)}
        alone = [one.name for one in targets if not one.reference and not other_seeds(one, targets)]
        others = f" and {len(alone) - 3} more" if len(alone) > 3 else ""
        raise UnavailableError(
            "stability needs at least two runs that differ only by seed, but there is no other seed of "
            f"{', '.join(alone[:3])}{others}. Name all seeds in one command. To train three seeds, pass "
            "--seed 0 --seed 1 --seed 2 to `sae train`. An imported SAE has no seeds."
        )

    def check(self) -> None:
        for name in ("tokens", "batch_contexts", "draws", "exact_latents"):
            if (value := getattr(self, name)) < 1:
                raise UsageError(f"stability.{name}={value}: give 1 or more.")
        if not 0 < self.threshold <= 1:
            raise UsageError(f"stability.threshold={self.threshold:g}: give a cosine above 0 and at most 1.")

    def kept_bytes(self, ctx: EvalContext, targets: Sequence[EvalTarget]) -> int:
        return missing_bytes(ctx, {target.row_set for target in targets}, self.tokens, self.batch_contexts)

    @torch.no_grad()
    def measure(self, ctx: EvalContext, targets: Sequence[EvalTarget], progress: Progress) -> list[Outcome]:
        """Compare the seeds of each system. Targets without another seed get an error."""
        outcomes: dict[int, Outcome] = {}
        for place, target in enumerate(targets):
            try:
                self.settings_of(target, targets)
            except SaeError as error:
                outcomes[place] = error
        compared = [place for place in range(len(targets)) if place not in outcomes]
        if compared:
            seeds = [targets[place] for place in compared]
            read = read_latents(ctx, seeds, self.tokens, self.batch_contexts, progress)
            systems: dict[tuple[str, RowSet], list[int]] = {}
            for number, seed in enumerate(seeds):
                systems.setdefault((seed.system, seed.row_set), []).append(number)
            for (_, row_set), system in systems.items():
                for number, outcome in self.compare_seeds(seeds, system, read[row_set], ctx.device, progress).items():
                    outcomes[compared[number]] = outcome
        return [outcomes[place] for place in range(len(targets))]

    def compare_seeds(
        self, targets: Sequence[EvalTarget], system: Sequence[int], rows: HeldOutRows, device: str, progress: Progress
    ) -> dict[int, Outcome]:
        """The outcomes for the targets of one system. `system` lists their indices in `targets`. The outcomes, and the
        latents in `rows`, are keyed by these indices."""
        try:
            require_comparable(targets, system, rows)
        except SaeError as error:
            return dict.fromkeys(system, error)
        # The order must not depend on the command, because it decides which of several optimal matchings is found.
        order = sorted(system, key=lambda place: (targets[place].weights, targets[place].name))
        latents = {place: rows.latents(place) for place in order}
        decoder = {place: unit_rows(targets[place], device) for place in order}
        steps = Steps(progress, len(order) * (len(order) - 1) // 2 + len(order) * self.draws * len(NULLS))
        pairs: dict[int, dict[int, Pair]] = {place: {} for place in order}
        for number, one in enumerate(order):
            for other in order[number + 1 :]:
                steps.next(f"{targets[one].name} and {targets[other].name}")
                pair = match_pair(decoder[one], decoder[other], latents[one], latents[other], self.exact_latents)
                pairs[one][other], pairs[other][one] = pair, pair.inverse()
        outcomes: dict[int, Outcome] = {}
        x_DT = rows.centered(device)
        for place in order:
            others = [other for other in order if other != place]
            moment_DD = torch.stack([second_moment(decoder[other]) for other in others]).mean(0)
            nulls: dict[str, list[Pair]] = {kind: [] for kind in NULLS}
            for kind, null in nulls.items():
                for draw in range(self.draws):
                    steps.next(f"{targets[place].name} and random dictionary {draw + 1} ({kind})")
                    random_FD = (
                        shuffle_rows(decoder[place], draw)
                        if kind == "shuffled"
                        else gaussian_rows(moment_DD, len(decoder[place]), draw)
                    )
                    null.append(self.match_random(decoder[place], random_FD, latents[place], x_DT))
            seeds = [(targets[other].name, pairs[place][other]) for other in others]
            result = self.result(seeds, nulls, latents[place])
            outcomes[place] = result.without_outliers(rows.outliers, rows.tokens)
        return outcomes

    def match_random(self, unit_FD: Tensor, random_FD: Tensor, latents: Latents, x_DT: Tensor) -> Pair:
        random = random_latents(random_FD, x_DT, latents.active_F)
        exact_latents = min(self.exact_latents, EXACT_RANDOM)
        return match_pair(unit_FD, random_FD, latents, random, exact_latents, signed=False)

    def result(self, seeds: Sequence[NamedPair], nulls: Mapping[str, Sequence[Pair]], latents: Latents) -> MetricResult:
        """The result for one SAE, from its matchings with the other seeds and with random dictionaries. `nulls` maps
        each kind of random dictionary to the matchings with it."""
        quantiles = [
            float(np.quantile(np.abs([pair.decoder.similarity_F for pair in null]), NULL_QUANTILE))
            for null in nulls.values()
        ]
        threshold = max(self.threshold, *quantiles)
        recurs_SF = np.stack([recurring_cosines(pair) >= threshold for _, pair in seeds])
        values = matched_values([pair for _, pair in seeds], nulls) | {"recurring": recurs_SF.mean(1).tolist()}
        cosine_SF, alive_F = np.abs([pair.decoder.similarity_F for _, pair in seeds]), latents.varies_F
        metrics = {name: float(np.mean(numbers)) for name, numbers in values.items()} | {
            "recurring_in_all": float(recurs_SF.all(0).mean()),
            "recurring_threshold": threshold,
            "decoder_pw_mcc_alive": float(cosine_SF[:, alive_F].mean()) if alive_F.any() else math.nan,
            "frac_alive": float(alive_F.mean()),
        }
        intervals = {
            name: t_interval(numbers, of_another="_null" in name)
            for name, numbers in values.items()
            if len(numbers) > 1
        }
        signed = any(pair.signed is not pair.decoder for _, pair in seeds)
        return MetricResult.of(
            {"stability": metrics},
            latent_details(seeds, recurs_SF, latents),
            intervals={"stability": intervals},
            n={"other_seeds": len(seeds), "tokens": latents.f_TF.shape[0], "latents": len(alive_F)},
            flags=[*self.method_flags(metrics, len(alive_F)), *stability_flags(metrics, intervals, seeds)],
            extra={"seeds": [name for name, _ in seeds], "signed": signed, **values},
        )

    def method_flags(self, metrics: Mapping[str, float], latents: int) -> list[str]:
        flags = []
        if latents > self.exact_latents:
            flags.append(
                f"With {latents:,} latents, more than {self.exact_latents:,}, each latent is matched with "
                f"one of its {CANDIDATES} most similar latents, so PW-MCC is a lower bound."
            )
        if metrics["recurring_threshold"] > self.threshold:
            flags.append(
                f"Random dictionaries of this shape reach a cosine of {self.threshold:g}, so a latent recurs "
                f"only if its cosine is at least {metrics['recurring_threshold']:.3f}, the "
                f"{NULL_QUANTILE:.0%} quantile of their matches."
            )
        return flags


@dataclass
class Steps:
    progress: Progress
    total: int
    done: int = 0

    def next(self, what: str) -> None:
        """Report that the next step begins."""
        self.progress(self.done, self.total, what)
        self.done += 1


def other_seeds(target: EvalTarget, targets: Sequence[EvalTarget]) -> list[EvalTarget]:
    """The targets that differ from `target` only in their seed."""
    beside = [one for one in targets if one is not target and one.system == target.system]
    return [one for one in beside if target.system and one.row_set == target.row_set]


def require_comparable(targets: Sequence[EvalTarget], system: Sequence[int], rows: HeldOutRows) -> None:
    """Raise SaeError if the seeds of a system cannot be compared."""
    for place in system:
        if not hasattr(targets[place].sae, "W_dec"):
            kind = type(targets[place].sae).__name__
            raise SaeError(f"Stability compares the decoder directions of latents, but {kind} has no W_dec.")
        if place in rows.failed:
            raise SaeError(f"{targets[place].name}: {rows.failed[place]}")
    widths = {len(targets[place].sae.W_dec): targets[place].name for place in system}  # type: ignore[attr-defined]
    if len(widths) > 1:
        shown = ", ".join(f"{name} has {width:,}" for width, name in widths.items())
        raise UsageError(f"All seeds of one system must have the same number of latents, but {shown}.")
    if not rows.tokens:
        raise SaeError(
            "The held-out text has no token on which latents can be compared: all are special tokens or outlier rows. "
            "Harvest with a different dataset, or pass --max-norm none."
        )


def t_interval(values: Sequence[float], of_another: bool) -> list[float]:
    """95 % interval by Student's t: of the mean or, if `of_another` is true, of one further value (a prediction
    interval)."""
    count = len(values)
    spread = float(np.std(values, ddof=1)) * math.sqrt(1 / count + of_another)
    half, centre = float(t.ppf(0.975, count - 1)) * spread, float(np.mean(values))
    return [centre - half, centre + half]


def stability_flags(
    metrics: Mapping[str, float], intervals: Mapping[str, list[float]], seeds: Sequence[NamedPair]
) -> list[str]:
    flags = [
        f"Its decoder equals the decoder of {name}. One is a copy of the other, or neither seed nor training "
        "changes the decoder. PW-MCC then says nothing about the stability of training."
        for name, pair in seeds
        if pair.decoder_mcc > SAME_DECODER
    ]
    for what in ("decoder", "activation"):
        value, null = metrics[f"{what}_pw_mcc"], metrics[f"{what}_pw_mcc_null"]
        _, high = intervals.get(f"{what}_pw_mcc_null", (null, null))
        if value <= high:
            flags.append(
                f"The {what} PW-MCC of {value:.3f} is not above the value that random dictionaries reach, "
                f"{high:.3f}: these seeds have no more in common than by chance."
            )
    if (dead := 1 - metrics["frac_alive"]) > MANY_DEAD:
        flags.append(
            f"{dead:.0%} of the latents do not vary on these tokens. The activation PW-MCC leaves them out. The "
            f"decoder PW-MCC includes their rows; without them, it is {metrics['decoder_pw_mcc_alive']:.3f}."
        )
    return flags


def latent_details(seeds: Sequence[NamedPair], recurs_SF: np.ndarray, latents: Latents) -> list[dict[str, Any]]:
    """One entry per latent: whether it recurs in all other seeds, and its match in each of them, in the order of
    extra["seeds"].

    Whether a latent recurs is decided by its decoder match. A latent that does not vary has no activation match.
    """
    density_F = latents.active_F / latents.f_TF.shape[0]
    columns: dict[str, list[list[Any]]] = {}
    for name, similarity in (("decoder", "cosine"), ("activation", "correlation")):
        matchings = [pair.signed if name == "decoder" else pair.activation for _, pair in seeds]
        partner_FS = np.stack([one.partner_F for one in matchings], 1)
        value_FS = np.stack([one.similarity_F for one in matchings], 1)
        has_match_FS = (partner_FS >= 0) & ((value_FS != 0) | (name == "decoder"))
        for column, numbers_FS in (("match", partner_FS), (similarity, value_FS.round(6))):
            entries_FS = numbers_FS.astype(object)
            entries_FS[~has_match_FS] = None
            columns[f"{name}_{column}"] = entries_FS.tolist()
    return [
        {"index": i, "density": round(float(density_F[i]), 10), "recurs": bool(recurs_SF[:, i].all())}
        | {name: column[i] for name, column in columns.items()}
        for i in range(len(density_F))
    ]
