"""The language model and its hook points.

A *layer* is the zero-based index of a block, and denotes the residual stream after that block:
`blocks.12.hook_resid_post` in TransformerLens, the output of `model.layers[12]`, `hidden_states[13]` in transformers.
(transformers applies the final norm to the last hidden state; here that norm is left out.)

A block has more sites, which hooked.py reads and replaces, and which probe.py finds from the block's activations:

    resid_pre   what enters the block
    attn_out    what attention adds to the residual stream; in Gemma 2, this is the output of a norm
    attn_z      what attention's output projection reads: the outputs of all heads, concatenated
    resid_mid   resid_pre + attn_out; blocks that run MLP and attention in parallel, as in GPT-J, have none
    mlp_in      what the MLP reads, after its norm
    mlp_hidden  what the MLP's last projection reads; a mixture of experts has none
    mlp_out     what the MLP adds to the residual stream
    resid_post  what leaves the block: resid_pre + attn_out + mlp_out

In a block without attention, as in hybrid models, "attention" is the module that reads earlier tokens instead, such as
a Mamba mixer. Any other module is a site too: `mlp.gate_proj.output` is the output of
`model.layers[12].mlp.gate_proj`, and `mlp.gate_proj.input` is its input (cache/hooks.py).

Shape suffixes: N contexts in a batch, S positions, D d_model, V vocabulary.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..cache.hooks import Hook
from ..common.errors import UsageError
from .architectures import can_truncate
from .hooked import HookedModel
from .load_errors import translate_model_errors
from .loading import (
    ModelSource,
    describe_record,
    find_config,
    find_model,
    find_recorded_model,
    load_first_blocks,
    load_tokenizer,
    load_whole_model,
)
from .logits import unrounded_logits
from .splice import ForwardPass, PrefixPass, Splicer, gradients_of
from .structure import decoder_config

__all__ = [
    "ForwardPass",
    "LanguageModel",
    "ModelSource",
    "PrefixPass",
    "describe_record",
    "find_config",
    "find_model",
    "find_recorded_model",
    "load_model",
    "load_tokenizer",
    "load_trunk",
    "load_whole_model",
]


def load_trunk(
    source: ModelSource, config: Any, last_layer: int, *, dtype: str, device: str, attention: str
) -> "LanguageModel":
    """Load the model up to a layer, without the later blocks and the unembedding.

    If the first blocks cannot be built alone, all blocks are loaded.
    """
    if not can_truncate(config, last_layer + 1):
        last_layer = int(decoder_config(config).num_hidden_layers) - 1
    blocks = load_first_blocks(source, config, last_layer, dtype=dtype, device=device, attention=attention)
    return refuse_unknown_ids(LanguageModel(blocks))


def load_model(
    source: ModelSource, config: Any, *, dtype: str, device: str, attention: str = "eager"
) -> "LanguageModel":
    """Load the whole model. Raises UsageError if `unembed` does not reproduce the model's logits."""
    model = LanguageModel(load_whole_model(source, config, dtype=dtype, device=device, attention=attention))
    with translate_model_errors(source.argument, attention):
        model.check_forward()
    return refuse_unknown_ids(model)


def refuse_unknown_ids(model: "LanguageModel") -> "LanguageModel":
    """Make the model raise UsageError, instead of torch's IndexError, for token ids without an embedding.

    Ids on a GPU are not checked here, because reading the ids would make the host wait for the previous pass. Callers
    check these ids beforehand.
    """
    embedding = model.trunk.get_input_embeddings()
    rows = int(embedding.num_embeddings)

    def check(_module: nn.Module, args: tuple[Any, ...]) -> None:
        ids = args[0] if args else None
        if isinstance(ids, Tensor) and ids.device.type == "cpu" and ids.numel() and int(ids.max()) >= rows:
            raise UsageError(
                f"A text contains the token id {int(ids.max()):,}, but the embedding of the model has only {rows:,} "
                "rows: tokens were added to the tokenizer without enlarging the embedding. Leave such texts out."
            )

    if isinstance(embedding, nn.Embedding):
        embedding.register_forward_pre_hook(check)
    return model


class LanguageModel(HookedModel):
    """A decoder with a list of blocks.

    `capture` reads the residual stream and `capture_hooks` reads any hook. `forward` and `prefix` allow running the
    model again from changed activations. `patching` changes activations during any call of the model.
    """

    @cached_property
    def _splicer(self) -> Splicer:
        return Splicer(self)

    @torch.no_grad()
    def forward(self, ids_NS: Tensor, hooks: Sequence[Hook]) -> ForwardPass:
        """One whole pass that keeps the activations at the hooks, so that `run_from` can start at each of them.

        Raises UsageError for a hook from which the model cannot be run again. Each hook is checked once.
        """
        return self._splicer.forward(ids_NS, hooks)

    @torch.no_grad()
    def resume(self, ids_NS: Tensor, hooks: Sequence[Hook], kept: dict[Hook, Tensor], final: Tensor) -> ForwardPass:
        """Recreate the pass that `forward` returned, from its `kept` (at `hooks_to_keep`) and its `final`."""
        return self._splicer.resume(ids_NS, hooks, kept, final)

    def hooks_to_keep(self, hooks: Sequence[Hook]) -> list[Hook]:
        """The hooks whose activations a `ForwardPass` keeps: `hooks`, and the hooks from which the model restarts."""
        return self._splicer.hooks_to_keep(hooks)

    @torch.no_grad()
    def prefix(self, ids_NS: Tensor, hooks: Sequence[Hook]) -> PrefixPass:
        """A pass that ends at the last hook, for callers that do not need the outputs of the unchanged model.

        Raises UsageError as `forward` does.
        """
        return self._splicer.prefix(ids_NS, hooks)

    def unembed(self, final: Tensor) -> Tensor:
        """Logits (..., V) from `ForwardPass.final` (..., D). Select positions before the call: logits take the most
        memory.

        The logits are in float32 even if the model computes in bfloat16 (logits.py).

        Gradients flow back to `final` if it requires them.
        """
        with gradients_of(final), unrounded_logits(self.model):
            return self._splicer.unembed(final)

    @torch.no_grad()
    def check_forward(self, hooks: Sequence[Hook] = ()) -> None:
        """Raise UsageError unless `run_from` at these hooks and `unembed` reproduce the logits of the model."""
        self._splicer.check(hooks)
