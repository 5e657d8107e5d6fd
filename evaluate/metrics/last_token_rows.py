"""Activations at the last token of labeled texts, from one pass of the model for all hooks (sae_probes).

Shape suffixes: N texts, S positions, D d_in.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...cache.hooks import Hook
from ...common.device import copy_to_device
from ...common.errors import UsageError
from ...common.tokenizers import tokenizer_digest
from ..context import EvalContext
from .base import Progress

MAX_TOKENS = 1024  # including BOS; of a longer text, only the last tokens are kept
TOKENS_PER_FORWARD = 8192  # including padding


def last_token_rows(
    ctx: EvalContext, hooks: Sequence[Hook], texts: Sequence[str], source: Mapping[str, Any], progress: Progress
) -> dict[Hook, Tensor]:
    """The activations (N, D) at each hook at the last token of every text, in the model's dtype.

    The rows come from the artifact cache, or from one pass of the model up to the last of the hooks. `source`
    identifies the texts. Raises UsageError for a text that has no token.
    """
    depends = {**ctx.model_identity, **source, "bos": ctx.context_format.bos_id, "max_tokens": MAX_TOKENS}
    depends["tokenizer"] = tokenizer_digest(ctx.tokenizer)
    captured: dict[Hook, Tensor] = {}

    def rows_of(hook: Hook) -> Tensor:
        def make() -> dict[str, Tensor]:
            return {"x": captured[hook] if hook in captured else capture_last_rows(ctx, [hook], texts, progress)[hook]}

        return ctx.artifacts.get_or_compute("last_rows", {**depends, **hook.record}, make)["x"]

    with ctx.artifacts.claim("last_rows", ({**depends, **hook.record} for hook in hooks)):
        missing = [hook for hook in hooks if not ctx.artifacts.contains("last_rows", {**depends, **hook.record})]
        captured |= capture_last_rows(ctx, missing, texts, progress) if missing else {}
        return {hook: rows_of(hook) for hook in hooks}


def capture_last_rows(
    ctx: EvalContext, hooks: Sequence[Hook], texts: Sequence[str], progress: Progress
) -> dict[Hook, Tensor]:
    """Run the model over the texts, in batches of similar length."""
    ids = [keep_last_tokens(ctx, one) for one in ctx.encode_texts(texts)]
    if empty := [number for number, one in enumerate(ids) if not one]:
        raise UsageError(f"the text {texts[empty[0]]!r} has no token to probe. Remove it from the data set.")
    longest_first = sorted(range(len(ids)), key=lambda text: -len(ids[text]))
    rows: dict[Hook, Tensor] = {}
    done = 0
    while done < len(longest_first):
        width = len(ids[longest_first[done]])
        batch = longest_first[done : done + max(1, TOKENS_PER_FORWARD // width)]
        ids_NS = torch.zeros(len(batch), width, dtype=torch.int64)
        for row, text in enumerate(batch):
            ids_NS[row, : len(ids[text])] = torch.tensor(ids[text])
        last_N = copy_to_device(torch.tensor([len(ids[text]) - 1 for text in batch]), ctx.model.device)
        for hook, x_NSD in ctx.model.capture_hooks(copy_to_device(ids_NS, ctx.model.device), hooks).items():
            x_ND = x_NSD[torch.arange(len(batch), device=x_NSD.device), last_N].cpu()
            rows.setdefault(hook, torch.empty(len(ids), x_ND.shape[1], dtype=x_ND.dtype))[batch] = x_ND
        done += len(batch)
        progress(done, len(ids), "texts through the model")
    return rows


def keep_last_tokens(ctx: EvalContext, ids: list[int]) -> list[int]:
    """The last MAX_TOKENS tokens of a text. BOS stays the first token if contexts begin with it."""
    if len(ids) <= MAX_TOKENS:
        return ids
    return ids[-MAX_TOKENS:] if ctx.context_format.bos_id is None else [ids[0], *ids[1 - MAX_TOKENS :]]
