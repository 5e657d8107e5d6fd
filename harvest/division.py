"""Lines of the plan about each process's part of a harvest: rows, bytes and memory."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import AutoModel

from ..cache.hooks import Hook
from ..cache.layout import Layout
from ..common.formatting import format_bytes, format_count
from ..common.process_group import processes_on_this_machine, rank_and_count
from .architectures import can_truncate
from .building import build_without_numbers
from .share import HarvestShare
from .structure import decoder_config, truncate_config

WINDOWS_IN_MEMORY = 2  # per process: one is computed, one is written
TOKEN_BYTES = 5  # the id of a token, and whether it is a row
SIDE_BYTES, NORM_BYTES = 6, 4  # per row on disk: row_ctx and row_pos; for each hook also row_norm


def describe_division(
    share: HarvestShare | None, layout: Layout, windows: Sequence[int], context: int, model_config: Any,
    widths: Mapping[Hook, int], dtype: str, device: str,
) -> list[str]:  # fmt: skip
    """The lines about the work and memory of a process. The list is empty if a single process does everything.

    With several ranks, `windows` are those of the rank that has the most. `widths` contains the harvested hooks.
    """
    if (count := rank_and_count()[1]) > 1:
        machines = format_count(-(-count // processes_on_this_machine()), "machine")
        title = f"ranks    {count} processes on {machines}: each at most"
    elif share is not None:
        title = f"share    {share.number} of {share.count}:"
    else:
        return []
    rows, per_row = layout.rows_in(windows), 2 * sum(widths.values())
    memory = describe_memory(layout, per_row, context, weight_bytes(model_config, list(widths), dtype), device)
    return [
        f"{title} {len(windows)} of {layout.n_windows} windows, {rows:,} rows, "
        f"{format_bytes(rows * (per_row + SIDE_BYTES + NORM_BYTES * len(widths)))}",
        f"memory   {memory}",
    ]


def describe_memory(layout: Layout, bytes_per_row: int, context: int, weights: int | None, device: str) -> str:
    """A line about the memory of a process, excluding torch itself and the forward pass."""
    window = window_bytes(layout, bytes_per_row)
    tokens = TOKEN_BYTES * layout.rows * context // (context - 1)
    parts = [
        f"{WINDOWS_IN_MEMORY} windows of {format_bytes(window)}", f"{format_bytes(tokens)} of token ids",
        *([] if weights is None else [f"{format_bytes(weights)} of weights on {device}"]),
    ]  # fmt: skip
    total = WINDOWS_IN_MEMORY * window + tokens + (weights or 0)
    return f"about {format_bytes(total)} in each process: {', '.join(parts)}"


def window_bytes(layout: Layout, bytes_per_row: int) -> int:
    """Bytes of the activations of a whole window."""
    return min(layout.window_rows, layout.rows) * bytes_per_row


def weight_bytes(model_config: Any, hooks: Sequence[Hook], dtype: str) -> int | None:
    """The bytes of a model's weights, without blocks after the deepest of these hooks. None if they are quantized."""
    if getattr(model_config, "quantization_config", None) is not None:
        return None
    config, blocks = copy.deepcopy(decoder_config(model_config)), max((hook.layer + 1 for hook in hooks), default=1)
    if can_truncate(model_config, blocks):
        truncate_config(config, blocks)
    model = build_without_numbers(config, AutoModel)
    return sum(parameter.numel() for parameter in model.parameters()) * getattr(torch, dtype).itemsize
