"""How long the model of a harvest will take, from timing one of its blocks with random weights."""

import copy
import time
from typing import Any

import torch
from transformers import AutoModel

from ..common.device import empty_gpu_cache
from ..common.errors import UsageError
from .dataset_reader import first_line
from .hooked import HookedModel
from .structure import decoder_config, truncate_config

TIMED_CONTEXT = 2048  # attention over a longer context can fill the memory, and few documents are as long
LONG_ENOUGH = 0.1  # seconds of a pass


def block_seconds_per_token(
    model_config: Any, *, dtype: str, device: str, attention: str, context: int, batch_contexts: int
) -> float:
    """Seconds that one block of this shape takes per token on the device.

    Raises UsageError if the attention implementation cannot be used.
    """
    config = copy.deepcopy(decoder_config(model_config))
    config.vocab_size, config.pad_token_id = 8, 0
    truncate_config(config, 1)
    with torch.random.fork_rng():
        try:
            block = AutoModel.from_config(config, dtype=getattr(torch, dtype), attn_implementation=attention)
            model = HookedModel(block.to(device).eval())
        except (ValueError, ImportError) as error:
            raise UsageError(f"--attention {attention} cannot be used: {first_line(error)}") from error
    contexts, length = 1, min(context, TIMED_CONTEXT)
    while True:  # with more contexts each time, until a pass takes long enough to be timed
        ids_NS = torch.zeros(contexts, length, dtype=torch.long, device=device)
        seconds = min(time_pass(model, ids_NS) for _ in range(3))  # the first pass of a shape is slower
        if seconds > LONG_ENOUGH or contexts >= batch_contexts:
            break
        contexts = min(4 * contexts, batch_contexts)
    del model, block
    empty_gpu_cache(device)
    return seconds / ids_NS.numel()


def time_pass(model: HookedModel, ids_NS: torch.Tensor) -> float:
    started = time.perf_counter()
    model.capture(ids_NS, [0])[0].float().mean().item()  # reading a number waits for the device
    return time.perf_counter() - started
