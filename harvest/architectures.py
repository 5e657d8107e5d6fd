"""What a family of models calls its parts, and where in them a hook is.

Every decoder of transformers is a trunk with a list of blocks and a norm behind it, and an unembedding. Most keep the
blocks in `model.layers`; GPT-2 and GPT-NeoX (Pythia) have names of their own. In all families named here a block adds
the attention and the MLP to the residual stream, in GPT-NeoX both computed from the same; a test shows it of each.
"""

from collections.abc import Sequence
from operator import attrgetter
from typing import Any, NamedTuple

from torch import nn

from ..cache.layout import Hook
from ..common.errors import UsageError


class Family(NamedTuple):
    """The names of the parts. Those in a block are None where nobody has looked what it adds: its sites are refused."""

    mlp: str | None = None  # its output is what the MLP adds to the residual stream
    projection: str | None = None  # of the attention; its input is the heads' outputs side by side
    trunk: str = "model"
    blocks: str = "layers"
    norm: str = "norm"
    learned_positions: bool = False  # a longer context than those cannot be computed


LLAMA = Family("mlp", "self_attn.o_proj")
GEMMA2 = LLAMA._replace(mlp="post_feedforward_layernorm")
FAMILIES = {
    **dict.fromkeys(("gemma", "llama", "mistral", "qwen2", "qwen3"), LLAMA),
    **dict.fromkeys(("gemma2", "gemma3_text"), GEMMA2),
    "gpt2": Family("mlp", "attn.c_proj", "transformer", "h", "ln_f", learned_positions=True),
    "gpt_neox": Family("mlp", "attention.dense", "gpt_neox", "layers", "final_layer_norm"),
}  # by transformers' model_type


def family_of(config: Any) -> Family:
    """The names of a model's parts; of a family that is not known, those that most have."""
    return FAMILIES.get(config.get_text_config().model_type, Family())


def find_trunk(model: nn.Module) -> Any:
    """The part without the unembedding, which holds the blocks."""
    family = family_of(model.config)
    for part in (model, getattr(model, family.trunk, None)):
        for decoder in (part, getattr(part, "language_model", None)):  # of a model that reads images too
            if hasattr(decoder, family.blocks):
                return decoder
    raise UsageError(
        f"A {type(model).__name__} keeps its blocks elsewhere than in `model.layers`, where most models have them; it cannot be "
        f"harvested yet. Known are {', '.join(FAMILIES)}, and what has such a list."
    )


def find_module(hook: Hook, trunk: Any, family: Family) -> tuple[nn.Module, bool]:
    """The module where a hook is, and whether it is what goes in there; else it is what comes out."""
    block = getattr(trunk, family.blocks)[hook.layer]
    name = {"resid_post": "", "mlp_out": family.mlp, "attn_z": family.projection}[hook.site]
    return attrgetter(name)(block) if name else block, hook.site == "attn_z"


def module_name(hook: Hook, config: Any) -> str:
    """Where a hook is in transformers' words: `model.layers.12`, of which it is the output."""
    decoder, family = config.get_text_config(), family_of(config)
    trunk = family.trunk if decoder is config else f"{family.trunk}.language_model"
    block = f"{trunk}.{family.blocks}.{hook.layer}"
    if hook.site != "resid_post":
        return f"the input of {block}.{family.projection}" if hook.site == "attn_z" else f"{block}.{family.mlp}"
    last = hook.layer == decoder.num_hidden_layers - 1  # transformers puts the final norm on its hidden state
    return block + ("" if last else f", hidden_states[{hook.layer + 1}]")


def hook_width(hook: Hook, config: Any) -> int:
    """How many numbers a token has there."""
    config = config.get_text_config()
    if hook.site != "attn_z":
        return config.hidden_size
    heads = config.num_attention_heads
    return heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)


def check_layers(config: Any, layers: Sequence[int], name: str) -> None:
    """UsageError unless every layer is a block of the model."""
    blocks = getattr(config.get_text_config(), "num_hidden_layers", None)
    if blocks is None:
        raise UsageError(f"{name} is a {config.model_type} model, which has no list of blocks; it cannot be harvested.")
    last = blocks - 1
    for layer in layers:
        if not 0 <= layer <= last:
            raise UsageError(f"{name} has {last + 1} blocks, so layers 0 to {last}; there is no layer {layer}.")


def check_sites(config: Any, hooks: Sequence[Hook]) -> None:
    """UsageError unless it is known where the sites of these hooks are in the model."""
    decoder = config.get_text_config()
    unknown = [hook.site for hook in hooks if hook.site != "resid_post"]
    if unknown and decoder.model_type not in FAMILIES:
        name = type(decoder).__name__.removesuffix("Config")
        raise UsageError(
            f"Where {unknown[0]} is in the blocks of {name} is not known; it is in those of {', '.join(FAMILIES)}. "
            "Harvest --site resid_post."
        )


def check_context(config: Any, context: int, name: str) -> None:
    """UsageError when a model has learned fewer positions than a context has tokens."""
    most = getattr(config.get_text_config(), "max_position_embeddings", context)
    if family_of(config).learned_positions and context > most:
        raise UsageError(f"--context {context} is too long: {name} has learned {most} positions. Give at most that.")


def truncate_config(config: Any, blocks: int) -> None:
    """Make the configuration one of a model that ends after so many blocks."""
    decoder = config.get_text_config()
    decoder.num_hidden_layers = blocks
    if getattr(decoder, "layer_types", None):
        decoder.layer_types = decoder.layer_types[:blocks]
