"""What one SAE makes of the counted tokens: reconstruction, sparsity, correlation; and what its own weights say.

Shape suffixes: N contexts, S positions, R rows that are replaced, T counted tokens, D d_in, F latents.
"""

import math
from collections import defaultdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...train.sae import SAE
from .base import EvalTarget

# Logits and latents exist for so many tokens at a time. In float32 Gemma's logits of them take 0.5 GB, and three such
# exist at most; latents of 65,536 take 0.13 GB.
TOKENS_PER_CHUNK = 512
PAIRED_LATENTS = 2048  # latents whose pairs are all correlated; of a larger dictionary that many are drawn
GRAM_ROWS = 256  # of their products, computed at a time from the diagonal on
PAIRED_TOKENS = 32_768  # the batches that begin before so many tokens are what is correlated
PER_CONTEXT = ("l0", "cossim", "error", "around_centre", "tokens")  # sums that intervals are taken from

Ratio = tuple[Tensor, Tensor]  # a number as one sum over contexts through another, context by context


def ratio_value(share: Ratio) -> float:
    return divide(float(share[0].sum()), float(share[1].sum()))


def ratio_interval(share: Ratio) -> list[float]:
    """95 %: the share is linearised, and its entries are taken as independent draws: documents, not their contexts."""
    part, whole = share
    count, total = len(whole), float(whole.sum())
    if count < 2 or not total:
        return [math.nan, math.nan]
    centre = ratio_value(share)
    spread = float((part - centre * whole).square().sum()) * count / (count - 1)
    half = 1.96 * math.sqrt(spread) / abs(total)
    return [centre - half, centre + half]


def sum_by_document(share: Ratio, document_N: Tensor) -> Ratio:
    """Sums over contexts -> sums over documents; `document_N` begins with those of the share's contexts."""
    _, place_N = document_N[: len(share[1])].unique(return_inverse=True)
    part, whole = (torch.zeros(int(place_N.max()) + 1).to(column).index_add_(0, place_N, column) for column in share)
    return part, whole


def divide(part: float, whole: float) -> float:
    """part / whole; NaN where there is no whole: a text of one token has neither a variance nor a next token."""
    return part / whole if whole else math.nan


class SAEStatistics:
    """Reconstruction, sparsity and correlation over the counted tokens of one SAE, summed in float64.

    Numbers that SAEBench takes per batch are settled at the end of each `add`, which takes one batch.
    """

    def __init__(self) -> None:
        self.sums: defaultdict[str, Any] = defaultdict(float)
        self.tokens = self.batches = 0
        self.contexts: list[Tensor] = []  # of each batch: (N, len(PER_CONTEXT)), sums over each context
        self.centre_D: Tensor | None = None  # the first batch's mean: what variance within contexts is taken about
        self.pairs: Tensor | None = None  # which latents are correlated with each other

    def add(self, target: EvalTarget, x_NSD: Tensor, kept_NS: Tensor) -> Tensor:
        """Take one batch; returns its residual with what the SAE makes of it in place."""
        replaced = torch.ones_like(kept_NS) if target.everywhere else kept_NS
        x_RD, counted_R, context_R = x_NSD[replaced], kept_NS[replaced], replaced.nonzero()[:, 0]
        fired_NF: Tensor | None = None
        gram_FF: Tensor | None = None
        recons, numbers = [], []
        for start in range(0, len(x_RD), TOKENS_PER_CHUNK):
            rows = slice(start, start + TOKENS_PER_CHUNK)
            f_TF = target.sae.encode(x_RD[rows].float())
            recons.append(target.sae.decode(f_TF).float())
            f_TF = f_TF[counted_R[rows]] if target.everywhere else f_TF
            numbers.append(torch.stack([f_TF.count_nonzero(-1).double(), f_TF.sum(-1).double()], 1))
            if fired_NF is None:
                fired_NF = f_TF.new_zeros(len(kept_NS), f_TF.shape[1])
            fired_NF.index_add_(0, context_R[rows][counted_R[rows]], (f_TF > 0).to(f_TF.dtype))
            self.sums["f"] += f_TF.sum(0).double()
            self.sums["f_square"] += f_TF.square().sum(0).double()
            if self.tokens < PAIRED_TOKENS:
                gram_FF = self.add_pairs(f_TF, gram_FF)
        if gram_FF is not None:
            self.sums["gram"] += gram_FF.double()
        recon_RD = torch.cat(recons)
        if fired_NF is not None:
            self.sums["fired"] += fired_NF.double().sum(0)
            self.sums["contexts_fired"] += (fired_NF > 0).double().sum(0)
        l0, l1 = torch.cat(numbers).unbind(1)
        self.end_batch(x_RD[counted_R].float(), recon_RD[counted_R], l0, l1, kept_NS.nonzero()[:, 0], len(kept_NS))
        patched = x_NSD.clone()
        patched[replaced] = recon_RD.to(x_NSD.dtype)
        return patched

    def add_pairs(self, f_TF: Tensor, gram_FF: Tensor | None) -> Tensor:
        """f^T f added to that of the batch so far, on and above the diagonal: what is below is not all there."""
        if self.pairs is None:
            generator = torch.Generator().manual_seed(0)
            self.pairs = (
                torch.randperm(f_TF.shape[1], generator=generator)[:PAIRED_LATENTS].sort().values.to(f_TF.device)
            )
        chosen = f_TF[:, self.pairs] if len(self.pairs) < f_TF.shape[1] else f_TF
        if gram_FF is None:
            gram_FF = f_TF.new_zeros(len(self.pairs), len(self.pairs))
        for start in range(0, len(gram_FF), GRAM_ROWS):
            rows = slice(start, start + GRAM_ROWS)
            gram_FF[rows, start:].addmm_(chosen[:, rows].T, chosen[:, start:])
        return gram_FF

    def end_batch(
        self, x_TD: Tensor, recon_TD: Tensor, l0: Tensor, l1: Tensor, context_T: Tensor, contexts: int
    ) -> None:
        if self.centre_D is None:
            self.centre_D = x_TD.mean(0)
        norm_in, norm_out = x_TD.norm(dim=-1).double(), recon_TD.norm(dim=-1).double()
        error = (x_TD - recon_TD).square().sum(-1).double()
        dot = (x_TD * recon_TD).sum(-1).double()
        per_token = {
            "l0": l0,
            "l1": l1,
            "l2_norm_in": norm_in,
            "l2_norm_out": norm_out,
            "l2_ratio": norm_out / torch.where(norm_in < 1e-4, 1.0, norm_in),
            "mse": error / len(error),  # SAEBench divides by the tokens of the batch where it means the dimensions
            "cossim": dot / (norm_in * norm_out),
            "explained_variance_legacy": 1 - error / (x_TD - x_TD.mean(0)).square().sum(-1).double(),
            "error": error,
            "x_square": norm_in.square(),
            "around_centre": (x_TD - self.centre_D).square().sum(-1).double(),
            "tokens": torch.ones_like(error),
        }
        per_batch = {
            "bias": norm_out.square().mean() / dot.mean(),
            "batch_error": error.mean(),
            "batch_square": norm_in.square().mean(),
        }
        for name, numbers in (per_token | per_batch).items():
            self.sums[name] += float(numbers.sum())
        sums = torch.zeros(contexts, len(PER_CONTEXT), dtype=torch.float64)
        columns = torch.stack([per_token[name] for name in PER_CONTEXT], 1)
        self.contexts.append(sums.index_add_(0, context_T.cpu(), columns.cpu()))
        self.sums["x"] += x_TD.double().sum(0)
        self.tokens += len(error)
        self.batches += 1

    def scalars(self, mode: str) -> dict[str, dict[str, float]]:
        s, d_in = self.sums, len(self.sums["x"])

        def mean(*names: str) -> dict[str, float]:
            return {name: s[name] / self.tokens for name in names}

        square = s["batch_square"] / self.batches
        quality = {
            # What 0.6.0 calls explained_variance subtracts the wrong mean; its legacy formula is the published one.
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

    def about_the_mean(self, interval: list[float], fve: float) -> list[float]:
        """That of the share about the first batch's mean, which alone is known in time -> that of `fve`."""
        around = self.sums["around_centre"]
        half = (interval[1] - interval[0]) / 2 * divide(around, self.variance)
        return [fve - half, fve + half]

    def shares(self) -> dict[str, dict[str, Ratio]]:
        """What has an interval."""
        column = dict(zip(PER_CONTEXT, torch.cat(self.contexts).T, strict=True))
        tokens = column["tokens"]
        unexplained = column["around_centre"] - column["error"], column["around_centre"]
        return {
            "reconstruction_quality": {"fve": unexplained, "cossim": (column["cossim"], tokens)},
            "sparsity": {"l0": (column["l0"], tokens)},
        }

    def density(self) -> Tensor:
        """Share of the counted tokens at which each latent is positive (F,)."""
        return self.sums["fired"] / self.tokens

    def correlation(self, W_dec_FD: Tensor | None) -> dict[str, float]:
        """Cosines between the columns of activations of alive latents, over PAIRED_TOKENS counted tokens (003, eq. 2).

        With decoder rows, how well those cosines follow the rows' own (002, sec. 4): Spearman's rank correlation.
        """
        gram_FF = self.sums["gram"]
        alive = gram_FF.diagonal() > 0
        counts = {"latents": int(alive.sum()), "latents_dead": int((~alive).sum())}
        cosines = upper_triangle(gram_cosines(gram_FF[alive][:, alive]))
        if not len(cosines):
            return {"mean": math.nan, **counts}
        found = {**distribution(cosines.abs()), **counts}
        if W_dec_FD is not None:
            assert self.pairs is not None
            rows = W_dec_FD[self.pairs][alive].double()
            found["spearman_decoder"] = spearman(cosines, upper_triangle(gram_cosines(rows @ rows.T)))
        return found


def gram_cosines(gram_FF: Tensor) -> Tensor:
    norm_F = gram_FF.diagonal().sqrt()
    return gram_FF / norm_F[:, None] / norm_F


def upper_triangle(matrix_FF: Tensor) -> Tensor:
    """Above the diagonal: every pair once."""
    return matrix_FF[tuple(torch.triu_indices(len(matrix_FF), len(matrix_FF), 1))]


def distribution(numbers: Tensor) -> dict[str, float]:
    shares = {"quantile_50": 0.5, "quantile_90": 0.9, "quantile_99": 0.99, "quantile_99.9": 0.999}
    places = {name: share * (len(numbers) - 1) for name, share in shares.items()}
    # Only these places are put in order: torch.quantile takes 16 million numbers at most, and a sort takes several times as long.
    ends = sorted({end for place in places.values() for end in (math.floor(place), math.ceil(place))})
    ordered = dict(zip(ends, np.partition(numbers.detach().cpu().numpy(), ends)[ends].tolist(), strict=True))

    def quantile(place: float) -> float:
        below, above = ordered[math.floor(place)], ordered[math.ceil(place)]
        return below + (place - math.floor(place)) * (above - below)

    spread = {"mean": float(numbers.mean()), "sd": float(numbers.std(correction=0))}
    return spread | {name: quantile(place) for name, place in places.items()}


def spearman(a: Tensor, b: Tensor) -> float:
    """Pearson's correlation of the ranks; those that are equal share their mean rank."""

    def ranks(numbers: Tensor) -> Tensor:
        _, group, count = numbers.unique(return_inverse=True, return_counts=True)
        last = count.cumsum(0).double()
        return (last - (count - 1) / 2)[group]

    ranked = torch.stack([ranks(a), ranks(b)])
    return float(ranked.corrcoef()[0, 1])


def decoder_geometry(W_dec_FD: Tensor) -> dict[str, float]:
    """Of the decoder rows: |cosine| of pairs, and effective rank, exp of the entropy of their singular values' shares.

    Both are of unit rows, so that a row's length does not count; Roy and Vetterli 2007.
    """
    unit_FD = torch.nn.functional.normalize(W_dec_FD.float(), dim=1)
    some = unit_FD[torch.randperm(len(unit_FD), generator=torch.Generator().manual_seed(0))[:PAIRED_LATENTS]]
    share = torch.linalg.eigvalsh((unit_FD.T @ unit_FD).double()).clamp(min=0).sqrt()
    share = share / share.sum()
    spread = distribution(upper_triangle(some @ some.T).abs()) if len(some) > 1 else {}
    return {
        **{f"decoder_cosine_{name}": number for name, number in spread.items()},
        "effective_rank": float(torch.special.entr(share).sum().exp()),
    }


def largest_other_cosine(rows_FD: Tensor, block: int = 4096) -> Tensor:
    """For each row, its largest cosine with another row (F,)."""
    unit = torch.nn.functional.normalize(rows_FD.float(), dim=1)
    found = []
    for start in range(0, len(unit), block):
        cosine = unit[start : start + block] @ unit.T
        cosine[torch.arange(len(cosine)), torch.arange(start, start + len(cosine))] = -torch.inf
        found.append(cosine.amax(1))
    return torch.cat(found)


def latent_details(sae: SAE, codes: SAEStatistics) -> list[dict[str, Any]]:
    """One entry per latent, numbers rounded to ten decimals as SAEBench does."""
    encoder, decoder = sae.W_enc.T.float(), sae.W_dec.float()
    columns = {
        "feature_density": codes.density(),
        "consistent_activation_heuristic": codes.sums["fired"] / codes.sums["contexts_fired"],
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
    """Summaries of the entries per latent."""

    def mass_over(cut: float) -> float:
        total = float(density.sum())
        return float(density[density > cut].sum()) / total if total else 0.0

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
