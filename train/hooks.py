"""The hooks that the options of `sae train` select."""

from collections.abc import Sequence
from pathlib import Path

from ..cache.catalog import open_caches
from ..cache.hooks import SITES, Hook, ModuleSpec, is_site
from ..cache.opening import open_place
from ..common.errors import UsageError


def hooks_to_train(
    layers: Sequence[int], site: str, modules: Sequence[str], arrays: Sequence[str] | None, caches: Sequence[str | Path]
) -> list[Hook]:
    """The hooks for the site, or for the modules, in every layer.

    For a module outside the blocks, the hook is searched for in `arrays`, the names of the arrays of a harvest. If
    `arrays` is None, the hook is searched for in `caches`, or in all caches if `caches` is empty.

    Raises UsageError for an invalid site.
    """
    if not is_site(site):
        raise UsageError(
            f"unknown --site {site}: expected one of {', '.join(SITES)}, or the input or output of a module in the "
            "block, such as mlp.gate_proj.output."
        )
    if not modules:
        return [Hook(layer, site) for layer in dict.fromkeys(layers)]
    if site != "resid_post":
        raise UsageError("--site and --module name different activations. Give one of them.")
    hooks: list[Hook] = []
    for text in modules:
        spec = ModuleSpec.parse(text)
        if spec.blocks is None:
            known = known_hooks(caches) if arrays is None else list(map(Hook.from_array, arrays))
            hooks.append(outside_hook(known, spec, text))
        else:
            hooks += [Hook(layer, spec.site) for layer in (layers if spec.layer is None else [spec.layer])]
    return list(dict.fromkeys(hooks))


def outside_hook(known: Sequence[Hook], spec: ModuleSpec, text: str) -> Hook:
    """The hook of a module outside the blocks. The known hooks determine its layer."""
    for hook in known:
        is_same_end = hook.site.endswith(f".{spec.end}")
        if hook.is_outside and is_same_end and f".{spec.path}".endswith(f".{hook.module_path}"):
            return hook
    raise UsageError(f"No cache contains --module {text}. Create one with `sae harvest --module {text}`.")


def known_hooks(folders: Sequence[str | Path]) -> list[Hook]:
    """The hooks of the caches in `folders`, or of all caches if `folders` is empty."""
    caches = [open_place(folder) for folder in folders] if folders else open_caches()
    return [hook for cache in caches for hook in cache.hooks]
