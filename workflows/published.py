"""Evaluate a published SAE in one command: turn the arguments of `sae evaluate` into run folders.

A run folder is used as it is. hf://owner/repo/folder and folders with another library's files are imported into runs/.
The next time, the import is found in runs/ by the commit or by the checksums of the files.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..cache.hooks import RESIDUAL_SITES, Hook
from ..cache.models import GivenModel
from ..common.addresses import disk_path
from ..common.errors import SaeError, UnavailableError, UsageError, warn_left_out
from ..common.files import digest_of, sae_home
from ..common.formatting import format_bytes
from ..common.remote_code import from_pretrained
from ..harvest import mini
from ..train.formats.base import Format
from ..train.formats.hub import REPO_ID, HubAddress, RemoteSAE, find_remote_sae
from ..train.formats.import_ import ImportConfig, ImportResult, file_digests, import_files, import_remote, open_folder
from ..train.formats.verify import Progress, no_progress
from ..train.sae import read_run_record, read_sae_record

COMMIT = re.compile(r"[0-9a-f]{40}")

Say = Callable[[str], None]


@dataclass(frozen=True)
class PublishedConfig:
    """How to import published SAEs, which are not run folders yet. None for `model` or `layer` means the value from the
    SAE's files.
    """

    model: str | None = None
    layer: int | None = None
    cache: str | Path | None = None
    dry_run: bool = False  # only report what would be imported


@dataclass
class RunFolders:
    """The run folders to evaluate, and the arguments that could not be turned into run folders.

    Attributes:
        refused: argument -> error.
        pending: addresses that a dry run did not import.
    """

    folders: list[Path] = field(default_factory=list)
    refused: dict[str, SaeError] = field(default_factory=dict)
    pending: list[str] = field(default_factory=list)

    def raise_refusals(self) -> None:
        """Raise all refusals as one error, with their exit code if all have the same exit code."""
        errors = list(self.refused.values())
        if errors:
            kind = type(errors[0]) if len({error.exit_code for error in errors}) == 1 else SaeError
            raise kind("\n".join(dict.fromkeys(map(str, errors))))


def find_or_import(
    texts: Sequence[str], config: PublishedConfig, say: Say = lambda line: None, progress: Progress = no_progress
) -> RunFolders:
    """The run folder for each argument: the folder itself, or the run imported from it now or earlier.

    If there is no run folder for an argument and none can be made, the argument and its error are put into
    `RunFolders.refused`. The other arguments are still processed.

    Args:
        texts: run folders, hf://owner/repo[@revision]/folder, or folders of another library's files.
        say: called with lines about what is imported.
        progress: called with (rows compared, rows in all).
    """
    found = RunFolders()
    for text in dict.fromkeys(texts):
        try:
            if text.startswith("hf://"):
                folder = run_of_address(text, config, say, progress)
            elif not text or not Path(text).exists():
                if not text.startswith("http"):
                    disk_path(text)  # raises for an address in an object store
                raise UsageError(f"There is no run folder {text!r}. {advice_on_address(text)}")
            elif is_foreign(Path(text)):
                folder = run_of_files(Path(text), config, say, progress)
            else:
                folder = Path(text)
        except SaeError as error:
            found.refused[text] = error
            continue
        if folder is None:
            found.pending.append(text)
        else:
            found.folders.append(folder)
    return found


def advice_on_address(text: str) -> str:
    """Advice on an argument that may be intended as an address on the Hub."""
    address = re.sub(r"^(https?://)?(www\.)?(huggingface\.co|hf\.co)/|^hf:/*", "", text)
    owner, _, rest = address.partition("/")
    repo, _, folder = rest.partition("/")
    if not REPO_ID.fullmatch(f"{owner}/{repo}") or Path(owner).exists():
        return "Train one with `sae train`, or give hf://owner/repo/folder."
    if tree := re.match(r"(?:tree|blob)/([^/]+)/?(.*)", folder):
        repo, folder = (repo if tree[1] == "main" else f"{repo}@{tree[1]}"), tree[2]
    return f"For an SAE on the Hub, give hf://{owner}/{repo}/{folder or 'folder'}."


def is_foreign(path: Path) -> bool:
    """Whether a path is an SAE in another library's files rather than a run folder."""
    folder = path.parent if path.is_file() else path
    if (folder / "sae.json").exists() or (folder / "run.json").exists():
        return False
    try:
        open_folder(path)
    except UsageError:  # a folder with several SAEs is refused when it is opened again
        return path.is_dir() and any(fmt.is_weights(p.name) for p in path.glob("*") for fmt in Format.registry.values())
    return True


# --- from the Hub -----------------------------------------------------------------------------------------------------


def run_of_address(text: str, config: PublishedConfig, say: Say, progress: Progress) -> Path | None:
    """The run folder for an address on the Hub. In a dry run, None if the SAE would have to be imported."""
    address = HubAddress.parse(text)
    if address.revision and COMMIT.fullmatch(address.revision):  # nothing to resolve, so no need to ask the Hub
        for folder, source in imported_runs(config):
            if is_from(source, address) and source.get("revision") == address.revision:
                return reuse(folder, text, address.revision, say)
    try:
        remote = find_remote_sae(address, config.layer)
    except UnavailableError as error:
        for folder, source in imported_runs(config):
            if is_from(source, address) and address.revision is None:
                say(f"note     {error} Using the SAE that was imported earlier.")
                return reuse(folder, text, str(source.get("revision")), say)
        raise
    for folder, source in imported_runs(config):
        if {key: source.get(key) for key in remote.origin} == remote.origin:
            return reuse(folder, text, remote.commit, say)
    if config.dry_run:
        say(f"import   {text} at {remote.commit[:12]}: {format_bytes(remote.sae.size)} to download")
        return None
    return announce(import_remote(remote, import_config(config, free_name(remote, config)), say, progress), say)


def is_from(source: dict[str, Any], address: HubAddress) -> bool:
    """Whether a run was imported from exactly this address."""
    return (source.get("repository"), source.get("path")) == (address.repo, address.folder or ".")


def free_name(remote: RemoteSAE, config: PublishedConfig) -> str:
    """`gemma-scope-2-1b-pt--resid_post--layer_12_width_16k_l0_medium`; a digest is added if this name is taken."""
    words = [remote.repository.split("/")[1], *remote.sae.path.split("/")]
    name = "--".join(re.sub(r"[^\w.\-]", "_", word) for word in words if word)[:120].strip("-.")
    if not (sae_home() / "runs" / name).exists():
        return name
    return f"{name}--{digest_of([remote.commit, config.model, config.layer])[:6]}"


# --- from a folder ----------------------------------------------------------------------------------------------------


def run_of_files(path: Path, config: PublishedConfig, say: Say, progress: Progress) -> Path | None:
    """The run folder for another library's files. In a dry run, None if the files would have to be imported."""
    folder, fmt = open_folder(path, config.layer)
    sha256 = file_digests(fmt, folder)
    for run, source in imported_runs(config):
        if source.get("sha256") == sha256 and source.get("format") == fmt.name:
            say(f"import   {path} is unchanged since it was imported: {run}")
            return run
    if config.dry_run:
        say(f"import   {path} ({fmt.name})")
        return None
    return announce(import_files(path, import_config(config), progress=progress), say)


# --- runs that were imported before -----------------------------------------------------------------------------------


Origin = dict[str, Any]  # `origin` of sae.json
Source = dict[str, Any]  # `imported_from` of run.json


def imported_runs(config: PublishedConfig) -> Iterator[tuple[Path, Source]]:
    """The imported runs in runs/ that match a configuration, newest first, each with its source."""
    fits = fitting(config)
    records = [path for path in (sae_home() / "runs").glob("*/run.json") if (path.parent / "sae.json").exists()]
    for path in sorted(records, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            run, sae = read_run_record(path.parent), read_sae_record(path.parent)
        except SaeError as error:
            warn_left_out(path.parent, error)
            continue
        if run is None or "imported_from" not in run:
            continue
        source, origin = {**run["imported_from"]}, {**sae.get("origin", {})}
        if fits(origin, source):
            yield path.parent, source


def fitting(config: PublishedConfig) -> Callable[[Origin, Source], bool]:
    """A function that tells whether an imported SAE has the requested model and layer. If no model is requested, the
    SAE must have been imported with the model that its files name; the same holds for the layer.
    """
    given = GivenModel(config.model) if config.model is not None else None

    def fits(origin: Origin, source: Source) -> bool:
        overrides = source.get("overrides") or {}
        right_layer = "layer" not in overrides if config.layer is None else origin.get("layer") == config.layer
        right_model = "model" not in overrides if given is None else given.is_base_of(origin.get("model") or {})
        return right_layer and right_model

    return fits


def reuse(folder: Path, text: str, commit: str, say: Say) -> Path:
    say(f"import   {text} at {commit[:12]} was imported earlier: {folder}")
    return folder


def import_config(config: PublishedConfig, name: str | None = None) -> ImportConfig:
    return ImportConfig(config.model, config.layer, config.cache, True, name=name, check_hook=check_hook)


def announce(imported: ImportResult, say: Say) -> Path:
    """Report what an import found. Returns the run folder."""
    for note in imported.notes:
        say(f"note     {note}")
    say(f"checked  {imported.check}")
    say(f"import   {imported.folder}")
    return imported.folder


# --- the model on this machine ----------------------------------------------------------------------------------------


def check_hook(model: str, hook: Hook, d_in: int) -> None:
    """Raise UsageError if a model's config on this machine shows that the layer does not exist or has another width.

    If the config is not on this machine, nothing is checked.
    """
    config = local_model_config(model)
    layers, width = (getattr(config, name, None) for name in ("num_hidden_layers", "hidden_size"))
    if isinstance(layers, int) and hook.layer >= layers:
        raise UsageError(
            f"The SAE belongs to layer {hook.layer}, but {model} has the layers 0 to {layers - 1}. Give another "
            "--layer, or the SAE's own model with --model."
        )
    if isinstance(width, int) and hook.site in RESIDUAL_SITES and d_in != width:
        raise UsageError(
            f"The SAE expects activations of width {d_in}, but {model} has width {width} at {hook}. Give the SAE's own "
            "model with --model."
        )


def local_model_config(model: str) -> Any | None:
    """The transformers configuration of a model's text part; None if it is not on this machine. Uses no network."""
    from transformers import AutoConfig

    location = str(mini.WEIGHTS) if model == mini.NAME else model
    try:
        return from_pretrained(AutoConfig, location, local_files_only=True).get_text_config()
    except Exception:  # loading the model will report the error
        return None
