"""The language model and its hook points.

A *layer* is the zero-based index of a block and means the residual stream after it: `blocks.12.hook_resid_post` in
TransformerLens, the output of `model.layers[12]`, `hidden_states[13]` in transformers (which applies the final norm to
the last one; here it is left out).

A block has two more sites: `mlp_out`, what the MLP adds to the residual stream (in Gemma after its last norm), and
`attn_z`, the concatenated outputs of the attention heads before the output projection. architectures.py knows which
modules these are in each family of models.

Shape suffixes: N contexts in a batch, S positions, D d_model, V vocabulary.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..cache.layout import Hook
from ..common.errors import SaeError, UsageError
from .architectures import (
    Family,
    check_sites,
    family_of,
    find_module,
    find_trunk,
    hook_width,
)
from .loading import (
    ModelSource,
    describe_record,
    ensure_bos,
    find_config,
    find_model,
    find_recorded_model,
    load_first_blocks,
    load_tokenizer,
    load_whole_model,
)
from .splice import ForwardPass, Splicer

__all__ = [
    "ForwardPass",
    "LanguageModel",
    "ModelSource",
    "describe_record",
    "ensure_bos",
    "find_config",
    "find_model",
    "find_recorded_model",
    "load_model",
    "load_tokenizer",
    "load_trunk",
    "output_tensor",
]


def load_trunk(
    source: ModelSource, config: Any, last_layer: int, *, dtype: str, device: str, attention: str
) -> "LanguageModel":
    """Load the model up to a layer, without the later blocks and the unembedding."""
    return LanguageModel(load_first_blocks(source, config, last_layer, dtype=dtype, device=device, attention=attention))


def load_model(
    source: ModelSource, config: Any, *, dtype: str, device: str, attention: str = "eager"
) -> "LanguageModel":
    """Load the whole model. Raises UsageError if `LanguageModel.forward` cannot run its last blocks separately."""
    model = LanguageModel(load_whole_model(source, config, dtype=dtype, device=device, attention=attention))
    model.check_forward()
    return model


def output_tensor(output: Any) -> Tensor:
    """The output of a block: transformers 5 returns the tensor itself, earlier versions a tuple that begins with it."""
    return output[0] if isinstance(output, tuple) else output


class _StopForward(Exception):  # noqa: N818  (not an error: the model has run as far as it has to)
    pass


class LanguageModel:
    """A decoder with a list of blocks.

    `capture` reads the residual stream, `capture_hooks` reads other sites too, `forward` makes it possible to run
    the model again from a changed residual stream, and `patching` changes activations during any call of the model.
    """

    def __init__(self, model: Any) -> None:
        """`model` is a causal language model of transformers, or its trunk alone."""
        self.model = model
        self.config = model.config.get_text_config()

    @cached_property
    def trunk(self) -> Any:
        """The part without the unembedding, which holds the blocks."""
        return find_trunk(self.model)

    @cached_property
    def family(self) -> Family:
        return family_of(self.config)

    @property
    def blocks(self) -> nn.ModuleList:
        return getattr(self.trunk, self.family.blocks)

    @property
    def norm(self) -> nn.Module:
        """The norm between the last block and the unembedding."""
        return getattr(self.trunk, self.family.norm)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def width(self, hook: Hook) -> int:
        """The width of the activations at a hook."""
        return hook_width(hook, self.config)

    @contextlib.contextmanager
    def capturing(self, hooks: Sequence[Hook], captured: dict[Hook, Tensor]) -> Iterator[None]:
        """Store the activations of every forward pass in `captured` while the context is open."""

        def output_of(hook: Hook) -> Callable[..., None]:
            def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
                captured[hook] = output_tensor(output)

            return keep

        def input_of(hook: Hook) -> Callable[..., None]:
            def keep(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                captured[hook] = inputs[0]

            return keep

        check_sites(self.config, hooks)
        handles = []
        for hook in hooks:
            module, is_input = find_module(hook, self.trunk, self.family)
            handles.append(
                module.register_forward_pre_hook(input_of(hook))
                if is_input
                else module.register_forward_hook(output_of(hook))
            )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        silent = [hook.name for hook in hooks if hook not in captured]
        if silent:
            raise SaeError(f"The hook on {', '.join(silent)} did not fire, so nothing was captured.")

    @contextlib.contextmanager
    def patching(self, hook: Hook, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Replace the activations x (N, S, d) at the hook by `change(x)` while the context is open."""

        def patch_output(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            x = change(output_tensor(output))
            return (x, *output[1:]) if isinstance(output, tuple) else x

        def patch_input(_module: nn.Module, inputs: tuple[Any, ...]) -> Any:
            return (change(inputs[0]), *inputs[1:])

        check_sites(self.config, [hook])
        module, is_input = find_module(hook, self.trunk, self.family)
        handle = (
            module.register_forward_pre_hook(patch_input) if is_input else module.register_forward_hook(patch_output)
        )
        try:
            yield
        finally:
            handle.remove()

    @contextlib.contextmanager
    def _stopping_after(self, layer: int) -> Iterator[None]:
        """End forward passes after this block while the context is open, since later blocks affect nothing captured."""

        def stop(_module: nn.Module, _inputs: Any, _output: Any) -> None:
            raise _StopForward

        handle = self.blocks[layer].register_forward_hook(stop)  # runs after those that capture
        try:
            with contextlib.suppress(_StopForward):
                yield
        finally:
            handle.remove()

    @torch.no_grad()
    def capture_hooks(self, ids_NS: Tensor, hooks: Sequence[Hook]) -> dict[Hook, Tensor]:
        """The activations at each hook, (N, S, d_in) in the model's dtype, from one pass that ends at the last hook."""
        captured: dict[Hook, Tensor] = {}
        with self.capturing(hooks, captured), self._stopping_after(max(hook.layer for hook in hooks)):
            self.trunk(ids_NS, use_cache=False)
        for hook, x in captured.items():
            if x.shape[:-1] != ids_NS.shape:
                raise UsageError(
                    f"{type(self.model).__name__} has activations of shape {tuple(x.shape)} at {hook.name} for "
                    f"{tuple(ids_NS.shape)} tokens; expected one vector per token. It is not supported."
                )
        return captured

    def capture(self, ids_NS: Tensor, layers: Sequence[int]) -> dict[int, Tensor]:
        """The residual stream after each layer, (N, S, D)."""
        return {hook.layer: x_NSD for hook, x_NSD in self.capture_hooks(ids_NS, [Hook(n) for n in layers]).items()}

    @cached_property
    def _splicer(self) -> Splicer:
        return Splicer(self)

    @torch.no_grad()
    def forward(self, ids_NS: Tensor, hooks: Sequence[Hook]) -> ForwardPass:
        """One whole pass that keeps the activations at the hooks, so that `run_from` can start at each of them.

        Raises UsageError for a hook from which the model cannot be run again; each is checked once.
        """
        return self._splicer.forward(ids_NS, hooks)

    @torch.no_grad()
    def unembed(self, final: Tensor) -> Tensor:
        """Logits (..., V) from `ForwardPass.final` (..., D). Select positions first: logits take the most memory."""
        return self._splicer.unembed(final)

    @torch.no_grad()
    def check_forward(self, hooks: Sequence[Hook] = ()) -> None:
        """Raise UsageError unless `run_from` at these hooks and `unembed` reproduce the logits of the model."""
        self._splicer.check(hooks)
