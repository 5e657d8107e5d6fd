"""The caches under `activations/`: list, find and delete them."""

import shutil
from pathlib import Path

from ..common.errors import SaeError, UsageError
from ..common.escaping import quote
from ..common.files import folder_bytes, sae_home, writer_lock
from .layout import Hook
from .models import GivenModel, recorded_folders
from .reader import Cache, is_ring_cache


def list_caches(root: Path | None = None) -> dict[Path, Cache | SaeError]:
    """{folder: cache} of every cache under `activations/`; a cache that cannot be opened is replaced by its error."""
    caches: dict[Path, Cache | SaeError] = {}
    for path in sorted((root or sae_home() / "activations").glob("*/zarr.json")):
        try:
            caches[path.parent] = Cache(path.parent)
        except SaeError as error:
            caches[path.parent] = error
    return caches


def find_cache(model: str | None, hook: Hook, root: Path | None = None) -> Cache:
    """The one cache under `activations/` that holds the complete activations of this hook (and model, if given).

    Raises UsageError if there is none or more than one; the message lists the caches that exist.
    """
    caches, given = list_caches(root), GivenModel(model) if model else None
    opened = [cache for cache in caches.values() if isinstance(cache, Cache)]
    matches = [c for c in opened if hook in c.hooks and (given is None or given.is_model_of(c.identity["model"]))]
    if len(matches) == 1:
        return matches[0]
    if matches:
        options = "\n".join(f"  --cache {c.folder}   ({c.rows:,} rows, {c.identity['data']['name']})" for c in matches)
        raise UsageError(f"{len(matches)} caches hold {hook}. Choose one:\n{options}")
    unfinished = [c for c in opened if not c.attributes["complete"] and not is_ring_cache(c.folder)]
    if unfinished:
        raise UsageError(
            f"No complete cache holds {hook}; {unfinished[0].folder} is half written. "
            "Run the same `sae harvest` again to finish it."
        )
    models = {model} if model else {c.model_argument for c in opened}
    flags = hook.cli_flags + (f" --model {quote(models.pop())}" if len(models) == 1 else "")
    others = "".join(f"\n  {c.folder} holds {', '.join(map(str, c.hooks))} of {c.model}" for c in opened if c.hooks)
    errors = "".join(f"\n  {error}" for error in caches.values() if isinstance(error, SaeError))
    raise UsageError(
        f"No cache holds {hook}{f' of {given.describe()}' if given else ''}. "
        f"Create one with `sae harvest {flags}`.{others}{errors}"
    )


def model_folders(cache: Cache, key: str = "model") -> list[str]:
    """Where the folder of a cache's model has been: as its harvest was given it, then as those of other caches were.

    With the key "adapters", where its adapters have been.
    """
    record = cache.identity["model"]
    others = [
        other.folder
        for other in list_caches().values()
        if isinstance(other, Cache) and other.identity["model"].get("revision") == record["revision"]
    ]
    return [path for folder in (cache.folder, *others) for path in recorded_folders(folder, key)]


def harvest_command(model: str, hook: Hook, context: int | None = None) -> str:
    """The command that makes a cache to evaluate an SAE of this hook on: half of its text is held out.

    `context`: the length in tokens of the contexts that the SAE was trained on, where it is known.
    """
    length = f" --context {context}" if context else ""
    return f"sae harvest --model {quote(model)} {hook.cli_flags}{length} --tokens 1M --held-out 0.5"


def require_cache_folder(folder: Path) -> None:
    """Raise UsageError unless the folder is a cache, complete or not, or what is left of one."""
    if not any((folder / record).exists() for record in ("harvest.json", "tokens/commit.json", "tokens/draft")):
        raise UsageError(f"{folder} holds no activation cache; nothing was deleted.")


def remove_cache(folder: Path) -> int:
    """Delete a cache, complete or not; returns the bytes freed.

    Raises UsageError if the folder is not a cache, UnavailableError if a process is writing it.
    """
    require_cache_folder(folder)
    with writer_lock(folder, "sae cache rm"):
        size = folder_bytes(folder)
        shutil.rmtree(folder)
    return size
