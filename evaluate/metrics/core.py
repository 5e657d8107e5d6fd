"""Core: what an SAE costs the model (KL, CE), how well it reconstructs, how sparse and how correlated its latents are.

The names and definitions are SAEBench's; where one of them is not what its name says, the correct number stands beside
it under another name (`fve`, `mse_elementwise`). The text is not: contexts are the cache's, of one document each unless
it was packed, so `mse`, which SAEBench divides by the tokens of a batch, compares within a text only. Positions of pad,
eos and bos keep their residual and are not counted.

Shape suffixes: N contexts, S positions, T counted tokens, D d_in, F latents, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...common.errors import UsageError
from ...harvest.model import ForwardPass, LanguageModel
from ...train.sae import SAE
from ..context import ContextBatch, EvalContext
from .base import EvalTarget, Metric, MetricColumn, MetricResult, Outcome, Progress
from .sae_statistics import (
    TOKENS_PER_CHUNK,
    Ratio,
    SAEStatistics,
    decoder_geometry,
    density_summary,
    latent_details,
    ratio_interval,
    ratio_value,
    sum_by_document,
)

MOSTLY_DEAD = 0.5  # share of latents that never fire, from which on a flag says so


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
    columns = (
        MetricColumn("L0", "sparsity", "l0", ".1f"),
        MetricColumn("KL score", "model_behavior_preservation", "kl_div_score", ".4f", "up", 0, 1),
        MetricColumn("KL", "model_behavior_preservation", "kl_div_with_sae", ".4f", "down", 0),
        MetricColumn("CE score", "model_performance_preservation", "ce_loss_score", ".4f", "up", 0, 1),
        MetricColumn("EV", "reconstruction_quality", "fve", ".4f", "up", 0, 1),
        MetricColumn("cosine", "reconstruction_quality", "cossim", ".3f", "up", 0, 1),
        MetricColumn("alive", "misc_metrics", "frac_alive", ".3f", "up", 0, 1),
        MetricColumn("corr", "correlation", "mean", ".4f", "down", 0, 1),
        MetricColumn("corr 99.9%", "correlation", "quantile_99.9", ".3f", "down", 0, 1),
    )

    def settings(self, ctx: EvalContext) -> dict[str, Any]:
        return {**super().settings(ctx), **ctx.text_identity}

    @torch.no_grad()
    def measure(self, ctx: EvalContext, targets: Sequence[EvalTarget], progress: Progress) -> list[Outcome]:
        for name in ("batch_contexts", "reconstruction_batches", "sparsity_batches"):
            if (number := getattr(self, name)) < 1:
                raise UsageError(f"core.{name}={number}: give 1 or more.")
        batches = [batch for batch in ctx.batches(self.batch_contexts, self.sparsity_batches) if batch.counted.any()]
        if not batches:
            raise UsageError(
                "Nothing of the held-out text counts: its tokens are all pad, eos or bos. Harvest other text."
            )
        layers = sorted({target.layer for target in targets})
        own, ablated = SpliceLoss(), {layer: SpliceLoss() for layer in layers}
        spliced, codes = [SpliceLoss() for _ in targets], [SAEStatistics() for _ in targets]
        constant_D: dict[int, Tensor] = {}
        for number, batch in enumerate(batches):
            behaves = number < self.reconstruction_batches
            run = ctx.model.forward(batch.ids, layers) if behaves else None
            residual = run.residual if run else ctx.model.capture(batch.ids, layers)
            finals = []  # of each subject: what the model ends with when it has seen this SAE's reconstruction
            for target, code in zip(targets, codes, strict=True):
                patched = code.add(target, residual[target.layer], batch.counted)
                if run:
                    finals.append(run.run_from(target.layer, patched)[batch.counted])
            if run:
                zeroed = [zero_ablated_output(run, layer, batch, constant_D) for layer in layers]
                losses = [own, *ablated.values(), *spliced]
                add_losses(ctx.model, batch, losses, [run.final[batch.counted], *zeroed, *finals])
            progress(number + 1, len(batches), "batches")
        read = [int(batch.is_token.sum()) for batch in batches]
        tokens = {
            "total_tokens_eval_reconstruction": sum(read[: self.reconstruction_batches]),
            "total_tokens_eval_sparsity_variance": sum(read),
        }
        document_N = torch.cat([batch.document for batch in batches])
        return [
            build_result(ctx.mode, target, own, ablated[target.layer], loss, code, tokens, document_N)
            for target, loss, code in zip(targets, spliced, codes, strict=True)
        ]


def zero_ablated_output(run: ForwardPass, layer: int, batch: ContextBatch, constant_D: dict[int, Tensor]) -> Tensor:
    """What the model ends with at the counted positions (T, D) when a layer is zeroed at every position.

    Attention over equal values gives that value, so nothing tells positions apart any more, nor texts: where the first
    batch shows it, its one end serves all.
    """
    if layer not in constant_D:
        end_TD = run.run_from(layer, torch.zeros_like(run.residual[layer]))[batch.counted]
        if not (end_TD == end_TD[:1]).all():
            return end_TD
        constant_D[layer] = end_TD[0]
    return constant_D[layer].expand(int(batch.counted.sum()), -1)


def add_losses(
    model: LanguageModel, batch: ContextBatch, losses: Sequence["SpliceLoss"], finals_TD: Sequence[Tensor]
) -> None:
    """Add what the model predicts at the counted positions to each loss. The first is the model's own, the truth.

    An end that is the same at all positions is unembedded once.
    """
    context_T, position_T = batch.counted.nonzero(as_tuple=True)
    next_T = batch.ids.roll(-1, 1)[batch.counted]
    # Of the last token of a context none is known.
    has_next_T = position_T + 1 < batch.is_token.sum(1)[context_T]
    constant = [final.stride(0) == 0 for final in finals_TD]
    for loss in losses:
        loss.begin(len(batch.ids))
    for start in range(0, len(context_T), TOKENS_PER_CHUNK):
        rows = slice(start, start + TOKENS_PER_CHUNK)
        true_TV = model.unembed(finals_TD[0][rows]).float().log_softmax(-1)
        p_TV = true_TV.exp()
        for loss, final_TD, same in zip(losses, finals_TD, constant, strict=True):
            logp_TV = model.unembed(final_TD[:1] if same else final_TD[rows]).float().log_softmax(-1)
            kl_T = torch.linalg.vecdot(p_TV, true_TV - logp_TV)
            ce_T = -logp_TV.expand_as(p_TV).gather(1, next_T[rows, None])[:, 0]
            loss.add(context_T[rows], kl_T, ce_T, has_next_T[rows])


class SpliceLoss:
    """Of each context, over its counted positions, in nats: KL(original || these logits), and CE of the next token."""

    def __init__(self) -> None:
        self.contexts: list[Tensor] = []  # of each batch: (N, 4), sums of KL and of CE, and how many of each

    def begin(self, contexts: int) -> None:
        self.contexts.append(torch.zeros(contexts, 4, dtype=torch.float64))

    def add(self, context_T: Tensor, kl_T: Tensor, ce_T: Tensor, has_next_T: Tensor) -> None:
        columns = [kl_T, torch.where(has_next_T, ce_T, 0), torch.ones_like(kl_T), has_next_T]
        numbers = torch.stack([column.double() for column in columns], 1).cpu()
        self.contexts[-1].index_add_(0, context_T.cpu(), numbers)

    @property
    def sums(self) -> Tensor:
        """(4, contexts): KL, CE, tokens, tokens with a next one."""
        return torch.cat(self.contexts).T


def loss_ratios(own: SpliceLoss, ablated: SpliceLoss, spliced: SpliceLoss) -> dict[str, dict[str, Ratio]]:
    """Raw divergences and losses (lower is better), and scores: 1 is the model's own, 0 that of a zeroed layer."""
    _, ce_own, tokens, targets = own.sums
    (kl_zero, ce_zero, *_), (kl, ce, *_) = ablated.sums, spliced.sums
    return {
        "model_behavior_preservation": {
            "kl_div_score": (kl_zero - kl, kl_zero),
            "kl_div_with_ablation": (kl_zero, tokens),
            "kl_div_with_sae": (kl, tokens),
        },
        "model_performance_preservation": {
            "ce_loss_score": (ce_zero - ce, ce_zero - ce_own),
            "ce_loss_with_ablation": (ce_zero, targets),
            "ce_loss_with_sae": (ce, targets),
            "ce_loss_without_sae": (ce_own, targets),
        },
    }


def build_result(
    mode: str, target: EvalTarget, own: SpliceLoss, ablated: SpliceLoss, loss: SpliceLoss, codes: SAEStatistics, tokens: dict[str, int],
    document_N: Tensor,
) -> MetricResult:  # fmt: skip
    shares = loss_ratios(own, ablated, loss)
    behaviour = {name: {key: ratio_value(share) for key, share in group.items()} for name, group in shares.items()}
    W_dec_FD = getattr(target.sae, "W_dec", None)
    metrics = {
        **behaviour,
        **codes.scalars(mode),
        "token_stats": dict(tokens),
        "correlation": codes.correlation(W_dec_FD),
    }
    if W_dec_FD is not None:
        metrics["dictionary"] = decoder_geometry(W_dec_FD)
    details = latent_details(target.sae, codes) if isinstance(target.sae, SAE) else []
    if details and mode != "2024-12":  # added to SAEBench in January 2025
        metrics["misc_metrics"] = density_summary(codes.density(), details)
    intervals = {
        name: {key: ratio_interval(sum_by_document(share, document_N)) for key, share in group.items()}
        for name, group in (shares | codes.shares()).items()
    }
    quality = intervals["reconstruction_quality"]
    quality["fve"] = codes.about_the_mean(quality["fve"], metrics["reconstruction_quality"]["fve"])
    n = {"documents": len(document_N.unique()), "contexts": len(own.sums[0]), "tokens": codes.tokens}
    return MetricResult.of(metrics, details, intervals=intervals, n=n, flags=core_flags(target, metrics, codes))


def core_flags(target: EvalTarget, metrics: dict[str, dict[str, float]], codes: SAEStatistics) -> list[str]:
    """What makes a number mean less than it seems to. The references are what they are, and get none."""
    if target.reference:
        return []
    found = []
    dead = float((codes.density() == 0).double().mean())
    if metrics["sparsity"]["l0"] == 0:
        found.append("L0 is 0: no latent ever fires, so the SAE is its decoder bias.")
    elif dead > MOSTLY_DEAD:
        found.append(f"{dead:.0%} of the latents never fire on this text.")
    if metrics["reconstruction_quality"]["fve"] < 0:
        found.append("The explained variance is negative: the mean alone would reconstruct better.")
    return found
