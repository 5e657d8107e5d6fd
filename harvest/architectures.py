"""Module names in each family of models, and the module that each hook is on.

Every decoder of transformers is a trunk (a list of blocks and a final norm) and an unembedding. Most keep their blocks
in `model.layers`; GPT-2 and GPT-NeoX (Pythia) use other names. In every family listed here a block adds its
attention and its MLP to the residual stream; GPT-NeoX computes both from the same input. tests/harvest/test_model.py
checks this for each of them.
"""

from collections.abc import Sequence
from operator import attrgetter
from typing import Any, NamedTuple

from torch import nn

from ..cache.layout import Hook
from ..common.errors import UsageError


class Family(NamedTuple):
    """The names of a family's modules.

    `mlp` and `projection` are None where it has not been checked what they add: the sites there are then refused.
    """

    mlp: str | None = None  # in a block; its output is what the MLP adds to the residual stream
    projection: str | None = None  # in a block; its input is the outputs of all attention heads, concatenated
    trunk: str = "model"
    blocks: str = "layers"  # in the trunk
    norm: str = "norm"  # in the trunk
    learned_positions: bool = False  # contexts longer than those are impossible


LLAMA = Family("mlp", "self_attn.o_proj")
GEMMA2 = LLAMA._replace(mlp="post_feedforward_layernorm")
FAMILIES = {
    **dict.fromkeys(("gemma", "llama", "mistral", "qwen2", "qwen3"), LLAMA),
    **dict.fromkeys(("gemma2", "gemma3_text"), GEMMA2),
    "gpt2": Family("mlp", "attn.c_proj", "transformer", "h", "ln_f", learned_positions=True),
    "gpt_neox": Family("mlp", "attention.dense", "gpt_neox", "layers", "final_layer_norm"),
}  # by transformers' model_type


def family_of(config: Any) -> Family:
    """The family of a model. An unknown one gets the names that most families use, and no sites."""
    return FAMILIES.get(config.get_text_config().model_type, Family())


def find_trunk(model: nn.Module) -> Any:
    """The part of a model without the unembedding, which holds the blocks."""
    family = family_of(model.config)
    for part in (model, getattr(model, family.trunk, None)):
        for decoder in (part, getattr(part, "language_model", None)):  # in a model that also reads images
            if hasattr(decoder, family.blocks):
                return decoder
    raise UsageError(
        f"{type(model).__name__} does not keep its blocks in `model.layers`, where most models have them, so it is not "
        f"supported. Supported families: {', '.join(FAMILIES)}, and others that have such a list."
    )


def find_module(hook: Hook, trunk: Any, family: Family) -> tuple[nn.Module, bool]:
    """The module of a hook, and whether the hook reads its input (True) or its output (False)."""
    block = getattr(trunk, family.blocks)[hook.layer]
    name = {"resid_post": "", "mlp_out": family.mlp, "attn_z": family.projection}[hook.site]
    return attrgetter(name)(block) if name else block, hook.site == "attn_z"


def module_name(hook: Hook, config: Any) -> str:
    """The module of a hook as transformers names it, such as `model.layers.12`, whose output the hook reads."""
    decoder, family = config.get_text_config(), family_of(config)
    trunk = family.trunk if decoder is config else f"{family.trunk}.language_model"
    block = f"{trunk}.{family.blocks}.{hook.layer}"
    if hook.site != "resid_post":
        return f"the input of {block}.{family.projection}" if hook.site == "attn_z" else f"{block}.{family.mlp}"
    last = hook.layer == decoder.num_hidden_layers - 1  # its hidden state in transformers is after the final norm
    return block + ("" if last else f", hidden_states[{hook.layer + 1}]")


def hook_width(hook: Hook, config: Any) -> int:
    """The width of the activations at a hook: d_in of an SAE trained there."""
    config = config.get_text_config()
    if hook.site != "attn_z":
        return config.hidden_size
    heads = config.num_attention_heads
    return heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)


def check_layers(config: Any, layers: Sequence[int], name: str) -> None:
    """Raise UsageError unless every layer is a block of the model."""
    blocks = getattr(config.get_text_config(), "num_hidden_layers", None)
    if blocks is None:
        raise UsageError(
            f"{name} is a {config.model_type} model without num_hidden_layers in its configuration, which is not "
            "supported."
        )
    for layer in layers:
        if not 0 <= layer < blocks:
            raise UsageError(f"{name} has no layer {layer}: its {blocks} blocks are layers 0 to {blocks - 1}.")


def check_sites(config: Any, hooks: Sequence[Hook]) -> None:
    """Raise UsageError unless the sites of these hooks are known for the model's family."""
    decoder = config.get_text_config()
    other = [hook.site for hook in hooks if hook.site != "resid_post"]
    if other and decoder.model_type not in FAMILIES:
        name = type(decoder).__name__.removesuffix("Config")
        raise UsageError(
            f"The site {other[0]} is not supported for {name}, only for {', '.join(FAMILIES)}. Use --site resid_post."
        )


def check_context(config: Any, context: int, name: str) -> None:
    """Raise UsageError if the model has learned fewer positions than a context has tokens."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", context)
    if family_of(config).learned_positions and context > positions:
        raise UsageError(
            f"--context {context} is too long: {name} has learned {positions} positions. Use a shorter context."
        )


def truncate_config(config: Any, blocks: int) -> None:
    """Change a configuration, in place, into that of a model with only the first `blocks` blocks."""
    decoder = config.get_text_config()
    decoder.num_hidden_layers = blocks
    if getattr(decoder, "layer_types", None):
        decoder.layer_types = decoder.layer_types[:blocks]
