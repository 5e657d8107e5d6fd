"""The parts of a language model of transformers, found by structure: its blocks, and the trunk that runs them.

The blocks are a list of modules, as many as the configuration says. The trunk is the module that turns token ids into
the last hidden state: the innermost one that holds the blocks and takes `input_ids`.
"""

import contextlib
import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn

from ..common.errors import UsageError


class Parts(NamedTuple):
    """The trunk and the blocks of a model, with their paths in it, such as `model` and `model.layers`."""

    trunk: Any
    trunk_path: str
    blocks: Any  # nn.ModuleList
    blocks_path: str


def decoder_config(config: Any) -> Any:
    """The configuration of the language model within that of a model that also reads images or sound."""
    return config.get_text_config(decoder=True)


def find_parts(model: nn.Module) -> Parts:
    """Find the trunk and the blocks of a model. Raises UsageError if it has no list of blocks, or several."""
    decoder: Any = decoder_config(model.config)
    lists = outermost_lists(model)
    depth = getattr(decoder, "num_hidden_layers", None)
    if not any(len(blocks) == depth for _, blocks in lists):
        depth = max((len(blocks) for _, blocks in lists), default=0)
    around = [parts_around(model, path, blocks) for path, blocks in lists if len(blocks) == depth]
    found = [parts for parts in around if parts is not None]
    if len(found) > 1:  # an encoder of images can be as deep as the decoder
        kind = decoder.model_type
        found = [p for p in found if getattr(getattr(p.trunk, "config", None), "model_type", None) == kind]
    if len(found) != 1:
        raise UsageError(
            f"{type(model).__name__} is not supported: it has {'several lists' if found else 'no list'} of blocks in "
            "a module that takes token ids. Supported are the causal language models of transformers."
        )
    return found[0]


def outermost_lists(model: nn.Module) -> list[tuple[str, Any]]:
    """The lists of modules with parts that are not inside another one, as experts of a block are, with their paths."""
    found: list[tuple[str, Any]] = []
    for path, module in model.named_modules():
        is_inside = any(path.startswith(f"{outer}.") for outer, _ in found)
        if isinstance(module, nn.ModuleList) and not is_inside and any(list(part.children()) for part in module):
            found.append((path, module))
    return found


def parts_around(model: nn.Module, path: str, blocks: Any) -> Parts | None:
    """The parts of a model whose blocks are at `path`; None if no module around them takes token ids."""
    parent = path
    while parent:
        parent = parent.rpartition(".")[0]
        trunk = model.get_submodule(parent)
        if "input_ids" in inspect.signature(trunk.forward).parameters:
            return Parts(trunk, parent, blocks, path)
    return None


def check_layers(config: Any, layers: Sequence[int], name: str) -> None:
    """Raise UsageError unless the model is causal and every layer is one of its blocks."""
    decoder = decoder_config(config)
    if getattr(decoder, "is_encoder_decoder", False):
        raise UsageError(
            f"{name} is a {config.model_type} model, which has an encoder and a decoder. Supported are causal language "
            "models, such as Llama or GPT-2."
        )
    blocks = getattr(decoder, "num_hidden_layers", None)
    if blocks is None:
        raise UsageError(
            f"{name} is a {config.model_type} model without num_hidden_layers in its configuration, which is not "
            "supported."
        )
    for layer in layers:
        if not 0 <= layer < blocks:
            raise UsageError(f"{name} has no layer {layer}: its {blocks} blocks are layers 0 to {blocks - 1}.")


def truncate_config(config: Any, blocks: int) -> None:
    """Change a configuration, in place, into that of a model with only the first `blocks` blocks."""
    decoder = decoder_config(config)
    depth = decoder.num_hidden_layers
    per_block = {
        name: value for name, value in vars(decoder).items()
        if isinstance(value, list | tuple) and len(value) == depth and "token_id" not in name
    }  # fmt: skip
    for name, value in per_block.items():
        with contextlib.suppress(AttributeError):  # derived from others
            setattr(decoder, name, value[:blocks])
    with contextlib.suppress(AttributeError):  # derived from a list, such as that of Nemotron-H
        decoder.num_hidden_layers = blocks
