"""The activation rows of held-out text on which the latents of SAEs are compared, from one pass of the model for all
hooks.

The rows stay in the artifact cache, in the model's dtype: 150 MB for 32,768 tokens of Gemma-2-2B in bfloat16.

Shape suffixes: T tokens, D d_in.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...cache.outliers import outlier_mask
from ...common.errors import UnavailableError
from ..context import EvalContext
from .base import Progress, RowSet

KIND = "held_out"  # of the artifacts


class KeptRows(NamedTuple):
    """The rows of a row set (T, D), on the CPU, and how many outlier rows were skipped while reading them."""

    x_TD: Tensor
    outliers: int


def read_rows(
    ctx: EvalContext, row_sets: Sequence[RowSet], tokens: int, batch_contexts: int, progress: Progress
) -> dict[RowSet, KeptRows]:
    """For each row set, the first `tokens` rows of the held-out text, or fewer if the text is shorter.

    Special tokens and outlier rows are skipped. The rows come from the artifact cache or, if they are missing there,
    from one pass of the model.
    """
    keys = {row_set: key_of(ctx, row_set, tokens, batch_contexts) for row_set in row_sets}
    captured: dict[RowSet, KeptRows] = {}

    def rows_of(row_set: RowSet) -> KeptRows:
        def make() -> dict[str, Tensor]:
            if row_set not in captured:  # the kept file is damaged
                captured.update(capture_rows(ctx, [row_set], tokens, batch_contexts, progress))
            x_TD, outliers = captured[row_set]
            return {"x": x_TD, "outliers": torch.tensor(outliers)}

        try:
            arrays = ctx.artifacts.get_or_compute(KIND, keys[row_set], make)
        except UnavailableError:
            if row_set not in captured:
                raise
            return captured[row_set]  # the disk is full: measure without storing the rows
        return KeptRows(arrays["x"], int(arrays["outliers"]))

    with ctx.artifacts.claim(KIND, keys.values()):
        missing = [row_set for row_set in row_sets if not ctx.artifacts.contains(KIND, keys[row_set])]
        captured |= capture_rows(ctx, missing, tokens, batch_contexts, progress) if missing else {}
        return {row_set: rows_of(row_set) for row_set in row_sets}


def key_of(ctx: EvalContext, row_set: RowSet, tokens: int, batch_contexts: int) -> dict[str, Any]:
    """Everything on which the rows depend."""
    return {
        **ctx.model_identity, **ctx.text_identity, "skip": ctx.context_format.skip_record, "tokens": tokens,
        "batch_contexts": batch_contexts, **row_set.hook.record, "norm_limit": row_set.norm_limit,
    }  # fmt: skip


def missing_bytes(ctx: EvalContext, row_sets: Iterable[RowSet], tokens: int, batch_contexts: int) -> int:
    """An upper bound on the bytes that `read_rows` will add to the artifact cache. Does not need the model."""
    rows = min(tokens, int(ctx.contexts.length.sum()))
    return sum(
        rows * ctx.row_bytes([row_set.hook])
        for row_set in set(row_sets)
        if not ctx.artifacts.contains(KIND, key_of(ctx, row_set, tokens, batch_contexts))
    )


def capture_rows(
    ctx: EvalContext, row_sets: Sequence[RowSet], tokens: int, batch_contexts: int, progress: Progress
) -> dict[RowSet, KeptRows]:
    parts: dict[RowSet, list[Tensor]] = {row_set: [] for row_set in row_sets}
    kept, outliers = dict.fromkeys(row_sets, 0), dict.fromkeys(row_sets, 0)
    hooks = sorted({row_set.hook for row_set in row_sets})
    progress(0, tokens, "loading the model")
    for batch in ctx.batches(batch_contexts, len(ctx.contexts)):
        wanted = [row_set for row_set in row_sets if kept[row_set] < tokens]
        if not wanted:
            break
        activations = ctx.model.capture_hooks(batch.ids, hooks)
        for row_set in wanted:
            x_TD = activations[row_set.hook][batch.counted]
            outlier_T = outlier_mask(x_TD, row_set.norm_limit)
            part_TD = x_TD[~outlier_T][: tokens - kept[row_set]]
            parts[row_set].append(part_TD.cpu())
            outliers[row_set] += int(outlier_T.sum())
            kept[row_set] += len(part_TD)
        progress(min(kept.values()), tokens, "tokens")
    return {
        row_set: KeptRows(torch.cat(found) if found else torch.empty(0, 0), outliers[row_set])
        for row_set, found in parts.items()
    }
