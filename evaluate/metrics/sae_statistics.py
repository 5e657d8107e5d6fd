"""Statistics of one SAE for the core metric: reconstruction, sparsity, correlation of latents, decoder geometry.

Shape suffixes: N contexts, S positions, R rows that are replaced, T counted tokens, D d_in, F latents.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...common.device import copy_to_device
from ...train.sae import SAE
from .base import EvalTarget, reconstruct

# Logits and latents are computed for so many tokens at a time. In float32, Gemma's logits of them take 0.5 GB, with at
# most three copies in memory; 65,536 latents of them take 0.13 GB.
TOKENS_PER_CHUNK = 512
PAIRED_LATENTS = 2048  # latents that are correlated pairwise; a larger dictionary is sampled
GRAM_ROWS = 256  # rows of the Gram matrix computed at a time, from the diagonal to the right
PAIRED_TOKENS = 32_768  # correlations are taken over the batches that start before this many tokens
PER_CONTEXT = ("l0", "cossim", "error", "around_centre", "tokens")  # sums kept per context, for the intervals

Ratio = tuple[Tensor, Tensor]  # numerator and denominator of a number, each as one summand per context


def ratio_value(ratio: Ratio) -> float:
    return divide(float(ratio[0].sum()), float(ratio[1].sum()))


def ratio_interval(ratio: Ratio) -> list[float]:
    """95 % interval by linearizing the ratio. Its entries have to be independent: documents rather than contexts."""
    part, whole = ratio
    count, total = len(whole), float(whole.sum())
    if count < 2 or not total:
        return [math.nan, math.nan]
    centre = ratio_value(ratio)
    spread = float((part - centre * whole).square().sum()) * count / (count - 1)
    half = 1.96 * math.sqrt(spread) / abs(total)
    return [centre - half, centre + half]


def sum_by_document(ratio: Ratio, document_N: Tensor) -> Ratio:
    """Sum the entries of a ratio over the contexts of each document. `document_N` may have further contexts."""
    _, index_N = document_N[: len(ratio[1])].unique(return_inverse=True)
    part, whole = (torch.zeros(int(index_N.max()) + 1).to(column).index_add_(0, index_N, column) for column in ratio)
    return part, whole


def divide(part: float, whole: float) -> float:
    """part / whole, NaN if whole is 0: a text of one token has neither a variance nor a next token."""
    return part / whole if whole else math.nan


def splice(
    target: EvalTarget, x_NSD: Tensor, counted_NS: Tensor, statistics: Sequence[tuple["SAEStatistics", Tensor]]
) -> Tensor:
    """The activations of one batch (N, S, D) with the SAE's reconstruction at the counted tokens.

    The batch is encoded once and added to each of the `statistics`, restricted to its rows (N, S), which are counted
    tokens.
    """
    replaced_NS = torch.ones_like(counted_NS) if target.everywhere else counted_NS
    x_RD, context_R = x_NSD[replaced_NS], replaced_NS.nonzero()[:, 0]
    takers = [(stats, rows_NS[replaced_NS]) for stats, rows_NS in statistics if rows_NS.any()]
    recons = []
    for start in range(0, len(x_RD), TOKENS_PER_CHUNK):
        chunk = slice(start, start + TOKENS_PER_CHUNK)
        f_TF = target.sae.encode(x_RD[chunk].float())
        recons.append(reconstruct(target.sae, f_TF, x_RD[chunk].float()).float())
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
    """Sums in float64 over some of the counted tokens of one SAE: reconstruction, sparsity and correlation.

    `splice` adds batches: `add_latents` for each chunk of a batch, then `end_batch`, which also computes the numbers
    that SAEBench defines per batch.
    """

    def __init__(self) -> None:
        self.sums: defaultdict[str, Any] = defaultdict(float)
        self.tokens = self.batches = 0
        self.per_context: list[Tensor] = []  # one (N, len(PER_CONTEXT)) a batch: sums over each context
        self.center_D: Tensor | None = None  # mean of the first batch: the per-context variance is taken about it
        self.paired: Tensor | None = None  # indices of the latents that are correlated pairwise
        self.start_batch()

    def start_batch(self) -> None:
        self.fired_NF: Tensor | None = None
        self.gram_FF: Tensor | None = None
        self.l0_l1: list[Tensor] = []

    def add_latents(self, f_TF: Tensor, context_T: Tensor, contexts: int) -> None:
        """Take the latents of some tokens of a batch of `contexts` contexts, and the context of each token."""
        self.l0_l1.append(torch.stack([f_TF.count_nonzero(-1).double(), f_TF.sum(-1).double()], 1))
        if self.fired_NF is None:
            self.fired_NF = f_TF.new_zeros(contexts, f_TF.shape[1])
        self.fired_NF.index_add_(0, context_T, (f_TF > 0).to(f_TF.dtype))
        self.sums["f"] += f_TF.sum(0).double()
        self.sums["f_square"] += f_TF.square().sum(0).double()
        if self.tokens < PAIRED_TOKENS:
            self.gram_FF = self.add_pairs(f_TF, self.gram_FF)

    def skip_batch(self, contexts: int) -> None:
        """Take a batch of `contexts` contexts without a token."""
        self.per_context.append(torch.zeros(contexts, len(PER_CONTEXT), dtype=torch.float64))

    def add_pairs(self, f_TF: Tensor, gram_FF: Tensor | None) -> Tensor:
        """Add f^T f to the batch's Gram matrix. Only the diagonal and what is above it are complete."""
        if self.paired is None:
            generator = torch.Generator().manual_seed(0)
            sample = torch.randperm(f_TF.shape[1], generator=generator)[:PAIRED_LATENTS]
            self.paired = copy_to_device(sample.sort().values, f_TF.device)
        paired_TF = f_TF[:, self.paired] if len(self.paired) < f_TF.shape[1] else f_TF
        if gram_FF is None:
            gram_FF = f_TF.new_zeros(len(self.paired), len(self.paired))
        for start in range(0, len(gram_FF), GRAM_ROWS):
            rows = slice(start, start + GRAM_ROWS)
            gram_FF[rows, start:].addmm_(paired_TF[:, rows].T, paired_TF[:, start:])
        return gram_FF

    def end_batch(self, x_TD: Tensor, recon_TD: Tensor, context_T: Tensor, contexts: int) -> None:
        """Take the activations of a batch's tokens, their reconstructions, and the context of each token."""
        if self.gram_FF is not None:
            self.sums["gram"] += self.gram_FF.double()
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
            "mse": error / len(error),  # SAEBench divides by the batch's tokens instead of the dimensions
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
        """The categories reconstruction_quality, shrinkage and sparsity of SAEBench."""
        s, d_in = self.sums, len(self.sums["x"])

        def mean(*names: str) -> dict[str, float]:
            return {name: s[name] / self.tokens for name in names}

        square = s["batch_square"] / self.batches
        quality = {
            # SAEBench 0.6.0's explained_variance subtracts the wrong mean; the papers' numbers are the legacy formula.
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
        """Rescale the interval of the `fve` about the first batch's mean to that about the mean of all tokens.

        Sums per context have to be taken about a center that is known from the start.
        """
        around = self.sums["around_centre"]
        half = (interval[1] - interval[0]) / 2 * divide(around, self.variance)
        return [fve - half, fve + half]

    def ratios(self) -> dict[str, dict[str, Ratio]]:
        """The numbers that have an interval."""
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

    def correlation(self, W_dec_FD: Tensor | None) -> dict[str, float]:
        """Cosines between the activations of pairs of alive latents, over PAIRED_TOKENS counted tokens (003, eq. 2).

        With decoder rows, also Spearman's rank correlation of those cosines with the cosines of the rows (002, sec. 4).
        """
        gram_FF = self.sums["gram"]
        alive = gram_FF.diagonal() > 0
        counts = {"latents": int(alive.sum()), "latents_dead": int((~alive).sum())}
        cosines = upper_triangle(gram_cosines(gram_FF[alive][:, alive]))
        if not len(cosines):
            return {"mean": math.nan, **counts}
        numbers = {**distribution(cosines.abs()), **counts}
        if W_dec_FD is not None:
            assert self.paired is not None
            rows = W_dec_FD[self.paired][alive].double()
            numbers["spearman_decoder"] = spearman(cosines, upper_triangle(gram_cosines(rows @ rows.T)))
        return numbers


def gram_cosines(gram_FF: Tensor) -> Tensor:
    """Cosines of vectors from their inner products."""
    norm_F = gram_FF.diagonal().sqrt()
    return gram_FF / norm_F[:, None] / norm_F


def upper_triangle(matrix_FF: Tensor) -> Tensor:
    """The entries above the diagonal: every pair once."""
    return matrix_FF[tuple(torch.triu_indices(len(matrix_FF), len(matrix_FF), 1, device=matrix_FF.device))]


def distribution(values: Tensor) -> dict[str, float]:
    """Mean, standard deviation and quantiles (linear interpolation)."""
    shares = {"quantile_50": 0.5, "quantile_90": 0.9, "quantile_99": 0.99, "quantile_99.9": 0.999}
    positions = {name: share * (len(values) - 1) for name, share in shares.items()}
    # Only these positions are sorted: torch.quantile takes at most 16 million numbers, and a full sort is several times
    # slower.
    ends = sorted({end for position in positions.values() for end in (math.floor(position), math.ceil(position))})
    ordered = dict(zip(ends, np.partition(values.detach().cpu().numpy(), ends)[ends].tolist(), strict=True))

    def quantile(position: float) -> float:
        below, above = ordered[math.floor(position)], ordered[math.ceil(position)]
        return below + (position - math.floor(position)) * (above - below)

    numbers = {"mean": float(values.mean()), "sd": float(values.std(correction=0))}
    return numbers | {name: quantile(position) for name, position in positions.items()}


def spearman(a: Tensor, b: Tensor) -> float:
    """Pearson's correlation of the ranks; equal values share their mean rank."""

    def ranks(values: Tensor) -> Tensor:
        _, group, count = values.unique(return_inverse=True, return_counts=True)
        last = count.cumsum(0).double()
        return (last - (count - 1) / 2)[group]

    ranked = torch.stack([ranks(a), ranks(b)])
    return float(ranked.corrcoef()[0, 1])


def decoder_geometry(W_dec_FD: Tensor) -> dict[str, float]:
    """|cosine| between pairs of decoder rows, and the effective rank of the decoder (Roy and Vetterli 2007).

    The effective rank is exp of the entropy of the normalized singular values. Rows are scaled to unit length first, so
    that their lengths do not matter.
    """
    unit_FD = torch.nn.functional.normalize(W_dec_FD.float(), dim=1)
    sample = torch.randperm(len(unit_FD), generator=torch.Generator().manual_seed(0))[:PAIRED_LATENTS]
    sample_FD = unit_FD[copy_to_device(sample, unit_FD.device)]
    share = torch.linalg.eigvalsh((unit_FD.T @ unit_FD).double()).clamp(min=0).sqrt()
    share = share / share.sum()
    cosines = distribution(upper_triangle(sample_FD @ sample_FD.T).abs()) if len(sample_FD) > 1 else {}
    return {
        **{f"decoder_cosine_{name}": number for name, number in cosines.items()},
        "effective_rank": float(torch.special.entr(share).sum().exp()),
    }


def largest_other_cosine(rows_FD: Tensor, block: int = 4096) -> Tensor:
    """The largest cosine of each row with any other row (F,)."""
    unit = torch.nn.functional.normalize(rows_FD.float(), dim=1)
    largest = []
    for start in range(0, len(unit), block):
        cosine = unit[start : start + block] @ unit.T
        cosine.diagonal(start).fill_(-torch.inf)  # of each row with itself
        largest.append(cosine.amax(1))
    return torch.cat(largest)


def latent_details(sae: SAE, stats: SAEStatistics) -> list[dict[str, Any]]:
    """One entry per latent with SAEBench's names, rounded to ten decimals as SAEBench does."""
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
