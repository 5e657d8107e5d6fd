"""The caches under `activations/`: list and find them."""

from collections.abc import Callable, Iterable
from pathlib import Path

from ..common.errors import DamagedError, SaeError, UsageError, warn_left_out
from ..common.escaping import quote
from ..common.files import sae_home
from .hooks import Hook
from .layout import is_ring_cache
from .models import GivenModel, recorded_folders
from .object_store import is_url
from .opening import open_place
from .reader import Cache


def list_caches(root: Path | None = None) -> dict[Path, Cache | SaeError]:
    """{folder: cache} of every cache under `activations/`; a cache that cannot be opened is replaced by its error."""
    folders = sorted(path.parent for path in (root or sae_home() / "activations").glob("*/zarr.json"))
    return {folder: open_or_error(folder) for folder in folders}


def open_or_error(folder: Path | str) -> Cache | SaeError:
    """The cache in a folder, or the error raised by opening it, so that a damaged cache does not make other commands
    fail.
    """
    try:
        cache = open_place(folder)
        repr(cache), cache.state, cache.layout.n_windows
        cache.identity["model"]["revision"], cache.identity["data"]["name"]
        return cache
    except SaeError as error:
        return error
    except (OSError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        return DamagedError(f"{folder}/zarr.json or a record beside it was overwritten: {error!r}.")


def open_caches(root: Path | None = None) -> list[Cache]:
    """The caches under `activations/` that can be opened. A LeftOutWarning names each cache that cannot be opened."""
    caches = list_caches(root)
    for folder, error in caches.items():
        if isinstance(error, SaeError):
            warn_left_out(folder, error)
    return [cache for cache in caches.values() if isinstance(cache, Cache)]


def caches_that(fit: Callable[[Cache], bool], caches: Iterable[Cache]) -> list[Cache]:
    """The caches for which `fit` is true. A LeftOutWarning names each cache that is so damaged that `fit` fails."""
    fitting = []
    for cache in caches:
        try:
            if fit(cache):
                fitting.append(cache)
        except SaeError as error:
            warn_left_out(cache.folder, error)
    return fitting


def find_cache(model: str | None, hook: Hook, root: Path | None = None) -> Cache:
    """The one cache under `activations/` that holds the complete activations of this hook (and model, if given).

    Raises UsageError if there is no such cache or more than one; the message lists the caches that exist.
    """
    opened, given = open_caches(root), GivenModel(model) if model else None
    matches = [c for c in opened if hook in c.hooks and (given is None or given.is_model_of(c.identity["model"]))]
    if len(matches) == 1:
        return matches[0]
    if matches:
        options = "\n".join(f"  --cache {c.folder}   ({c.rows:,} rows, {c.identity['data']['name']})" for c in matches)
        raise UsageError(f"{len(matches)} caches hold {hook}. Choose one:\n{options}")
    unfinished = [
        c for c in opened
        if not c.attributes["complete"] and not is_ring_cache(c.folder) and (c.folder / hook.array).is_dir()
    ]  # fmt: skip
    if unfinished:
        raise UsageError(
            f"No complete cache holds {hook}; {unfinished[0].folder} is half written. "
            "Run the same `sae harvest` again to finish it."
        )
    models = {model} if model else {c.model_argument for c in opened}
    flags = hook.cli_flags + (f" --model {quote(models.pop())}" if len(models) == 1 else "")
    others = "".join(f"\n  {c.folder} holds {', '.join(map(str, c.hooks))} of {c.model}" for c in opened if c.hooks)
    raise UsageError(
        f"No cache holds {hook}{f' of {given.describe()}' if given else ''}. "
        f"Create one with `sae harvest {flags}`.{others}"
    )


def find_by_fingerprint(fingerprint: object, folder: Path | str | None, root: Path | None = None) -> Cache | None:
    """Find the cache with this fingerprint: at its recorded place `folder` (path or address), or under `activations/`.

    Returns None if it is in neither place. A cache under `activations/` is preferred to one at an address. If the cache
    at the recorded place cannot be opened and there is no other cache, the error from opening it is raised.
    """
    damage: SaeError | None = None
    if is_url(folder):
        if found := next((cache for cache in open_caches(root) if cache.fingerprint == fingerprint), None):
            return found
        stored = open_place(folder)
        return stored if stored.fingerprint == fingerprint else None
    if folder is not None and (Path(folder) / "zarr.json").exists():
        match open_or_error(Path(folder)):
            case Cache() as cache if cache.fingerprint == fingerprint:
                return cache
            case SaeError() as error:
                damage = error
    found = next((cache for cache in open_caches(root) if cache.fingerprint == fingerprint), None)
    if found is None and damage is not None:
        raise damage
    return found


def model_folders(cache: Cache, key: str = "model") -> list[str]:
    """The recorded folders of a cache's model: first the one given to its harvest, then those from other caches.

    If `key` is "adapters": the recorded folders of the model's adapters.
    """
    record = cache.identity["model"]
    others = [
        other.folder
        for other in list_caches().values()
        if isinstance(other, Cache) and other.identity["model"].get("revision") == record["revision"]
    ]
    return [path for folder in (cache.folder, *others) for path in recorded_folders(folder, key)]


def harvest_command(model: str, hook: Hook, context: int | None = None) -> str:
    """The command that makes a cache for evaluating an SAE of this hook: half of the text is held out.

    `context`: the length in tokens of the contexts that the SAE was trained on, if known.
    """
    length = f" --context {context}" if context else ""
    return f"sae harvest --model {quote(model)} {hook.cli_flags}{length} --tokens 1M --held-out 0.5"
