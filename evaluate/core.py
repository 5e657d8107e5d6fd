"""Core: what an SAE costs the model (KL, CE), how well it reconstructs, how sparse and how correlated its latents are.

The names and definitions are SAEBench's; where one of them is not what its name says, the correct number stands beside
it under another name (`fve`, `mse_elementwise`). The text is not: contexts hold one document each and are not packed,
so `mse`, which SAEBench divides by the tokens of a batch, compares within a text only. Positions of pad, eos and bos keep their residual and are not counted.

Shape suffixes: N contexts, S positions, T counted tokens, C those of them with a next token, D d_in, F latents,
V vocabulary.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from ..cache.errors import UsageError
from ..train.sae import SAE
from .bench import Batch, Bench
from .metric import Metric, Number, Outcome, Progress, Result, Subject

# Through the model: logits are (4, S, V), half a gigabyte for Gemma, and in a CPU's cache for gemma-2-mini.
CONTEXTS_AT_ONCE = 4
DENSE_PAIRS = 4096  # latents whose pairs are all correlated; of a larger dictionary that many are drawn


@dataclass(frozen=True)
class Core(Metric):
    """Batches are of `batch_contexts` contexts; KL and CE are taken on the first `reconstruction_batches` of them.

    SAEBench's sparsity batches begin where its reconstruction batches stop; held-out text is short, so ours overlap.
    """

    batch_contexts: int = 16
    reconstruction_batches: int = 200
    sparsity_batches: int = 2000

    name = "core"
    type_id = "core"
    title = "core, on held-out text (KL and CE scores: 0 is a zeroed layer, 1 the model alone)"
    numbers = (
        Number("L0", "sparsity", "l0", ".1f"),
        Number("KL score", "model_behavior_preservation", "kl_div_score", ".4f", "up", 0, 1),
        Number("KL", "model_behavior_preservation", "kl_div_with_sae", ".4f", "down", 0),
        Number("CE score", "model_performance_preservation", "ce_loss_score", ".4f", "up", 0, 1),
        Number("EV", "reconstruction_quality", "fve", ".4f", "up", 0, 1),
        Number("cosine", "reconstruction_quality", "cossim", ".3f", "up", 0, 1),
        Number("alive", "misc_metrics", "frac_alive", ".3f", "up", 0, 1),
        Number("corr", "correlation", "mean", ".4f", "down", 0, 1),
        Number("corr 99.9%", "correlation", "quantile_99.9", ".3f", "down", 0, 1),
    )

    def settings(self, bench: Bench) -> dict[str, Any]:
        return {**super().settings(bench), **bench.text}

    @torch.no_grad()
    def measure(self, bench: Bench, subjects: Sequence[Subject], progress: Progress) -> list[Outcome]:
        batches = [batch for batch in bench.batches(self.batch_contexts, self.sparsity_batches) if batch.kept.any()]
        if not batches:
            raise UsageError(
                "Nothing of the held-out text counts: its tokens are all pad, eos or bos. Harvest other text."
            )
        layers = sorted({subject.layer for subject in subjects})
        own, ablated = Loss(), {layer: Loss() for layer in layers}
        spliced, codes = [Loss() for _ in subjects], [Codes() for _ in subjects]
        for number, batch in enumerate(batches):
            x_TD: dict[int, list[Tensor]] = {layer: [] for layer in layers}
            for part in batch.parts(CONTEXTS_AT_ONCE):
                behaves = number < self.reconstruction_batches
                run = bench.model.forward(part.ids, layers) if behaves else None
                residual = run.residual if run else bench.model.capture(part.ids, layers)
                if run:
                    truth = Truth.of(part, run.logits)
                    own.add(truth, run.logits)
                    for layer in layers:
                        ablated[layer].add(truth, run.suffix(layer, torch.zeros_like(residual[layer])))
                for layer in layers:
                    x_TD[layer].append(residual[layer][part.kept].float())
                for subject, loss, code in zip(subjects, spliced, codes, strict=True):
                    x_NSD = residual[subject.layer]
                    replaced = torch.ones_like(part.kept) if subject.everywhere else part.kept
                    counted = part.kept[replaced]
                    f = subject.sae.encode(x_NSD[replaced].float())
                    recon = subject.sae.decode(f)
                    code.add(x_TD[subject.layer][-1], f[counted], recon[counted].float(), part.kept)
                    if run:
                        patched = x_NSD.clone()
                        patched[replaced] = recon.to(x_NSD.dtype)
                        loss.add(truth, run.suffix(subject.layer, patched))
            for subject, code in zip(subjects, codes, strict=True):
                code.end_batch(torch.cat(x_TD[subject.layer]))
            progress(number + 1, len(batches), "batches")
        read = [int(batch.inside.sum()) for batch in batches]
        tokens = {
            "total_tokens_eval_reconstruction": sum(read[: self.reconstruction_batches]),
            "total_tokens_eval_sparsity_variance": sum(read),
        }
        return [
            result(bench.mode, subject, scores(own, ablated[subject.layer], loss), code, tokens)
            for subject, loss, code in zip(subjects, spliced, codes, strict=True)
        ]


@dataclass(frozen=True)
class Truth:
    """What the model alone predicts at the counted positions of some contexts, and what comes next there."""

    kept_NS: Tensor
    logp_TV: Tensor
    p_TV: Tensor
    row_C: Tensor  # those of the T rows that have a next token; of the last token of a context none is known
    target_C: Tensor

    @classmethod
    def of(cls, part: Batch, logits_NSV: Tensor) -> Self:
        has_next = torch.zeros_like(part.kept)
        has_next[:, :-1] = part.inside[:, 1:]
        logp_TV = logits_NSV[part.kept].float().log_softmax(-1)
        target_T = part.ids.roll(-1, 1)[part.kept]
        row_C = has_next[part.kept].nonzero().squeeze(1)
        return cls(part.kept, logp_TV, logp_TV.exp(), row_C, target_T[row_C])


class Loss:
    """Means over the counted positions, in nats: KL(original || these logits), and CE of the next token."""

    def __init__(self) -> None:
        self.kl_sum, self.ce_sum, self.kl_count, self.ce_count = 0.0, 0.0, 0, 0

    def add(self, truth: Truth, logits_NSV: Tensor) -> None:
        logp_TV = logits_NSV[truth.kept_NS].float().log_softmax(-1)
        self.ce_sum -= float(logp_TV[truth.row_C, truth.target_C].sum(dtype=torch.float64))
        self.kl_sum += float(torch.linalg.vecdot(truth.p_TV, truth.logp_TV - logp_TV).sum(dtype=torch.float64))
        self.kl_count += len(logp_TV)
        self.ce_count += len(truth.row_C)

    @property
    def kl(self) -> float:
        return ratio(self.kl_sum, self.kl_count)

    @property
    def ce(self) -> float:
        return ratio(self.ce_sum, self.ce_count)


def ratio(part: float, whole: float) -> float:
    """part / whole; NaN where there is no whole: a text of one token has neither a variance nor a next token."""
    return part / whole if whole else math.nan


def scores(own: Loss, ablated: Loss, spliced: Loss) -> dict[str, dict[str, float]]:
    """Raw divergences and losses (lower is better), and scores: 1 is the model's own, 0 that of a zeroed layer."""
    return {
        "model_behavior_preservation": {
            "kl_div_score": ratio(ablated.kl - spliced.kl, ablated.kl),
            "kl_div_with_ablation": ablated.kl,
            "kl_div_with_sae": spliced.kl,
        },
        "model_performance_preservation": {
            "ce_loss_score": ratio(ablated.ce - spliced.ce, ablated.ce - own.ce),
            "ce_loss_with_ablation": ablated.ce,
            "ce_loss_with_sae": spliced.ce,
            "ce_loss_without_sae": own.ce,
        },
    }


class Codes:
    """Reconstruction, sparsity and correlation over the counted tokens, summed in float64.

    Numbers that SAEBench takes per batch wait until its last part was added (`end_batch`).
    """

    def __init__(self) -> None:
        self.sums: defaultdict[str, Any] = defaultdict(float)
        self.tokens = self.batches = 0
        self.parts: list[Tensor] = []  # of the batch: (T, 5), what is one number a token
        self.pairs: Tensor | None = None  # which latents are correlated with each other

    def add(self, x_TD: Tensor, f_TF: Tensor, recon_TD: Tensor, kept_NS: Tensor) -> None:
        numbers = [
            (f_TF != 0).sum(-1),
            f_TF.sum(-1),
            recon_TD.norm(dim=-1),
            (x_TD - recon_TD).square().sum(-1),
            (x_TD * recon_TD).sum(-1),
        ]
        self.parts.append(torch.stack([number.double() for number in numbers], 1))
        fired_TF, context_T = f_TF > 0, kept_NS.nonzero()[:, 0]
        fired_NF = torch.zeros(len(kept_NS), f_TF.shape[1], device=f_TF.device)
        fired_NF.index_add_(0, context_T, fired_TF.float())
        self.sums["fired"] += fired_NF.double().sum(0)
        self.sums["contexts_fired"] += (fired_NF > 0).double().sum(0)
        if self.pairs is None:
            generator = torch.Generator().manual_seed(0)
            self.pairs = torch.randperm(f_TF.shape[1], generator=generator)[:DENSE_PAIRS].sort().values.to(f_TF.device)
        chosen = f_TF[:, self.pairs]
        self.sums["gram"] += (chosen.T @ chosen).double()

    def end_batch(self, x_TD: Tensor) -> None:
        l0, l1, norm_out, error, dot = torch.cat(self.parts).unbind(1)
        norm_in = x_TD.norm(dim=-1).double()
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
        }
        per_batch = {
            "bias": norm_out.square().mean() / dot.mean(),
            "batch_error": error.mean(),
            "batch_square": norm_in.square().mean(),
        }
        for name, value in (per_token | per_batch).items():
            self.sums[name] += float(value.sum())
        self.sums["x"] += x_TD.double().sum(0)
        self.tokens += len(error)
        self.batches += 1
        self.parts = []

    def scalars(self, mode: str) -> dict[str, dict[str, float]]:
        s, d_in = self.sums, len(self.sums["x"])

        def mean(*names: str) -> dict[str, float]:
            return {name: s[name] / self.tokens for name in names}

        square = s["batch_square"] / self.batches
        variance = s["x_square"] - float(s["x"].square().sum()) / self.tokens
        quality = {
            # What 0.6.0 calls explained_variance subtracts the wrong mean; its legacy formula is the published one.
            "explained_variance": 1 - ratio(s["batch_error"] / self.batches, square - (square / d_in) ** 2),
            **mean("explained_variance_legacy", "mse", "cossim"),
            "fve": 1 - ratio(s["error"], variance),
            "mse_elementwise": s["error"] / self.tokens / d_in,
        }
        if mode == "2024-12":
            quality["explained_variance"] = quality.pop("explained_variance_legacy")
        bias = {"relative_reconstruction_bias": s["bias"] / self.batches}
        return {
            "reconstruction_quality": quality,
            "shrinkage": mean("l2_norm_in", "l2_norm_out", "l2_ratio") | bias,
            "sparsity": mean("l0", "l1"),
        }

    def density(self) -> Tensor:
        """Share of the counted tokens at which each latent is positive (F,)."""
        return self.sums["fired"] / self.tokens

    def correlation(self) -> dict[str, float]:
        """Cosines between the columns of activations of alive latents over the counted tokens (003, eq. 2)."""
        gram_FF = self.sums["gram"]
        alive = gram_FF.diagonal() > 0
        unit_FF = gram_FF[alive][:, alive]
        norm_F = unit_FF.diagonal().sqrt()
        unit_FF = unit_FF / norm_F[:, None] / norm_F
        cosines = unit_FF[tuple(torch.triu_indices(len(unit_FF), len(unit_FF), 1))].abs()
        counts = {"latents": int(alive.sum()), "latents_dead": int((~alive).sum())}
        if not len(cosines):
            return {"mean": math.nan, **counts}
        shares = {"quantile_50": 0.5, "quantile_90": 0.9, "quantile_99": 0.99, "quantile_99.9": 0.999}
        quantiles = torch.quantile(cosines, cosines.new_tensor(list(shares.values()))).tolist()
        spread = {"mean": float(cosines.mean()), "sd": float(cosines.std(correction=0))}
        return {**spread, **dict(zip(shares, quantiles, strict=True)), **counts}


def result(
    mode: str, subject: Subject, behaviour: dict[str, dict[str, float]], codes: Codes, tokens: dict[str, float]
) -> Result:
    metrics = {**behaviour, **codes.scalars(mode), "token_stats": tokens, "correlation": codes.correlation()}
    details = per_latent(subject.sae, codes) if isinstance(subject.sae, SAE) else []
    if details and mode != "2024-12":  # added to SAEBench in January 2025
        metrics["misc_metrics"] = misc(codes.density(), details)
    return Result.of(metrics, details)


def largest_other_cosine(rows_FD: Tensor, block: int = 4096) -> Tensor:
    """For each row, its largest cosine with another row (F,)."""
    unit = torch.nn.functional.normalize(rows_FD.float(), dim=1)
    found = []
    for start in range(0, len(unit), block):
        cosine = unit[start : start + block] @ unit.T
        cosine[torch.arange(len(cosine)), torch.arange(start, start + len(cosine))] = -torch.inf
        found.append(cosine.amax(1))
    return torch.cat(found)


def per_latent(sae: SAE, codes: Codes) -> list[dict[str, Any]]:
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


def misc(density: Tensor, details: list[dict[str, Any]]) -> dict[str, float]:
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
