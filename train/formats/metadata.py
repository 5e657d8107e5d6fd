"""The metadata of an export, with SAELens' keys. It serves programs that load the SAE, and records the SAE's origin."""

import contextlib
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ...cache.hooks import SITES, Hook
from ...cache.models import model_label
from ...cache.reader import Cache
from ...common.cache_schemas import HARVEST_RECORD
from ...common.errors import SaeError
from ..sae import SAE, read_run_record
from .canonical import chain_name
from .hook_names import transformerlens_name

# The oldest SAELens release that reads these files. If the version is missing, SAELens' loader drops all other
# metadata.
SAELENS_VERSION = "6.28.0"


def run_hook(sae: SAE) -> Hook | None:
    return Hook.from_record(sae.origin) if isinstance(sae.origin.get("layer"), int) else None


def hook_module(hook: Hook, cache: Cache | None) -> tuple[str, str] | None:
    """The module in transformers that has the activations as input or output: ("model.layers.12.mlp", "output").

    The harvest records this module. If there is no cache, or the cache is too old to record the module, the module is
    derived from the usual block names. This works for resid_post and for sites that are modules; for other sites the
    result is None. For resid_mid it is always None, because resid_mid is neither an input nor an output of a module.
    """
    modules: dict[str, str] = {}
    if cache is not None:
        with contextlib.suppress(SaeError):
            modules = HARVEST_RECORD.read(cache.folder / "harvest.json").get("modules", {})
    if hook.site == "resid_mid":
        return None
    if recorded := modules.get(hook.array, "").split(",")[0]:
        return recorded.removeprefix("the input of "), "input" if recorded.startswith("the input of ") else "output"
    if hook.site == "resid_post":
        return f"model.layers.{hook.layer}", "output"
    path, _, end = hook.name.rpartition(".")
    return None if hook.site in SITES else (path, end)


def context_beginning(origin: Mapping[str, Any], cache: Cache | None) -> dict[str, Any]:
    """Whether contexts began with a special token (SAELens' prepend_bos) and, if known, which token.

    SAELens' own tokenizers prepend the model's BOS, or its EOS if it has no BOS. Earlier versions of this package did
    the same for their caches.
    """
    imported = "format" in origin
    known = origin if cache is None or imported else cache.identity
    if "bos" not in known:
        token = origin.get("bos_token")
        return {"prepend_bos": origin.get("prepend_bos", True), **({} if token is None else {"bos_token": token})}
    if known["bos"] is None:
        return {"prepend_bos": False}
    beginning = {"prepend_bos": True, "bos_token_id": known["bos"]}
    if cache is not None:
        with contextlib.suppress(SaeError):
            harvest = HARVEST_RECORD.read(cache.folder / "harvest.json")
            beginning |= {"bos_token": harvest["bos_token"]} if "bos_token" in harvest else {}
    return beginning


def export_metadata(sae: SAE, run: Path | None, cache: Cache | None) -> dict[str, Any]:
    """The metadata of an export: SAELens' keys first, then our own.

    `run` is the run folder, and `cache` is the cache on which the run was trained. Either can be None.
    """
    origin, hook = sae.origin, run_hook(sae)
    recorded = read_run_record(run) if run is not None else None
    run_record: dict[str, Any] = {**recorded} if recorded else {}
    model = origin.get("model") or {}
    metadata: dict[str, Any] = {"sae_lens_version": SAELENS_VERSION}
    if model.get("name"):
        metadata["model_name"] = transformerlens_name(model_label(model))
        metadata["model_class_name"] = "HookedTransformer"
        metadata["model_from_pretrained_kwargs"] = {"center_writing_weights": False}
    if hook is not None:
        metadata |= {"hook_name": hook.name, "hook_layer": hook.layer, "hook_head_index": None}
        if (module := hook_module(hook, cache)) is not None:
            metadata["hf_hook_name" if module[1] == "output" else "hf_hook_input_of"] = module[0]
    metadata |= {"context_size": origin.get("context"), **context_beginning(origin, cache)}
    if cache is not None:
        data = cache.identity["data"]
        metadata |= {"dataset_path": data["name"], "exclude_special_tokens": cache.identity.get("skip")}
        metadata["dataset_revision"] = data.get("revision")
    metadata |= {
        "training_architecture": chain_name(sae),
        "created_by": f"sae-pipeline {version('sae-pipeline')}",
        "variant": origin.get("variant"),
        "seed": origin.get("seed"),
        "training_tokens": origin.get("training_tokens"),
        "model_revision": model.get("revision"),
        "cache_digest": run_record.get("cache") or origin.get("fingerprint"),
        "training_options": run_record.get("resolved"),
        "run": run.resolve().name if run is not None else None,
    }
    return {key: value for key, value in metadata.items() if value is not None or key == "hook_head_index"}
