"""Text packed into rows of equal length, and how often each latent fires on it (unlearning and autointerp).

Shape suffixes: R rows, S positions, N rows of one forward pass, T counted tokens, D d_in, F latents.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...harvest.model import LanguageModel
from ..context import EvalContext
from .base import EvalTarget, Progress, SAELike

TOKENIZER_CHUNKS = 20  # SAEBench tokenizes a corpus in so many pieces, each on its own
TOKENS_PER_FORWARD = 4096  # tokens of one forward pass of the model
TOKENS_PER_ENCODE = 1024  # tokens of one call of an SAE's encode


def pack_texts(texts: Sequence[str], tokenizer: Any, context: int) -> Tensor:
    """Join texts by EOS and cut them into rows (R, context); BOS replaces the first token of each row.

    Tokens that do not fill a row are dropped.
    """
    joined = (tokenizer.eos_token or "\n").join(texts)
    size = max(1, -(-len(joined) // TOKENIZER_CHUNKS))
    chunks = [joined[start : start + size] for start in range(0, len(joined), size)]
    ids = [torch.tensor(tokenizer(chunk, verbose=False)["input_ids"], dtype=torch.int64) for chunk in chunks]
    flat = torch.cat([*ids, torch.zeros(0, dtype=torch.int64)])
    if tokenizer.pad_token_id is not None:
        flat = flat[flat != tokenizer.pad_token_id]
    return fill_rows(flat, context, tokenizer.bos_token_id)


def pack_contexts(ctx: EvalContext, context: int) -> Tensor:
    """Pack the held-out contexts into rows (R, context): their BOS removed, EOS after each; BOS in column 0."""
    bos, eos = ctx.tokenizer.bos_token_id, ctx.tokenizer.eos_token_id
    separator = torch.tensor([] if eos is None else [eos], dtype=torch.int64)
    parts = []
    for ids, length in zip(ctx.contexts.ids, ctx.contexts.length, strict=True):
        tokens = torch.from_numpy(ids[: int(length)].astype(np.int64))
        parts += [tokens if bos is None else tokens[tokens != bos], separator]
    return fill_rows(torch.cat(parts or [separator]), context, bos)


def fill_rows(flat_T: Tensor, context: int, bos: int | None) -> Tensor:
    """Cut tokens into full rows (R, context), overwrite the first token of each by BOS, drop the remainder."""
    rows_RS = flat_T[: len(flat_T) // context * context].view(-1, context).clone()
    if bos is not None:
        rows_RS[:, 0] = bos
    return rows_RS


def forward_batches(rows_RS: Tensor) -> tuple[Tensor, ...]:
    """Split rows into batches (N, S) of at most TOKENS_PER_FORWARD tokens."""
    return rows_RS.split(max(1, TOKENS_PER_FORWARD // rows_RS.shape[1]))


def firing_frequencies(
    model: LanguageModel, skip: Tensor, rows_RS: Tensor, targets: Sequence[EvalTarget], progress: Progress
) -> list[np.ndarray]:
    """For each SAE, the share of counted tokens on which each latent is positive (F,).

    Tokens are counted unless their id is in `skip`.
    """
    hooks = sorted({target.hook for target in targets})
    counts: list[Any] = [0] * len(targets)
    tokens = 0
    done = 0
    for ids_NS in forward_batches(rows_RS):
        counted_NS = ~torch.isin(ids_NS, skip)
        tokens += int(counted_NS.sum())
        activations = model.capture_hooks(ids_NS.to(model.device), hooks)
        for i, target in enumerate(targets):
            for x_TD in activations[target.hook][counted_NS.to(model.device)].split(TOKENS_PER_ENCODE):
                counts[i] += (encode_float32(target.sae, x_TD) > 0).sum(0)
        done += len(ids_NS)
        progress(done, len(rows_RS), "rows of text")
    return [count.cpu().double().numpy() / max(tokens, 1) for count in counts]


def encode_float32(sae: SAELike, x_TD: Tensor) -> Tensor:
    """The latents (T, F) in float32, whatever the dtype of the activations."""
    return sae.encode(x_TD.float()).float()


def select_forget_latents(forget_F: np.ndarray, retain_F: np.ndarray, threshold: float) -> tuple[int, ...]:
    """Latents that fire on less than `threshold` of the retain corpus, most frequent on the forget corpus first.

    Among ties the latent with the largest index comes first; SAEBench leaves ties to an unstable sort, so its order
    depends on the machine. Frequencies are rounded to six decimals, because SAEBench writes them to a file that way and
    reads them back.
    """
    forget_F, retain_F = (np.array([float(f"{share:f}") for share in shares]) for shares in (forget_F, retain_F))
    forget_F = np.where(retain_F >= threshold, 0.0, forget_F)
    order = np.argsort(forget_F, kind="stable")[::-1]
    return tuple(int(latent) for latent in order if forget_F[latent] > 0)
