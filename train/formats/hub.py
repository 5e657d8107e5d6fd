"""SAEs on the Hugging Face Hub: hf://owner/repo[@revision]/folder, downloaded from one commit."""

import contextlib
import hashlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from ...common.errors import DamagedError, SaeError, UnavailableError, UsageError
from ...common.formatting import format_bytes
from .base import Format

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


class RemoteFile(NamedTuple):
    """A file of a repository, with the size and checksum that the Hub declares."""

    name: str
    size: int
    sha256: str | None


@contextlib.contextmanager
def translate_hub_errors(repo: str) -> Iterator[None]:
    """Turn the client's exceptions into errors of this package that say what to do."""
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
            f"{repo} was not found on the Hub. Check the name; if it is private, run `hf auth login`."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UsageError(f"{repo} has no such revision. Give one of its commits, branches or tags.") from error
    except Exception as error:  # the HTTP client's own exceptions are not always OSErrors
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UnavailableError(
            f"Could not reach the Hub for {repo}: {first_line.rstrip('.')}. Check the network and `hf auth login`."
        ) from error


def download_sae(address: str, root: Path, say: Callable[[str], None]) -> tuple[Path, dict[str, Any]]:
    """Download the files of one SAE, and no others, from one commit.

    Returns its folder below `root`, and its origin: repository, revision and path. `say` is told the commit and the
    files before the download begins.
    """
    from huggingface_hub import HfApi, hf_hub_download

    repo, revision, _ = parsed = HubAddress.parse(address)
    with translate_hub_errors(repo):
        info = HfApi().model_info(repo, revision=revision, files_metadata=True)
    files = select_files(parsed, [remote_file(sibling) for sibling in info.siblings or []])
    say(f"commit   {repo} at {info.sha}")
    for file in files:
        say(f"file     {file.name} ({format_bytes(file.size)})")
    # The repository's name stays part of the local path: Gemma Scope's names model and site.
    local_repo = Path(root, *repo.split("/"))
    for file in files:
        with translate_hub_errors(repo):
            hf_hub_download(repo, file.name, revision=info.sha, local_dir=local_repo)
        check_download(local_repo / file.name, file)
    folder = Path(files[0].name).parent
    return local_repo / folder, {"repository": repo, "revision": info.sha, "path": folder.as_posix()}


def remote_file(sibling: Any) -> RemoteFile:
    lfs = getattr(sibling, "lfs", None)
    return RemoteFile(sibling.rfilename, sibling.size or 0, getattr(lfs, "sha256", None))


def select_files(address: HubAddress, files: list[RemoteFile]) -> list[RemoteFile]:
    """The files of the SAE at an address, weights first. UsageError if there is none, or more than one."""
    unsafe = [file.name for file in files if is_unsafe_name(file.name)]
    if unsafe:
        raise UsageError(f"Refused: {address.repo} holds {unsafe[0][:80]!r}, which leads out of its folder.")
    folder = PurePosixPath(address.folder)
    if folder.name in {name for fmt in Format.registry.values() for name in fmt.files}:
        folder = folder.parent
    for fmt in Format.registry.values():
        weights = [file for file in weights_files(files, fmt) if PurePosixPath(file.name).parent == folder]
        if weights:
            others = [folder / name for name in fmt.files[1:]] + [folder.parent / name for name in fmt.parent_files]
            return weights + [file for file in files if PurePosixPath(file.name) in others]
    below = sorted(
        str(PurePosixPath(file.name).parent)
        for fmt in Format.registry.values()
        for file in weights_files(files, fmt)
        if PurePosixPath(file.name).is_relative_to(folder)
    )
    if len(below) == 1:
        return select_files(address._replace(folder=below[0]), files)
    location = f"{address.repo}/{address.folder}" if address.folder else address.repo
    if below:
        choices = "\n".join(f"  hf://{address.repo}/{name}" for name in below[:12])
        raise UsageError(f"{location} holds {len(below):,} SAEs. Choose one:\n{choices}")
    raise UsageError(f"{location} holds no SAE of a known format. See https://huggingface.co/{address.repo}/tree/main")


def weights_files(files: list[RemoteFile], fmt: Format) -> list[RemoteFile]:
    return [file for file in files if PurePosixPath(file.name).name == fmt.files[0]]


def is_unsafe_name(name: str) -> bool:
    """Whether a file name leads out of its folder, or holds control characters that a terminal would obey."""
    return not name.isprintable() or name.startswith("/") or "\\" in name or ".." in PurePosixPath(name).parts


def check_download(path: Path, file: RemoteFile) -> None:
    """DamagedError unless a file has the size and checksum that the Hub declares."""
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
