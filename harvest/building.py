"""Build a model without weights: on torch's meta device, where tensors have shapes but take no memory.

Such a model shows what a configuration describes before anything is allocated for it.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.utils import logging as transformers_logging

from ..common.errors import SaeError, UnavailableError, UsageError
from ..common.formatting import format_bytes
from ..common.remote_code import from_config
from .load_errors import cannot_be_built, model_name, translate_model_errors

MOST_PARTS = 500_000  # modules and parameters; DeepSeek-V3 with a module for each expert has 140,000


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence the warnings of transformers about blocks that are left out on purpose."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


def build_without_numbers(config: Any, *kinds: Any) -> nn.Module:
    """Build a model on the meta device with the first of these transformers classes that accepts the configuration.

    Raises UsageError if no class does, and DamagedError if the configuration describes a model that cannot be built.
    """
    errors = []
    for kind in kinds or (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModel):
        try:
            with torch.device("meta"), quiet_transformers(), limited_parts(config):
                return kind(config) if issubclass(kind, nn.Module) else from_config(kind, config)
        except SaeError:
            raise
        except Exception as error:  # from the model's own code
            errors.append(error)
    known = [error for error in errors if "Unrecognized configuration class" not in str(error)]
    if not known:
        raise UsageError(f"transformers has no language model of the type {config.model_type}.") from errors[0]
    raise cannot_be_built(config, known[0]) from known[0]


@contextlib.contextmanager
def limited_parts(config: Any) -> Iterator[None]:
    """A context manager that raises DamagedError once the model being built has more than MOST_PARTS parts."""
    parts = 0

    def count(*_: Any) -> None:
        nonlocal parts
        parts += 1
        if parts > MOST_PARTS:
            raise cannot_be_built(config, f"it has more than {MOST_PARTS:,} modules and parameters")

    handles = [register_module_module_registration_hook(count), register_module_parameter_registration_hook(count)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def build_with_numbers(config: Any, *, dtype: str, device: str, attention: str) -> nn.Module:
    """A model with random weights on a device.

    Raises UsageError for an attention implementation that cannot be used, UnavailableError if there is too little
    memory, and DamagedError for a configuration that makes no sense.
    """
    name = model_name(config)
    check_memory(build_without_numbers(config, AutoModel), name, dtype, device)
    with torch.random.fork_rng(devices=[]), translate_model_errors(name, attention):  # built on the CPU, then moved
        model = from_config(AutoModel, config, dtype=getattr(torch, dtype), attn_implementation=attention)
        return model.to(device).eval()


def check_memory(model: Any, name: str, dtype: str, device: str) -> None:
    """Raise UnavailableError if the weights of a model on the meta device would not fit into the memory of `device`."""
    if getattr(model.config, "quantization_config", None) is not None:
        return  # quantized: the weights take less memory than their dtype implies
    itemsize = getattr(torch, dtype).itemsize
    numbers = sum(x.numel() for x in (*model.parameters(), *model.buffers()))
    if numbers * itemsize > (memory := total_memory(device)):
        raise UnavailableError(
            f"According to config.json, the weights of {name} take {format_bytes(numbers * itemsize)} in {dtype}, but "
            f"the memory of {device} is {format_bytes(memory)}. Use a machine with more memory, or a smaller model. "
            "If the files of the model are smaller than that, config.json is damaged: download it again."
        )


def total_memory(device: str) -> int:
    """The total memory of a GPU or of this machine in bytes, whether used or free."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
