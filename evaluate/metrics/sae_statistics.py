"""Statistics of one SAE for the core metric: reconstruction, sparsity, and SAEBench's numbers for each latent.

Shape suffixes: N contexts, S positions, R rows that are replaced, T counted tokens, D d_in, F latents.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...train.sae import SAE
from .base import EvalTarget, reconstruct
from .latent_pairs import PAIRED_TOKENS, LatentPairs
from .parts import tokens_per_encode

PER_CONTEXT = ("l0", "cossim", "error", "around_centre", "tokens")  # sums per context, for the intervals

Ratio = tuple[Tensor, Tensor]  # numerator and denominator of a number, each with one term per context


def ratio_value(ratio: Ratio) -> float:
    return divide(float(ratio[0].sum()), float(ratio[1].sum()))


def ratio_interval(ratio: Ratio) -> list[float]:
    """95 % interval from linearizing the ratio. The entries must be independent, so sum them by document first."""
    part, whole = ratio
    count, total = len(whole), float(whole.sum())
    if count < 2 or not total:
        return [math.nan, math.nan]
    centre = ratio_value(ratio)
    spread = float((part - centre * whole).square().sum()) * count / (count - 1)
    half = 1.96 * math.sqrt(spread) / abs(total)
    return [centre - half, centre + half]


def sum_by_document(ratio: Ratio, document_N: Tensor) -> Ratio:
    """Sum the numerators and the denominators of a ratio over the contexts of each document.

    `document_N` contains the document of each context. If the ratio covers fewer contexts, only the first entries of
    `document_N` are used.
    """
    _, index_N = document_N[: len(ratio[1])].unique(return_inverse=True)
    part, whole = (torch.zeros(int(index_N.max()) + 1).to(column).index_add_(0, index_N, column) for column in ratio)
    return part, whole


def divide(part: float, whole: float) -> float:
    """part / whole, or NaN if whole is 0. (A text of one token has neither a variance nor a next token.)"""
    return part / whole if whole else math.nan


@torch.no_grad()
def splice(
    target: EvalTarget,
    x_NSD: Tensor,
    counted_NS: Tensor,
    statistics: Sequence[tuple["SAEStatistics", Tensor]],
    tokens: int | None = None,
) -> Tensor:
    """The activations of one batch (N, S, D), in which the SAE's reconstruction replaces the counted tokens.

    The batch is encoded once, `tokens` tokens at a time (default: `tokens_per_encode`). Each SAEStatistics in
    `statistics` comes with a mask (N, S) of some of the counted tokens, and receives only these tokens.
    """
    replaced_NS = torch.ones_like(counted_NS) if target.everywhere else counted_NS
    x_RD, context_R = x_NSD[replaced_NS], replaced_NS.nonzero()[:, 0]
    takers = [(stats, rows_NS[replaced_NS]) for stats, rows_NS in statistics if rows_NS.any()]
    recons = []
    tokens = tokens or tokens_per_encode(target.sae, x_RD, x_RD.device)
    for start in range(0, len(x_RD), tokens):
        chunk = slice(start, start + tokens)
        f_TF = target.sae.encode(x_RD[chunk].float())
        recons.append(reconstruct(target.sae, f_TF, x_RD[chunk].float()).float())
        f_TF = f_TF.to(torch.promote_types(f_TF.dtype, torch.float32))
        for stats, taken_R in takers:
            taken_T = taken_R[chunk]
            f, context_T = (f_TF, context_R[chunk]) if taken_T.all() else (f_TF[taken_T], context_R[chunk][taken_T])
            stats.add_latents(f, context_T, len(x_NSD))
    recon_RD = torch.cat(recons)
    for stats, taken_R in takers:
        stats.end_batch(x_RD[taken_R].float(), recon_RD[taken_R], context_R[taken_R], len(x_NSD))
    for stats, rows_NS in statistics:
        if not rows_NS.any():
            stats.skip_batch(len(x_NSD))
    patched_NSD = x_NSD.clone()
    patched_NSD[replaced_NS] = recon_RD.to(x_NSD.dtype)
    return patched_NSD


class SAEStatistics:
    """Sums for one SAE over some of the counted tokens, in float64: reconstruction, sparsity and pairs of latents.

    `splice` adds batches: it calls `add_latents` for each chunk of a batch and then `end_batch`, which also computes
    the numbers that SAEBench defines per batch. `pairs` is None if `paired_latents` is 0.
    """

    def __init__(self, paired_latents: int = 0) -> None:
        self.sums: defaultdict[str, Any] = defaultdict(float)
        self.tokens = self.batches = 0
        self.per_context: list[Tensor] = []  # a tensor (N, len(PER_CONTEXT)) for each batch: sums over each context
        self.center_D: Tensor | None = None  # mean of the first batch, about which the variance per context is taken
        self.pairs = LatentPairs(paired_latents) if paired_latents else None
        self.start_batch()

    def start_batch(self) -> None:
        self.fired_NF: Tensor | None = None
        self.l0_l1: list[Tensor] = []

    def add_latents(self, f_TF: Tensor, context_T: Tensor, contexts: int) -> None:
        """Add the latents at some tokens of a batch. `context_T` is the index of each token's context in the batch, and
        `contexts` is the number of contexts in the batch."""
        if self.fired_NF is None:
            self.fired_NF = f_TF.new_zeros(contexts, f_TF.shape[1])
        # Comparisons are written as 0 and 1 into one float tensor, because creating and converting bools takes 20 times
        # as long.
        part_TF = torch.ne(f_TF, 0, out=torch.empty_like(f_TF))
        self.l0_l1.append(torch.stack([part_TF.sum(-1).double(), f_TF.sum(-1).double()], 1))
        self.fired_NF.index_add_(0, context_T, torch.gt(f_TF, 0, out=part_TF))
        self.sums["f"] += f_TF.sum(0).double()
        self.sums["f_square"] += torch.mul(f_TF, f_TF, out=part_TF).sum(0).double()
        if self.pairs and self.tokens < PAIRED_TOKENS:
            self.pairs.add(f_TF)

    def skip_batch(self, contexts: int) -> None:
        """Add a batch in which no token is counted. `contexts` is the number of its contexts."""
        self.per_context.append(torch.zeros(contexts, len(PER_CONTEXT), dtype=torch.float64))

    def end_batch(self, x_TD: Tensor, recon_TD: Tensor, context_T: Tensor, contexts: int) -> None:
        """Add the activations and the reconstructions of a batch's tokens to the sums, and end the batch. `context_T`
        and `contexts` are as in `add_latents`."""
        if self.pairs:
            self.pairs.end_batch()
        if self.fired_NF is not None:
            self.sums["fired"] += self.fired_NF.double().sum(0)
            self.sums["contexts_fired"] += (self.fired_NF > 0).double().sum(0)
        l0, l1 = torch.cat(self.l0_l1).unbind(1)
        self.start_batch()
        if self.center_D is None:
            self.center_D = x_TD.mean(0)
        norm_in, norm_out = x_TD.norm(dim=-1).double(), recon_TD.norm(dim=-1).double()
        error = (x_TD - recon_TD).square().sum(-1).double()
        dot = (x_TD * recon_TD).sum(-1).double()
        per_token = {
            "l0": l0,
            "l1": l1,
            "l2_norm_in": norm_in,
            "l2_norm_out": norm_out,
            "l2_ratio": norm_out / torch.where(norm_in < 1e-4, 1.0, norm_in),
            "mse": error / len(error),  # SAEBench divides by the number of tokens instead of the number of dimensions
            "cossim": dot / (norm_in * norm_out),
            "explained_variance_legacy": 1 - error / (x_TD - x_TD.mean(0)).square().sum(-1).double(),
            "error": error,
            "x_square": norm_in.square(),
            "around_centre": (x_TD - self.center_D).square().sum(-1).double(),
            "tokens": torch.ones_like(error),
        }
        per_batch = {
            "bias": norm_out.square().mean() / dot.mean(),
            "batch_error": error.mean(),
            "batch_square": norm_in.square().mean(),
        }
        summed = per_token | per_batch | {"not_finite": ~recon_TD.isfinite().all(-1)}
        totals = torch.stack([values.sum().double() for values in summed.values()]).tolist()  # waits for a GPU once
        for name, total in zip(summed, totals, strict=True):
            self.sums[name] += total
        sums = torch.zeros(contexts, len(PER_CONTEXT), dtype=torch.float64)
        columns = torch.stack([per_token[name] for name in PER_CONTEXT], 1)
        self.per_context.append(sums.index_add_(0, context_T.cpu(), columns.cpu()))
        self.sums["x"] += x_TD.double().sum(0)
        self.tokens += len(error)
        self.batches += 1

    def scalars(self, mode: str) -> dict[str, dict[str, float]]:
        """SAEBench's categories reconstruction_quality, shrinkage and sparsity."""
        s, d_in = self.sums, len(self.sums["x"])

        def mean(*names: str) -> dict[str, float]:
            return {name: s[name] / self.tokens for name in names}

        square = s["batch_square"] / self.batches
        quality = {
            # SAEBench 0.6.0's explained_variance subtracts the wrong mean; the papers' numbers come from the legacy
            # formula.
            "explained_variance": 1 - divide(s["batch_error"] / self.batches, square - (square / d_in) ** 2),
            **mean("explained_variance_legacy", "mse", "cossim"),
            "fve": 1 - divide(s["error"], self.variance),
            "mse_elementwise": s["error"] / self.tokens / d_in,
        }
        if mode == "2024-12":
            quality["explained_variance"] = quality.pop("explained_variance_legacy")
        bias = {"relative_reconstruction_bias": s["bias"] / self.batches}
        spread_F = s["f_square"] / self.tokens - (s["f"] / self.tokens).square()
        return {
            "reconstruction_quality": quality,
            "shrinkage": mean("l2_norm_in", "l2_norm_out", "l2_ratio") | bias,
            "sparsity": mean("l0", "l1") | {"activation_variance": float(spread_F.mean())},
        }

    @property
    def variance(self) -> float:
        """Sum over the counted tokens of |x - their mean|^2."""
        return self.sums["x_square"] - float(self.sums["x"].square().sum()) / self.tokens

    def fve_interval(self, interval: list[float], fve: float) -> list[float]:
        """Rescale an interval that was computed with the variance about the mean of the first batch, so that it fits
        `fve`, which is computed with the variance about the mean of all tokens.

        Sums per context need a center that is known from the start, so they use the mean of the first batch.
        """
        around = self.sums["around_centre"]
        half = (interval[1] - interval[0]) / 2 * divide(around, self.variance)
        return [fve - half, fve + half]

    def ratios(self) -> dict[str, dict[str, Ratio]]:
        """The numbers that have an interval, each as its numerator and denominator."""
        column = dict(zip(PER_CONTEXT, torch.cat(self.per_context).T, strict=True))
        tokens = column["tokens"]
        explained = column["around_centre"] - column["error"], column["around_centre"]
        return {
            "reconstruction_quality": {"fve": explained, "cossim": (column["cossim"], tokens)},
            "sparsity": {"l0": (column["l0"], tokens)},
        }

    def density(self) -> Tensor:
        """Share of the counted tokens on which each latent is positive (F,)."""
        return self.sums["fired"] / self.tokens


def largest_other_cosine(rows_FD: Tensor, block: int = 4096) -> Tensor:
    """The largest cosine of each row with any other row (F,)."""
    unit = torch.nn.functional.normalize(rows_FD.float(), dim=1)
    largest = []
    for start in range(0, len(unit), block):
        cosine = unit[start : start + block] @ unit.T
        cosine.diagonal(start).fill_(-torch.inf)  # the cosine of each row with itself
        largest.append(cosine.amax(1))
    return torch.cat(largest)


def latent_details(sae: SAE, stats: SAEStatistics) -> list[dict[str, Any]]:
    """One entry for each latent. As in SAEBench, whose names are used, values are rounded to ten decimals."""
    encoder, decoder = sae.W_enc.T.float(), sae.W_dec.float()
    columns = {
        "feature_density": stats.density(),
        "consistent_activation_heuristic": stats.sums["fired"] / stats.sums["contexts_fired"],
        "encoder_bias": sae.b_enc,
        "encoder_norm": encoder.norm(dim=1),
        "encoder_decoder_cosine_sim": torch.nn.functional.cosine_similarity(encoder, decoder, dim=1),
        "max_decoder_cosine_sim": largest_other_cosine(decoder),
        "max_encoder_cosine_sim": largest_other_cosine(encoder),
    }
    table = torch.stack([column.double().cpu() for column in columns.values()], 1).tolist()
    return [
        {"index": i, **{name: round(value, 10) for name, value in zip(columns, row, strict=True)}}
        for i, row in enumerate(table)
    ]


def density_summary(density: Tensor, details: list[dict[str, Any]]) -> dict[str, float]:
    """SAEBench's misc_metrics: how many latents fire, how often, and how similar each is to its nearest neighbor."""

    def mass_over(threshold: float) -> float:
        total = float(density.sum())
        return float(density[density > threshold].sum()) / total if total else 0.0

    def average(name: str) -> float:
        return sum(entry[name] for entry in details) / len(details)

    return {
        "frac_alive": float((density > 0).double().mean()),
        "freq_over_1_percent": float((density > 0.01).double().mean()),
        "freq_over_10_percent": float((density > 0.1).double().mean()),
        "normalized_freq_over_1_percent": mass_over(0.01),
        "normalized_freq_over_10_percent": mass_over(0.1),
        "average_max_encoder_cosine_sim": average("max_encoder_cosine_sim"),
        "average_max_decoder_cosine_sim": average("max_decoder_cosine_sim"),
    }
