"""Estimate the time that the model takes in a harvest, by timing one of its blocks with random weights."""

import copy
import time
from typing import Any

import torch

from ..common.device import empty_gpu_cache
from .building import build_with_numbers, model_name
from .hooked import HookedModel
from .load_errors import translate_model_errors
from .structure import decoder_config, truncate_config

TIMED_CONTEXT = 2048  # attention over a longer context can fill the memory, and few documents are that long
LONG_ENOUGH = 0.1  # seconds per pass


def block_seconds_per_token(
    model_config: Any, *, dtype: str, device: str, attention: str, context: int, batch_contexts: int
) -> float:
    """Seconds per token that one block of this shape takes on the device.

    Raises UsageError if the attention implementation cannot be used, UnavailableError if the memory is too small, and
    DamagedError if the configuration makes no sense.
    """
    config = copy.deepcopy(decoder_config(model_config))
    config.vocab_size, config.pad_token_id = 8, 0
    truncate_config(config, 1)
    block = build_with_numbers(config, dtype=dtype, device=device, attention=attention)
    model = HookedModel(block)
    contexts, length = 1, min(context, TIMED_CONTEXT)
    while True:  # with more contexts each time, until a pass takes long enough to be timed
        ids_NS = torch.zeros(contexts, length, dtype=torch.long, device=device)
        with translate_model_errors(model_name(config), attention):
            seconds = min(time_pass(model, ids_NS) for _ in range(3))  # the first pass with a new shape is slower
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
