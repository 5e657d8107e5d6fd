"""Core: what an SAE costs the model (KL, CE), how well it reconstructs, how sparse and how correlated its latents are.

The names and definitions are SAEBench's; where one of them is not what its name says, the correct number stands beside
it under another name (`fve`, `mse_elementwise`). Positions of pad, eos and bos keep their residual and are not counted.

Shape suffixes: N contexts, S positions, T counted tokens, D d_in, F latents, V vocabulary.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..cache.errors import UsageError
from .metric import Bench, Coder, Metric, Result, Subject

DENSE_PAIRS = 4096  # latents whose pairs are all correlated; of a larger dictionary that many are drawn


@dataclass(frozen=True)
class Core(Metric):
    """Batches are of `batch_contexts` contexts; KL and CE are taken on the first `reconstruction_batches` of them."""

    batch_contexts: int = 16
    reconstruction_batches: int = 200
    sparsity_batches: int = 2000

    name = "core"
    type_id = "core"

    @torch.no_grad()
    def measure(
        self, bench: Bench, subjects: Mapping[str, Subject], progress: Callable[[int, int], None]
    ) -> dict[str, Result]:
        if not len(bench.contexts):
            raise UsageError(
                "The cache holds no held-out text to evaluate on. Harvest with --held-out above 0, or more text."
            )
        layers = sorted({subject.layer for subject in subjects.values()})
        behaviour = {name: Behaviour() for name in subjects}
        codes = {name: Codes(subject.sae) for name, subject in subjects.items()}
        total = min(self.sparsity_batches, -(-len(bench.contexts) // self.batch_contexts))
        for number, (ids, kept) in enumerate(bench.batches(self.batch_contexts, self.sparsity_batches)):
            if number < self.reconstruction_batches:
                run = bench.model.forward(ids, layers)
                original, residual = run.logits.float().log_softmax(-1), run.residual
                ablated = {
                    layer: run.suffix(layer, torch.zeros_like(residual[layer])).float().log_softmax(-1)
                    for layer in layers
                }
            else:
                run, residual = None, bench.model.capture(ids, layers)
            for name, subject in subjects.items():
                x = residual[subject.layer]
                f_NSF = subject.sae.encode(x.float())
                recon = subject.sae.decode(f_NSF)
                codes[name].add(x.float(), f_NSF, recon, kept)
                if run is not None:
                    patched = (
                        recon.to(x.dtype) if subject.everywhere else torch.where(kept[..., None], recon.to(x.dtype), x)
                    )
                    spliced = run.suffix(subject.layer, patched).float().log_softmax(-1)
                    behaviour[name].add(ids, kept, original, spliced, ablated[subject.layer])
            progress(number + 1, total)
        return {name: self._result(bench, subjects[name], behaviour[name], codes[name]) for name in subjects}

    def _result(self, bench: Bench, subject: Subject, behaviour: "Behaviour", codes: "Codes") -> Result:
        reconstruction, shrinkage, sparsity = codes.scalars(bench.mode)
        metrics = {
            **behaviour.scores(),
            "reconstruction_quality": reconstruction,
            "shrinkage": shrinkage,
            "sparsity": sparsity,
            "token_stats": {
                "total_tokens_eval_reconstruction": behaviour.sums["positions"],
                "total_tokens_eval_sparsity_variance": codes.sums["positions"],
            },
            "correlation": codes.correlation(),
        }
        details = per_latent(subject.sae, codes) if hasattr(subject.sae, "W_dec") else []
        if details and bench.mode != "2024-12":  # added to SAEBench in January 2025
            metrics["misc_metrics"] = misc(codes.density(), details)
        return Result(metrics, details)


class Behaviour:
    """KL and CE of the model with the SAE in place, against the model alone and the model without the layer."""

    def __init__(self) -> None:
        self.sums: defaultdict[str, float] = defaultdict(float)

    def add(self, ids_NS: Tensor, kept_NS: Tensor, original: Tensor, spliced: Tensor, ablated: Tensor) -> None:
        """Log-probabilities (N, S, V). KL(original || other) at counted positions; CE where a next token exists too."""
        p, sums = original.exp(), self.sums
        for name, other in (("kl_sae", spliced), ("kl_ablation", ablated)):
            sums[name] += float((p * (original - other)).sum(-1)[kept_NS].sum(dtype=torch.float64))
        # The target of the last real position is padding: a position counts while the next one is inside its context.
        inside = kept_NS.flip(1).cummax(1).values.flip(1)[:, 1:] & kept_NS[:, :-1]
        for name, logp in (("ce", original), ("ce_sae", spliced), ("ce_ablation", ablated)):
            target = logp[:, :-1].gather(-1, ids_NS[:, 1:, None]).squeeze(-1)
            sums[name] -= float(target[inside].sum(dtype=torch.float64))
        sums["kl_count"] += int(kept_NS.sum())
        sums["ce_count"] += int(inside.sum())
        sums["positions"] += ids_NS.numel()

    def scores(self) -> dict[str, dict[str, float]]:
        """Raw divergences and losses in nats (lower is better), and scores: 1 is the model's own, 0 a zeroed layer."""
        s = self.sums
        kl_sae, kl_ablation = s["kl_sae"] / s["kl_count"], s["kl_ablation"] / s["kl_count"]
        ce, ce_sae, ce_ablation = (s[name] / s["ce_count"] for name in ("ce", "ce_sae", "ce_ablation"))
        return {
            "model_behavior_preservation": {
                "kl_div_score": (kl_ablation - kl_sae) / kl_ablation,
                "kl_div_with_ablation": kl_ablation,
                "kl_div_with_sae": kl_sae,
            },
            "model_performance_preservation": {
                "ce_loss_score": (ce_ablation - ce_sae) / (ce_ablation - ce),
                "ce_loss_with_ablation": ce_ablation,
                "ce_loss_with_sae": ce_sae,
                "ce_loss_without_sae": ce,
            },
        }


class Codes:
    """Reconstruction, sparsity and correlation, accumulated over batches in float64."""

    def __init__(self, sae: Coder) -> None:
        self.sae = sae
        self.sums: defaultdict[str, Any] = defaultdict(float)
        self.batches = 0
        self.pairs: Tensor | None = None  # which latents are correlated with each other

    def add(self, x_NSD: Tensor, f_NSF: Tensor, recon_NSD: Tensor, kept_NS: Tensor) -> None:
        x, f, recon, sums = x_NSD[kept_NS], f_NSF[kept_NS], recon_NSD[kept_NS].float(), self.sums
        error, count = (x - recon).square().sum(-1), len(x)
        norm_in, norm_out = x.norm(dim=-1), recon.norm(dim=-1)
        per_token = {
            "l0": (f != 0).sum(-1).double(),
            "l1": f.sum(-1),
            "l2_norm_in": norm_in,
            "l2_norm_out": norm_out,
            "l2_ratio": norm_out / torch.where(norm_in < 1e-4, 1.0, norm_in),
            "mse": error / count,  # SAEBench divides by the tokens of the batch where it means the dimensions
            "cossim": (x * recon).sum(-1) / (norm_in * norm_out),
            "explained_variance_legacy": 1 - error / (x - x.mean(0)).square().sum(-1),
            "error": error,
        }
        for name, values in per_token.items():
            sums[name] += float(values.sum(dtype=torch.float64))
        sums["bias"] += float(
            recon.square().sum(-1).mean(dtype=torch.float64) / (x * recon).sum(-1).mean(dtype=torch.float64)
        )
        sums["batch_error"] += float(error.mean(dtype=torch.float64))
        sums["batch_square"] += float(x.square().sum(-1).mean(dtype=torch.float64))
        sums["x"] += x.double().sum(0)
        sums["x_square"] += float(x.double().square().sum())
        sums["tokens"] += count
        sums["positions"] += kept_NS.numel()
        sums["fired"] += (f > 0).sum(0)
        sums["contexts_fired"] += ((f_NSF > 0) & kept_NS[..., None]).any(1).sum(0)
        if self.pairs is None:
            generator = torch.Generator().manual_seed(0)
            self.pairs = torch.randperm(f.shape[-1], generator=generator)[:DENSE_PAIRS].sort().values.to(f.device)
        chosen = f[:, self.pairs]
        sums["gram"] += (chosen.T @ chosen).double()
        self.batches += 1

    def scalars(self, mode: str) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
        s = self.sums
        tokens, d_in = s["tokens"], len(s["x"])
        mean = {
            name: s[name] / tokens
            for name in (
                "l0",
                "l1",
                "l2_norm_in",
                "l2_norm_out",
                "l2_ratio",
                "mse",
                "cossim",
                "explained_variance_legacy",
            )
        }
        variance = s["x_square"] - float(s["x"].square().sum()) / tokens
        square = s["batch_square"] / self.batches
        reconstruction = {
            # What 0.6.0 calls explained_variance subtracts the wrong mean; its legacy formula is the published one.
            "explained_variance": 1 - (s["batch_error"] / self.batches) / (square - (square / d_in) ** 2),
            "explained_variance_legacy": mean["explained_variance_legacy"],
            "mse": mean["mse"],
            "cossim": mean["cossim"],
            "fve": 1 - s["error"] / variance,
            "mse_elementwise": s["error"] / tokens / d_in,
        }
        if mode == "2024-12":
            reconstruction["explained_variance"] = reconstruction.pop("explained_variance_legacy")
        shrinkage = {name: mean[name] for name in ("l2_norm_in", "l2_norm_out", "l2_ratio")}
        return (
            reconstruction,
            {**shrinkage, "relative_reconstruction_bias": s["bias"] / self.batches},
            {"l0": mean["l0"], "l1": mean["l1"]},
        )

    def density(self) -> Tensor:
        """Share of the counted tokens at which each latent is positive (F,)."""
        return self.sums["fired"].double() / self.sums["tokens"]

    def correlation(self) -> dict[str, float]:
        """Cosines between the columns of activations of alive latents over the counted tokens (003, eq. 2)."""
        gram = self.sums["gram"]
        alive = gram.diagonal() > 0
        unit = gram[alive][:, alive]
        unit = unit / unit.diagonal().sqrt()[:, None] / unit.diagonal().sqrt()
        rows, columns = torch.triu_indices(len(unit), len(unit), 1)
        cosines = unit[rows, columns].abs()
        if not len(cosines):
            return {"mean": float("nan"), "latents": int(alive.sum()), "latents_dead": int((~alive).sum())}
        at = torch.quantile(
            cosines[:: max(1, len(cosines) // 1_000_000)],
            torch.tensor([0.5, 0.9, 0.99, 0.999], dtype=cosines.dtype, device=cosines.device),
        )
        return {
            "mean": float(cosines.mean()),
            "sd": float(cosines.std()) if len(cosines) > 1 else 0.0,
            **{f"quantile_{q}": float(v) for q, v in zip(("50", "90", "99", "99.9"), at, strict=True)},
            "latents": int(alive.sum()),
            "latents_dead": int((~alive).sum()),
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


def per_latent(sae: Any, codes: Codes) -> list[dict[str, Any]]:
    """One entry per latent, numbers rounded to ten decimals as SAEBench does."""
    encoder, decoder = sae.W_enc.T.float(), sae.W_dec.float()
    columns = {
        "feature_density": codes.density(),
        "consistent_activation_heuristic": codes.sums["fired"].double() / codes.sums["contexts_fired"],
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
