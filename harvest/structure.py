"""Find the parts of a transformers language model by its structure: the blocks, and the trunk that runs them.

The blocks are a list of modules whose length is given by the configuration. The trunk is the module that turns token
ids into the last hidden state: the innermost one that contains the blocks and accepts `input_ids`.
"""

import contextlib
import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn

from ..common.errors import DamagedError, UsageError

MOST_BLOCKS = 10_000  # in a model; the deepest have a few hundred


class Parts(NamedTuple):
    """The trunk and the blocks of a model, with their paths in it, such as `model` and `model.layers`."""

    trunk: Any
    trunk_path: str
    blocks: Any  # nn.ModuleList
    blocks_path: str


def decoder_config(config: Any) -> Any:
    """The configuration of the language model, within the configuration of a model that also reads images or sound."""
    return config.get_text_config(decoder=True)


def embedding_rows(config: Any) -> int | None:
    """The number of token ids for which a model has embeddings; None if its configuration does not say."""
    return getattr(decoder_config(config), "vocab_size", None)


def find_parts(model: nn.Module) -> Parts:
    """Find the trunk and the blocks of a model. Raises UsageError if the model has no list of blocks, or several."""
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
            "a module that takes token ids. Only the causal language models of transformers are supported."
        )
    return found[0]


def outermost_lists(model: nn.Module) -> list[tuple[str, Any]]:
    """The non-empty lists of modules with their paths, except lists inside another list, such as a block's experts."""
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


def check_config(config: Any, name: str) -> None:
    """Raise DamagedError if one of the sizes that every model has is not plausible."""
    decoder = decoder_config(config)
    for field, most in {"num_hidden_layers": MOST_BLOCKS, "hidden_size": 2**31, "vocab_size": 2**31}.items():
        value = getattr(decoder, field, None)
        if value is not None and not (type(value) is int and 1 <= value <= most):
            raise DamagedError(
                f"The config.json of {name} has {field} = {shorten(value)}; expected a number from 1 to {most:,}. "
                "Download it again, or correct the value."
            )


def check_config_file(content: Any, path: str) -> None:
    """Raise DamagedError unless transformers can build a configuration from the content of a config.json.

    transformers makes a list with an entry for each block, so an absurd number of blocks would fill the memory.
    """
    if not isinstance(content, dict):
        raise DamagedError(f"{path} is not the configuration of a model: expected an object. Download it again.")
    for field, value in content.items():
        is_depth = any(word in field for word in ("layer", "depth", "block")) and "size" not in field
        if is_depth and isinstance(value, int | float) and abs(value) > MOST_BLOCKS:
            raise DamagedError(
                f"{path} has {field} = {shorten(value)}, and no model has more than {MOST_BLOCKS:,} blocks. Download "
                "it again, or correct the value."
            )
        if isinstance(value, dict):
            check_config_file(value, path)


def shorten(value: Any) -> str:
    """A value from a foreign file, shortened for a message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def check_layers(config: Any, layers: Sequence[int], name: str) -> None:
    """Raise UsageError unless the model is causal and every layer is one of its blocks."""
    decoder = decoder_config(config)
    if getattr(decoder, "is_encoder_decoder", False):
        raise UsageError(
            f"{name} is a {config.model_type} model, which has an encoder and a decoder. Only causal language models, "
            "such as Llama or GPT-2, are supported."
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
    """Change a configuration in place so that the model has only the first `blocks` blocks."""
    decoder = decoder_config(config)
    depth = decoder.num_hidden_layers
    per_block = {
        name: value for name, value in vars(decoder).items()
        if isinstance(value, list | tuple) and len(value) == depth and "token_id" not in name
    }  # fmt: skip
    for name, value in per_block.items():
        with contextlib.suppress(AttributeError):  # a property that is derived from other values
            setattr(decoder, name, value[:blocks])
    with contextlib.suppress(AttributeError):  # derived from a list, as in Nemotron-H
        decoder.num_hidden_layers = blocks
