"""The files of another library as a run folder of ours, checked before it is called by its name."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...cache.layout import Hook
from ...cache.reader import Cache, list_caches, model_name
from ...common.errors import UsageError
from ...common.files import digest_of, sae_home, write_json
from ..sae import SAE, save_sae
from .base import ForeignSAE, Format, detect_format
from .canonical import to_canonical
from .export import new_folder
from .safe_read import ForeignFolder
from .verify import Check, Progress, cached_rows, compare, no_progress, require_passed, synthetic_rows

FORMAT = 1


@dataclass
class ImportResult:
    """The run folder that was made, its SAE, and how it was checked."""

    folder: Path
    format: str
    sae: SAE
    check: Check
    cache: Path | None
    notes: list[str] = field(default_factory=list)


def import_sae(
    path: Path | str,
    *,
    model: str | None = None,
    layer: int | None = None,
    cache: Path | str | None = None,
    out: Path | str | None = None,
    name: str | None = None,
    origin: dict[str, Any] | None = None,
    progress: Progress = no_progress,
) -> ImportResult:
    """Make a run folder of an SAE of SAELens, Gemma Scope, dictionary_learning or sparsify; which, its files say.

    Model and layer are taken from the files where they say them. With a cache of that model and layer, given or found,
    `sae evaluate` works on it as on a run of ours. `origin`: where the files were before, of the Hub.

    Raises UsageError for what is refused or missing, DamagedError for files that contradict themselves.
    """
    if name and (Path(name).name != name or name.startswith(".") or not name.isprintable()):
        raise UsageError(f"--name {name!r} is no name of a folder. Give one word, such as gemma-scope-16k.")
    path = Path(path)
    folder = ForeignFolder(path.parent if path.is_file() else path)
    if not folder.path.is_dir():
        raise UsageError(f"There is no folder {path}. Give one with an SAE, or hf://owner/repo/folder.")
    kind = detect_format(folder)
    if path.is_file() and path.name not in kind.files:
        raise UsageError(
            f"{path} is not the file of an SAE; its folder holds one of {kind.name}: sae import {path.parent}"
        )
    found = kind.read(folder)
    hook, called = resolve_hook_and_model(found, folder.path, model, layer)
    source = find_cache(called, hook, found.sae.d_in, Path(cache) if cache is not None else None, found.notes)
    if source is not None:
        called = source.model
    plain = to_canonical(found.sae)
    rows = synthetic_rows(plain) if source is None else cached_rows(source, hook)
    check = compare(found.sae, plain, kind.reference(folder), rows, progress=progress)
    require_passed(check, f"The import of {path}")
    files = file_digests(kind, folder)
    variant = f"imported-{plain.kind}"
    digest = digest_of([files, called, *hook])[:6]
    title = name or f"{variant}-L{hook.layer:02d}-n{found.sae.d_sae}-{digest}"
    target = (Path(out) if out is not None else sae_home() / "runs") / title
    if (target / "sae.json").exists():
        raise UsageError(f"{target} is there already: sae evaluate {target}. For another, give --name.")
    about: dict[str, Any] = {
        "model": {"name": called, "revision": model_revision(source, found)},
        **hook._asdict(),
        "hook_name": hook.name,
        "variant": variant,
        "format": kind.name,
        "context": source.identity["context"] if source is not None else found.context,
    }
    if source is not None:
        about |= {"cache": str(source.folder.resolve()), "fingerprint": source.fingerprint}
    elsewhere = origin or {"path": str(folder.path.resolve())}
    record = {
        "format": FORMAT, "variant": variant, "layer": hook.layer, "site": hook.site, "d_in": found.sae.d_in,
        "d_sae": found.sae.d_sae, "imported_from": {"format": kind.name, **elsewhere, "sha256": files},
        "check": check.record(), "notes": found.notes, "metadata": found.metadata,
    }  # fmt: skip
    with new_folder(target) as temporary:
        write_json(temporary / "run.json", record)
        save_sae(found.sae, temporary, about)
    found.sae.origin = about
    return ImportResult(target, kind.name, found.sae, check, source.folder if source else None, found.notes)


def resolve_hook_and_model(found: ForeignSAE, path: Path, model: str | None, layer: int | None) -> tuple[Hook, str]:
    """The hook point and the model, asked for or said by the files. UsageError when neither."""
    hook = found.hook
    if layer is not None:
        if layer < 0:
            raise UsageError(f"--layer {layer} is no block: they count from 0.")
        if hook is not None and hook.layer != layer:
            found.notes.append(f"The files say {hook}; --layer {layer} was taken.")
        hook = Hook(layer, hook.site if hook is not None else "resid_post")
    called = model_name(model) or found.model
    if model is not None and found.model not in (None, called):
        found.notes.append(f"The files say {found.model}; --model {called} was taken.")
    lacking = [flag for flag, value in (("--layer 12", hook), ("--model google/gemma-2-2b", called)) if value is None]
    if hook is None or called is None:
        raise UsageError(
            f"The files of {path} do not say which {'model and layer' if len(lacking) > 1 else lacking[0].split()[0][2:]} they are of. "
            f"Add {' '.join(reversed(lacking))}."
        )
    return hook, called


def find_cache(model: str, hook: Hook, d_in: int, given: Path | None, notes: list[str]) -> Cache | None:
    """The cache that an SAE can be evaluated on: the one given, or the only one of its model and hook."""
    if given is not None:
        cache = Cache(given)
        width = cache.array(cache.require(*hook)).shape[1]
        if cache.model != model:
            raise UsageError(f"--cache {given} holds activations of {cache.model}, and the SAE is of {model}.")
        if width != d_in:
            raise UsageError(f"--cache {given} has rows of {width} numbers, and the SAE takes {d_in}.")
        return cache
    opened = [c for c in list_caches().values() if isinstance(c, Cache)]
    fitting = [c for c in opened if c.model == model and hook in c.hooks and c.array(hook.array).shape[1] == d_in]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        notes.append(
            f"{len(fitting)} caches hold {hook} of {model}; none was taken. --cache {fitting[0].folder} takes the first."
        )
    return None


def model_revision(cache: Cache | None, found: ForeignSAE) -> str | None:
    if cache is not None:
        return cache.identity["model"].get("revision")
    said = found.metadata.get("model_revision")
    return said if isinstance(said, str) else None


def file_digests(kind: Format, folder: ForeignFolder) -> dict[str, str]:
    """sha256 of every file that was read, by its name in the folder."""
    found = {}
    names = (*kind.files, *kind.above)
    for path in sorted(p for name in names for p in (folder.path / name, *folder.path.glob(f"*/{name}"))):
        if path.is_file() and path.resolve().is_relative_to(folder.path.resolve()):
            with path.open("rb") as file:
                found[path.relative_to(folder.path).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return found
