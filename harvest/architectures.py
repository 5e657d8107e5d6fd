"""The modules and widths of a model's hooks, from its configuration alone.

No weights are loaded. The model is built on torch's meta device, where tensors have shapes but no values; this yields
the module names. One block of each kind is built in memory with random weights and run on a few tokens (probe.py),
which shows what its modules compute. Once the real weights are loaded, the same probe runs on them (hooked.py).
"""

import contextlib
import copy
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import nn
from transformers import AutoModel

from ..cache.hooks import OUTSIDE, RESIDUAL_SITES, Hook, ModuleSpec
from ..common.errors import UnavailableError, UsageError, did_you_mean
from ..common.remote_code import from_config
from .building import build_without_numbers, check_memory, quiet_transformers
from .hooked import HookedModel, belongs_to, module_refusal, refusal
from .load_errors import describe, model_name
from .recorder import BlockSites, Site
from .structure import Parts, check_layers, decoder_config, find_parts, truncate_config

__all__ = [
    "can_truncate", "check_context", "check_layers", "check_loaded_sites", "check_sites", "hook_width",
    "hooks_of_sites", "module_name",
]  # fmt: skip

MOST_PARAMETERS = 1_000_000_000  # in a block that is built in memory
# Substring of the name of a configuration field -> the size to which such a field is reduced.
SMALL = {"expert": 16, "intermediate_size": 256}
VOCABULARY = 64  # of the model with random weights
SKIPPED_OUTPUTS: tuple[Callable[[Any], Any], ...] = (lambda x: x, lambda x: (x,), lambda x: (x, None))


def check_sites(config: Any, hooks: Sequence[Hook]) -> None:
    """Raise UsageError unless the model has all these hooks."""
    for hook in hooks:
        if hook.site != "resid_post":
            blueprint_of(config).site(hook)


def module_name(hook: Hook, config: Any) -> str:
    """What a hook reads, in transformers' names: `model.layers.12`, for example, means the output of that module."""
    blueprint = blueprint_of(config)
    site = blueprint.site(hook)
    where = blueprint.parts.trunk_path if hook.is_outside else f"{blueprint.parts.blocks_path}.{hook.layer}"
    name = ".".join(filter(None, (where, site.path)))
    if hook.site != "resid_post":
        return f"the input of {name}" if site.is_input else name
    # The last hidden state is taken after the final norm. Recurrent models count hidden states differently.
    if hook.layer == len(blueprint.parts.blocks) - 1 or not hasattr(decoder_config(config), "num_attention_heads"):
        return name
    return f"{name}, hidden_states[{hook.layer + 1}]"


def hook_width(hook: Hook, config: Any) -> int:
    """The width of the activations at a hook: d_in of an SAE trained there."""
    if hook.site in RESIDUAL_SITES:
        return int(decoder_config(config).hidden_size)
    return blueprint_of(config).site(hook).width


def check_context(config: Any, context: int, name: str) -> None:
    """Raise UsageError if the model has a table of positions that is shorter than the context."""
    decoder = decoder_config(config)
    positions = getattr(decoder, "max_position_embeddings", None) or getattr(decoder, "max_seq_len", None)
    if positions is not None and context > positions and blueprint_of(config).has_position_table():
        raise UsageError(
            f"--context {context} is too long: {name} has positions for {positions} tokens. Use a shorter context."
        )


def hooks_of_sites(config: Any, layers: Sequence[int], sites: Sequence[str], modules: Sequence[str]) -> list[Hook]:
    """The hooks at the given sites and modules (values of --module) of every layer, in the order that a cache uses.

    A module outside the blocks is a single hook, in the layer it belongs to. Raises UsageError if there is no such
    module.
    """
    hooks = set()
    for site in sites:
        is_outside = Hook(0, site).is_outside
        hooks |= {blueprint_of(config).outside_hook(site)} if is_outside else {Hook(layer, site) for layer in layers}
    for text in modules:
        spec = ModuleSpec.parse(text)
        if spec.blocks is None:
            hooks.add(blueprint_of(config).outside_hook(spec.site))
        else:
            blueprint_of(config).check_blocks_path(spec, text)
            hooks |= {Hook(layer, spec.site) for layer in (layers if spec.layer is None else [spec.layer])}
    return sorted(hooks)


def check_loaded_sites(model: HookedModel, config: Any, hooks: Sequence[Hook]) -> None:
    """Raise UsageError unless a run of the loaded model finds each hook at the planned module."""
    model.check_hooks(hooks)
    for hook in hooks:
        planned, found = blueprint_of(config).site(hook), model.site(hook)
        if planned != found:
            raise UsageError(
                f"{hook} is at {found.path} (width {found.width}) in the loaded model, but at {planned.path} (width "
                f"{planned.width}) in the same architecture with random weights. Name the module with --module."
            )


def can_truncate(config: Any, blocks: int) -> bool:
    """Whether the first blocks, built alone, have the same parameters as in the whole model.

    In Gemma 3n and 4 the parameters differ, because one embedding holds inputs for all blocks.
    """
    short = copy.deepcopy(config)
    truncate_config(short, blocks)
    whole = {name: p.shape for name, p in blueprint_of(config).model.named_parameters()}
    return all(whole.get(name) == p.shape for name, p in build_without_numbers(short).named_parameters())


def parameter_count(config: Any) -> int:
    """The number of parameters of a model, found without loading them."""
    return sum(parameter.numel() for parameter in blueprint_of(config).model.parameters())


class Blueprint:
    """The modules of a model, built without loading its weights, and the sites that probing the blocks has found.

    For the probe, the blocks get random weights.
    """

    def __init__(self, config: Any) -> None:
        self.config = config
        self.model = build_without_numbers(config)
        self.parts: Parts = find_parts(self.model)
        self._found: dict[str, BlockSites] = {}  # kind of block -> its sites

    @property
    def class_name(self) -> str:
        return type(self.model).__name__

    def site(self, hook: Hook) -> Site:
        """The module of a hook. Raises UsageError if the model has no such hook."""
        if hook.site in ("resid_pre", "resid_post"):  # checked when the weights are loaded
            return Site("", hook.site == "resid_pre", int(decoder_config(self.config).hidden_size))
        if hook.is_outside:
            return self.outside_site(hook)
        found = self.sites_of(hook.layer)
        if hook.site in found.sites:
            return found.sites[hook.site]
        path, _, end = hook.site.rpartition(".")
        if why := found.refused.get(hook.site) or module_refusal(hook, found):
            raise UsageError(refusal(self.class_name, hook, why))
        shape = found.shapes[path][0][end == "output"]
        assert shape is not None
        return Site(path, end == "input", self.real_width(hook.layer, path, end, shape[-1]), len(shape) == 2)

    def outside_hook(self, site: str) -> Hook:
        """The hook on a module outside the blocks. The module's path may begin with `model` in place of the path of the
        trunk.
        """
        path, _, end = site.rpartition(".")
        trunk = f"{self.parts.trunk_path}." if self.parts.trunk_path else ""
        inside = path.removeprefix(trunk) if path.startswith(trunk) else path.removeprefix(OUTSIDE)
        known = [name for name, _ in self.parts.trunk.named_modules() if name]
        if inside not in known or f"{inside}.".startswith(self.blocks_prefix):
            outside = [f"{trunk}{name}" for name in known if not f"{name}.".startswith(self.blocks_prefix)]
            raise UsageError(
                f"{self.class_name} has no module {path} outside its blocks{did_you_mean(path, outside)} "
                f"Modules of its blocks are named {self.parts.blocks_path}.{{layer}}.<module>."
            )
        hook = Hook(0, f"{OUTSIDE}{inside}.{end}")
        return hook._replace(layer=self.layer_outside(hook))

    @property
    def blocks_prefix(self) -> str:
        """The path of the blocks in the trunk, with a dot at its end."""
        return f"{self.parts.blocks_path.removeprefix(self.parts.trunk_path).lstrip('.')}."

    def check_blocks_path(self, spec: ModuleSpec, text: str) -> None:
        """Raise UsageError unless the blocks are at the path given to --module and contain the given module."""
        if not f".{self.parts.blocks_path}".endswith(f".{spec.blocks}"):
            raise UsageError(
                f"--module {text}: {self.class_name} has its blocks in {self.parts.blocks_path}, not in {spec.blocks}. "
                f"Give '{self.parts.blocks_path}.{{layer}}.{spec.path}:{spec.end}'."
            )
        known = {name for block in self.parts.blocks for name, _ in block.named_modules()}
        if spec.path not in known:
            raise UsageError(f"--module {text}: no block has a module {spec.path}{did_you_mean(spec.path, known)}")

    def layer_outside(self, hook: Hook) -> int:
        """The layer of a module outside the blocks: the last if the module runs after the blocks, else the first."""
        layer, _ = self.first_block.outside(hook)
        return len(self.parts.blocks) - 1 if layer is None else layer

    @cached_property
    def first_block(self) -> HookedModel:
        """The model with random weights and a single block, which shows what runs before and after the blocks."""
        return random_model(self.config, 0, [type(self.parts.blocks[0])])

    def outside_site(self, hook: Hook) -> Site:
        """The module of a hook outside the blocks."""
        layer, seen = self.first_block.outside(hook)
        if hook.layer != (belongs := self.layer_outside(hook)):
            raise UsageError(belongs_to(hook, belongs))
        if why := module_refusal(hook, seen):
            raise UsageError(refusal(self.class_name, hook, why))
        return self.first_block.site(Hook(0, hook.site))

    def real_width(self, layer: int, path: str, end: str, width: int) -> int:
        """The width of a module's input or output in the real model; the probed block may have reduced sizes."""
        module = self.parts.blocks[layer].get_submodule(path)
        if isinstance(module, nn.Linear):
            return module.in_features if end == "input" else module.out_features
        return width

    def sites_of(self, layer: int) -> BlockSites:
        """The sites of a block. The first block of the same kind is built with random weights and probed."""
        kind = kind_of(self.parts.blocks[layer])
        if kind not in self._found:
            first = next(n for n, block in enumerate(self.parts.blocks) if kind_of(block) == kind)
            found = self.probe(first)
            for name, site in found.sites.items():
                end = "input" if site.is_input else "output"
                found.sites[name] = site._replace(width=self.real_width(first, site.path, end, site.width))
            self._found[kind] = found
        return self._found[kind]

    def probe(self, layer: int) -> BlockSites:
        config, block = self.config, self.parts.blocks[layer]
        if sum(p.numel() for p in block.parameters()) > MOST_PARAMETERS:
            config = with_small_sizes(config)
        classes = [type(block) for block in self.parts.blocks[: layer + 1]]
        try:
            model = random_model(config, layer, classes)
            if config is self.config and kind_of(model.blocks[layer]) != kind_of(block):
                raise UsageError(
                    f"{self.class_name} builds its last block differently from the others, so its blocks cannot be "
                    "probed one by one. Use --site resid_post."
                )
            return model.probe(layer)
        except (UsageError, UnavailableError):
            raise
        except Exception as error:  # raised by the model's code; DamagedError if the first blocks cannot be built alone
            why = describe(error.__cause__ or error)
            raise UsageError(
                f"{self.class_name} with random weights cannot be run: {why}. So its modules cannot be identified "
                "before its weights are loaded. Use --site resid_post."
            ) from error

    @lru_cache(maxsize=1)  # noqa: B019  (blueprints are kept anyway)
    def has_position_table(self) -> bool:
        """Whether the model has an embedding or a buffer with an entry for each position."""
        config, unusual = copy.deepcopy(decoder_config(self.config)), 1237
        for name in ("max_position_embeddings", "max_seq_len"):
            if hasattr(config, name):
                setattr(config, name, unusual)
        truncate_config(config, 1)
        model = build_without_numbers(config)
        sizes = [size for _, buffer in model.named_buffers() for size in buffer.shape]
        sizes += [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)]
        return any(unusual <= size <= unusual + 2 for size in sizes)


def blueprint_of(config: Any) -> Blueprint:
    """The blueprint of a configuration."""
    key = f"{type(config).__name__} {json.dumps(config.to_dict(), default=str, sort_keys=True)}"
    return _blueprints(key, Unhashed(config))


class Unhashed:
    """A wrapper that keeps a value out of an lru_cache key."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Unhashed)

    def __hash__(self) -> int:
        return 0


@lru_cache(maxsize=8)
def _blueprints(_key: str, config: Unhashed) -> Blueprint:
    return Blueprint(copy.deepcopy(config.value))


def kind_of(block: nn.Module) -> str:
    """A name for the structure of a block. Blocks of the same kind have the same sites.

    The name leaves out whether a block stores its keys and values for later blocks (`store_...`), because that depends
    on how many blocks follow.
    """
    parts = [
        (path, type(module).__name__, [tuple(p.shape) for p in module.parameters(recurse=False)],
         sorted((name, value) for name, value in vars(module).items()
                if isinstance(value, bool | str) and name != "training" and not name.startswith(("_", "store_"))))
        for path, module in block.named_modules()
    ]  # fmt: skip
    return repr(parts)


def with_small_sizes(config: Any) -> Any:
    """A configuration with fewer experts and narrower MLPs, so that one block fits into memory."""
    config = copy.deepcopy(decoder_config(config))
    for name, value in list(vars(config).items()):
        for word, small in SMALL.items():
            if word in name and type(value) is int and value > small:
                setattr(config, name, small)
    return config


def random_model(config: Any, layer: int, classes: Sequence[type]) -> HookedModel:
    """A trunk that ends with the block at `layer`. This block has random weights; the blocks before it are skipped.

    `classes` are the classes of the trunk's blocks.
    """
    config = copy.deepcopy(decoder_config(config))
    truncate_config(config, layer + 1)
    config.vocab_size, config.pad_token_id = VOCABULARY, 0
    config._attn_implementation = "eager"
    without_numbers = build_without_numbers(config, AutoModel)
    del find_parts(without_numbers).blocks[:layer]
    check_memory(without_numbers, model_name(config), "float32", "cpu")
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        torch.manual_seed(0)
        with without_numbers_except(layer, classes):
            model = from_config(AutoModel, config, dtype=torch.float32).eval()
        hooked = HookedModel(model)
        randomize(hooked)
    for output in SKIPPED_OUTPUTS:
        for block in hooked.blocks[:layer]:
            block.forward = lambda x, *_, output=output, **__: output(x)
        try:
            hooked.probe(layer)
            break
        except UsageError:
            raise
        except Exception:  # from the model's own code, which unpacks the output of a block
            if output is SKIPPED_OUTPUTS[-1] or layer == 0:
                raise
    return hooked


@contextlib.contextmanager
def without_numbers_except(layer: int, classes: Sequence[type]) -> Iterator[None]:
    """A context manager in which every block except the one at `layer` is built on the meta device."""
    numbers, inside = itertools.count(), [False]
    own = {kind: kind.__dict__.get("__init__") for kind in classes}

    def wrapped(init: Callable[..., None]) -> Callable[..., None]:
        def build(self: Any, *args: Any, **keywords: Any) -> None:
            if inside[0]:  # a call of the parent class's __init__
                init(self, *args, **keywords)
                return
            inside[0] = True
            try:
                with torch.device("cpu" if next(numbers) == layer else "meta"):
                    init(self, *args, **keywords)
            finally:
                inside[0] = False

        return build

    try:
        for kind in own:
            setattr(kind, "__init__", wrapped(getattr(kind, "__init__")))  # noqa: B009, B010  (mypy knows the types)
        yield
    finally:
        for kind, init in own.items():
            if init is None:
                delattr(kind, "__init__")
            else:
                setattr(kind, "__init__", init)  # noqa: B010


@torch.no_grad()
def randomize(model: HookedModel) -> None:
    """Set all parameters to random values. The probe could not tell a norm whose weights are all one from no norm."""
    for parameter in model.model.parameters():
        if parameter.device.type != "meta" and parameter.is_floating_point():
            if parameter.dim() >= 2:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.trunk.get_input_embeddings().weight.normal_()
