"""The core metric: the cost of splicing an SAE into the model (KL, CE), its reconstruction and sparsity, and the
correlations of its latents.

Higher is better for the KL and CE scores (1: the model alone, 0: the layer zeroed), explained variance, cosine and the
share of alive latents; lower is better for KL, CE, MSE and correlations.

Names and definitions follow SAEBench 0.6.0 (`evals/core`). Where a name does not match its definition, the correct
number is also reported under another name: `fve` (explained variance), `mse_elementwise`. The text differs from
SAEBench's: it consists of the contexts of the cache, with one document in each unless the cache was packed. SAEBench
divides `mse` by the number of tokens in a batch, so `mse` is comparable only between SAEs measured on the same text.
Pad, EOS and BOS positions keep their activations and are not counted.

All other rows are counted under these names, as in SAEBench, so a single attention sink can dominate the numbers.
Therefore, if the text has outlier rows (`EvalTarget.norm_limit`), `MetricResult.masked` contains the same numbers
computed without the outlier rows: at these rows the model keeps its own activations, as at BOS, and the rows are not
counted. To compute the numbers without outlier rows, the model runs a second time on the contexts that contain an
outlier row. The results of the model's own pass over the text are kept in the artifact cache (`TextPasses`). For an SAE
that is measured later, the model therefore runs only the blocks after the hook of that SAE.

Shape suffixes: N contexts, S positions, T counted tokens, D d_in, F latents, V vocabulary.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...cache.hooks import Hook
from ...cache.outliers import outlier_mask
from ...common.errors import UsageError
from ...common.files import digest_of
from ...harvest.model import ForwardPass, LanguageModel
from ...train.sae import SAE
from ..context import ContextBatch, EvalContext
from .base import (
    EvalTarget,
    Metric,
    MetricColumn,
    MetricResult,
    Outcome,
    Progress,
    UnitValues,
)
from .core_flags import core_flags
from .document_values import document_record, values_in_record
from .latent_pairs import PAIRED_LATENTS, decoder_geometry
from .parts import tokens_per_encode
from .sae_statistics import (
    SAEStatistics,
    density_summary,
    latent_details,
    ratio_interval,
    ratio_value,
    splice,
    sum_by_document,
)
from .splice_losses import CountedTokens, loss_ratios, tokens_per_unembed, zero_ablated_output
from .text_passes import TextPasses

EARLIER_PAIRED_LATENTS = 2048  # in versions without the option


@dataclass(frozen=True)
class Core(Metric):
    """A batch has `batch_contexts` contexts. KL and CE are measured on the first `reconstruction_batches` batches,
    everything else on the first `sparsity_batches`.

    In SAEBench the sparsity batches start where the reconstruction batches end. Here they overlap, because held-out
    text is short.

    The correlations between latents, and the cosines between decoder rows, are computed over all pairs in a sample of
    `paired_latents` latents. SAEBench has neither. The sample contains every latent if the SAE has at most
    `paired_latents` latents. If `paired_latents` is 0, there are no pairs.
    """

    batch_contexts: int = 16
    reconstruction_batches: int = 200
    sparsity_batches: int = 2000
    paired_latents: int = PAIRED_LATENTS

    knows_what_is_kept = True
    name = "core"
    unit = "document"
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
        settings = {**super().settings(ctx), **ctx.logit_settings, **ctx.text_identity}
        del settings["paired_latents"]  # see settings_of
        return settings

    def settings_of(self, target: EvalTarget, targets: Sequence[EvalTarget]) -> dict[str, Any]:
        """`paired_latents`, but only if it selects other pairs than EARLIER_PAIRED_LATENTS, the value that earlier
        versions always used and did not record.

        The option is not recorded for the identity, zero and PCA, whose number of latents is unknown.
        """
        d_sae = getattr(target.sae, "d_sae", 0)
        same = min(self.paired_latents, d_sae) == min(EARLIER_PAIRED_LATENTS, d_sae)
        return {} if same else {"paired_latents": self.paired_latents}

    def check(self) -> None:
        least = {"batch_contexts": 1, "reconstruction_batches": 1, "sparsity_batches": 1, "paired_latents": 0}
        for name, smallest in least.items():
            if (value := getattr(self, name)) < smallest:
                raise UsageError(f"core.{name}={value}: give {smallest} or more.")

    def kept_bytes(self, ctx: EvalContext, targets: Sequence[EvalTarget]) -> int:
        hooks = sorted({target.hook for target in targets})
        return TextPasses(ctx, hooks, self.counted_batches(ctx, "cpu")).missing_bytes(self.reconstruction_batches)

    @torch.no_grad()
    def measure(self, ctx: EvalContext, targets: Sequence[EvalTarget], progress: Progress) -> list[Outcome]:
        """The results over all rows and, in `masked`, without outlier rows, both from one pass of the model."""
        progress(0, 1, "loading the model")
        batches = self.counted_batches(ctx)
        if not batches:
            raise UsageError(
                "The held-out text contains only special tokens (pad, EOS, BOS). Harvest with a different dataset."
            )
        hooks = sorted({target.hook for target in targets})
        passes = TextPasses(ctx, hooks, batches)
        passes.compute_together(self.reconstruction_batches, progress)
        measured = [MeasuredSAE(target, self.paired_latents) for target in targets]
        constant_D: dict[Hook, Tensor] = {}
        tokens_of_logits = 0
        steps = BatchSteps(progress, len(batches), len(measured))
        for number, batch in enumerate(batches):
            steps.model(number)
            with_loss = number < self.reconstruction_batches
            run = passes.whole(batch) if with_loss else None
            activations = run.activations if run else passes.activations(batch)
            outliers = {
                row_set: batch.counted & outlier_mask(activations[row_set.hook], row_set.norm_limit)
                for row_set in {target.row_set for target in targets}
            }
            splices = []
            for place, one in enumerate(measured, 1):
                steps.sae(number, place)
                x_NSD, outlier_NS = activations[one.target.hook], outliers[one.target.row_set]
                splices.append(one.add_batch(run, x_NSD, batch.counted, outlier_NS))
            if run:
                zeroed = {hook: zero_ablated_output(run, hook, batch, constant_D) for hook in hooks}
                final_TD = run.final[batch.counted]
                tokens_of_logits = tokens_of_logits or tokens_per_unembed(ctx.model, final_TD)
                add_losses(
                    ctx.model, batch, final_TD, zeroed, measured, splices, tokens_of_logits, steps.losses(number)
                )
        steps.done()
        token_counts = [int(batch.is_token.sum()) for batch in batches]
        tokens: dict[str, float | None] = {
            "total_tokens_eval_reconstruction": sum(token_counts[: self.reconstruction_batches]),
            "total_tokens_eval_sparsity_variance": sum(token_counts),
        }
        document_N = torch.cat([batch.document for batch in batches])
        text = digest_of(self.settings(ctx))[:16]
        return [one.result(ctx.mode, tokens, document_N, text) for one in measured]

    @classmethod
    def values_by_unit(cls, result: MetricResult, column: MetricColumn) -> UnitValues:
        return UnitValues(*values_in_record(result.extra, column.name))

    def counted_batches(self, ctx: EvalContext, device: str | None = None) -> list[ContextBatch]:
        """The batches that contain a counted token, on `device`. By default, they are on the model's device, and the
        model is loaded to find out which this is."""
        return [
            batch
            for batch in ctx.batches(self.batch_contexts, self.sparsity_batches, device=device)
            if batch.counted.any()
        ]


@dataclass(frozen=True)
class BatchSteps:
    """Progress within a batch, which can take minutes with a large model.

    The steps of a batch are the model's pass and, for each SAE, its splice and its losses. The current step is shown
    while it runs.
    """

    progress: Progress
    batches: int
    saes: int

    def report(self, batch: int, step: int, what: str) -> None:
        steps = 1 + 2 * self.saes
        self.progress(batch * steps + step, self.batches * steps, f"batch {batch + 1:,} of {self.batches:,}: {what}")

    def model(self, batch: int) -> None:
        self.report(batch, 0, "model")

    def sae(self, batch: int, place: int) -> None:
        self.report(batch, place, f"SAE {place:,} of {self.saes:,}")

    def losses(self, batch: int) -> Callable[[float], None]:
        """A progress function. Call it with the fraction (0 to 1) of the batch's losses that is already computed."""
        return lambda share: self.report(batch, 1 + self.saes + int(share * self.saes), "losses")

    def done(self) -> None:
        total = self.batches * (1 + 2 * self.saes)
        self.progress(total, total)


class BatchSplice(NamedTuple):
    """The result of splicing an SAE into one batch.

    Attributes:
        outlier_NS: True at outlier rows.
        output_TD: the model's final residual with the reconstruction at all counted tokens.
        restored_TD: the final residual with the model's own activations at outlier rows, for the counted tokens of
            contexts that contain such rows.
    """

    outlier_NS: Tensor
    output_TD: Tensor = torch.empty(0)
    restored_TD: Tensor = torch.empty(0)


class CoreSums:
    """The sums of one SAE over some rows. The losses are summed by context, in one tensor (N, 4) for each batch."""

    def __init__(self, paired_latents: int) -> None:
        self.stats = SAEStatistics(paired_latents)
        self.original: list[Tensor] = []
        self.ablated: list[Tensor] = []
        self.spliced: list[Tensor] = []

    def add_losses(self, original: Tensor, ablated: Tensor, spliced: Tensor) -> None:
        self.original.append(original)
        self.ablated.append(ablated)
        self.spliced.append(spliced)


class MeasuredSAE:
    """Two sets of running sums for one SAE: over all counted rows, and over those of them that are not outliers.

    As long as there has been no outlier row, both sets are equal, and only `all` is kept.
    """

    def __init__(self, target: EvalTarget, paired_latents: int) -> None:
        self.target = target
        self.all = CoreSums(paired_latents)
        self.masked: CoreSums | None = None
        self.outliers = 0
        # the number of tokens to encode at a time; computed once, after the model has been loaded
        self.tokens: int | None = None

    def add_batch(self, run: ForwardPass | None, x_NSD: Tensor, counted_NS: Tensor, outlier_NS: Tensor) -> BatchSplice:
        """Add the activations of a batch. If `run` is given, also run the model on their reconstruction."""
        outliers = int(outlier_NS.sum())
        self.outliers += outliers
        if outliers and self.masked is None:
            self.masked = copy.deepcopy(self.all)
        takers = [(self.all.stats, counted_NS)]
        if self.masked is not None:
            takers.append((self.masked.stats, counted_NS & ~outlier_NS))
        self.tokens = self.tokens or tokens_per_encode(self.target.sae, x_NSD[counted_NS], x_NSD.device)
        patched_NSD = splice(self.target, x_NSD, counted_NS, takers, self.tokens)
        if run is None:
            return BatchSplice(outlier_NS)
        output_TD, chosen_N = run.run_from(self.target.hook, patched_NSD)[counted_NS], outlier_NS.any(1)
        if not outliers or self.target.everywhere:  # `everywhere` replaces outlier rows, too
            return BatchSplice(outlier_NS, output_TD, output_TD[chosen_N[counted_NS.nonzero()[:, 0]]])
        restored_NSD = torch.where(outlier_NS[..., None], x_NSD, patched_NSD)[chosen_N]
        restored_TD = run.run_from(self.target.hook, restored_NSD, chosen_N)[counted_NS[chosen_N]]
        return BatchSplice(outlier_NS, output_TD, restored_TD)

    def result(self, mode: str, tokens: dict[str, float | None], document_N: Tensor, text: str) -> Outcome:
        """The numbers over all rows and, if there are outlier rows, without them. `text` identifies the text."""
        every = build_result(mode, self.target, self.all, document_N, text, tokens)
        if self.masked is None:
            return every
        if not self.masked.stats.tokens:
            return UsageError(
                f"All {self.outliers:,} rows of the held-out text have norms over {self.target.norm_limit:.4g}, so all "
                "of them are outliers. The limit was made for other activations. Pass --max-norm none."
            )
        masked = build_result(mode, self.target, self.masked, document_N, text)
        return every.with_masked(masked.without_outliers(self.outliers, masked.n["tokens"]))


def add_losses(
    model: LanguageModel,
    batch: ContextBatch,
    final_TD: Tensor,
    zeroed: Mapping[Hook, Tensor],
    measured: Sequence[MeasuredSAE],
    splices: Sequence[BatchSplice],
    at_once: int,
    report: Callable[[float], None],
) -> None:
    """Add the KL and CE of a batch to the sums of each SAE. `final_TD` is the model's own final residual.

    Logits are computed for `at_once` tokens at a time. `report` is called with the share of the tokens done so far.
    """
    tokens = CountedTokens.of(batch)
    outputs_TD = [final_TD, *zeroed.values(), *(one.output_TD for one in splices)]
    original, *others = tokens.losses(model, outputs_TD, at_once, report)
    ablated, spliced = dict(zip(zeroed, others, strict=False)), others[len(zeroed) :]
    sum_original = tokens.sum_by_context(original)
    sum_ablated = {hook: tokens.sum_by_context(losses) for hook, losses in ablated.items()}
    for one, of_batch, losses in zip(measured, splices, spliced, strict=True):
        hook, sums = one.target.hook, tokens.sum_by_context(losses)
        one.all.add_losses(sum_original, sum_ablated[hook], sums)
        if one.masked is None:
            continue
        if not of_batch.outlier_NS.any():
            one.masked.add_losses(sum_original, sum_ablated[hook], sums)
            continue
        kept_T, redone_T = ~of_batch.outlier_NS[batch.counted], of_batch.outlier_NS.any(1)[tokens.context_T]
        _, redone = tokens.select(redone_T).losses(model, [final_TD[redone_T], of_batch.restored_TD], at_once)
        losses = losses.replace_at(redone_T, redone)
        one.masked.add_losses(*(tokens.sum_by_context(some, kept_T) for some in (original, ablated[hook], losses)))


def build_result(
    mode: str,
    target: EvalTarget,
    sums: CoreSums,
    document_N: Tensor,
    text: str,
    tokens: dict[str, float | None] | None = None,
) -> MetricResult:
    """The numbers over the rows of `sums`. If `tokens` is None, numbers that do not depend on the rows are left out."""
    stats = sums.stats
    ratios = loss_ratios(sums.original, sums.ablated, sums.spliced)
    W_dec_FD = getattr(target.sae, "W_dec", None)
    metrics: dict[str, dict[str, Any]] = {
        **{name: {key: ratio_value(ratio) for key, ratio in group.items()} for name, group in ratios.items()},
        **stats.scalars(mode),
        **({"token_stats": dict(tokens)} if tokens else {}),
        **({"correlation": stats.pairs.correlation(W_dec_FD)} if stats.pairs else {}),
    }
    if W_dec_FD is not None and tokens:
        metrics["dictionary"] = decoder_geometry(W_dec_FD, stats.pairs.latents if stats.pairs else 0)
    details = latent_details(target.sae, stats) if isinstance(target.sae, SAE) else []
    if details and mode != "2024-12":  # SAEBench has reported these since January 2025
        metrics["misc_metrics"] = density_summary(stats.density(), details)
    ratios |= stats.ratios()
    intervals = {
        name: {key: ratio_interval(sum_by_document(ratio, document_N)) for key, ratio in group.items()}
        for name, group in ratios.items()
    }
    quality, fve = intervals["reconstruction_quality"], metrics["reconstruction_quality"]["fve"]
    quality["fve"] = stats.fve_interval(quality["fve"], fve)
    contexts = sum(map(len, sums.original))
    n = {"documents": len(document_N.unique()), "contexts": contexts, "tokens": stats.tokens}
    flags = core_flags(target, metrics, stats)
    documents = document_record(ratios, stats, fve, document_N, text)
    return MetricResult.of(metrics, details, intervals=intervals, n=n, flags=flags, extra=documents)
