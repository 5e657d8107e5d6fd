"""The language model and its hook points.

A *layer* is the zero-based index of a block and means the residual stream after it: `blocks.12.hook_resid_post` in
TransformerLens' words, the output of `model.layers[12]`, `hidden_states[13]` (after the last block, transformers
puts the final norm there, and we do not).

Two more sites of a block can be harvested: `mlp_out`, what the MLP adds to the residual stream (in Gemma after its
last norm), and `attn_z`, the heads' outputs side by side, before the output projection. What a family of models calls
its blocks and sites stands in architectures.py.

Shape suffixes: N contexts in a batch, S positions, D d_model, V vocabulary.
"""

import contextlib
import copy
import hashlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from ..cache.layout import Hook
from ..common.errors import DamagedError, SaeError, UsageError
from . import mini
from .architectures import (
    FAMILIES,
    Family,
    check_sites,
    family_of,
    find_module,
    find_trunk,
    hook_width,
    truncate_config,
)
from .load_errors import translate_load_errors


@dataclass(frozen=True)
class ModelSource:
    """Which model: its name, where it is loaded from, and what pins its bytes."""

    name: str
    location: str  # a Hub id or a folder
    revision: str  # a commit of the Hub, or sha256 of the files

    @property
    def on_hub(self) -> bool:
        return not Path(self.location).is_dir()

    def identity(self) -> dict[str, str]:
        return {"name": self.name, "revision": self.revision}


def find_model(name: str, revision: str | None = None) -> tuple[ModelSource, Any]:
    """Pin a model to its bytes; returns its configuration too. Loads no weights.

    Raises OutsideError when the Hub cannot be reached or the model's licence has not been accepted.
    """
    folder = mini.WEIGHTS if name == mini.NAME else Path(name)
    if folder.is_dir() and revision is not None:
        raise UsageError(f"--revision is a commit of the Hub; {name} is a folder here. Leave it out.")
    if name.startswith((".", "/")) and not folder.is_dir():
        raise UsageError(f"There is no folder {name}. Give a folder with a model, a Hub id, or --model {mini.NAME}.")
    if folder.is_dir():
        with translate_load_errors(name):
            called = name if name == mini.NAME else str(folder.resolve())
            return ModelSource(called, str(folder), digest_of_folder(folder)), AutoConfig.from_pretrained(folder)
    with translate_load_errors(name):
        config = AutoConfig.from_pretrained(name, revision=revision)
    return ModelSource(name, name, getattr(config, "_commit_hash", None) or revision or "unknown"), config


def digest_of_folder(folder: Path) -> str:
    """sha256 over the names and bytes of everything that decides what the model computes."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.suffix in {".json", ".safetensors", ".model", ".bin"}):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def load_tokenizer(source: ModelSource) -> Any:
    """The tokenizer. Without a BOS, as Qwen's, EOS stands before each text: it is what parted them in pretraining."""
    with translate_load_errors(source.name):
        return ensure_bos(AutoTokenizer.from_pretrained(source.location, **_revision(source)))


def ensure_bos(tokenizer: Any) -> Any:
    """The tokenizer, given its EOS as BOS where it has none."""
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.bos_token = tokenizer.eos_token
    return tokenizer


def load_trunk(
    source: ModelSource, config: Any, last_layer: int, *, dtype: str, device: str, attention: str
) -> "LanguageModel":
    """The model up to a layer: no later block is loaded, and no unembedding."""
    config = copy.deepcopy(config)
    truncate_config(config, last_layer + 1)
    return _load(AutoModel, source, config, dtype, device, attention)


def load_model(
    source: ModelSource, config: Any, *, dtype: str, device: str, attention: str = "eager"
) -> "LanguageModel":
    """The whole model, with its unembedding. UsageError when `forward` could not run the end of it alone."""
    model = _load(AutoModelForCausalLM, source, config, dtype, device, attention)
    model.check_forward()
    return model


def _load(kind: Any, source: ModelSource, config: Any, dtype: str, device: str, attention: str) -> "LanguageModel":
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # it lists the blocks that are left out on purpose
    transformers_logging.disable_progress_bar()
    try:
        with translate_load_errors(source.name):
            model, found = kind.from_pretrained(
                source.location,
                config=config,
                dtype=getattr(torch, dtype),
                attn_implementation=attention,
                device_map=device,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **_revision(source),
            )
    finally:
        transformers_logging.set_verbosity(level)
    wrong = sorted({*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])})
    if wrong:  # they would be random numbers
        raise DamagedError(
            f"The weights of {source.name} lack {wrong[0]}, or have it in another shape than config.json says ({len(wrong):,} such in all). "
            "Get its files again."
        )
    return LanguageModel(model.eval().requires_grad_(False))


def _revision(source: ModelSource) -> dict[str, str]:
    return {"revision": source.revision} if source.on_hub and source.revision != "unknown" else {}


def output_tensor(output: Any) -> Tensor:
    """A block returns its residual stream alone (transformers 5) or first in a tuple (before)."""
    return output[0] if isinstance(output, tuple) else output


@dataclass
class ForwardPass:
    """One pass of the model over some contexts, from which the part after any captured layer can be run again."""

    residual: dict[int, Tensor]  # layer -> (N, S, D)
    final: Tensor  # (N, S, D): what `LanguageModel.unembed` makes logits of
    # layer, (N, S, D) -> (N, S, D): `final`, had the residual been this. Several versions of the contexts, one after
    # the other (M N, S, D), give the `final` of each.
    run_from: Callable[[int, Tensor], Tensor]


class _StopForward(Exception):  # noqa: N818  (no error: the model has run as far as it has to)
    pass


class LanguageModel:
    """A decoder with a list of blocks. `capture` reads the residual stream, `forward` also lets it be replaced."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.config: Any = model.config.get_text_config()

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
        """What stands between the last block and the unembedding."""
        return getattr(self.trunk, self.family.norm)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def width(self, hook: Hook) -> int:
        """How many numbers a token has at a hook."""
        return hook_width(hook, self.config)

    @contextlib.contextmanager
    def _capturing(self, hooks: Sequence[Hook], found: dict[Hook, Tensor]) -> Iterator[None]:
        def output_of(hook: Hook) -> Callable[..., None]:
            def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
                found[hook] = output_tensor(output)

            return keep

        def input_of(hook: Hook) -> Callable[..., None]:
            def keep(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                found[hook] = inputs[0]

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
        silent = [hook.name for hook in hooks if hook not in found]
        if silent:
            raise SaeError(f"The hook on {', '.join(silent)} did not fire: nothing was captured.")

    @contextlib.contextmanager
    def patching(self, hook: Hook, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """While this is open, the model goes on with `change(x)` for the x (N, S, d) that stands at the hook."""

        def output(_module: nn.Module, _inputs: Any, found: Any) -> Any:
            x = change(output_tensor(found))
            return (x, *found[1:]) if isinstance(found, tuple) else x

        def input_(_module: nn.Module, inputs: tuple[Any, ...]) -> Any:
            return (change(inputs[0]), *inputs[1:])

        check_sites(self.config, [hook])
        module, is_input = find_module(hook, self.trunk, self.family)
        handle = module.register_forward_pre_hook(input_) if is_input else module.register_forward_hook(output)
        try:
            yield
        finally:
            handle.remove()

    @contextlib.contextmanager
    def _stopping_after(self, layer: int) -> Iterator[None]:
        """Run no block behind this one: what is captured does not depend on them."""

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
        """What stands at each hook, (N, S, D) in the model's dtype, from one pass."""
        found: dict[Hook, Tensor] = {}
        with self._capturing(hooks, found), self._stopping_after(max(hook.layer for hook in hooks)):
            self.trunk(ids_NS, use_cache=False)
        for hook, x in found.items():
            if x.shape[:-1] != ids_NS.shape:
                raise UsageError(
                    f"A block of {type(self.model).__name__} gives {tuple(x.shape)} for {tuple(ids_NS.shape)} tokens, "
                    f"where one vector of each was expected at {hook.name}; it cannot be harvested."
                )
        return found

    def capture(self, ids_NS: Tensor, layers: Sequence[int]) -> dict[int, Tensor]:
        """The residual stream after each layer, (N, S, D)."""
        return {hook.layer: x_NSD for hook, x_NSD in self.capture_hooks(ids_NS, [Hook(n) for n in layers]).items()}

    @torch.no_grad()
    def forward(self, ids_NS: Tensor, layers: Sequence[int]) -> ForwardPass:
        """One pass. What each later block was called with is kept, so that `suffix` runs those blocks alone."""
        found: dict[Hook, Tensor] = {}
        calls: dict[int, dict[str, Any]] = {}

        def remember(index: int) -> Callable[..., None]:
            def hook(module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
                called = dict(zip(inspect.signature(module.forward).parameters, inputs, strict=False)) | keywords
                called.pop("hidden_states")
                if isinstance(mask := called.get("attention_mask"), Tensor):
                    called["attention_mask"] = mask[:1]  # nothing but causal, so every context's is the same
                calls[index] = called

            return hook

        later = range(min(layers) + 1, len(self.blocks))
        handles = [self.blocks[i].register_forward_pre_hook(remember(i), with_kwargs=True) for i in later]
        try:
            with self._capturing([Hook(layer) for layer in layers], found):
                final = self.trunk(ids_NS, use_cache=False).last_hidden_state
        finally:
            for handle in handles:
                handle.remove()

        def run_from(layer: int, residual_NSD: Tensor) -> Tensor:
            hidden = residual_NSD
            for index in range(layer + 1, len(self.blocks)):
                hidden = output_tensor(self.blocks[index](hidden, **calls[index]))
            return self.norm(hidden)

        residual = {hook.layer: x_NSD for hook, x_NSD in found.items()}
        return ForwardPass(residual, final, torch.no_grad()(run_from))

    @torch.no_grad()
    def unembed(self, final: Tensor) -> Tensor:
        """Logits (..., V) of `Forward.final` (..., D), of all positions or of some: they are what takes the memory."""
        logits = self.model.get_output_embeddings()(final)
        cap = getattr(self.config, "final_logit_softcapping", None)
        return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)

    @torch.no_grad()
    def check_forward(self) -> None:
        """UsageError unless the suffix and the unembedding give the logits of the model.

        A family that is not known may scale its logits, or give its blocks what depends on the context.
        """
        ids_NS = torch.arange(8, device=self.device).reshape(2, 4) % self.config.vocab_size
        try:
            run = self.forward(ids_NS, [0])
            ours = self.unembed(run.run_from(0, run.residual[0])).float()
        except (AttributeError, TypeError, KeyError) as error:
            raise UsageError(self._not_evaluated(f"its parts are called otherwise ({error})")) from error
        theirs = self.model(ids_NS, use_cache=False).logits.float()
        if (apart := (ours - theirs).abs().max()) > 0.01 * theirs.abs().max():
            raise UsageError(self._not_evaluated(f"the logits of its blocks, run one by one, are off by {apart:.2g}"))

    def _not_evaluated(self, why: str) -> str:
        name = type(self.model).__name__
        return f"SAEs cannot be spliced into a {name} yet: {why}. It works with {', '.join(FAMILIES)}."
