"""Statistics of single latents: where they fire on held-out text, their logit effects, and their nearest latents.

Shape suffixes: N contexts, S positions, T counted tokens, D d_in, F latents of the SAE, K selected latents, C a block
of them, B bins of a histogram, M entries of a list.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from ...cache.hooks import RESIDUAL_SITES, Hook
from ...cache.outliers import outlier_mask
from ...common.errors import SaeError, UnavailableError, UsageError
from ...common.memory import out_of_memory
from ...harvest.model import LanguageModel
from ..context import EvalContext
from ..metrics.base import Progress, RowSet
from ..metrics.packing import TOKENS_PER_ENCODE, encode_float32
from .passages import DEFAULT_WINDOW, PassageTable, PassageWindow

TOP_PASSAGES = 10  # passages with the largest activations
SAMPLED_PASSAGES = 15  # passages from which quantiles are taken
BYTES_PER_PASSAGE_TOKEN = 4 * (TOP_PASSAGES + SAMPLED_PASSAGES)  # memory for each selected latent
BINS = 32
LISTED_LATENTS = 8  # nearest latents, and latents that fire together
LOGIT_TOKENS = 10  # listed tokens with the largest positive logit effects, and as many with the largest negative ones
BLOCK_ELEMENTS = 2**25  # elements of a dense float32 block: 128 MiB
MAX_PAIR_TOKENS = 32_768  # number of tokens that are searched for latents that fire together
MAX_PAIR_COST = 2e9  # maximum number of pairs of firing latents; this many take half a minute on one core


class Histogram:
    """Exact counts of each latent's positive activations in bins [b w, (b + 1) w), in one pass.

    The bin width `width` (K,) is a power of two. When a value exceeds the last bin, the width doubles and neighboring
    bins merge.
    """

    def __init__(self, latents: int, device: torch.device | str = "cpu") -> None:
        self.count_KB = torch.zeros(latents, BINS, dtype=torch.int64, device=device)
        self.width = torch.full((latents,), 2.0**-20, device=device)

    def add(self, f_TK: Tensor) -> None:
        peak_K = f_TK.amax(0)
        while (narrow_K := peak_K >= BINS * self.width).any():
            merged = self.count_KB[narrow_K].view(-1, BINS // 2, 2).sum(2)
            self.count_KB[narrow_K] = torch.cat([merged, torch.zeros_like(merged)], 1)
            self.width[narrow_K] *= 2
        token, latent = (f_TK > 0).nonzero(as_tuple=True)
        place = latent * BINS + (f_TK[token, latent] / self.width[latent]).long()
        self.count_KB.view(-1).index_add_(0, place, torch.ones_like(place))


class ActivationStats:
    """How often, how strongly and where latents fire, collected in one pass over the text.

    Attributes:
        fired_F: the number of tokens at which each latent fires, for all latents of the SAE.
        l0: the number of latents that fire at each token (T,).
        outliers: the number of tokens left out because of their norm.
        sum_K, peak_K, histogram: sum, maximum and histogram of the activations of the selected latents.
        top: the contexts with the largest activations.
        sample: contexts drawn with probability proportional to the number of tokens at which the latent fires, each
            with one of these tokens, drawn uniformly.
        pair_activations: the activations of all latents at the first `pair_tokens` tokens, as a sparse array.

    Memory: four times the activations of 1,024 tokens (1.1 GB at 65,536 latents), and for each selected latent
    `BYTES_PER_PASSAGE_TOKEN` times the number of tokens in `window` (6.4 kB for passages of 64 tokens).
    """

    def __init__(self, d_sae: int, latents_K: Tensor, window: PassageWindow = DEFAULT_WINDOW) -> None:
        device, count = latents_K.device, len(latents_K)
        self.latents_K, self.has_all = latents_K, count == d_sae
        self.fired_F = torch.zeros(d_sae, dtype=torch.int64, device=device)
        self.sum_K = torch.zeros(count, dtype=torch.float64, device=device)
        self.peak_K = torch.zeros(count, device=device)
        self.histogram = Histogram(count, device)
        self.top = PassageTable(count, TOP_PASSAGES, window, device)
        self.sample = PassageTable(count, SAMPLED_PASSAGES, window, device)
        self.generator = torch.Generator().manual_seed(0)  # on the CPU, so that draws are the same on every device
        self.l0_parts: list[Tensor] = []
        self.pair_parts: list[Any] = []
        self.pair_tokens, self.pair_cost = 0, 0.0
        self.outliers = 0

    def add(self, f_NSF: Tensor, counted_NS: Tensor, first: int) -> None:
        """Add the activations of contexts `first`, `first` + 1, ...; only the activations where `counted_NS` is True
        count."""
        f_NSF = torch.where(counted_NS[..., None], f_NSF, 0)
        peak_F = f_NSF.amax((0, 1))
        if not torch.isfinite(peak_F).all():
            raise SaeError("Some activations of the SAE on this text are not finite, so there are no statistics.")
        fires_NSF = (f_NSF > 0).float()  # summing floats is faster than summing booleans
        self.fired_F += fires_NSF.sum((0, 1)).long()
        l0_T = fires_NSF.sum(-1)[counted_NS].long().cpu()
        self.l0_parts.append(l0_T)
        if self.pair_tokens < MAX_PAIR_TOKENS and self.pair_cost < MAX_PAIR_COST:
            self.pair_parts.append(sparse.csr_array(f_NSF[counted_NS].cpu().numpy()))
            self.pair_tokens += len(l0_T)
            self.pair_cost += float(l0_T.double().square().sum())
        f_NSK, fires_NSK, peak_K = f_NSF, fires_NSF, peak_F
        if not self.has_all:
            f_NSK, fires_NSK, peak_K = (x[..., self.latents_K] for x in (f_NSF, fires_NSF, peak_F))
        self.sum_K += f_NSK.sum((0, 1)).double()
        self.peak_K = torch.maximum(self.peak_K, peak_K)
        self.histogram.add(f_NSK.flatten(0, 1))
        value_NK, at_NK = f_NSK.max(1)
        self.top.offer(torch.where(value_NK > 0, value_NK, -math.inf), at_NK, f_NSK, first)
        self.sample.offer(*self.sample_keys(fires_NSK), f_NSK, first)

    def sample_keys(self, fires_NSK: Tensor) -> tuple[Tensor, Tensor]:
        """For each context and latent (N, K), a random key and the position of a random token at which the latent
        fires.

        The contexts with the largest keys are a sample weighted by the number of firing tokens (Efraimidis and
        Spirakis 2006).

        `fires_NSK` is 1 where a latent fires and 0 elsewhere, float32.
        """
        (contexts, positions, latents), device = fires_NSK.shape, fires_NSK.device
        order_NS = torch.rand(contexts, positions, generator=self.generator).add(1).to(device)
        tokens_NK, at_NK = fires_NSK.sum(1), (fires_NSK * order_NS[..., None]).max(1).indices
        u_NK = torch.rand(contexts, latents, generator=self.generator).clamp(1e-12, 1 - 1e-7).to(device)
        return torch.where(tokens_NK > 0, u_NK.log() / tokens_NK, -math.inf), at_NK

    @property
    def l0(self) -> Tensor:
        return torch.cat(self.l0_parts)

    @property
    def pair_activations(self) -> Any:
        return sparse.vstack(self.pair_parts).tocsc()


@dataclass(frozen=True)
class RankedEntries:
    """A ranked list of latents or tokens for each of the K latents, best first.

    `index` (K, M) is int64, with -1 after the end of a shorter list. The lists are sorted by `value` (K, M).
    """

    index: Tensor
    value: Tensor

    def entries(self, latent: int) -> list[tuple[int, float]]:
        """The (index, value) pairs in one latent's list; `latent` is the index of this latent among the K."""
        pairs = zip(self.index[latent].tolist(), self.value[latent].tolist(), strict=True)
        return [(index, value) for index, value in pairs if index >= 0]


@dataclass(frozen=True)
class LatentStats:
    """All statistics that pages show about K latents.

    Attributes:
        activations: how often, how strongly and where they fire.
        raised, lowered: the tokens with the largest positive and negative logit effects; None if the decoder rows of
            the SAE are not directions in the residual stream.
        nearest: latents with the largest cosines of decoder rows.
        coactive: latents that fire at the same tokens, by the cosine of activations.
        jaccard: Jaccard's index of each entry in `coactive` (K, M).
    """

    activations: ActivationStats
    raised: RankedEntries | None
    lowered: RankedEntries | None
    nearest: RankedEntries
    coactive: RankedEntries
    jaccard: Tensor

    @property
    def density(self) -> Tensor:
        """Share of the counted tokens at which each latent fires (F,)."""
        return self.activations.fired_F.cpu().double() / max(1, len(self.activations.l0))

    @property
    def mean(self) -> Tensor:
        """Mean activation over the tokens at which a latent fires (K,); 0 for a latent that never fires."""
        stats = self.activations
        return (stats.sum_K / stats.fired_F[stats.latents_K].clamp(min=1)).cpu()


def collect_activations(
    ctx: EvalContext, sae: Any, rows: RowSet, latents_K: Tensor, progress: Progress, window: PassageWindow
) -> ActivationStats:
    """Read the held-out text once. BOS, EOS, padding and outlier rows are not counted."""
    window = window.limited_to(ctx.contexts.ids.shape[1])
    stats = ActivationStats(sae.d_sae, latents_K.to(ctx.model.device), window)
    contexts_per_batch, done, total = max(1, TOKENS_PER_ENCODE // ctx.contexts.ids.shape[1]), 0, len(ctx.contexts)
    for batch in ctx.batches(contexts_per_batch, total):
        x_NSD = ctx.model.capture_hooks(batch.ids, [rows.hook])[rows.hook]
        f_NSF = encode_float32(sae, x_NSD.flatten(0, 1)).unflatten(0, batch.ids.shape)
        outlier_NS = batch.counted & outlier_mask(x_NSD, rows.norm_limit)
        stats.outliers += int(outlier_NS.sum())
        stats.add(f_NSF, batch.counted & ~outlier_NS, done)
        done += len(batch.ids)
        progress(done, total, "contexts")
    return stats


@torch.no_grad()
def latent_stats(
    ctx: EvalContext,
    sae: Any,
    hook: Hook,
    latents_K: Tensor,
    progress: Progress,
    window: PassageWindow = DEFAULT_WINDOW,
    norm_limit: float | None = None,
) -> LatentStats:
    """The statistics of some latents of an SAE that reads `hook`, on the held-out text of `ctx`. `latents_K` (K,) int64
    has the indices of these latents.

    `window` determines how many tokens a passage contains. Tokens whose activations have a norm over `norm_limit` are
    neither counted nor shown as examples.

    Raises SaeError if activations are not finite, and UnavailableError if the device runs out of memory.
    """
    try:
        return _latent_stats(ctx, sae, RowSet(hook, norm_limit), latents_K, progress, window)
    except Exception as error:
        if not out_of_memory(error):
            raise
        raise UnavailableError(
            f"The device is out of memory: {error} Show fewer latents with --latents, or use --device cpu."
        ) from error


def _latent_stats(
    ctx: EvalContext, sae: Any, rows: RowSet, latents_K: Tensor, progress: Progress, window: PassageWindow
) -> LatentStats:
    stats = collect_activations(ctx, sae, rows, latents_K, progress, window)
    raised, lowered = None, None
    if has_logit_effects(ctx.model, rows.hook):
        raised, lowered = logit_effects(ctx.model, sae.W_dec[latents_K], partial(progress, note="logit effects"))
    nearest = nearest_latents(sae.W_dec, latents_K, partial(progress, note="nearest latents"))
    coactive, jaccard = coactive_latents(stats.pair_activations, latents_K, partial(progress, note="coactive latents"))
    return LatentStats(stats, raised, lowered, nearest, coactive, jaccard)


def has_logit_effects(model: LanguageModel, hook: Hook) -> bool:
    """Whether decoder rows at a hook are directions in the residual stream, which the final norm and unembedding read.

    False inside attention or an MLP, and for a model that does more between its last block and its unembedding than
    apply one norm.
    """
    if hook.site not in RESIDUAL_SITES:
        return False
    try:
        return model.norm is not None
    except UsageError:
        return False


@torch.no_grad()
def direct_logits(model: LanguageModel, rows_KD: Tensor) -> Tensor:
    """The direct effect of residual-stream directions on the logits: (K, D) -> (K, V), float32.

    The directions are multiplied by the weight of the final norm (if that is a LayerNorm, after the mean of each
    direction is subtracted) and then by the unembedding. TransformerLens' W_U has the same effect, because
    TransformerLens folds the final norm into W_U by default. The division in the norm (the same for all tokens), the
    soft cap (which preserves the order of tokens) and later blocks are left out.
    """
    transformer: Any = model.model
    weight_VD = transformer.get_output_embeddings().weight
    sign_D = torch.ones_like(weight_VD[0])
    sign_D[1::2] = -1  # mean 0 and mean square 1, so that a norm returns its weight (plus its bias, if it has one)
    gain_D = (model.norm(sign_D) - model.norm(-sign_D)) * sign_D / 2
    rows_KD = rows_KD.float()
    if isinstance(model.norm, torch.nn.LayerNorm):
        rows_KD = rows_KD - rows_KD.mean(1, keepdim=True)
    return (rows_KD * gain_D.float()) @ weight_VD.T.float()


def logit_effects(model: LanguageModel, rows_KD: Tensor, progress: Progress) -> tuple[RankedEntries, RankedEntries]:
    """The tokens whose logits each latent raises most and lowers most, according to `direct_logits`."""
    ups, downs = [], []
    for rows_CD in split_blocks(rows_KD, model.config.vocab_size, progress):
        effect_CV = direct_logits(model, rows_CD)
        ups.append(top_entries(effect_CV, LOGIT_TOKENS))
        downs.append(top_entries(-effect_CV, LOGIT_TOKENS))
    down = concat_entries(downs)
    return concat_entries(ups), RankedEntries(down.index, -down.value)


def nearest_latents(W_dec_FD: Tensor, latents_K: Tensor, progress: Progress) -> RankedEntries:
    """For each latent, the latents whose decoder rows have the largest cosines with its decoder row."""
    unit_FD = torch.nn.functional.normalize(W_dec_FD.float(), dim=1)
    blocks = []
    for own_C in split_blocks(latents_K.to(unit_FD.device), len(unit_FD), progress):
        blocks.append(top_entries(mask_self(unit_FD[own_C] @ unit_FD.T, own_C), LISTED_LATENTS))
    return concat_entries(blocks)


def coactive_latents(f_TF: Any, latents_K: Tensor, progress: Progress) -> tuple[RankedEntries, Tensor]:
    """For each latent, the latents that fire together with it (ranked by the cosine of activations), and Jaccard's
    index of each pair.

    `f_TF` is a scipy.sparse array of activations in column format. Jaccard's index (K, M) is the number of tokens at
    which both latents fire, divided by the number of tokens at which at least one of them fires.
    """
    norm_F = np.sqrt(f_TF.multiply(f_TF).sum(0))
    fires_TF = f_TF.astype(bool).astype(np.int32)
    count_F = fires_TF.sum(0)
    index_KM = np.full((len(latents_K), LISTED_LATENTS), -1)
    cosine_KM, jaccard_KM = np.zeros((2, len(latents_K), LISTED_LATENTS))
    done = 0
    for own_C in split_blocks(latents_K.cpu(), f_TF.shape[1], progress):
        dot_CF = (f_TF[:, own_C.numpy()].T @ f_TF).tocsr()
        dot_CF.sort_indices()
        for row, own in enumerate(own_C.tolist(), done):
            part = slice(*dot_CF.indptr[row - done : row - done + 2])
            others = dot_CF.indices[part]
            cosines = dot_CF.data[part] / norm_F[others] / norm_F[own]
            cosines[others == own] = 0
            best = np.argsort(-cosines, kind="stable")[:LISTED_LATENTS]
            best = best[cosines[best] > 0]
            index_KM[row, : len(best)], cosine_KM[row, : len(best)] = others[best], cosines[best]
        rows = slice(done, done := done + len(own_C))
        left, right = np.repeat(own_C.numpy(), LISTED_LATENTS), index_KM[rows].clip(0).ravel()
        both = fires_TF[:, left].multiply(fires_TF[:, right]).sum(0)
        share = both / (count_F[left] + count_F[right] - both).clip(1)
        jaccard_KM[rows] = share.reshape(-1, LISTED_LATENTS) * (index_KM[rows] >= 0)
    return RankedEntries(torch.from_numpy(index_KM), torch.from_numpy(cosine_KM)), torch.from_numpy(jaccard_KM)


def split_blocks(rows: Tensor, width: int, progress: Progress) -> Iterator[Tensor]:
    """Yield slices of the rows, short enough for a dense block of this width to fit into memory."""
    done = 0
    for part in rows.split(max(1, BLOCK_ELEMENTS // width)):
        yield part
        done += len(part)
        progress(done, len(rows))


def mask_self(similarity_CF: Tensor, own_C: Tensor) -> Tensor:
    """The similarities with -inf at each row's own latent."""
    return similarity_CF.scatter(1, own_C[:, None], -math.inf)


def top_entries(value_CF: Tensor, count: int) -> RankedEntries:
    value, index = value_CF.topk(min(count, value_CF.shape[1]), 1)
    missing = value == -math.inf
    return RankedEntries(index.masked_fill(missing, -1).cpu(), value.masked_fill(missing, 0).double().cpu())


def concat_entries(parts: list[RankedEntries]) -> RankedEntries:
    return RankedEntries(torch.cat([part.index for part in parts]), torch.cat([part.value for part in parts]))
