"""What single latents do: where they fire on held-out text, what they push, which others are near them.

Shape suffixes: N contexts, S positions, T counted tokens, D d_in, F latents of the SAE, K latents that are looked at,
C some of those, P passages of each, W positions of a passage, B bins of a histogram, M latents or tokens of a list.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from ...cache.layout import Hook
from ...common.errors import SaeError, UnavailableError
from ...harvest.model import LanguageModel
from ..context import EvalContext
from ..metrics.base import Progress
from ..metrics.packing import TOKENS_PER_ENCODE, encode_float32

BEFORE, AFTER = 16, 7  # positions of a passage around the token that it is chosen for
WIDTH = BEFORE + 1 + AFTER
TOP_PASSAGES, SAMPLED_PASSAGES = (
    10,
    15,
)  # passages with the largest activations, and those that quantiles are taken from
BINS = 32
LISTED_LATENTS = 8  # neighbours, and latents that fire together
LOGIT_TOKENS = 10  # tokens at each end of the logit effects
BLOCK_ELEMENTS = 2**25  # of a dense block: 128 MiB
MAX_PAIR_TOKENS = 32_768  # at most so many tokens tell which latents fire together,
MAX_PAIR_COST = 2e9  # and so many pairs of firing latents, which is half a minute of one core


class Histogram:
    """How often each latent's positive activations fall into [b w, (b + 1) w), in one pass and exactly.

    `width` (K,) is a power of two; where a value does not fit into BINS bins it doubles, and neighbouring bins merge.
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


class PassageTable:
    """Of each latent the `count` passages of the largest score, one of a context at most.

    `score` (K, P) descends, -inf where there are fewer; `context` and `position` (K, P) are of the token that a passage
    is chosen for; `window` (K, P, W) holds the latent's activations from BEFORE positions before it to AFTER behind.
    """

    def __init__(self, latents: int, count: int, device: torch.device | str = "cpu") -> None:
        self.score = torch.full((latents, count), -math.inf, device=device)
        self.context = torch.zeros(latents, count, dtype=torch.int64, device=device)
        self.position = torch.zeros_like(self.context)
        self.window = torch.zeros(latents, count, WIDTH, device=device)

    def offer(self, score_NK: Tensor, position_NK: Tensor, f_NSK: Tensor, first: int) -> None:
        """Contexts `first`, `first` + 1, ...: the score of each for each latent, and the position it is of."""
        kept = self.score.shape[1]
        self.score, index_KP = torch.cat([self.score, score_NK.T], 1).topk(kept, 1)
        fresh_KP, old_KP = index_KP >= kept, index_KP.clamp(max=kept - 1)
        self.context, self.position = self.context.gather(1, old_KP), self.position.gather(1, old_KP)
        self.window = self.window.gather(1, old_KP[..., None].expand(-1, -1, WIDTH))
        latent, slot = fresh_KP.nonzero(as_tuple=True)
        context = index_KP[latent, slot] - kept
        position = position_NK[context, latent]
        span = position[:, None] + torch.arange(-BEFORE, AFTER + 1, device=position.device)
        inside = (span >= 0) & (span < f_NSK.shape[1])
        values = f_NSK[context[:, None], span.clamp(0, f_NSK.shape[1] - 1), latent[:, None]]
        self.context[latent, slot], self.position[latent, slot] = context + first, position
        self.window[latent, slot] = torch.where(inside, values, 0)

    def of(self, latent: int) -> list["Passage"]:
        """Those of one latent (its place among the K), best first; no more are offered once these are asked for."""
        score_KP, context_KP, position_KP, window_KPW = self.settled
        return [
            Passage(int(context_KP[latent, p]), int(position_KP[latent, p]), window_KPW[latent, p])
            for p in range(int((score_KP[latent] > -math.inf).sum()))
        ]

    @cached_property
    def settled(self) -> list[np.ndarray]:
        return [part.cpu().numpy() for part in (self.score, self.context, self.position, self.window)]


class Passage(NamedTuple):
    context: int  # its place in the text
    position: int  # in the context, of the token that the passage is chosen for
    values: np.ndarray  # (W,)

    @property
    def value(self) -> float:
        return float(self.values[BEFORE])


class ActivationStats:
    """One pass over the text: how often and how strongly latents fire, and where.

    `fired_F` counts tokens with a positive activation, of all latents; `l0` is how many latents fire at each token (T,).
    Of the K: `sum_K`, `peak_K`, `histogram`; `top`, the contexts with their largest activations; `sample`, contexts drawn
    in proportion to the number of tokens they fire at, and in each one such token, all equally likely. `paired` has the
    activations of all latents at the first `paired.shape[0]` tokens.

    Memory: four times the activations of 1,024 tokens (1.1 GB at 65,536 latents), and 6 KiB for each of the K latents.
    """

    def __init__(self, d_sae: int, latents_K: Tensor) -> None:
        device, count = latents_K.device, len(latents_K)
        self.latents_K, self.all = latents_K, count == d_sae
        self.fired_F = torch.zeros(d_sae, dtype=torch.int64, device=device)
        self.sum_K = torch.zeros(count, dtype=torch.float64, device=device)
        self.peak_K = torch.zeros(count, device=device)
        self.histogram = Histogram(count, device)
        self.top, self.sample = PassageTable(count, TOP_PASSAGES, device), PassageTable(count, SAMPLED_PASSAGES, device)
        self.random = torch.Generator().manual_seed(0)  # on the CPU: every device draws the same
        self.l0_parts: list[Tensor] = []
        self.paired_parts: list[Any] = []
        self.paired_tokens, self.paired_cost = 0, 0.0

    def add(self, f_NSF: Tensor, kept_NS: Tensor, first: int) -> None:
        """Activations of contexts `first`, `first` + 1, ...; those at positions that are not kept do not count."""
        f_NSF = torch.where(kept_NS[..., None], f_NSF, 0)
        peak_F = f_NSF.amax((0, 1))
        if not torch.isfinite(peak_F).all():
            raise SaeError("The SAE gives activations on this text that are not finite, so there is nothing to show.")
        fires_NSF = (f_NSF > 0).float()  # sums of it are faster than those of truth values
        self.fired_F += fires_NSF.sum((0, 1)).long()
        l0_T = fires_NSF.sum(-1)[kept_NS].long().cpu()
        self.l0_parts.append(l0_T)
        if self.paired_tokens < MAX_PAIR_TOKENS and self.paired_cost < MAX_PAIR_COST:
            self.paired_parts.append(sparse.csr_array(f_NSF[kept_NS].cpu().numpy()))
            self.paired_tokens += len(l0_T)
            self.paired_cost += float(l0_T.double().square().sum())
        f_NSK, fires_NSK, peak_K = f_NSF, fires_NSF, peak_F
        if not self.all:
            f_NSK, fires_NSK, peak_K = (x[..., self.latents_K] for x in (f_NSF, fires_NSF, peak_F))
        self.sum_K += f_NSK.sum((0, 1)).double()
        self.peak_K = torch.maximum(self.peak_K, peak_K)
        self.histogram.add(f_NSK.flatten(0, 1))
        value_NK, at_NK = f_NSK.max(1)
        self.top.offer(torch.where(value_NK > 0, value_NK, -math.inf), at_NK, f_NSK, first)
        self.sample.offer(*self.drawn(fires_NSK), f_NSK, first)

    def drawn(self, fires_NSK: Tensor) -> tuple[Tensor, Tensor]:
        """Keys (N, K) whose largest are a sample weighted by tokens (Efraimidis and Spirakis 2006), and a token of each.

        `fires_NSK` is 1 where a latent fires and 0 elsewhere, float32.
        """
        (contexts, positions, latents), device = fires_NSK.shape, fires_NSK.device
        order_NS = torch.rand(contexts, positions, generator=self.random).add(1).to(device)
        tokens_NK, at_NK = fires_NSK.sum(1), (fires_NSK * order_NS[..., None]).max(1).indices
        u_NK = torch.rand(contexts, latents, generator=self.random).clamp(1e-12, 1 - 1e-7).to(device)
        return torch.where(tokens_NK > 0, u_NK.log() / tokens_NK, -math.inf), at_NK

    @property
    def l0(self) -> Tensor:
        return torch.cat(self.l0_parts)

    @property
    def paired(self) -> Any:
        return sparse.vstack(self.paired_parts).tocsc()


@dataclass(frozen=True)
class RankedEntries:
    """For each of the K latents a list of others or of tokens, best first: `index` (K, M) int64, -1 where it is shorter,
    and the number that it is sorted by (K, M)."""

    index: Tensor
    value: Tensor

    def of(self, latent: int) -> list[tuple[int, float]]:
        pairs = zip(self.index[latent].tolist(), self.value[latent].tolist(), strict=True)
        return [(index, value) for index, value in pairs if index >= 0]


@dataclass(frozen=True)
class LatentStats:
    """All that is shown of K latents: `activation_stats`, logit effects at both ends, neighbours and latents that fire together.

    `up` and `down` are None where the SAE's rows are no directions of the residual stream.
    """

    activation_stats: ActivationStats
    up: RankedEntries | None
    down: RankedEntries | None
    near: RankedEntries
    together: RankedEntries
    jaccard: Tensor  # (K, M), beside `together`

    @property
    def density(self) -> Tensor:
        """Share of the counted tokens at which each latent fires (F,)."""
        return self.activation_stats.fired_F.cpu().double() / max(1, len(self.activation_stats.l0))

    @property
    def mean(self) -> Tensor:
        """Mean activation where a latent fires (K,); 0 where it never does."""
        found = self.activation_stats
        return (found.sum_K / found.fired_F[found.latents_K].clamp(min=1)).cpu()


def activation_stats(ctx: EvalContext, sae: Any, hook: Hook, latents_K: Tensor, progress: Progress) -> ActivationStats:
    """Read the bench's text once. BOS, EOS and pad do not count."""
    found = ActivationStats(sae.d_sae, latents_K.to(ctx.model.device))
    at_once, done, total = max(1, TOKENS_PER_ENCODE // ctx.contexts.ids.shape[1]), 0, len(ctx.contexts)
    for batch in ctx.batches(at_once, total):
        x_NSD = ctx.model.capture_hooks(batch.ids, [hook])[hook]
        f_NSF = encode_float32(sae, x_NSD.flatten(0, 1)).unflatten(0, batch.ids.shape)
        found.add(f_NSF, batch.counted, done)
        done += len(batch.ids)
        progress(done, total, "contexts")
    return found


@torch.no_grad()
def latent_stats(ctx: EvalContext, sae: Any, hook: Hook, latents_K: Tensor, progress: Progress) -> LatentStats:
    """Everything of the latents `latents_K` (K,) int64 of an SAE at a hook of the bench's model, on the bench's text.

    Raises SaeError when the SAE's activations are not finite, OutsideError when the device has too little memory.
    """
    try:
        return _latent_stats(ctx, sae, hook, latents_K, progress)
    except torch.OutOfMemoryError as error:
        raise UnavailableError(f"The device has too little memory: {error} Give --latents or --device cpu.") from error


def _latent_stats(ctx: EvalContext, sae: Any, hook: Hook, latents_K: Tensor, progress: Progress) -> LatentStats:
    found = activation_stats(ctx, sae, hook, latents_K, progress)
    up, down = None, None
    if hook.site != "attn_z":
        effects = logit_effects(ctx.model, sae.W_dec[latents_K], partial(progress, note="logit effects"))
        up, down = effects
    near = neighbours(sae.W_dec, latents_K, partial(progress, note="neighbours"))
    together, jaccard = coactive_latents(found.paired, latents_K, partial(progress, note="latents that fire together"))
    return LatentStats(found, up, down, near, together, jaccard)


@torch.no_grad()
def direct_logits(model: LanguageModel, rows_KD: Tensor) -> Tensor:
    """What directions written into the residual stream push: (K, D) -> (K, V) in float32, through the unembedding.

    Each dimension is weighted as the final norm does, as in TransformerLens' W_U once it has folded that norm in, which
    it does by default: a LayerNorm's subtraction of the mean is in it too. The norm's division, the same for all tokens,
    and the soft cap, which keeps their order, are left out. So are the blocks in between.
    """
    weight_VD = model.model.get_output_embeddings().weight
    sign_D = torch.ones_like(weight_VD[0])
    sign_D[1::2] = -1  # of mean 0 and mean square 1, so a norm gives its weight, and a shift if it has one
    gain_D = (model.norm(sign_D) - model.norm(-sign_D)) * sign_D / 2
    rows_KD = rows_KD.float()
    if isinstance(model.norm, torch.nn.LayerNorm):
        rows_KD = rows_KD - rows_KD.mean(1, keepdim=True)
    return (rows_KD * gain_D.float()) @ weight_VD.T.float()


def logit_effects(model: LanguageModel, rows_KD: Tensor, progress: Progress) -> tuple[RankedEntries, RankedEntries]:
    """The tokens whose logits a unit of each latent raises most and lowers most, by `direct_logits`."""
    ups, downs = [], []
    for rows_CD in split_blocks(rows_KD, model.config.vocab_size, progress):
        effect_CV = direct_logits(model, rows_CD)
        ups.append(top_entries(effect_CV, LOGIT_TOKENS))
        downs.append(top_entries(-effect_CV, LOGIT_TOKENS))
    down = concat_entries(downs)
    return concat_entries(ups), RankedEntries(down.index, -down.value)


def neighbours(W_dec_FD: Tensor, latents_K: Tensor, progress: Progress) -> RankedEntries:
    """The latents whose decoder rows have the largest cosines with each one's."""
    unit_FD = torch.nn.functional.normalize(W_dec_FD.float(), dim=1)
    found = []
    for own_C in split_blocks(latents_K.to(unit_FD.device), len(unit_FD), progress):
        found.append(top_entries(mask_self(unit_FD[own_C] @ unit_FD.T, own_C), LISTED_LATENTS))
    return concat_entries(found)


def coactive_latents(paired_TF: Any, latents_K: Tensor, progress: Progress) -> tuple[RankedEntries, Tensor]:
    """The latents that fire together with each: cosine of activations over tokens, and beside it Jaccard's index (K, M).

    `paired_TF` is a scipy.sparse array of activations, column by column. Jaccard's index is the share of the tokens with
    one of the two at which both fire.
    """
    norm_F = np.sqrt(paired_TF.multiply(paired_TF).sum(0))
    fires_TF = paired_TF.astype(bool).astype(np.int32)
    count_F = fires_TF.sum(0)
    index_KM = np.full((len(latents_K), LISTED_LATENTS), -1)
    cosine_KM, jaccard_KM = np.zeros((2, len(latents_K), LISTED_LATENTS))
    done = 0
    for own_C in split_blocks(latents_K.cpu(), paired_TF.shape[1], progress):
        dot_CF = (paired_TF[:, own_C.numpy()].T @ paired_TF).tocsr()
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
        one, other = np.repeat(own_C.numpy(), LISTED_LATENTS), index_KM[rows].clip(0).ravel()
        both = fires_TF[:, one].multiply(fires_TF[:, other]).sum(0)
        share = both / (count_F[one] + count_F[other] - both).clip(1)
        jaccard_KM[rows] = share.reshape(-1, LISTED_LATENTS) * (index_KM[rows] >= 0)
    return RankedEntries(torch.from_numpy(index_KM), torch.from_numpy(cosine_KM)), torch.from_numpy(jaccard_KM)


def split_blocks(rows: Tensor, width: int, progress: Progress) -> Iterator[Tensor]:
    """The rows, as many at a time as dense blocks of that width have room for."""
    done = 0
    for part in rows.split(max(1, BLOCK_ELEMENTS // width)):
        yield part
        done += len(part)
        progress(done, len(rows))


def mask_self(similarity_CF: Tensor, own_C: Tensor) -> Tensor:
    """-inf at each row's own latent."""
    return similarity_CF.scatter(1, own_C[:, None], -math.inf)


def top_entries(value_CF: Tensor, count: int) -> RankedEntries:
    value, index = value_CF.topk(min(count, value_CF.shape[1]), 1)
    missing = value == -math.inf
    return RankedEntries(index.masked_fill(missing, -1).cpu(), value.masked_fill(missing, 0).double().cpu())


def concat_entries(parts: list[RankedEntries]) -> RankedEntries:
    return RankedEntries(torch.cat([part.index for part in parts]), torch.cat([part.value for part in parts]))


def quantile_passages(
    found: PassageTable, latent: int, shares: tuple[float, ...] = (0.9, 0.7, 0.5, 0.3, 0.1)
) -> list[Passage]:
    """Of a latent's sampled passages those at these shares of their order by activation, the strongest first."""
    ordered = sorted(found.of(latent), key=lambda passage: passage.value)
    places = dict.fromkeys(round(share * (len(ordered) - 1)) for share in shares) if ordered else {}
    return [ordered[place] for place in places]
