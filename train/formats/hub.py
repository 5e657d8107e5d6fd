"""SAEs on the Hugging Face Hub: hf://owner/repo[@revision]/folder, downloaded from one commit."""

import contextlib
import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from ...common.errors import DamagedError, SaeError, UnavailableError, UsageError, first_line
from ...common.formatting import format_bytes
from .release import PublishedSAE, RemoteFile, find_published

REPO_ID = re.compile(r"[A-Za-z0-9][\w.\-]*/[A-Za-z0-9][\w.\-]*")


class HubAddress(NamedTuple):
    """hf://owner/repo@revision/folder"""

    repo: str
    revision: str | None
    folder: str

    @classmethod
    def parse(cls, text: str) -> "HubAddress":
        parts = text.removeprefix("hf://").rstrip("/").split("/", 2)
        repo, _, revision = "/".join(parts[:2]).partition("@")
        folder = parts[2] if len(parts) > 2 else ""
        if not REPO_ID.fullmatch(repo) or ".." in PurePosixPath(folder).parts or folder.startswith("/"):
            raise UsageError(
                f"Invalid address {text}: expected hf://owner/repo/folder or hf://owner/repo@revision/folder."
            )
        return cls(repo, revision or None, folder)


@contextlib.contextmanager
def translate_hub_errors(repo: str) -> Iterator[None]:
    """Convert the client's exceptions to errors of this package that say what to do."""
    from huggingface_hub import errors

    try:
        yield
    except SaeError:
        raise
    except errors.GatedRepoError as error:
        raise UnavailableError(
            f"{repo} is gated: accept its license on https://huggingface.co/{repo}, then run `hf auth login`."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UnavailableError(
            f"{repo} was not found on the Hub. Check the name; if the repository is private, run `hf auth login`."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UsageError(f"{repo} has no such revision. Give one of its commits, branches or tags.") from error
    except Exception as error:  # the HTTP client's own exceptions are not always OSErrors
        raise UnavailableError(
            f"Could not reach the Hub for {repo}: {first_line(error).rstrip('.')}. "
            "Check the network and `hf auth login`."
        ) from error


@dataclass(frozen=True)
class Snapshot:
    """The files of a repository at one commit."""

    address: HubAddress
    commit: str
    files: list[RemoteFile]


@dataclass(frozen=True)
class RemoteSAE:
    """An SAE in a repository, at one commit."""

    repository: str
    commit: str
    sae: PublishedSAE

    @property
    def origin(self) -> dict[str, str]:
        """The source of the SAE, for run.json."""
        return {"repository": self.repository, "revision": self.commit, "path": self.sae.path or "."}


def list_repository(address: HubAddress) -> Snapshot:
    """Get the files of a repository and their sizes, with one request that also resolves the revision to a commit.

    Raises UnavailableError if the Hub cannot be reached or denies access, and UsageError if the revision does not exist
    or a file name points outside its folder.
    """
    from huggingface_hub import HfApi

    with translate_hub_errors(address.repo):
        info = HfApi().model_info(address.repo, revision=address.revision, files_metadata=True)
    files = [remote_file(sibling) for sibling in info.siblings or []]
    unsafe = [file.name for file in files if is_unsafe_name(file.name)]
    if unsafe:
        raise UsageError(f"Refused: {address.repo} contains {unsafe[0][:80]!r}, which points outside its folder.")
    return Snapshot(address, str(info.sha), files)


def find_remote_sae(address: HubAddress, layer: int | None = None) -> RemoteSAE:
    """Find the SAE at an address, using only the list of the repository's files: no file is downloaded.

    `layer` selects one of the SAEs in a folder. Raises the errors of `list_repository`, and UsageError if there is no
    SAE or more than one.
    """
    snapshot = list_repository(address)
    return RemoteSAE(address.repo, snapshot.commit, choose_sae(address, snapshot.files, layer))


def download(remote: RemoteSAE, root: Path, say: Callable[[str], None]) -> Path:
    """Download only the files of one SAE, from its commit. Returns its path below `root`.

    Before the download begins, `say` is called with the commit and the files.
    """
    from huggingface_hub import hf_hub_download

    say(f"commit   {remote.repository} at {remote.commit}")
    for file in remote.sae.files:
        say(f"file     {file.name} ({format_bytes(file.size)})")
    # The repository's name is kept in the local path, because for Gemma Scope it contains the model and the site.
    local_repo = Path(root, *remote.repository.split("/"))
    for file in remote.sae.files:
        with translate_hub_errors(remote.repository):
            hf_hub_download(remote.repository, file.name, revision=remote.commit, local_dir=local_repo)
        check_download(local_repo / file.name, file)
    return local_repo / remote.sae.path


def remote_file(sibling: Any) -> RemoteFile:
    lfs = getattr(sibling, "lfs", None)
    return RemoteFile(sibling.rfilename, sibling.size or 0, getattr(lfs, "sha256", None))


def choose_sae(address: HubAddress, files: list[RemoteFile], layer: int | None = None) -> PublishedSAE:
    """Choose the SAE at an address.

    This can be the address of an SAE's folder, of one of the SAE's files, or of a folder that contains one SAE.

    Raises UsageError if there is no SAE or more than one. `layer` selects one of the SAEs in a folder.
    """
    folder, all_saes = PurePosixPath(address.folder), find_published(files, address.repo)
    exact = [
        sae for sae in all_saes if folder in {PurePosixPath(sae.path), *(PurePosixPath(f.name) for f in sae.files)}
    ]
    found = exact or [sae for sae in all_saes if PurePosixPath(sae.path).is_relative_to(folder)]
    if layer is not None and len(found) > 1 and len({PurePosixPath(sae.files[0].name).parent for sae in found}) == 1:
        found = [sae for sae in found if sae.description.hook and sae.description.hook.layer == layer] or found
    location = f"{address.repo}/{address.folder}" if address.folder else address.repo
    if not found:
        raise UsageError(
            f"{location} contains no SAE of a known format. See https://huggingface.co/{address.repo}/tree/main"
        )
    if len(found) > 1:
        choices = "\n".join(f"  hf://{address.repo}/{sae.path}" for sae in found[:12])
        raise UsageError(
            f"{location} contains {len(found):,} SAEs. Choose one:\n{choices}"
            + (f"\nTo list all of them: sae import --list hf://{location}" if len(found) > 12 else "")
        )
    if found[0].refusal:
        raise UsageError(
            f"hf://{address.repo}/{found[0].path} has the file layout of {found[0].format.name}, but it is not an SAE "
            f"on a layer: {found[0].refusal}. `sae import --list hf://{address.repo}` shows what can be imported."
        )
    return found[0]


def is_unsafe_name(name: str) -> bool:
    """Whether a file name points outside its folder, or contains control characters that a terminal would interpret."""
    return not name.isprintable() or name.startswith("/") or "\\" in name or ".." in PurePosixPath(name).parts


def check_download(path: Path, file: RemoteFile) -> None:
    """Raise DamagedError unless a file has the size and checksum that the Hub declares."""
    if not path.is_file() or path.stat().st_size != file.size:
        raise DamagedError(
            f"The download of {file.name} is incomplete: expected {file.size:,} bytes. Run the same command again."
        )
    if file.sha256 is not None:
        with path.open("rb") as opened:
            if hashlib.file_digest(opened, "sha256").hexdigest() != file.sha256:
                raise DamagedError(
                    f"{file.name} does not have the checksum that the Hub declares. Run the same command again."
                )
