"""Import another library's files as a run folder. The SAE is verified before the folder gets its final name."""

import hashlib
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...cache.catalog import caches_that, open_caches
from ...cache.hooks import Hook
from ...cache.models import GivenModel, ModelRecord, model_label, same_model
from ...cache.object_store import is_url
from ...cache.opening import open_place
from ...cache.reader import Cache
from ...common.addresses import disk_path
from ...common.errors import UsageError
from ...common.files import digest_of, sae_home
from ...common.schemas import RUN_RECORD
from ..sae import SAE, save_sae
from .base import ForeignSAE, Format, detect_format
from .canonical import to_canonical
from .export import new_folder
from .hub import HubAddress, RemoteSAE, download, find_remote_sae
from .safe_read import ForeignFolder
from .verify import (
    Check,
    Progress,
    cached_rows,
    check_orientation,
    compare,
    no_progress,
    require_passed,
    synthetic_rows,
)

FORMAT = 1  # of run.json

HookCheck = Callable[[str, Hook, int], None]
"""Raises UsageError if the model of this name has no such hook point, or if its activations have another width."""


@dataclass(frozen=True)
class ImportConfig:
    """How to import an SAE. A field that is None takes the value in the files, or the default of `import_sae`."""

    model: str | None = None
    layer: int | None = None
    cache: str | Path | None = None
    cache_if_fits: bool = False  # `cache` is only for evaluation; ignored if it does not contain the SAE's input
    out: Path | None = None
    name: str | None = None
    check_hook: HookCheck = lambda model, hook, d_in: None

    @property
    def runs(self) -> Path:
        return self.out or sae_home() / "runs"


@dataclass
class ImportResult:
    """The result of an import: the run folder, its SAE and the verification.

    The result can be used as a path to the folder.
    """

    folder: Path
    format: str
    sae: SAE
    check: Check
    cache: str | Path | None  # the cache that the run records
    candidates: list[Path]  # the caches that fit, if there are several and none was chosen
    notes: list[str] = field(default_factory=list)

    def __fspath__(self) -> str:
        return os.fspath(self.folder)


def import_sae(
    path: str | os.PathLike[str],
    *,
    model: str | None = None,
    layer: int | None = None,
    cache: str | os.PathLike[str] | None = None,
    out: str | os.PathLike[str] | None = None,
    name: str | None = None,
    check_hook: HookCheck = lambda model, hook, d_in: None,
    say: Callable[[str], None] = lambda line: None,
    progress: Progress = no_progress,
) -> ImportResult:
    """Make a run folder from files of SAELens, Gemma Scope 1 and 2, Qwen-Scope, dictionary_learning or sparsify.

    The format is detected from the files, and no code in them is run. Latents and reconstructions computed with the
    files' own tensors are compared with those of the imported SAE, as in `export_sae`. If there is a cache of the
    SAE's model and layer, `sae evaluate` can evaluate the run folder like any other run folder.

    Args:
        path: a folder, the weights file in a folder, or hf://owner/repo[@revision]/folder.
        model: id on the Hub, or a folder. Required if the files record no model; otherwise overrides the recorded one.
        layer: zero-based block. Required if the files record no layer; otherwise overrides the recorded one. In a
            folder with SAEs of several layers, selects the SAE of this layer.
        cache: a cache of the model, used for verification and evaluation. Default: the only matching cache, or
            none.
        out: the folder in which the run folder is created. Default: runs/.
        name: name of the run folder. Default: imported-<activation>-L<layer>-n<d_sae>-<digest>.
        check_hook: called with the model's name, the hook point and d_in before anything is written; it may raise
            UsageError to reject the import.
        say: called with lines about a download.
        progress: called with (rows compared, rows in all).

    Returns:
        An `ImportResult` with `.sae`, `.folder`, `.check` (the comparison) and `.notes`.

    Raises:
        UsageError: the files are rejected, unsupported or missing, or the model or layer is not known.
        DamagedError: the files are truncated or contradict each other.
        UnavailableError: the Hub cannot be reached or denies access.
        SaeError: the verification failed; nothing is left behind.

    Examples:
        >>> imported = sae.import_sae("hf://google/gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82")
        >>> f = imported.sae.encode(x)  # (..., 2304) -> (..., 16384)
        >>> sae.evaluate_saes([imported.folder])
    """
    if name and (Path(name).name != name or name.startswith(".") or not name.isprintable()):
        raise UsageError(f"Invalid --name {name!r}: expected the name of one folder, such as gemma-scope-16k.")
    config = ImportConfig(
        model=model,
        layer=layer,
        cache=disk_path(cache) if cache is not None else None,
        out=disk_path(out) if out is not None else None,
        name=name,
        check_hook=check_hook,
    )
    if (address := os.fspath(path)).startswith("hf://"):
        return import_remote(find_remote_sae(HubAddress.parse(address), layer), config, say, progress)
    if address.startswith("http"):
        raise UsageError(f"No such folder: {address}. Give a folder with an SAE, or hf://owner/repo/folder.")
    return import_files(disk_path(path), config, progress=progress)


def import_remote(
    remote: RemoteSAE,
    config: ImportConfig,
    say: Callable[[str], None] = lambda line: None,
    progress: Progress = no_progress,
) -> ImportResult:
    """Download an SAE into a temporary folder and import it. Arguments and errors are those of `import_sae`."""
    with tempfile.TemporaryDirectory() as temporary:
        return import_files(download(remote, Path(temporary), say), config, remote.origin, progress)


def import_files(
    path: Path, config: ImportConfig, hub_origin: dict[str, str] | None = None, progress: Progress = no_progress
) -> ImportResult:
    """`import_sae` for local files. `hub_origin` is the place on the Hub from which the files were downloaded."""
    folder, fmt = open_folder(path, config.layer)
    foreign = fmt.read(folder)
    file_hook, file_model = foreign.hook, foreign.model
    hook, used_model = resolve_hook_and_model(foreign, folder.path, config.model, config.layer)
    hook = hook_in_caches(used_model, hook, config.cache)
    config.check_hook(config.model or model_label(used_model), hook, foreign.sae.d_in)
    if config.cache is not None and config.cache_if_fits:
        given = open_place(config.cache)
        cache = given if holds(given, used_model, hook, foreign.sae.d_in) else None
        candidates: list[Path] = []
    else:
        cache, candidates = find_cache(used_model, hook, foreign.sae.d_in, config.cache, foreign.notes)
    if cache is not None:
        used_model = cache.identity["model"]
    canonical = to_canonical(foreign.sae)
    rows = synthetic_rows(canonical) if cache is None else cached_rows(cache, hook)
    check = compare(foreign.sae, canonical, fmt.reference(folder), rows, progress=progress)
    require_passed(check, f"The import of {path if hub_origin is None else hub_origin['repository']}")
    if canonical.d_in == canonical.d_sae:
        foreign.notes += check_orientation(foreign.sae, None if cache is None else rows, folder.path)
    sha256 = file_digests(fmt, folder)
    variant = f"imported-{canonical.activation}"
    digest = digest_of([sha256, used_model["name"], *hook])[:6]
    target = config.runs / (config.name or f"{variant}-L{hook.layer:02d}-n{foreign.sae.d_sae}-{digest}")
    if (target / "sae.json").exists():
        raise UsageError(f"{target} already exists: run `sae evaluate {target}`, or give another name with --name.")
    source: dict[str, Any] = {**(hub_origin or {"path": str(folder.path.resolve())})}
    if overrides := overrides_of(config, file_hook, file_model, used_model):
        source["overrides"] = overrides
    record = {
        "format": FORMAT,
        "variant": variant,
        "layer": hook.layer,
        "site": hook.site,
        "d_in": foreign.sae.d_in,
        "d_sae": foreign.sae.d_sae,
        "imported_from": {"format": fmt.name, **source, "sha256": sha256},
        "check": check.record(),
        "notes": foreign.notes,
        "metadata": foreign.metadata,
    }
    foreign.sae.origin = sae_origin(foreign, fmt, hook, used_model, cache, variant)
    with new_folder(target) as temporary:
        RUN_RECORD.write(temporary / "run.json", record)
        save_sae(foreign.sae, temporary, foreign.sae.origin)
    cache_folder = None if cache is None else cache.place if is_url(cache.place) else cache.folder
    return ImportResult(target, fmt.name, foreign.sae, check, cache_folder, candidates, foreign.notes)


def overrides_of(config: ImportConfig, hook: Hook | None, model: str | None, used: ModelRecord) -> dict[str, Any]:
    """The given layer and model, if they differ from the `hook` and `model` of the files."""
    overrides: dict[str, Any] = {}
    if config.layer is not None and (hook is None or hook.layer != config.layer):
        overrides["layer"] = config.layer
    if config.model is not None and config.model != model:
        overrides["model"] = model_label(used)
    return overrides


def open_folder(path: Path, layer: int | None = None) -> tuple[ForeignFolder, Format]:
    """The folder and the format of an SAE, given the path of the folder or of a file in it.

    `layer` selects one of the SAEs if a folder contains several layers.
    """
    formats = Format.registry.values()
    is_weights = path.is_file() and any(fmt.is_weights(path.name) for fmt in formats)
    folder = ForeignFolder(path.parent if path.is_file() else path, path.name if is_weights else None)
    if not folder.path.is_dir():
        raise UsageError(f"No such folder: {path}. Give a folder with an SAE, or hf://owner/repo/folder.")
    if path.is_file() and not is_weights and not any(path.name in fmt.files for fmt in formats):
        raise UsageError(
            f"{path} is not a file of a known format. Give a folder with an SAE, or hf://owner/repo/folder."
        )
    fmt = detect_format(folder)
    if path.is_file() and not fmt.is_weights(path.name) and path.name not in fmt.files:
        raise UsageError(
            f"{path.parent} contains a {fmt.name} SAE, but {path.name} is not one of its files. To import the SAE: "
            f"sae import {path.parent}"
        )
    return fmt.select(folder, layer), fmt


def resolve_hook_and_model(
    foreign: ForeignSAE, folder: Path, model: str | None, layer: int | None
) -> tuple[Hook, ModelRecord]:
    """The hook point and the record of the model: those that are given, otherwise those in the files.

    Raises UsageError if the hook point or the model is unknown.
    """
    hook = foreign.hook
    if layer is not None:
        if layer < 0:
            raise UsageError(f"Invalid --layer {layer}: expected a block number, counted from 0.")
        if hook is not None and hook.layer != layer:
            foreign.notes.append(f"The files say {hook}; --layer {layer} overrides it.")
        hook = Hook(layer, hook.site if hook is not None else "resid_post")
    revision = foreign.metadata.get("model_revision")
    recorded = {"name": foreign.model, "revision": revision if isinstance(revision, str) else None}
    given = GivenModel(model) if model is not None else None
    if given is not None and foreign.model is not None and not given.is_base_of(recorded):
        foreign.notes.append(f"The files say {foreign.model}; --model {model} overrides it.")
    if given is not None and (given.digests or foreign.model != model):
        recorded = given.record()
    if hook is None or recorded["name"] is None:
        missing = {"model": "--model google/gemma-2-2b"} if recorded["name"] is None else {}
        missing |= {"layer": "--layer 12"} if hook is None else {}
        raise UsageError(
            f"The files in {folder} do not record their {' and '.join(missing)}. Add {' '.join(missing.values())}."
        )
    return hook, recorded


def hook_in_caches(model: ModelRecord, hook: Hook, cache_folder: str | Path | None) -> Hook:
    """The hook by which a model's caches name these activations.

    It can differ from `hook`, because a block's output is also the next block's input.

    If `cache_folder` is given, only that cache is considered.
    """
    if hook.site != "resid_post":
        return hook
    caches = [open_place(cache_folder)] if cache_folder is not None else open_caches()
    held = [hook for cache in caches if same_model(cache.identity["model"], model) for hook in cache.hooks]
    as_input = Hook(hook.layer + 1, "resid_pre")
    return as_input if as_input in held and hook not in held else hook


def find_cache(
    model: ModelRecord, hook: Hook, d_in: int, cache_folder: str | Path | None, notes: list[str]
) -> tuple[Cache | None, list[Path]]:
    """The cache for evaluating an SAE: the given one, or the only cache of its model and hook, or None.

    Also returns the folders of all matching caches, if there are several.
    """
    if cache_folder is not None:
        cache = open_place(cache_folder)
        width = cache.array(cache.require_array(*hook)).shape[1]
        if not same_model(cache.identity["model"], model):
            raise UsageError(
                f"--cache {cache_folder} has activations of {cache.model}, but the SAE is for {model_label(model)}."
            )
        if width != d_in:
            raise UsageError(f"--cache {cache_folder} has rows of width {width}, but the SAE has d_in {d_in}.")
        return cache, []
    fitting = caches_that(lambda cache: holds(cache, model, hook, d_in), open_caches())
    if len(fitting) == 1:
        return fitting[0], []
    if fitting:
        notes.append(
            f"{len(fitting)} caches contain {hook} of {model_label(model)}, so none was chosen. To use the first: "
            f"--cache {fitting[0].folder}"
        )
    return None, [cache.folder for cache in fitting]


def holds(cache: Cache, model: ModelRecord, hook: Hook, d_in: int) -> bool:
    """Whether a cache contains activations on which an SAE can be verified."""
    fits = same_model(cache.identity["model"], model) and hook in cache.hooks
    return fits and cache.array(hook.array).shape[1] == d_in


def sae_origin(
    foreign: ForeignSAE, fmt: Format, hook: Hook, model: ModelRecord, cache: Cache | None, variant: str
) -> dict[str, Any]:
    """The origin that sae.json records, with the keys that training writes."""
    origin: dict[str, Any] = {
        "model": dict(model),
        **hook._asdict(),
        "hook_name": hook.name,
        "variant": variant,
        "format": fmt.name,
        "context": foreign.context or (cache.identity["context"] if cache is not None else None),
    }
    if foreign.prepend_bos is not None:
        origin["prepend_bos"] = foreign.prepend_bos
    if foreign.bos_token is not None:
        origin["bos_token"] = foreign.bos_token
    if foreign.dataset is not None:
        origin["dataset"] = foreign.dataset
    if cache is not None:
        origin |= {
            "cache": cache.place if is_url(cache.place) else str(cache.folder.resolve()),
            "fingerprint": cache.fingerprint,
        }
    return origin


def file_digests(fmt: Format, folder: ForeignFolder) -> dict[str, str]:
    """The path in the folder of every file that was read -> its SHA-256."""
    digests = {}
    names = (fmt.weights_name(folder), *fmt.files[1:], *fmt.parent_files)
    for path in sorted(p for name in names for p in (folder.path / name, *folder.path.glob(f"*/{name}"))):
        if path.is_file() and path.resolve().is_relative_to(folder.path.resolve()):
            with path.open("rb") as file:
                digests[path.relative_to(folder.path).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests
