"""Text packed into rows of equal length, and how often each latent fires on it (unlearning and autointerp).

Shape suffixes: R rows, S positions, N rows of one forward pass, T counted tokens, D d_in, F latents.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...cache.outliers import outlier_mask
from ...common.device import copy_to_device
from ...common.special_tokens import turn_markers
from ...harvest.model import LanguageModel
from ..context import EvalContext
from .base import EvalTarget, Progress, SAELike

TOKENIZER_CHUNKS = 20  # SAEBench tokenizes a corpus in this many separate pieces
TOKENS_PER_FORWARD = 4096  # tokens of one forward pass of the model
TOKENS_PER_ENCODE = 1024  # tokens of one call of an SAE's encode


def pack_texts(texts: Sequence[str], tokenizer: Any, context: int, bos_id: int | None) -> Tensor:
    """Join texts with EOS and cut them into rows (R, context). BOS replaces the first token of each row.

    Tokens that do not fill a row are dropped. SAEBench uses the tokenizer's BOS. Here BOS is `bos_id`, the first token
    of the contexts that the SAEs were trained on. For Gemma and Llama, `bos_id` is the tokenizer's BOS.
    """
    joined = (tokenizer.eos_token or "\n").join(texts)
    size = max(1, -(-len(joined) // TOKENIZER_CHUNKS))
    chunks = [joined[start : start + size] for start in range(0, len(joined), size)]
    ids = [torch.tensor(tokenizer(chunk, verbose=False)["input_ids"], dtype=torch.int64) for chunk in chunks]
    flat = torch.cat([*ids, torch.zeros(0, dtype=torch.int64)])
    if tokenizer.pad_token_id is not None:
        flat = flat[flat != tokenizer.pad_token_id]
    return fill_rows(flat, context, bos_id)


class PackedRows(NamedTuple):
    """Rows of equal length, and a mask of the tokens at which metrics are computed: (R, S) each."""

    ids: Tensor
    counted: Tensor

    def first(self, rows: int) -> "PackedRows":
        return PackedRows(self.ids[:rows], self.counted[:rows])


def pack_contexts(ctx: EvalContext, context: int) -> PackedRows:
    """Pack the held-out contexts into rows (R, context): remove their BOS, append EOS to each, and put BOS in column 0.

    If EOS is the token that ends a chat turn, BOS is appended instead.
    """
    bos, text = ctx.context_format.bos_id, ctx.contexts
    separator = torch.tensor([] if (end := separator_id(ctx)) is None else [end], dtype=torch.int64)
    parts, marks = [], []
    for number, (ids, length) in enumerate(zip(text.ids, text.length, strict=True)):
        tokens = torch.from_numpy(ids[: int(length)].astype(np.int64))
        kept = torch.ones(len(tokens), dtype=torch.bool) if bos is None else tokens != bos
        mark = torch.ones_like(kept) if text.rows is None else torch.from_numpy(text.rows[number, : int(length)])
        parts += [tokens[kept], separator]
        marks += [mark[kept], separator >= 0]
    ids_RS = fill_rows(torch.cat(parts or [separator]), context, bos)
    mark_RS = fill_rows(torch.cat(marks or [separator >= 0]), context, None)
    return PackedRows(ids_RS, ctx.context_format.counted(ids_RS) & mark_RS)


def separator_id(ctx: EvalContext) -> int | None:
    """The token between two texts: EOS, or BOS if EOS is the token that ends a chat turn."""
    tokenizer = ctx.tokenizer
    turn = tokenizer.eos_token is not None and tokenizer.eos_token in turn_markers(tokenizer)
    return ctx.context_format.bos_id if turn else tokenizer.eos_token_id


def fill_rows(flat_T: Tensor, context: int, bos: int | None) -> Tensor:
    """Cut tokens into full rows (R, context), overwrite each row's first token with BOS, drop the remainder."""
    rows_RS = flat_T[: len(flat_T) // context * context].view(-1, context).clone()
    if bos is not None:
        rows_RS[:, 0] = bos
    return rows_RS


def forward_batches(rows_RS: Tensor) -> tuple[Tensor, ...]:
    """Split rows into batches (N, S) of at most TOKENS_PER_FORWARD tokens."""
    return rows_RS.split(max(1, TOKENS_PER_FORWARD // rows_RS.shape[1]))


class FiringFrequency(NamedTuple):
    """How often the latents of an SAE fire on a text.

    Attributes:
        share_F: the share of the counted tokens on which each latent is positive.
        tokens: the number of counted tokens.
        outliers: the number of tokens left out because of their norm.
    """

    share_F: np.ndarray
    tokens: int
    outliers: int


def firing_frequencies(
    model: LanguageModel, rows: PackedRows, targets: Sequence[EvalTarget], progress: Progress
) -> list[FiringFrequency]:
    """How often each SAE's latents fire on rows of text, among the counted tokens that are not outlier rows."""
    hooks = sorted({target.hook for target in targets})
    counts: list[Any] = [0] * len(targets)
    outliers = [0] * len(targets)
    tokens = 0
    done = 0
    for ids_NS, counted_NS in zip(forward_batches(rows.ids), forward_batches(rows.counted), strict=True):
        tokens += int(counted_NS.sum())
        activations = model.capture_hooks(copy_to_device(ids_NS, model.device), hooks)
        counted_NS = copy_to_device(counted_NS, model.device)
        for i, target in enumerate(targets):
            x_TD = activations[target.hook][counted_NS]
            outlier_T = outlier_mask(x_TD, target.norm_limit)
            outliers[i] += int(outlier_T.sum())
            for x_BD in x_TD[~outlier_T].split(TOKENS_PER_ENCODE):
                counts[i] += (encode_float32(target.sae, x_BD) > 0).sum(0)
        done += len(ids_NS)
        progress(done, len(rows.ids), "rows of text")
    frequencies = []
    for count, left_out in zip(counts, outliers, strict=True):
        kept = tokens - left_out
        frequencies.append(FiringFrequency(count.cpu().double().numpy() / max(kept, 1), kept, left_out))
    return frequencies


def encode_float32(sae: SAELike, x_TD: Tensor) -> Tensor:
    """The latents (T, F) in float32, for activations of any dtype."""
    return sae.encode(x_TD.float()).float()


def select_forget_latents(forget_F: np.ndarray, retain_F: np.ndarray, threshold: float) -> tuple[int, ...]:
    """The latents that fire on less than the share `threshold` of the retain corpus, sorted by how often they fire on
    the forget corpus (most often first).

    Of latents with equal frequency, the latent with the largest index comes first. SAEBench leaves ties to an unstable
    sort, so the order in SAEBench depends on the machine. Frequencies are rounded to six decimals, because SAEBench
    writes them to a file that way and reads them back.
    """
    forget_F, retain_F = (np.array([float(f"{share:f}") for share in shares]) for shares in (forget_F, retain_F))
    forget_F = np.where(retain_F >= threshold, 0.0, forget_F)
    order = np.argsort(forget_F, kind="stable")[::-1]
    return tuple(int(latent) for latent in order if forget_F[latent] > 0)
