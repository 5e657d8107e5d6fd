"""Names of models and hook points in other libraries, and their translation to and from our names."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from ...cache.hooks import SITES, Hook
from ...common.errors import UsageError

PYTHIA_SIZES = ("70m", "160m", "410m", "1b", "1.4b", "2.8b", "6.9b", "12b")
HUB_IDS = {
    "gpt2-small": "gpt2",
    **{f"gemma-{size}": f"google/gemma-{size}" for size in ("2b", "7b", "2b-it", "7b-it")},
    **{f"gemma-2-{size}{it}": f"google/gemma-2-{size}{it}" for size in ("2b", "9b", "27b") for it in ("", "-it")},
    **{f"pythia-{size}{end}": f"EleutherAI/pythia-{size}{end}" for size in PYTHIA_SIZES for end in ("", "-deduped")},
}
"""TransformerLens' name of a model -> its id on the Hub, if the two differ."""
TRANSFORMERLENS_NAMES = {hub: name for name, hub in HUB_IDS.items()}

TRUNKS = ("model", "model.language_model", "language_model.model", "gpt_neox", "transformer", "backbone")
BLOCK = rf"(?:(?:{'|'.join(map(re.escape, TRUNKS))})\.)?(?:layers|h)\.(\d{{1,4}})"
"""A block with its number, as transformers names it."""
HOOK_PATTERNS = {
    site: [
        re.escape(name).replace(r"\{\}", r"(\d{1,4})"),  # TransformerLens, SAELens
        rf"(?:.*/)?{site}_layer_(\d{{1,4}})(?:/.*)?",  # dictionary_learning
    ]
    for site, name in SITES.items()
}
HOOK_PATTERNS["resid_post"] += [rf"(?:.*/)?{BLOCK}(?:\.output)?", r"(?:.*/)?layer_(\d{1,4})(?:/.*)?"]
MODULE = rf"(?:.*/)?{BLOCK}\.([\w.]+?)(\.input|\.output)?"
"""A module in a block, as sparsify, SAELens (with models of transformers) and our own exports name it."""
OUTSIDE_MODULE = r"(model\.[\w.]+?\.(?:input|output))"
"""A module outside the blocks, as our own exports name it."""
GEMMA_SCOPE_SITES = {"res": "resid_post", "mlp": "mlp_out", "att": "attn_z"}  # the last word of a repository's name


def hub_id(name: str) -> str:
    """A model's id on the Hub, given the id or TransformerLens' name."""
    return HUB_IDS.get(name, name)


def parse_model(value: object) -> str | None:
    """A model's id on the Hub, from a value in a file; None if the value cannot be a model's name."""
    return hub_id(value) if isinstance(value, str) and re.fullmatch(r"[\w.\-/]{1,200}", value) else None


def transformerlens_name(model: str) -> str:
    """TransformerLens' name of a model."""
    return TRANSFORMERLENS_NAMES.get(model, model)


def parse_hook(text: str) -> Hook | None:
    """The hook point that a name denotes in any of the libraries' naming schemes, or None.

    The input of a block is named as the output of the previous block; the input of block 0 remains resid_pre. A module
    is named by its path. A module outside the blocks gets layer 0, since its name contains no layer.
    """
    text = text.strip()
    for site, patterns in HOOK_PATTERNS.items():
        for pattern in patterns:
            if match := re.fullmatch(pattern, text):
                return resid_post_for(Hook(int(match[1]), site))
    if (match := re.fullmatch(MODULE, text)) and "hook_" not in text:
        return Hook(int(match[1]), match[2] + (match[3] or ".output"))
    if match := re.fullmatch(OUTSIDE_MODULE, text):
        return Hook(0, match[1])
    return None


def resid_post_for(hook: Hook) -> Hook:
    """Turn resid_pre into resid_post of the previous block. Any other hook is returned unchanged."""
    return Hook(hook.layer - 1) if hook.site == "resid_pre" and hook.layer > 0 else hook


def is_module(hook_name: object) -> bool:
    """Whether a hook name, in our own naming, stands for the input or output of a module.

    Example: model.layers.12.mlp.gate_proj.output.
    """
    return isinstance(hook_name, str) and hook_name.startswith("model.") and hook_name.endswith((".input", ".output"))


def recorded_hook(metadata: Mapping[str, Any]) -> Hook | None:
    """The hook point that our own exports record, or None."""
    return with_recorded_layer(first_hook([metadata.get("hook_name")]), metadata.get("hook_layer"))


def with_recorded_layer(hook: Hook | None, layer: object) -> Hook | None:
    """Add the recorded layer to a hook on a module outside the blocks, because its name contains no layer number."""
    return hook._replace(layer=layer) if hook is not None and hook.is_outside and type(layer) is int else hook


def first_hook(texts: Iterable[object]) -> Hook | None:
    """The hook point named by the first text that names one. Raises UsageError if this hook point is not supported."""
    for text in texts:
        if not isinstance(text, str) or not text:
            continue
        if hook := parse_hook(text):
            return hook
        if text.startswith("blocks."):
            raise UsageError(
                f"The hook point {text[:80]!r} is not supported. Supported are {', '.join(SITES.values())}, and "
                "modules named by their path in transformers, such as model.layers.12.mlp."
            )
    return None


def parse_gemma_scope_path(parts: Iterable[str]) -> tuple[str | None, Hook | None]:
    """Model and hook point from `gemma-scope-2b-pt-res/.../layer_12/width_16k/average_l0_82`; None if not named."""
    model, site, layer = None, "resid_post", None
    for part in parts:
        if match := re.search(r"gemma-scope-(2b|9b|27b)-(pt|it)-(res|mlp|att)", part):
            model = f"google/gemma-2-{match[1]}{'-it' if match[2] == 'it' else ''}"
            site = GEMMA_SCOPE_SITES[match[3]]
        if match := re.fullmatch(r"layer_(\d{1,3})", part):
            layer = int(match[1])
    return model, None if layer is None else Hook(layer, site)
