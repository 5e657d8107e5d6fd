"""SAEs from and to the Hub: hf://owner/repo[@revision]/folder, pinned to a commit; and a SAELens directory with a card."""

import contextlib
import hashlib
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from ...common.errors import DamagedError, Interrupted, SaeError, UnavailableError, UsageError
from ...common.files import atomic_write
from ...common.formatting import format_bytes
from ..sae import load_sae
from .base import Format
from .export import export_sae
from .import_ import ImportResult, import_sae
from .model_card import model_card
from .verify import Progress, no_progress

REPO_ID = re.compile(r"[A-Za-z0-9][\w.\-]*/[A-Za-z0-9][\w.\-]*")


class HubAddress(NamedTuple):
    """hf://owner/repo@revision/folder"""

    repo: str
    revision: str | None
    folder: str

    @classmethod
    def of(cls, text: str) -> "HubAddress":
        parts = text.removeprefix("hf://").rstrip("/").split("/", 2)
        name, _, revision = "/".join(parts[:2]).partition("@")
        folder = parts[2] if len(parts) > 2 else ""
        if not REPO_ID.fullmatch(name) or ".." in PurePosixPath(folder).parts or folder.startswith("/"):
            raise UsageError(
                f"{text} is no place on the Hub: write hf://owner/repo/folder, or hf://owner/repo@revision/folder."
            )
        return cls(name, revision or None, folder)


class RemoteFile(NamedTuple):
    name: str
    size: int
    sha256: str | None


@contextlib.contextmanager
def translate_hub_errors(what: str) -> Iterator[None]:
    """What the Hub can answer, as sentences."""
    from huggingface_hub import errors

    try:
        yield
    except SaeError:
        raise
    except errors.GatedRepoError as error:
        raise UnavailableError(
            f"{what} is gated: accept its licence on https://huggingface.co, then `hf auth login`."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UnavailableError(
            f"There is no {what} on the Hub that you can see. Check the name; if it is private, run `hf auth login`."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UsageError(f"{what} has no such revision. Give a commit, a branch or a tag of it.") from error
    except Exception as error:  # of whichever client of HTTP it uses
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UnavailableError(
            f"The Hub could not be reached for {what}: {first.rstrip('.')}. Check the network and `hf auth login`."
        ) from error


def import_from_hub(text: str, *, say: Callable[[str], None] = lambda line: None, **options: Any) -> ImportResult:
    """`import_sae` of a folder on the Hub. Only the files that its format needs are fetched, from one commit."""
    from huggingface_hub import HfApi, hf_hub_download

    address = HubAddress.of(text)
    with translate_hub_errors(address.repo):
        info = HfApi().model_info(address.repo, revision=address.revision, files_metadata=True)
    files = select_files(address, [remote_file(sibling) for sibling in info.siblings or []])
    say(f"commit   {address.repo} at {info.sha}")
    for file in files:
        say(f"file     {file.name} ({format_bytes(file.size)})")
    with tempfile.TemporaryDirectory() as place:
        root = Path(place, *address.repo.split("/"))
        for file in files:
            with translate_hub_errors(address.repo):
                hf_hub_download(address.repo, file.name, revision=info.sha, local_dir=root)
            check_download(root / file.name, file)
        folder = Path(files[0].name).parent
        origin = {"repository": address.repo, "revision": info.sha, "path": folder.as_posix()}
        return import_sae(root / folder, origin=origin, **options)


def remote_file(sibling: Any) -> RemoteFile:
    lfs = getattr(sibling, "lfs", None)
    return RemoteFile(sibling.rfilename, sibling.size or 0, getattr(lfs, "sha256", None))


def select_files(address: HubAddress, everything: list[RemoteFile]) -> list[RemoteFile]:
    """The files of the SAE in a folder, its weights first. UsageError when there is none, or several."""
    wrong = [file.name for file in everything if is_unsafe_name(file.name)]
    if wrong:
        raise UsageError(f"Refused: {address.repo} holds {wrong[0][:80]!r}, which leads out of its folder.")
    folder = PurePosixPath(address.folder)
    if folder.name in {name for kind in Format.registry.values() for name in kind.files}:
        folder = folder.parent
    for kind in Format.registry.values():
        found = [file for file in everything if PurePosixPath(file.name).name == kind.files[0]]
        if here := [file for file in found if PurePosixPath(file.name).parent == folder]:
            beside = [folder / name for name in kind.files[1:]] + [folder.parent / name for name in kind.above]
            return here + [file for file in everything if PurePosixPath(file.name) in beside]
    inside = sorted(
        str(PurePosixPath(file.name).parent)
        for kind in Format.registry.values()
        for file in everything
        if PurePosixPath(file.name).name == kind.files[0] and PurePosixPath(file.name).is_relative_to(folder)
    )
    where = f" in {address.folder}" if address.folder else ""
    if len(inside) == 1:
        return select_files(address._replace(folder=inside[0]), everything)
    if inside:
        shown = "\n".join(f"  hf://{address.repo}/{name}" for name in inside[:12])
        raise UsageError(f"{address.repo} holds {len(inside):,} SAEs{where}. Name one:\n{shown}")
    raise UsageError(
        f"{address.repo} holds no SAE of a known format{where}. Look at https://huggingface.co/{address.repo}/tree/main"
    )


def is_unsafe_name(name: str) -> bool:
    """Whether a name leads out of its folder, or holds what a terminal would obey."""
    return not name.isprintable() or name.startswith("/") or "\\" in name or ".." in PurePosixPath(name).parts


def check_download(path: Path, file: RemoteFile) -> None:
    """DamagedError unless a file has the bytes that the Hub promises."""
    if not path.is_file() or path.stat().st_size != file.size:
        raise DamagedError(
            f"{file.name} did not come whole: {file.size:,} bytes were promised. Run the same command again."
        )
    if file.sha256 is not None:
        with path.open("rb") as opened:
            if hashlib.file_digest(opened, "sha256").hexdigest() != file.sha256:
                raise DamagedError(
                    f"{file.name} came with another checksum than the Hub promises. Run the same command again."
                )


def upload_sae(
    run: Path, repo: str, *, private: bool = False, approximate: str | None = None, cache: Path | None = None,
    agree: Callable[[str], bool], say: Callable[[str], None] = lambda line: None, progress: Progress = no_progress,
) -> str:  # fmt: skip
    """Upload a run as a SAELens directory with a model card; returns its address. Nothing leaves before `agree` says so."""
    from huggingface_hub import HfApi

    if not REPO_ID.fullmatch(repo):
        raise UsageError(f"--repo {repo} is no name of a repository: write owner/name.")
    model = load_sae(run).origin.get("model", {}).get("name")
    base = model if isinstance(model, str) and REPO_ID.fullmatch(model) else None
    with tempfile.TemporaryDirectory() as place:
        made = export_sae(run, "saelens", Path(place) / "sae", approximate=approximate, cache=cache, progress=progress)
        atomic_write(made.folder / "README.md", model_card(made, run, repo, base).encode())
        for note in made.notes:
            say(f"note     {note}")
        say(f"checked  {made.check}")
        for path in made.files:
            say(f"file     {path.name} ({path.stat().st_size:,} bytes)")
        kind = "private" if private else "public"
        if not agree(f"Upload these {len(made.files)} files to https://huggingface.co/{repo}, {kind} if it is new?"):
            raise Interrupted("Nothing left this machine.")
        api = HfApi()
        with translate_hub_errors(repo):
            api.create_repo(repo, private=private, exist_ok=True)
            done = api.upload_folder(repo_id=repo, folder_path=made.folder, commit_message=f"SAE {run.resolve().name}")
        return f"https://huggingface.co/{repo} at {getattr(done, 'oid', 'main')}"
