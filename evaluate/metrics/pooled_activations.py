"""Residual rows of labelled texts, ragged: what probing, SCR and TPP read, and what an SAE makes of a whole text.

SAEBench pads each text to the same length and zeroes what does not count. Rows of tokens that count are all that is
needed: where a sum runs over padding too, its part is (padded positions) * encode(0), which `Pooled` has beside it.

Shape suffixes: N texts, S positions, T counted tokens of all texts, D d_in, F latents.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...common.errors import UsageError
from ...common.files import digest_of
from ..context import EvalContext
from .base import Progress, SAELike

TEXTS_PER_FORWARD = 32  # in one pass of the model
MIN_TOKENS_PER_ENCODE = 64  # tokens through one SAE: with fewer, reading its weights takes longer than the product


@dataclass(frozen=True)
class TextRows:
    """The residual at the counted tokens of texts, one text after the other, in the model's dtype."""

    x_TD: Tensor
    count_N: Tensor  # int64: how many of the rows are of each text

    def __len__(self) -> int:
        return len(self.count_N)

    def parts(self, tokens: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Whole texts, about `tokens` rows at a time: which, their rows (T, D), and the text of each row (T,)."""
        ends, first, start = self.count_N.cumsum(0).tolist(), 0, 0
        for number, end in enumerate(ends):
            if end - start >= tokens or number + 1 == len(ends):
                texts = slice(first, number + 1)
                owner_T = torch.repeat_interleave(torch.arange(number + 1 - first), self.count_N[texts])
                yield texts, self.x_TD[start:end], owner_T
                first, start = number + 1, end

    def mean_ND(self) -> Tensor:
        """The mean row of each text, in float32."""
        total_ND = torch.zeros(len(self), self.x_TD.shape[1])
        for texts, x_TD, owner_T in self.parts(4096):
            total_ND[texts].index_add_(0, owner_T, x_TD.float())
        return total_ND / self.count_N[:, None]


@dataclass(frozen=True)
class PooledLatents:
    """What an SAE makes of texts: its latents summed over the counted tokens of each, and what it makes of a zero row."""

    sum_NF: Tensor  # float32
    count_N: Tensor
    zero_F: Tensor

    @property
    def mean_NF(self) -> Tensor:
        return self.sum_NF / self.count_N[:, None]


def tokens_per_encode(d_sae: int, device: torch.device) -> int:
    """How many rows go through an SAE together. On a CPU their latents take 4 MB, which its cache holds and which is
    memory used before: tensors of tens of MB come anew from the system each time, and that took as long as the products.
    """
    latents = 2**20 if device.type == "cpu" else 2**26
    return max(MIN_TOKENS_PER_ENCODE, latents // d_sae)


@torch.no_grad()
def pool_latents(sae: SAELike, rows: TextRows, device: torch.device) -> PooledLatents:
    """Encode every row once."""
    zero_F = sae.encode(torch.zeros(1, rows.x_TD.shape[1], device=device))[0].float().cpu()
    sum_NF = torch.zeros(len(rows), len(zero_F))
    for texts, x_TD, owner_T in rows.parts(tokens_per_encode(len(zero_F), device)):
        f_TF = sae.encode(x_TD.to(device).float()).float()
        part_NF = torch.zeros(texts.stop - texts.start, f_TF.shape[1], device=device)
        sum_NF[texts] = part_NF.index_add_(0, owner_T.to(device), f_TF).cpu()
    return PooledLatents(sum_NF, rows.count_N, zero_F)


def read_text_rows(
    ctx: EvalContext, layers: Sequence[int], texts: Sequence[str], progress: Progress, context: int = 128
) -> dict[int, TextRows]:
    """The rows of texts, cut at `context` tokens (BOS included), after each layer: from the shelf, or one pass.

    A text without a token that counts keeps a count of 0; callers that divide by it have to drop it first.
    """
    if context < 2:  # the tokenizer would take 0 for no limit
        raise UsageError(f"A context of {context} tokens holds no text beside BOS. Give 2 or more.")
    ids: list[list[int]] = ctx.tokenizer(list(texts), truncation=True, max_length=context)["input_ids"]
    pinned = {**ctx.model_identity, "skip": ctx.special_ids, "ids": digest_of(ids)}
    lacking = [layer for layer in layers if not ctx.artifacts.contains("rows", {**pinned, "layer": layer})]
    made = capture_rows(ctx, lacking, ids, progress) if lacking else {}

    def rows_of(layer: int) -> TextRows:
        def make() -> dict[str, Tensor]:
            rows = made[layer] if layer in made else capture_rows(ctx, [layer], ids, progress)[layer]
            return {"x": rows.x_TD, "count": rows.count_N}

        kept: dict[str, Any] = ctx.artifacts.get_or_compute("rows", {**pinned, "layer": layer}, make)
        return TextRows(kept["x"], kept["count"])

    return {layer: rows_of(layer) for layer in layers}


def capture_rows(
    ctx: EvalContext, layers: Sequence[int], ids: Sequence[Sequence[int]], progress: Progress
) -> dict[int, TextRows]:
    """One pass over the texts, those of like length together; no later block than the last layer asked for is needed."""
    skip = torch.tensor(ctx.special_ids)
    found: dict[int, list[Tensor]] = {layer: [torch.empty(0)] * len(ids) for layer in layers}
    order = sorted(range(len(ids)), key=lambda number: -len(ids[number]))
    for start in range(0, len(order), TEXTS_PER_FORWARD):
        numbers = order[start : start + TEXTS_PER_FORWARD]
        ids_NS = torch.zeros(len(numbers), len(ids[numbers[0]]), dtype=torch.int64)
        kept_NS = torch.zeros_like(ids_NS, dtype=torch.bool)
        for line, number in enumerate(numbers):
            own = torch.tensor(ids[number])
            ids_NS[line, : len(own)] = own
            kept_NS[line, : len(own)] = ~torch.isin(own, skip)
        for layer, x_NSD in ctx.model.capture(ids_NS.to(ctx.model.device), layers).items():
            x_NSD = x_NSD.cpu()
            for line, number in enumerate(numbers):
                found[layer][number] = x_NSD[line, kept_NS[line]]
        progress(min(start + TEXTS_PER_FORWARD, len(order)), len(order), "texts through the model")
    return {layer: TextRows(torch.cat(x), torch.tensor([len(part) for part in x])) for layer, x in found.items()}
