"""Run a language model again from changed activations, with the model's own code.

The blocks before the hook are skipped: each returns immediately, and the last one returns its earlier output.
Everything else is the model's own code: the embedding, the arguments of the blocks, the blocks after the hook, the
final norm and the logits. So nothing here depends on the model family. If blocks store values for later ones (as in
Gemma 4, where some layers share keys and values), nothing is skipped; `Splicer.check` detects this.

Shape suffixes: N contexts in a batch, S positions, M versions of the contexts, D d_model, V vocabulary.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..cache.hooks import Hook
from ..common.errors import SaeError, UsageError

TOLERANCE = 0.01  # allowed change of logits when a model is run in parts, relative to the largest logit


@dataclass
class PrefixPass:
    """The activations of some contexts at some hooks. The rest of the model can be run from each hook.

    `run_from(hook, x)` replaces the activations at `hook` by x (N, S, d), such as an SAE's reconstruction, and returns
    the model's last hidden state (N, S, D), the input of `LanguageModel.unembed`. M versions of the contexts can be run
    together, as (M N, S, d). With a mask (N,), only the contexts where the mask is True are run, and x contains only
    these contexts. Gradients flow back to x if x requires them.
    """

    activations: dict[Hook, Tensor]  # hook -> (N, S, d)
    run_from: "RunFrom"


@dataclass
class ForwardPass(PrefixPass):
    """A whole forward pass. `final` (N, S, D) is the model's own last hidden state.

    `LanguageModel.resume` recreates the pass from `kept` and `final` without running the model.
    """

    final: Tensor
    kept: dict[Hook, Tensor]


class RunFrom(Protocol):
    def __call__(self, hook: Hook, x_NSD: Tensor, chosen_N: Tensor | None = None, /) -> Tensor: ...


class Splicer:
    """Forward passes of one model that can be run again from a hook."""

    def __init__(self, language_model: Any) -> None:
        """`language_model` is the `LanguageModel` whose trunk, blocks, `capturing` and `patching` are used."""
        self.language_model = language_model
        self.other_outputs: dict[int, tuple[None, ...] | None] = {}  # block -> its outputs besides the residual
        self.skips_blocks: dict[Hook, bool] = {}  # the hooks that were checked

    def forward(self, ids_NS: Tensor, hooks: Sequence[Hook]) -> ForwardPass:
        """One whole pass that keeps the activations at the hooks, and the inputs of the blocks with a hook inside."""
        self.check_once(hooks)
        return self.keep(ids_NS, hooks)

    def prefix(self, ids_NS: Tensor, hooks: Sequence[Hook]) -> PrefixPass:
        """Like `forward`, but the pass ends at the last hook."""
        self.check_once(hooks)
        kept = self.language_model.capture_hooks(ids_NS, self.hooks_to_keep(hooks))
        return PrefixPass({hook: kept[hook] for hook in hooks}, self.runner(ids_NS, hooks, kept))

    def check_once(self, hooks: Sequence[Hook]) -> None:
        if unchecked := [hook for hook in hooks if hook not in self.skips_blocks]:
            self.check(unchecked)

    def hooks_to_keep(self, hooks: Sequence[Hook]) -> list[Hook]:
        """The hooks, and for each of them the hook from which the model can restart (see `skipped_to`)."""
        before = [hook for hook in map(self.skipped_to, hooks) if hook is not None]
        return list(dict.fromkeys([*hooks, *before]))

    def keep(self, ids_NS: Tensor, hooks: Sequence[Hook]) -> ForwardPass:
        model = self.language_model
        kept: dict[Hook, Tensor] = {}
        with self.noting_outputs(), model.capturing(self.hooks_to_keep(hooks), kept):
            final = model.run_trunk(ids_NS).last_hidden_state
        return self.pass_of(ids_NS, hooks, kept, final)

    def resume(self, ids_NS: Tensor, hooks: Sequence[Hook], kept: dict[Hook, Tensor], final: Tensor) -> ForwardPass:
        """Recreate a pass of `forward` from its activations at `hooks_to_keep` and its last hidden state."""
        self.check_once(hooks)
        return self.pass_of(ids_NS, hooks, kept, final)

    def pass_of(self, ids_NS: Tensor, hooks: Sequence[Hook], kept: dict[Hook, Tensor], final: Tensor) -> ForwardPass:
        return ForwardPass({hook: kept[hook] for hook in hooks}, self.runner(ids_NS, hooks, kept), final, kept)

    def runner(self, ids_NS: Tensor, hooks: Sequence[Hook], kept: dict[Hook, Tensor]) -> "RunFrom":
        """Make the function `run_from` of a pass. `kept` contains the activations at `hooks_to_keep`."""
        model = self.language_model

        def run_from(hook: Hook, x_NSD: Tensor, chosen_N: Tensor | None = None) -> Tensor:
            if hook not in hooks:
                raise KeyError(hook)
            chosen = slice(None) if chosen_N is None else chosen_N
            versions, replaced = len(x_NSD) // len(ids_NS[chosen]), False

            def replace(_: Tensor) -> Tensor:
                nonlocal replaced
                replaced = True
                return x_NSD.clone()  # Falcon adds to this tensor in place

            with contextlib.ExitStack() as stack:
                stack.enter_context(gradients_of(x_NSD))
                start = self.skipped_to(hook) if self.skips_blocks.get(hook, True) else None
                if start == hook:
                    stack.enter_context(self.starting_after(hook.layer, x_NSD.clone()))
                    replaced = True
                else:
                    stack.enter_context(model.patching(hook, replace))
                    if start is not None:
                        block_input = kept[start][chosen].repeat(versions, 1, 1)
                        stack.enter_context(self.starting_after(start.layer, block_input))
                again = model.trunk(ids_NS[chosen].repeat(versions, 1), use_cache=False).last_hidden_state
            if not replaced:
                raise SaeError(f"The hook on {hook.name} did not fire, so nothing was replaced.")
            return again

        return run_from

    def skipped_to(self, hook: Hook) -> Hook | None:
        """The hook from which the model can restart: `hook` itself, or the last hook not affected by changes at `hook`.

        None if the model has to restart at the embedding. A module outside the blocks belongs to the first layer if it
        runs before them and to the last if it runs after them.
        """
        if hook.site == "resid_post":
            return hook
        last = len(self.language_model.blocks) - 1
        layer = hook.layer if hook.is_outside and hook.layer == last > 0 else hook.layer - 1
        return Hook(layer) if layer >= 0 and (layer == last or not hook.is_outside) else None

    @contextlib.contextmanager
    def starting_after(self, layer: int, x_NSD: Tensor) -> Iterator[None]:
        """Let the model skip the blocks up to `layer`, and pass x to the next block."""

        def skipped(index: int) -> Callable[..., Any]:
            others = self.other_outputs[index]
            return lambda *_, **__: x_NSD if others is None else (x_NSD, *others)

        blocks = self.language_model.blocks[: layer + 1]
        with contextlib.ExitStack() as stack:
            for index, block in enumerate(blocks):
                stack.enter_context(replacing_forward(block, skipped(index)))
            yield

    @contextlib.contextmanager
    def noting_outputs(self) -> Iterator[None]:
        """Record how many values each block returns besides the residual stream, for `starting_after` to imitate."""

        def note(index: int) -> Callable[..., None]:
            def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
                self.other_outputs[index] = (None,) * (len(output) - 1) if isinstance(output, tuple) else None

            return hook

        handles = [block.register_forward_hook(note(i)) for i, block in enumerate(self.language_model.blocks)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @cached_property
    def trunk_output(self) -> Callable[..., Any]:
        """The class of the trunk's output: a transformers class whose fields are all optional."""
        model = self.language_model
        return type(model.trunk(torch.zeros(1, 1, dtype=torch.int64, device=model.device), use_cache=False))

    def unembed(self, final: Tensor) -> Tensor:
        """The logits (..., V) for the trunk's output (..., D), from the model's own code (scales, caps, biases)."""
        model = self.language_model
        final_1TD = final.flatten(0, -2)[None]
        ids_1T = torch.zeros(final_1TD.shape[:2], dtype=torch.int64, device=final.device)
        output = self.trunk_output(last_hidden_state=final_1TD)
        with replacing_forward(model.trunk, lambda *_, **__: output):
            return model.model(ids_1T, use_cache=False).logits[0].unflatten(0, final.shape[:-1])

    def check(self, hooks: Sequence[Hook]) -> None:
        """Raise UsageError unless `unembed`, and `run_from` from each of these hooks, reproduce the model's logits.

        Also finds out for which hooks the earlier blocks can be skipped.
        """
        model = self.language_model
        ids_NS = torch.arange(8, device=model.device).reshape(2, 4) % model.config.vocab_size
        expected_NSV = model.model(ids_NS, use_cache=False).logits.float()

        def difference(final_NSD: Tensor) -> float:
            logits_NSV = self.unembed(final_NSD).float()
            return float((logits_NSV - expected_NSV).abs().max() / expected_NSV.abs().max())

        if hooks:
            model.capture_hooks(ids_NS, hooks)  # refuses activations that are not one vector per token
        run = self.keep(ids_NS, hooks)
        self.require(difference(run.final), "computing its logits from its last hidden state")
        for hook in hooks:
            x_NSD = run.activations[hook]
            changed_NSD = 0.5 * x_NSD.roll(1, 0)
            self.skips_blocks[hook] = False
            whole_NSD = run.run_from(hook, changed_NSD)
            self.require(difference(run.run_from(hook, x_NSD)), f"putting its own activations back at {hook}")
            self.skips_blocks[hook] = True
            try:
                again_NSD, changed_again_NSD = run.run_from(hook, torch.cat([x_NSD, changed_NSD])).chunk(2)
                off = (self.unembed(changed_again_NSD) - self.unembed(whole_NSD)).float().abs().max()
                same = max(difference(again_NSD), float(off / expected_NSV.abs().max())) <= TOLERANCE
            except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
                same = False  # a later block needs something from a skipped block
            self.skips_blocks[hook] = same

    def require(self, difference: float, what: str) -> None:
        if not difference <= TOLERANCE:
            name = type(self.language_model.model).__name__
            raise UsageError(
                f"SAEs cannot be spliced into {name}: {what} changes the logits by up to {difference:.2g} times "
                "the largest logit."
            )


def gradients_of(x: Tensor) -> torch.set_grad_enabled:
    """A context manager that disables gradient calculation unless x requires gradients."""
    return torch.set_grad_enabled(torch.is_grad_enabled() and x.requires_grad)


@contextlib.contextmanager
def replacing_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace a module's `forward` during the `with` block."""
    own = vars(module).get("forward")  # set if another library has overridden the method
    vars(module)["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del vars(module)["forward"]
        else:
            vars(module)["forward"] = own
