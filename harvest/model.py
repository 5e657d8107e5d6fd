"""The language model and its hook points.

A *layer* is the zero-based index of a block and means the residual stream after it: `blocks.12.hook_resid_post` in
TransformerLens' words, the output of `model.layers[12]`, `hidden_states[13]` (after the last block, transformers
puts the final norm there, and we do not).

Two more sites of a block can be harvested: `mlp_out`, what the MLP adds to the residual stream (in Gemma after its
last norm), and `attn_z`, the heads' outputs side by side, before the output projection.

Shape suffixes: N contexts in a batch, S positions, D d_model, V vocabulary.
"""

import contextlib
import copy
import errno
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from ..cache.errors import DamagedError, OutsideError, SaeError, UsageError
from ..cache.layout import Hook
from . import mini
from .rows import is_of_the_network

# Whose blocks add the attention, then the MLP, each after a norm of its own where there is a
# post_feedforward_layernorm; a test shows it of each. Others may scale, add in parallel, or name their parts otherwise.
SITED = ("gemma", "gemma2", "gemma3_text", "llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class Source:
    """Which model: its name, where it is loaded from, and what pins its bytes."""

    name: str
    location: str  # a Hub id or a folder
    revision: str  # a commit of the Hub, or sha256 of the files

    @property
    def on_hub(self) -> bool:
        return not Path(self.location).is_dir()

    def identity(self) -> dict[str, str]:
        return {"name": self.name, "revision": self.revision}


def module_of(hook: Hook, config: Any) -> str:
    """Where a hook is in transformers' words."""
    decoder = config.get_text_config()
    layers = "model.layers" if decoder is config else "model.language_model.layers"
    block, last = f"{layers}.{hook.layer}", hook.layer == decoder.num_hidden_layers - 1
    return {
        "resid_post": f"the output of {layers}[{hook.layer}]" if last else f"hidden_states[{hook.layer + 1}]",
        "mlp_out": f"{block}.mlp, after post_feedforward_layernorm where there is one",
        "attn_z": f"the input of {block}.self_attn.o_proj",
    }[hook.site]


def width_of(hook: Hook, config: Any) -> int:
    """How many numbers a token has there."""
    config = config.get_text_config()
    if hook.site != "attn_z":
        return config.hidden_size
    heads = config.num_attention_heads
    return heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)


def find_model(name: str, revision: str | None = None) -> tuple[Source, Any]:
    """Pin a model to its bytes; returns its configuration too. Loads no weights.

    Raises OutsideError when the Hub cannot be reached or the model's licence has not been accepted.
    """
    folder = mini.WEIGHTS if name == mini.NAME else Path(name)
    if folder.is_dir() and revision is not None:
        raise UsageError(f"--revision is a commit of the Hub; {name} is a folder here. Leave it out.")
    if name.startswith((".", "/")) and not folder.is_dir():
        raise UsageError(f"There is no folder {name}. Give a folder with a model, a Hub id, or --model {mini.NAME}.")
    if folder.is_dir():
        with explained(name):
            called = name if name == mini.NAME else str(folder.resolve())
            return Source(called, str(folder), digest_of_folder(folder)), AutoConfig.from_pretrained(folder)
    with explained(name):
        config = AutoConfig.from_pretrained(name, revision=revision)
    return Source(name, name, getattr(config, "_commit_hash", None) or revision or "unknown"), config


def digest_of_folder(folder: Path) -> str:
    """sha256 over the names and bytes of everything that decides what the model computes."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.suffix in {".json", ".safetensors", ".model", ".bin"}):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


@contextlib.contextmanager
def explained(name: str) -> Iterator[None]:
    """Turn what loading can throw into a sentence."""
    try:
        yield
    except SafetensorError as error:
        raise DamagedError(f"The weights of {name} are damaged: {error}. Get its files again.") from error
    except Exception as error:
        if sentence := refusal(error, name):
            raise sentence from error
        if not isinstance(error, (OSError, ValueError, ImportError, RuntimeError)):
            raise
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise OutsideError(
            f"The model {name} could not be loaded: {first} Give a Hub id, a folder, or --model {mini.NAME}."
        ) from error


def refusal(error: Exception, name: str) -> SaeError | None:
    """The sentence for a model that the Hub has not or does not give, no network, or a full disk; None for the rest.

    transformers raises an OSError for each, from the error that says which it is.
    """
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__) is not None:
        causes.append(cause)

    def found(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    licence = f"accept its licence at https://huggingface.co/{name}, then run `hf auth login`."
    if found(GatedRepoError):
        return OutsideError(
            f"{name} could not be loaded. It is gated: {licence} To try everything without it: --model {mini.NAME}"
        )
    if found(RepositoryNotFoundError):
        return OutsideError(
            f"There is no model {name} on the Hub that you can read. Check the name; if it is private, run `hf auth login`. "
            f"Or give a folder, or --model {mini.NAME}."
        )
    if found(RevisionNotFoundError):
        return UsageError(f"The model {name} has no such revision. Give a commit of it with --revision.")
    if any(isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT) for cause in causes):
        return OutsideError(
            f"The model {name} could not be loaded: the disk is full. Make room, or set HF_HOME to a folder of another disk."
        )
    if found(LocalEntryNotFoundError) or any(
        isinstance(cause, Exception) and is_of_the_network(cause) for cause in causes
    ):
        gated = f" If it has not been done yet: {licence}" if name.startswith("google/gemma") else ""
        return OutsideError(
            f"The model {name} could not be loaded: the Hub cannot be reached, and not all of its files are on this machine. "
            f"Check the network, and that HF_HUB_OFFLINE is not set.{gated} To try everything without it: --model {mini.NAME}"
        )
    return None


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
    if unknown and decoder.model_type not in SITED:
        name = type(decoder).__name__.removesuffix("Config")
        raise UsageError(
            f"Where {unknown[0]} is in the blocks of {name} is not known; it is in those of {', '.join(SITED)}. "
            "Harvest --site resid_post."
        )


def load_tokenizer(source: Source) -> Any:
    with explained(source.name):
        return AutoTokenizer.from_pretrained(source.location, **_revision(source))


def load_trunk(
    source: Source, config: Any, last_layer: int, *, dtype: str, device: str, attention: str
) -> "LanguageModel":
    """The model up to a layer: no later block is loaded, and no unembedding."""
    config = copy.deepcopy(config)
    decoder = config.get_text_config()
    decoder.num_hidden_layers = last_layer + 1
    if getattr(decoder, "layer_types", None):
        decoder.layer_types = decoder.layer_types[: last_layer + 1]
    return _load(AutoModel, source, config, dtype, device, attention)


def load_model(source: Source, config: Any, *, dtype: str, device: str, attention: str = "eager") -> "LanguageModel":
    """The whole model, with its unembedding."""
    return _load(AutoModelForCausalLM, source, config, dtype, device, attention)


def _load(kind: Any, source: Source, config: Any, dtype: str, device: str, attention: str) -> "LanguageModel":
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # it lists the blocks that are left out on purpose
    transformers_logging.disable_progress_bar()
    try:
        with explained(source.name):
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


def _revision(source: Source) -> dict[str, str]:
    return {"revision": source.revision} if source.on_hub and source.revision != "unknown" else {}


def hidden_of(output: Any) -> Tensor:
    """A block returns its residual stream alone (transformers 5) or first in a tuple (before)."""
    return output[0] if isinstance(output, tuple) else output


@dataclass
class Forward:
    """One pass of the model over some contexts, from which the part after any captured layer can be run again."""

    residual: dict[int, Tensor]  # layer -> (N, S, D)
    final: Tensor  # (N, S, D): what `LanguageModel.unembed` makes logits of
    # layer, (N, S, D) -> (N, S, D): `final`, had the residual been this. Several versions of the contexts, one after
    # the other (M N, S, D), give the `final` of each.
    suffix: Callable[[int, Tensor], Tensor]


class _Enough(Exception):  # noqa: N818  (no error: the model has run as far as it has to)
    pass


class LanguageModel:
    """A decoder with a list of blocks. `capture` reads the residual stream, `forward` also lets it be replaced."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.config: Any = model.config.get_text_config()

    @cached_property
    def trunk(self) -> Any:
        """The part without the unembedding, which holds the blocks."""
        for part in (self.model, getattr(self.model, "model", None)):
            for decoder in (part, getattr(part, "language_model", None)):  # of a model that reads images too
                if hasattr(decoder, "layers"):
                    return decoder
        raise UsageError(
            f"A {type(self.model).__name__} keeps its blocks elsewhere than in `model.layers`, where Gemma, Llama and Mistral "
            "models have them; it cannot be harvested yet."
        )

    @property
    def blocks(self) -> nn.ModuleList:
        return self.trunk.layers

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @contextlib.contextmanager
    def _capturing(self, hooks: Sequence[Hook], found: dict[Hook, Tensor]) -> Iterator[None]:
        def output_of(hook: Hook) -> Callable[..., None]:
            def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
                found[hook] = hidden_of(output)

            return keep

        def input_of(hook: Hook) -> Callable[..., None]:
            def keep(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                found[hook] = inputs[0]

            return keep

        check_sites(self.config, hooks)
        handles = []
        for hook in hooks:
            block: Any = self.blocks[hook.layer]
            if hook.site == "attn_z":
                handles.append(block.self_attn.o_proj.register_forward_pre_hook(input_of(hook)))
            else:
                last = "post_feedforward_layernorm" if hasattr(block, "post_feedforward_layernorm") else "mlp"
                module = block if hook.site == "resid_post" else getattr(block, last)
                handles.append(module.register_forward_hook(output_of(hook)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        silent = [hook.name for hook in hooks if hook not in found]
        if silent:
            raise SaeError(f"The hook on {', '.join(silent)} did not fire: nothing was captured.")

    @contextlib.contextmanager
    def _stopping_after(self, layer: int) -> Iterator[None]:
        """Run no block behind this one: what is captured does not depend on them."""

        def stop(_module: nn.Module, _inputs: Any, _output: Any) -> None:
            raise _Enough

        handle = self.blocks[layer].register_forward_hook(stop)  # runs after those that capture
        try:
            with contextlib.suppress(_Enough):
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
    def forward(self, ids_NS: Tensor, layers: Sequence[int]) -> Forward:
        """One pass. What each later block was called with is kept, so that `suffix` runs those blocks alone."""
        found: dict[Hook, Tensor] = {}
        calls: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}

        def remember(index: int) -> Callable[..., None]:
            def hook(_module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
                calls[index] = (inputs[1:], {k: v for k, v in keywords.items() if k != "hidden_states"})
                if isinstance(mask := keywords.get("attention_mask"), Tensor):
                    calls[index][1]["attention_mask"] = mask[:1]  # nothing but causal, so every context's is the same

            return hook

        later = range(min(layers) + 1, len(self.blocks))
        handles = [self.blocks[i].register_forward_pre_hook(remember(i), with_kwargs=True) for i in later]
        try:
            with self._capturing([Hook(layer) for layer in layers], found):
                final = self.trunk(ids_NS, use_cache=False).last_hidden_state
        finally:
            for handle in handles:
                handle.remove()

        def suffix(layer: int, residual_NSD: Tensor) -> Tensor:
            hidden = residual_NSD
            for index in range(layer + 1, len(self.blocks)):
                inputs, keywords = calls[index]
                hidden = hidden_of(self.blocks[index](hidden, *inputs, **keywords))
            return self.trunk.norm(hidden)

        residual = {hook.layer: x_NSD for hook, x_NSD in found.items()}
        return Forward(residual, final, torch.no_grad()(suffix))

    @torch.no_grad()
    def unembed(self, final: Tensor) -> Tensor:
        """Logits (..., V) of `Forward.final` (..., D), of all positions or of some: they are what takes the memory."""
        logits = self.model.lm_head(final)
        cap = getattr(self.config, "final_logit_softcapping", None)
        return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)
