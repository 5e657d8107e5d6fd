"""What each of several processes does of a harvest, in rows, bytes and memory: lines of its plan."""

import copy
from typing import TYPE_CHECKING

import torch
from transformers import AutoModel

from ..common.formatting import format_bytes, format_count
from ..common.process_group import processes_on_this_machine, rank_and_count
from .architectures import can_truncate
from .building import build_without_numbers
from .structure import decoder_config, truncate_config

if TYPE_CHECKING:
    from .plan import HarvestPlan

WINDOWS_IN_MEMORY = 2  # of each process: one is computed, one is written
TOKEN_BYTES = 5  # the id of a token, and whether it is a row


def describe_division(plan: "HarvestPlan") -> list[str]:
    """The lines about the processes: of ranks, the one with the most windows. None if a process does all of it."""
    layout = plan.layout_to_fill
    if (count := rank_and_count()[1]) > 1:
        machines = format_count(-(-count // processes_on_this_machine()), "machine")
        title = f"ranks    {count} processes on {machines}: each at most"
    elif plan.share is not None:
        title = f"share    {plan.share.number} of {plan.share.count}:"
    else:
        return []
    mine = plan.windows_of_process
    rows = sum(len(layout.row_range(window)) for window in mine)
    size = format_bytes(rows * plan.bytes_per_token_of([hook.array for hook in plan.existing.missing]))
    return [
        f"{title} {len(mine)} of {layout.n_windows} windows, {rows:,} rows, {size}",
        f"memory   {describe_memory(plan)}",
    ]


def describe_memory(plan: "HarvestPlan") -> str:
    """What a process keeps in memory, as text. What torch and one forward pass need comes on top of it."""
    layout, arrays = plan.layout_to_fill, [hook.array for hook in plan.existing.missing]
    window = min(layout.window_rows, layout.rows) * sum(2 * plan.widths[name] for name in arrays)
    tokens = TOKEN_BYTES * layout.rows * plan.config.context // (plan.config.context - 1)
    weights = weight_bytes(plan)
    parts = [
        f"{WINDOWS_IN_MEMORY} windows of {format_bytes(window)}", f"{format_bytes(tokens)} of token ids",
        *([] if weights is None else [f"{format_bytes(weights)} of weights on {plan.device}"]),
    ]  # fmt: skip
    total = WINDOWS_IN_MEMORY * window + tokens + (weights or 0)
    return f"about {format_bytes(total)} in each process: {', '.join(parts)}"


def weight_bytes(plan: "HarvestPlan") -> int | None:
    """Bytes of the weights of the model up to the deepest layer; None if they are quantized."""
    config = copy.deepcopy(decoder_config(plan.model_config))
    if getattr(plan.model_config, "quantization_config", None) is not None:
        return None
    blocks = max((hook.layer + 1 for hook in plan.existing.missing), default=1)
    if can_truncate(plan.model_config, blocks):
        truncate_config(config, blocks)
    model = build_without_numbers(config, AutoModel)
    return sum(parameter.numel() for parameter in model.parameters()) * getattr(torch, plan.dtype).itemsize
