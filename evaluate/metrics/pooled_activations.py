"""Residual activations of labeled texts without padding, and an SAE's latents summed over each text.

Sparse probing, SCR and TPP read them. SAEBench pads every text to the same length and zeroes the padding. Here only
counted tokens are stored. Where SAEBench also sums over padding, the padding contributes (padded positions) *
encode(0); `PooledLatents.zero_F` is encode(0).

Shape suffixes: N texts, S positions, T counted tokens of all texts, D d_in, F latents.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...cache.hooks import Hook
from ...cache.outliers import outlier_mask
from ...common.device import copy_to_device
from ...common.errors import UsageError
from ...common.files import digest_of
from ..context import EvalContext
from .base import Progress, SAELike, encode_finite

TEXTS_PER_FORWARD = 32
ROWS_PER_NORM = 65_536  # rows whose norms are computed at a time
MIN_TOKENS_PER_ENCODE = 64  # with fewer, reading the SAE's weights takes longer than multiplying by them


@dataclass(frozen=True)
class TextRows:
    """The activations at the counted tokens of all texts, one text after the other, in the model's dtype."""

    x_TD: Tensor
    count_N: Tensor  # int64: counted tokens of each text
    outliers: int = 0  # rows that were left out because of their norm

    def __len__(self) -> int:
        return len(self.count_N)

    def batches(self, tokens: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Batches of whole texts with about `tokens` rows each: the slice of texts, their rows (T, D), and for each row
        the index of its text within the slice (T,)."""
        ends, first, start = self.count_N.cumsum(0).tolist(), 0, 0
        for number, end in enumerate(ends):
            if end - start >= tokens or number + 1 == len(ends):
                texts = slice(first, number + 1)
                text_T = torch.repeat_interleave(torch.arange(number + 1 - first), self.count_N[texts])
                yield texts, self.x_TD[start:end], text_T
                first, start = number + 1, end

    def without_outliers(self, norm_limit: float | None) -> "TextRows":
        """The rows whose norm is at most `norm_limit`. A text with only outlier rows keeps them."""
        outlier_T = torch.cat([outlier_mask(x_TD, norm_limit) for x_TD in self.x_TD.split(ROWS_PER_NORM)])
        text_T = torch.repeat_interleave(torch.arange(len(self)), self.count_N)
        count_N = torch.bincount(text_T[~outlier_T], minlength=len(self))
        outlier_T &= (count_N > 0)[text_T]
        if not outlier_T.any():
            return self
        kept_T = ~outlier_T
        count_N = torch.bincount(text_T[kept_T], minlength=len(self))
        return TextRows(self.x_TD[kept_T], count_N, int(outlier_T.sum()))

    def mean_ND(self) -> Tensor:
        """The mean row of each text, in float32."""
        sum_ND = torch.zeros(len(self), self.x_TD.shape[1])
        for texts, x_TD, text_T in self.batches(4096):
            sum_ND[texts].index_add_(0, text_T, x_TD.float())
        return sum_ND / self.count_N[:, None]


@dataclass(frozen=True)
class PooledLatents:
    """An SAE's latents summed over the counted tokens of each text, and `zero_F`, its latents for a row of zeros."""

    sum_NF: Tensor  # float32
    count_N: Tensor
    zero_F: Tensor

    @property
    def mean_NF(self) -> Tensor:
        return self.sum_NF / self.count_N[:, None]


def rows_per_encode(d_sae: int, device: torch.device) -> int:
    """The number of rows to pass to `encode` at a time.

    On a CPU, the latents of these rows take 4 MB. Such a tensor fits into the CPU's cache, and its memory is reused for
    the next call. Larger tensors were allocated again for every call, which took as long as the matrix multiplications.
    """
    latents = 2**20 if device.type == "cpu" else 2**26
    return max(MIN_TOKENS_PER_ENCODE, latents // d_sae)


@torch.no_grad()
def pool_latents(sae: SAELike, rows: TextRows, device: torch.device) -> PooledLatents:
    """Encode every row once and sum the latents of each text. Raises SaeError for latents that are not finite."""
    zero_F = sae.encode(torch.zeros(1, rows.x_TD.shape[1], device=device))[0].float().cpu()
    sum_NF = torch.zeros(len(rows), len(zero_F))
    for texts, x_TD, text_T in rows.batches(rows_per_encode(len(zero_F), device)):
        f_TF = encode_finite(sae, copy_to_device(x_TD, device))
        part_NF = torch.zeros(texts.stop - texts.start, f_TF.shape[1], device=device)
        sum_NF[texts] = part_NF.index_add_(0, copy_to_device(text_T, device), f_TF).cpu()
    return PooledLatents(sum_NF, rows.count_N, zero_F)


def read_text_rows(
    ctx: EvalContext, hooks: Sequence[Hook], texts: Sequence[str], progress: Progress, context: int = 128
) -> dict[Hook, TextRows]:
    """The activation rows at each hook for texts truncated to `context` tokens (BOS included).

    The rows come from the artifact cache, or from one pass of the model over the texts. A text without a counted token
    has a count of 0. Callers that divide by the counts must drop such texts first.
    """
    if context < 2:  # the tokenizer would treat 0 as no limit
        raise UsageError(f"a context of {context} tokens has no room for text after BOS. Give 2 or more.")
    ids = ctx.encode_texts(texts, context)
    depends = {**ctx.model_identity, "skip": ctx.context_format.skip_record, "ids": digest_of(ids)}
    captured: dict[Hook, TextRows] = {}

    def rows_of(hook: Hook) -> TextRows:
        def make() -> dict[str, Tensor]:
            rows = captured[hook] if hook in captured else capture_rows(ctx, [hook], ids, progress)[hook]
            return {"x": rows.x_TD, "count": rows.count_N}

        arrays: dict[str, Any] = ctx.artifacts.get_or_compute("rows", {**depends, **hook.record}, make)
        return TextRows(arrays["x"], arrays["count"])

    with ctx.artifacts.claim("rows", ({**depends, **hook.record} for hook in hooks)):
        missing = [hook for hook in hooks if not ctx.artifacts.contains("rows", {**depends, **hook.record})]
        captured |= capture_rows(ctx, missing, ids, progress) if missing else {}
        return {hook: rows_of(hook) for hook in hooks}


def capture_rows(
    ctx: EvalContext, hooks: Sequence[Hook], ids: Sequence[Sequence[int]], progress: Progress
) -> dict[Hook, TextRows]:
    """Run the model, up to the last of `hooks`, once over the texts. The texts of a batch have similar lengths."""
    rows: dict[Hook, list[Tensor]] = {hook: [torch.empty(0)] * len(ids) for hook in hooks}
    longest_first = sorted(range(len(ids)), key=lambda text: -len(ids[text]))
    for start in range(0, len(longest_first), TEXTS_PER_FORWARD):
        batch = longest_first[start : start + TEXTS_PER_FORWARD]
        ids_NS = torch.zeros(len(batch), len(ids[batch[0]]), dtype=torch.int64)
        counted_NS = torch.zeros_like(ids_NS, dtype=torch.bool)
        for row, text in enumerate(batch):
            tokens = torch.tensor(ids[text])
            ids_NS[row, : len(tokens)] = tokens
            counted_NS[row, : len(tokens)] = ctx.context_format.counted(tokens)
        for hook, x_NSD in ctx.model.capture_hooks(copy_to_device(ids_NS, ctx.model.device), hooks).items():
            x_NSD = x_NSD.cpu()
            for row, text in enumerate(batch):
                rows[hook][text] = x_NSD[row, counted_NS[row]]
        progress(min(start + TEXTS_PER_FORWARD, len(ids)), len(ids), "texts through the model")
    return {hook: TextRows(torch.cat(x), torch.tensor([len(part) for part in x])) for hook, x in rows.items()}
