"""Text packed into full rows, and how often latents fire on it.

Shape suffixes: R rows, S positions, N of them at a time, T counted tokens, D d_in, F latents.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...harvest.model import LanguageModel
from ..context import EvalContext
from .base import EvalTarget, Progress, SAELike

TOKENIZER_CHUNKS = 20  # of a text, tokenised each for itself
TOKENS_PER_FORWARD = 4096  # through the model
TOKENS_PER_ENCODE = 1024  # through one SAE


def pack_texts(texts: Sequence[str], tokenizer: Any, context: int) -> Tensor:
    """Texts joined by EOS as rows (R, context), each beginning with BOS in the place of a token; the rest is dropped."""
    joined = (tokenizer.eos_token or "\n").join(texts)
    size = max(1, -(-len(joined) // TOKENIZER_CHUNKS))
    chunks = [joined[start : start + size] for start in range(0, len(joined), size)]
    ids = [torch.tensor(tokenizer(chunk, verbose=False)["input_ids"], dtype=torch.int64) for chunk in chunks]
    flat = torch.cat([*ids, torch.zeros(0, dtype=torch.int64)])
    if tokenizer.pad_token_id is not None:
        flat = flat[flat != tokenizer.pad_token_id]
    return fill_rows(flat, context, tokenizer.bos_token_id)


def pack_contexts(ctx: EvalContext, context: int) -> Tensor:
    """The held-out text as rows (R, context): what follows BOS of each of its contexts, then EOS; BOS in column 0."""
    bos, eos = ctx.tokenizer.bos_token_id, ctx.tokenizer.eos_token_id
    end = torch.tensor([] if eos is None else [eos], dtype=torch.int64)
    parts = []
    for ids, length in zip(ctx.contexts.ids, ctx.contexts.length, strict=True):
        own = torch.from_numpy(ids[: int(length)].astype(np.int64))
        parts += [own if bos is None else own[own != bos], end]
    return fill_rows(torch.cat(parts or [end]), context, bos)


def fill_rows(flat_T: Tensor, context: int, bos: int | None) -> Tensor:
    """Full rows (R, context), with BOS over the first token of each; what is left is dropped."""
    rows_RS = flat_T[: len(flat_T) // context * context].view(-1, context).clone()
    if bos is not None:
        rows_RS[:, 0] = bos
    return rows_RS


def forward_batches(rows_RS: Tensor) -> tuple[Tensor, ...]:
    """The rows (N, S) of each pass of the model."""
    return rows_RS.split(max(1, TOKENS_PER_FORWARD // rows_RS.shape[1]))


def firing_frequencies(
    model: LanguageModel, skip: Tensor, rows_RS: Tensor, targets: Sequence[EvalTarget], progress: Progress
) -> list[np.ndarray]:
    """Of each SAE, the share of counted tokens at which each latent is positive (F,)."""
    layers = sorted({target.layer for target in targets})
    counts: list[Any] = [0] * len(targets)
    tokens = 0
    done = 0
    for ids_NS in forward_batches(rows_RS):
        kept_NS = ~torch.isin(ids_NS, skip)
        tokens += int(kept_NS.sum())
        residual = model.capture(ids_NS.to(model.device), layers)
        for number, target in enumerate(targets):
            for x_TD in residual[target.layer][kept_NS.to(model.device)].split(TOKENS_PER_ENCODE):
                counts[number] += (encode_float32(target.sae, x_TD) > 0).sum(0)
        done += len(ids_NS)
        progress(done, len(rows_RS), "rows of text")
    return [count.cpu().double().numpy() / max(tokens, 1) for count in counts]


def encode_float32(sae: SAELike, x_TD: Tensor) -> Tensor:
    return sae.encode(x_TD.float()).float()


def select_forget_latents(forget_F: np.ndarray, retain_F: np.ndarray, threshold: float) -> tuple[int, ...]:
    """Latents that fire on less than `threshold` of what is to be retained, those that fire most on the rest first.

    Of ties the last comes first; SAEBench's order of them is that of an unstable sort, and depends on the machine. It
    writes both shares to a file with six decimals, and reads them back.
    """
    forget_F, retain_F = (np.array([float(f"{share:f}") for share in shares]) for shares in (forget_F, retain_F))
    forget_F = np.where(retain_F >= threshold, 0.0, forget_F)
    order = np.argsort(forget_F, kind="stable")[::-1]
    return tuple(int(latent) for latent in order if forget_F[latent] > 0)
