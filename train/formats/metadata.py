"""What is said of an SAE beside its weights, under SAELens' names: all that its consumers ask for, and where it came from."""

import contextlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ...cache.layout import Hook
from ...cache.reader import Cache
from ...common.errors import SaeError
from ...common.files import read_json
from ..sae import SAE
from .hook_names import transformerlens_name

SAELENS_VERSION = (
    "6.28.0"  # the oldest release that reads what is written here; without it the loader drops all the rest
)


def run_hook(sae: SAE) -> Hook | None:
    layer = sae.origin.get("layer")
    return Hook(layer, sae.origin.get("site", "resid_post")) if isinstance(layer, int) else None


def module_path(hook: Hook, cache: Cache | None) -> str:
    """The block in transformers' words, as the harvest noted it: GPT-2 and GPT-NeoX call theirs otherwise than most."""
    noted: dict[str, str] = {}
    if cache is not None:
        with contextlib.suppress(SaeError):  # a cache from before they were noted
            noted = read_json(cache.folder / "harvest.json", "modules")["modules"]
    return noted.get(hook.array, f"model.layers.{hook.layer}").split(",")[0]


def export_metadata(sae: SAE, folder: Path | None, cache: Cache | None) -> dict[str, Any]:
    """The metadata of an export; names of SAELens first, then ours."""
    origin, hook = sae.origin, run_hook(sae)
    run: dict[str, Any] = {}
    if folder is not None:
        with contextlib.suppress(SaeError):
            run = read_json(folder / "run.json")
    model = origin.get("model") or {}
    about: dict[str, Any] = {"sae_lens_version": SAELENS_VERSION}
    if model.get("name"):
        about["model_name"] = transformerlens_name(model["name"])
        about["model_class_name"] = "HookedTransformer"
        about["model_from_pretrained_kwargs"] = {"center_writing_weights": False}
    if hook is not None:
        about |= {"hook_name": hook.name, "hook_layer": hook.layer, "hook_head_index": None}
        if hook.site == "resid_post":
            about["hf_hook_name"] = module_path(hook, cache)
    about |= {"context_size": origin.get("context"), "prepend_bos": True}
    if cache is not None:
        about |= {"dataset_path": cache.identity["data"]["name"], "exclude_special_tokens": cache.identity.get("skip")}
        about["dataset_revision"] = cache.identity["data"].get("revision")
    about |= {
        "training_architecture": "+".join(link.name for link in sae.activation),  # type: ignore[misc]
        "created_by": f"sae-pipeline {version('sae-pipeline')}",
        "variant": origin.get("variant"),
        "seed": origin.get("seed"),
        "training_tokens": origin.get("training_tokens"),
        "model_revision": model.get("revision"),
        "cache_digest": run.get("cache") or origin.get("fingerprint"),
        "training_options": run.get("resolved"),
        "run": folder.resolve().name if folder is not None else None,
    }
    return {key: value for key, value in about.items() if value is not None or key == "hook_head_index"}
