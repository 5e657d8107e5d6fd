"""What others call a model and a hook point, in our words and back."""

import re
from collections.abc import Iterable

from ...cache.layout import SITES, Hook
from ...common.errors import UsageError

HUB_IDS = {
    "gpt2-small": "gpt2",
    **{f"gemma-{size}": f"google/gemma-{size}" for size in ("2b", "7b", "2b-it", "7b-it")},
    **{f"gemma-2-{size}{it}": f"google/gemma-2-{size}{it}" for size in ("2b", "9b", "27b") for it in ("", "-it")},
    **{f"pythia-{size}{dedup}": f"EleutherAI/pythia-{size}{dedup}" for size in ("70m", "160m", "410m", "1b", "1.4b", "2.8b", "6.9b", "12b") for dedup in ("", "-deduped")},
}  # fmt: skip
TRANSFORMERLENS_NAMES = {hub: name for name, hub in HUB_IDS.items()}

HOOK_PATTERNS = {
    "resid_post": (
        r"blocks\.(\d{1,4})\.hook_resid_post",
        r"(?:.*/)?resid_post_layer_(\d{1,4})(?:/.*)?",
        r"(?:.*/)?(?:model\.|model\.language_model\.)?layers\.(\d{1,4})(?:\.output)?",
        r"(?:.*/)?layer_(\d{1,4})(?:/.*)?",
    ),
    "resid_pre": (
        r"blocks\.(\d{1,4})\.hook_resid_pre",
        r"(?:.*/)?resid_pre_layer_(\d{1,4})(?:/.*)?",
    ),  # of the block before it
    "mlp_out": (r"blocks\.(\d{1,4})\.hook_mlp_out", r"(?:.*/)?mlp_out_layer_(\d{1,4})(?:/.*)?"),
    "attn_z": (r"blocks\.(\d{1,4})\.attn\.hook_z", r"(?:.*/)?attn_z_layer_(\d{1,4})(?:/.*)?"),
}
GEMMA_SCOPE_SITES = {"res": "resid_post", "mlp": "mlp_out", "att": "attn_z"}  # of Gemma Scope's repositories


def hub_id(name: str) -> str:
    """The model's id on the Hub, where TransformerLens has another."""
    return HUB_IDS.get(name, name)


def parse_model(value: object) -> str | None:
    """What a file says of its model, on the Hub; None for what is no name of one."""
    return hub_id(value) if isinstance(value, str) and re.fullmatch(r"[\w.\-/]{1,200}", value) else None


def transformerlens_name(model: str) -> str:
    """TransformerLens' name; of a folder its last part, for its place is nobody's business."""
    if model.startswith("/"):
        return model.rstrip("/").rsplit("/", 1)[-1]
    return TRANSFORMERLENS_NAMES.get(model, model)


def parse_hook(text: str) -> Hook | None:
    """The hook point that a name in any scheme means, or None."""
    for site, patterns in HOOK_PATTERNS.items():
        for pattern in patterns:
            if found := re.fullmatch(pattern, text.strip()):
                layer = int(found[1])
                if site != "resid_pre":
                    return Hook(layer, site)
                if layer == 0:
                    raise UsageError(f"{text!r} is the embedding, before every block; no layer of ours is that.")
                return Hook(layer - 1)
    return None


def first_hook(texts: Iterable[object]) -> Hook | None:
    """The hook of the first text that names one. UsageError where a text names a place that we do not have."""
    for text in texts:
        if not isinstance(text, str) or not text:
            continue
        if hook := parse_hook(text):
            return hook
        if text.startswith("blocks.") or re.fullmatch(r"(model\.)?layers\.\d+\..*", text):
            raise UsageError(f"{text[:80]!r} is no place that is known here; known are {', '.join(SITES.values())}.")
    return None


def parse_gemma_scope_path(parts: Iterable[str]) -> tuple[str | None, Hook | None]:
    """Model and hook of `gemma-scope-2b-pt-res/.../layer_12/width_16k/average_l0_82`, as far as the parts of a path say."""
    model, site, layer = None, "resid_post", None
    for part in parts:
        if found := re.search(r"gemma-scope-(2b|9b|27b)-(pt|it)-(res|mlp|att)", part):
            model = f"google/gemma-2-{found[1]}{'-it' if found[2] == 'it' else ''}"
            site = GEMMA_SCOPE_SITES[found[3]]
        if found := re.fullmatch(r"layer_(\d{1,3})", part):
            layer = int(found[1])
    return model, None if layer is None else Hook(layer, site)
