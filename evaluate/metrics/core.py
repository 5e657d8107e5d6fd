"""The core metric: what splicing in an SAE costs the model (KL, CE), how well the SAE reconstructs, how sparse it is,
and how correlated its latents are.

Higher is better for the KL and CE scores (1: the model alone, 0: the layer zeroed), explained variance, cosine and the
share of alive latents; lower for KL, CE, MSE and correlations.

Names and definitions are those of SAEBench 0.6.0 (`evals/core`). Where a name does not fit its definition, the correct
number is also reported, under another name: `fve` (explained variance), `mse_elementwise`. The text differs: contexts
are the cache's, of one document each unless it was packed. SAEBench divides `mse` by the tokens of a batch, so it is
comparable within one text only. Pad, EOS and BOS positions keep their residual and are not counted.

Shape suffixes: N contexts, S positions, T counted tokens, D d_in, F latents, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...cache.layout import Hook
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

WHOLE_RESIDUAL = ("resid_pre", "resid_mid", "resid_post")  # sites that hold all that later blocks read of the text
MOSTLY_DEAD = 0.5  # share of dead latents above which a flag says so


@dataclass(frozen=True)
class Core(Metric):
    """A batch has `batch_contexts` contexts. KL and CE are measured on the first `reconstruction_batches` batches,
    everything else on the first `sparsity_batches`.

    In SAEBench the sparsity batches start where the reconstruction batches stop; held-out text is short, so here they
    overlap.
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
        batches = self.counted_batches(ctx)
        hooks = sorted({target.hook for target in targets})
        original, ablated = SpliceLoss(), {hook: SpliceLoss() for hook in hooks}
        spliced, statistics = [SpliceLoss() for _ in targets], [SAEStatistics() for _ in targets]
        constant_D: dict[Hook, Tensor] = {}
        for number, batch in enumerate(batches):
            with_loss = number < self.reconstruction_batches
            run = ctx.model.forward(batch.ids, hooks) if with_loss else None
            activations = run.activations if run else ctx.model.capture_hooks(batch.ids, hooks)
            outputs = []  # for each target: the model's final residual after splicing its reconstruction
            for target, stats in zip(targets, statistics, strict=True):
                patched = stats.add(target, activations[target.hook], batch.counted)
                if run:
                    outputs.append(run.run_from(target.hook, patched)[batch.counted])
            if run:
                zeroed = [zero_ablated_output(run, hook, batch, constant_D) for hook in hooks]
                losses = [original, *ablated.values(), *spliced]
                add_losses(ctx.model, batch, losses, [run.final[batch.counted], *zeroed, *outputs])
            progress(number + 1, len(batches), "batches")
        token_counts = [int(batch.is_token.sum()) for batch in batches]
        tokens: dict[str, float | None] = {
            "total_tokens_eval_reconstruction": sum(token_counts[: self.reconstruction_batches]),
            "total_tokens_eval_sparsity_variance": sum(token_counts),
        }
        document_N = torch.cat([batch.document for batch in batches])
        return [
            build_result(ctx.mode, target, original, ablated[target.hook], loss, stats, tokens, document_N)
            for target, loss, stats in zip(targets, spliced, statistics, strict=True)
        ]

    def counted_batches(self, ctx: EvalContext) -> list[ContextBatch]:
        """The batches that contain a counted token. Raises UsageError for invalid options or if there are none."""
        for name in ("batch_contexts", "reconstruction_batches", "sparsity_batches"):
            if (value := getattr(self, name)) < 1:
                raise UsageError(f"core.{name}={value}: give 1 or more.")
        batches = [batch for batch in ctx.batches(self.batch_contexts, self.sparsity_batches) if batch.counted.any()]
        if not batches:
            raise UsageError(
                "The held-out text contains only special tokens (pad, EOS, BOS). Harvest with a different dataset."
            )
        return batches


def zero_ablated_output(run: ForwardPass, hook: Hook, batch: ContextBatch, constant_D: dict[Hook, Tensor]) -> Tensor:
    """The model's final residual at the counted positions (T, D) when a hook is zeroed at every position.

    With the whole residual stream zeroed, attention over equal values returns that value, so all positions and texts
    have the same output. Once the first batch confirms it, `constant_D` keeps that one vector per hook and no later
    batch runs the model for it. At other sites the residual stream still carries the text.
    """
    if hook not in constant_D:
        output_TD = run.run_from(hook, torch.zeros_like(run.activations[hook]))[batch.counted]
        if hook.site not in WHOLE_RESIDUAL or not (output_TD == output_TD[:1]).all():
            return output_TD
        constant_D[hook] = output_TD[0]
    return constant_D[hook].expand(int(batch.counted.sum()), -1)


def add_losses(
    model: LanguageModel, batch: ContextBatch, losses: Sequence["SpliceLoss"], outputs_TD: Sequence[Tensor]
) -> None:
    """Add the KL and CE of each final residual (T, D) to its loss. The first is the original model's, the reference.

    A residual that is constant over positions (stride 0) is unembedded once.
    """
    context_T, position_T = batch.counted.nonzero(as_tuple=True)
    next_T = batch.ids.roll(-1, 1)[batch.counted]
    # The last token of a context has no known next token.
    has_next_T = position_T + 1 < batch.is_token.sum(1)[context_T]
    constant = [output.stride(0) == 0 for output in outputs_TD]
    for loss in losses:
        loss.start_batch(len(batch.ids))
    for start in range(0, len(context_T), TOKENS_PER_CHUNK):
        rows = slice(start, start + TOKENS_PER_CHUNK)
        original_TV = model.unembed(outputs_TD[0][rows]).float().log_softmax(-1)
        p_TV = original_TV.exp()
        for loss, output_TD, is_constant in zip(losses, outputs_TD, constant, strict=True):
            logp_TV = model.unembed(output_TD[:1] if is_constant else output_TD[rows]).float().log_softmax(-1)
            kl_T = torch.linalg.vecdot(p_TV, original_TV - logp_TV)
            ce_T = -logp_TV.expand_as(p_TV).gather(1, next_T[rows, None])[:, 0]
            loss.add(context_T[rows], kl_T, ce_T, has_next_T[rows])


class SpliceLoss:
    """Sums per context over its counted tokens, in nats: KL(original || spliced), and CE of the next token."""

    def __init__(self) -> None:
        self.batches: list[Tensor] = []  # (N, 4) each: sum of KL, sum of CE, tokens, tokens with a next token

    def start_batch(self, contexts: int) -> None:
        self.batches.append(torch.zeros(contexts, 4, dtype=torch.float64))

    def add(self, context_T: Tensor, kl_T: Tensor, ce_T: Tensor, has_next_T: Tensor) -> None:
        columns = [kl_T, torch.where(has_next_T, ce_T, 0), torch.ones_like(kl_T), has_next_T]
        sums = torch.stack([column.double() for column in columns], 1).cpu()
        self.batches[-1].index_add_(0, context_T.cpu(), sums)

    @property
    def sums(self) -> Tensor:
        """(4, contexts): KL, CE, tokens, tokens with a next token."""
        return torch.cat(self.batches).T


def loss_ratios(original: SpliceLoss, ablated: SpliceLoss, spliced: SpliceLoss) -> dict[str, dict[str, Ratio]]:
    """Raw KL and CE (lower is better), and scores: 1 is the original model, 0 the zeroed layer."""
    _, ce_original, tokens, predictions = original.sums
    (kl_zero, ce_zero, *_), (kl, ce, *_) = ablated.sums, spliced.sums
    return {
        "model_behavior_preservation": {
            "kl_div_score": (kl_zero - kl, kl_zero),
            "kl_div_with_ablation": (kl_zero, tokens),
            "kl_div_with_sae": (kl, tokens),
        },
        "model_performance_preservation": {
            "ce_loss_score": (ce_zero - ce, ce_zero - ce_original),
            "ce_loss_with_ablation": (ce_zero, predictions),
            "ce_loss_with_sae": (ce, predictions),
            "ce_loss_without_sae": (ce_original, predictions),
        },
    }


def build_result(
    mode: str,
    target: EvalTarget,
    original: SpliceLoss,
    ablated: SpliceLoss,
    spliced: SpliceLoss,
    stats: SAEStatistics,
    tokens: dict[str, float | None],
    document_N: Tensor,
) -> MetricResult:
    ratios = loss_ratios(original, ablated, spliced)
    W_dec_FD = getattr(target.sae, "W_dec", None)
    metrics: dict[str, dict[str, Any]] = {
        **{name: {key: ratio_value(ratio) for key, ratio in group.items()} for name, group in ratios.items()},
        **stats.scalars(mode),
        "token_stats": dict(tokens),
        "correlation": stats.correlation(W_dec_FD),
    }
    if W_dec_FD is not None:
        metrics["dictionary"] = decoder_geometry(W_dec_FD)
    details = latent_details(target.sae, stats) if isinstance(target.sae, SAE) else []
    if details and mode != "2024-12":  # SAEBench reports these since January 2025
        metrics["misc_metrics"] = density_summary(stats.density(), details)
    intervals = {
        name: {key: ratio_interval(sum_by_document(ratio, document_N)) for key, ratio in group.items()}
        for name, group in (ratios | stats.ratios()).items()
    }
    quality = intervals["reconstruction_quality"]
    quality["fve"] = stats.fve_interval(quality["fve"], metrics["reconstruction_quality"]["fve"])
    n = {"documents": len(document_N.unique()), "contexts": len(original.sums[0]), "tokens": stats.tokens}
    return MetricResult.of(metrics, details, intervals=intervals, n=n, flags=core_flags(target, metrics, stats))


def core_flags(target: EvalTarget, metrics: dict[str, dict[str, Any]], stats: SAEStatistics) -> list[str]:
    """Sentences about numbers that mean less than they seem to. References get none: they are degenerate by design."""
    if target.reference:
        return []
    flags = []
    dead = float((stats.density() == 0).double().mean())
    if metrics["sparsity"]["l0"] == 0:
        flags.append("L0 is 0: no latent ever fires, so the SAE is its decoder bias.")
    elif dead > MOSTLY_DEAD:
        flags.append(f"{dead:.0%} of the latents never fire on this text.")
    if metrics["reconstruction_quality"]["fve"] < 0:
        flags.append("The explained variance is negative: the mean alone would reconstruct better.")
    return flags
