"""A language model whose activations can be read and replaced at the sites of its blocks and at any module.

probe.py finds the sites by running a block on a few tokens. This module keeps the sites and installs torch hooks on
them.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..cache.hooks import RESIDUAL_SITES, SITES, Hook
from ..common.errors import SaeError, UsageError
from .module_io import input_tensor, output_tensor, with_input, with_output
from .probe import find_sites
from .recorder import BlockSites, Call, Recorder, Shapes, Site, shapes_of
from .structure import Parts, decoder_config, find_parts
from .whole_contexts import whole_contexts

PROBED_TOKENS = (2, 8)  # contexts, positions


class _StopForward(Exception):  # noqa: N818  (not an error: the rest of the model is not needed)
    pass


class HookedModel:
    """A decoder with a list of blocks.

    `capture` reads the residual stream, `capture_hooks` reads any hook, and `patching` changes activations during any
    call of the model.
    """

    def __init__(self, model: Any) -> None:
        """`model` is a causal language model of transformers, or its trunk alone."""
        self.model = model
        self.config = decoder_config(model.config)
        self._probed: dict[int, BlockSites] = {}
        self._outside: dict[str, list[Shapes]] | None = None  # module path -> shapes of each call

    @cached_property
    def parts(self) -> Parts:
        return find_parts(self.model)

    @property
    def trunk(self) -> Any:
        """The part of the model that contains the blocks, without the unembedding."""
        return self.parts.trunk

    @property
    def blocks(self) -> nn.ModuleList:
        return self.parts.blocks

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @cached_property
    def norm(self) -> nn.Module:
        """The norm between the last block and the unembedding; identity if there is none.

        Raises UsageError if no single module computes the last hidden state from the last block's output.
        """
        with Recorder(self.trunk) as recorder:
            final = self.run_trunk(self.probe_ids()).last_hidden_state
        last = recorder.calls[f"{self.block_path(len(self.blocks) - 1)}"][-1].y
        if last is not None and torch.equal(last, final):
            return nn.Identity()
        for path, module in self.trunk.named_modules():
            calls = recorder.calls.get(path, []) if path else []
            ends = [c for c in calls if c.y is not None and torch.equal(c.y, final)]
            if last is not None and any(torch.equal(c.x, last) for c in ends if c.x is not None):
                return module
        raise UsageError(
            f"{type(self.model).__name__} has no single module between its last block and its last hidden state."
        )

    def block_path(self, layer: int) -> str:
        """The path of a block in the trunk."""
        inside = self.parts.blocks_path.removeprefix(self.parts.trunk_path).lstrip(".")
        return f"{inside}.{layer}"

    def width(self, hook: Hook) -> int:
        """The width of the activations at a hook."""
        return int(self.config.hidden_size) if hook.site in RESIDUAL_SITES else self.site(hook).width

    def site(self, hook: Hook) -> Site:
        """The module of a hook. Raises UsageError if the model has no such site."""
        if hook.site == "resid_post":  # checked when captured
            return Site("", False, int(self.config.hidden_size))
        if hook.is_outside:
            layer, seen = self.outside(hook)
            if hook.layer != (belongs := len(self.blocks) - 1 if layer is None else layer):
                raise UsageError(belongs_to(hook, belongs))
        else:
            seen = self.probe(hook.layer)
        if hook.site in seen.sites:
            return seen.sites[hook.site]
        if why := seen.refused.get(hook.site) or module_refusal(hook, seen):
            raise UsageError(refusal(type(self.model).__name__, hook, why))
        shape = seen.shapes[hook.module_path][0][hook.site.endswith(".output")]
        assert shape is not None
        return Site(hook.module_path, hook.site.endswith(".input"), shape[-1], len(shape) == 2)

    def check_hooks(self, hooks: Sequence[Hook]) -> None:
        """Raise UsageError unless a run of the model confirms every hook."""
        for hook in hooks:
            if not hook.is_outside and (why := self.probe(hook.layer).refused.get(hook.site)):
                raise UsageError(refusal(type(self.model).__name__, hook, why))
            self.site(hook)

    def probe_ids(self) -> Tensor:
        """A few different tokens (N, S), none of them the padding token."""
        count, positions = PROBED_TOKENS
        generator = torch.Generator().manual_seed(0)
        size = int(self.trunk.get_input_embeddings().num_embeddings)
        ids = torch.randint(0, size, (count * positions,), generator=generator)
        if (padding := getattr(self.config, "pad_token_id", None)) is not None:
            ids = torch.where(ids == padding, (ids + 1) % size, ids)
        return ids.reshape(count, positions).to(self.device)

    def run_trunk(self, ids_NS: Tensor) -> Any:
        with torch.no_grad(), whole_contexts():
            return self.trunk(ids_NS, use_cache=False)

    def probe(self, layer: int) -> BlockSites:
        """The sites of a block, found by running the model, up to and including this block, on a few tokens."""
        if layer not in self._probed:
            calls: list[tuple[int, Call]] = []

            def keep(number: int) -> Callable[..., None]:
                def hook(_module: nn.Module, args: Any, keywords: Any, output: Any) -> None:
                    x, y = input_tensor(args, keywords), output_tensor(output)
                    calls.append((number, Call(args, dict(keywords), x, y)))

                return hook

            def save_input(_module: nn.Module, args: Any, keywords: Any) -> Any:
                x = input_tensor(args, keywords)  # cloned: later modules can change it in place
                return None if x is None else with_input(args, keywords, x.clone())

            blocks = self.blocks[: layer + 1]
            handles = [block.register_forward_hook(keep(n), with_kwargs=True) for n, block in enumerate(blocks)]
            handles.append(blocks[layer].register_forward_pre_hook(save_input, with_kwargs=True))
            ids_NS = self.probe_ids()
            try:
                with self._stopping_after(layer):
                    self.run_trunk(ids_NS)
            finally:
                for handle in handles:
                    handle.remove()
            if [number for number, _ in calls] != list(range(layer + 1)):
                raise UsageError(
                    f"{type(self.model).__name__} is not supported: it does not run its blocks one after another."
                )
            self._probed[layer] = find_sites(blocks[layer], calls[-1][1], PROBED_TOKENS)
        return self._probed[layer]

    def outside(self, hook: Hook) -> tuple[int | None, BlockSites]:
        """The layer that a module outside the blocks belongs to, and the shapes of all calls of the trunk's modules.

        The layer is None, which stands for the last one, if the module runs after the blocks; otherwise it is 0.
        """
        if self._outside is None:
            with Recorder(self.trunk) as recorder:
                self.run_trunk(self.probe_ids())
            self._outside = {path: shapes_of(calls) for path, calls in recorder.calls.items()}
        paths = list(self._outside)
        seen = BlockSites(shape=PROBED_TOKENS, shapes=self._outside)
        is_before = hook.module_path in paths and paths.index(hook.module_path) < paths.index(self.block_path(0))
        return 0 if is_before or hook.module_path not in paths else None, seen

    @contextlib.contextmanager
    def _hooking(self, hook: Hook, use: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
        """Call `use` with the activations (N, S, d) at a hook; a result that is not None replaces them."""
        site = self.site(hook)
        module = (self.trunk if hook.is_outside else self.blocks[hook.layer]).get_submodule(site.path)
        shape: list[tuple[int, ...]] = []

        def note_shape(_module: nn.Module, args: Any, keywords: Any) -> None:
            x = input_tensor(args, keywords)
            shape[:] = [tuple(x.shape[:2])] if x is not None else []

        def used(x: Tensor) -> Tensor | None:
            if not site.is_flat:
                return use(x)
            y = use(x.reshape(*shape[0], x.shape[-1])) if x.shape[0] == shape[0][0] * shape[0][1] else use(x)
            return None if y is None else y.reshape(x.shape)

        def before(_module: nn.Module, args: Any, keywords: Any) -> Any:
            x = input_tensor(args, keywords)
            y = None if x is None else used(x)
            return None if y is None else with_input(args, keywords, y)

        def after(_module: nn.Module, _args: Any, output: Any) -> Any:
            x = output_tensor(output)
            y = None if x is None else used(x)
            return None if y is None else with_output(output, y)

        handles = []
        if site.is_flat:
            handles.append(self.blocks[hook.layer].register_forward_pre_hook(note_shape, with_kwargs=True))
        if site.is_input:
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        else:
            handles.append(module.register_forward_hook(after))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextlib.contextmanager
    def capturing(self, hooks: Sequence[Hook], captured: dict[Hook, Tensor]) -> Iterator[None]:
        """Store the activations of every forward pass during the `with` block in `captured`."""

        def keep(hook: Hook) -> Callable[[Tensor], None]:
            def store(x: Tensor) -> None:
                captured[hook] = x.clone()  # cloned: a later module can change it in place

            return store

        with contextlib.ExitStack() as stack:
            for hook in hooks:
                stack.enter_context(self._hooking(hook, keep(hook)))
            yield
        silent = [hook.name for hook in hooks if hook not in captured]
        if silent:
            raise SaeError(f"The hook on {', '.join(silent)} did not fire, so nothing was captured.")

    @contextlib.contextmanager
    def patching(self, hook: Hook, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Replace the activations x (N, S, d) at the hook by `change(x)` during the `with` block.

        The block itself computes resid_mid, outside of any module that could be hooked. So `patching` changes resid_mid
        by replacing attn_out with `change(x) - resid_pre`; the result is the same up to rounding.
        """
        if hook.site != "resid_mid":
            with self._hooking(hook, lambda x: change(x).clone()):  # Falcon adds to its MLP's output in place
                yield
            return
        self.site(hook)
        before: dict[str, Tensor] = {}

        def keep(x: Tensor) -> None:
            before["resid_pre"] = x

        def replace(attn_out: Tensor) -> Tensor:
            return change(before["resid_pre"] + attn_out) - before["resid_pre"]

        with self._hooking(Hook(hook.layer, "resid_pre"), keep):
            with self._hooking(Hook(hook.layer, "attn_out"), replace):
                yield

    @contextlib.contextmanager
    def _stopping_after(self, layer: int) -> Iterator[None]:
        """A context manager that ends forward passes after this block, since no later block is needed."""

        def stop(_module: nn.Module, _inputs: Any, _output: Any) -> None:
            raise _StopForward

        handle = self.blocks[layer].register_forward_hook(stop)  # runs after the capturing hooks
        try:
            with contextlib.suppress(_StopForward):
                yield
        finally:
            handle.remove()

    @torch.no_grad()
    def capture_hooks(self, ids_NS: Tensor, hooks: Sequence[Hook]) -> dict[Hook, Tensor]:
        """The activations at each hook, (N, S, d_in) in the model's dtype, from one pass that ends at the last hook."""
        captured: dict[Hook, Tensor] = {}
        last = max(hook.layer for hook in hooks)
        to_the_end = any(hook.is_outside and hook.layer == len(self.blocks) - 1 for hook in hooks)
        stopping = contextlib.nullcontext() if to_the_end else self._stopping_after(last)
        with self.capturing(hooks, captured), stopping:
            self.run_trunk(ids_NS)
        for hook, x in captured.items():
            if x.dim() != 3 or x.shape[:2] != ids_NS.shape:
                raise UsageError(
                    f"{type(self.model).__name__} has activations of shape {tuple(x.shape)} at {hook.name} for "
                    f"{tuple(ids_NS.shape)} tokens; expected one vector per token. The model is not supported."
                )
        return captured

    def capture(self, ids_NS: Tensor, layers: Sequence[int]) -> dict[int, Tensor]:
        """The residual stream after each layer, (N, S, D)."""
        return {hook.layer: x_NSD for hook, x_NSD in self.capture_hooks(ids_NS, [Hook(n) for n in layers]).items()}


def module_refusal(hook: Hook, seen: BlockSites) -> str | None:
    """The reason why the input or output of a module cannot be a hook; None if it can."""
    end = hook.site.rpartition(".")[2]
    calls = seen.shapes.get(hook.module_path)
    if not calls:
        return "no module with that path is run"
    if len(calls) > 1:
        return f"the module is run {len(calls)} times in a pass"
    shape, (contexts, positions) = calls[0][end == "output"], seen.shape
    if shape is None:
        return f"the module's {end} has no tensor"
    is_flat = len(shape) == 2 and shape[0] == contexts * positions
    if not is_flat and (len(shape) != 3 or shape[:2] != seen.shape):
        return f"its {end} has shape {shape} for {contexts} contexts of {positions} tokens, not one vector per token"
    return None


def refusal(model: str, hook: Hook, why: str) -> str:
    """A sentence that explains why a model does not have a hook, and what to do."""
    instead = "Use --site resid_post, or --module for any module." if hook.site in SITES else "Give another module."
    return f"{model} has no {hook}: {why}. {instead}"


def belongs_to(hook: Hook, layer: int) -> str:
    """A sentence stating that a module outside the blocks belongs to another layer."""
    return f"{hook.site} is outside the blocks and belongs to layer {layer}, not {hook.layer}. Use --layer {layer}."
