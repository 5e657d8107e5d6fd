"""The SAEs of a release (a repository, or a folder with many SAEs), found by the names and sizes of their files."""

import os
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from ...common.errors import UsageError
from .base import Description, Format

MAX_FILES = 200_000  # maximum number of files listed in a local folder; the largest releases have some thousands


class RemoteFile(NamedTuple):
    """A file of a repository, with the size and checksum that the Hub declares."""

    name: str
    size: int
    sha256: str | None = None


@dataclass(frozen=True)
class PublishedSAE:
    """One SAE of a release, before any of its files has been read.

    `refusal` is set if the files have the layout of an SAE but are not an SAE.
    """

    format: Format
    path: str  # its path in the release: a folder, or a file if a folder contains several SAEs
    files: tuple[RemoteFile, ...]  # files that an import reads, the weights first
    refusal: str | None  # its kind, such as "transcoder", if it is not an SAE that can be imported
    description: Description

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    @property
    def config(self) -> RemoteFile | None:
        """The small file that describes the SAE, or None."""
        names = [PurePosixPath(file.name).name for file in self.files]
        return self.files[names.index(self.format.config)] if self.format.config in names[1:] else None


def find_published(files: Iterable[RemoteFile], repo: str) -> list[PublishedSAE]:
    """The SAEs among the files of a release, in the order of their paths.

    `repo` is the name of the repository or folder. Some formats record the model only in this name.
    """
    folders: dict[PurePosixPath, dict[str, RemoteFile]] = defaultdict(dict)
    for file in files:
        path = PurePosixPath(file.name)
        folders[path.parent][path.name] = file
    found: dict[tuple[str, str], PublishedSAE] = {}
    for folder, contents in folders.items():
        if "sae.json" in contents:  # a run of this package
            continue
        for name, file in contents.items():
            for fmt in Format.registry.values():
                if fmt.is_weights(name):
                    sae = published_sae(fmt, file, contents, folders.get(folder.parent, {}), repo)
                    found.setdefault((fmt.name, sae.path), sae)  # a crosscoder has several files with weights
    return sorted(found.values(), key=lambda sae: natural_key(sae.path))


def published_sae(
    fmt: Format, weights: RemoteFile, folder: dict[str, RemoteFile], above: dict[str, RemoteFile], repo: str
) -> PublishedSAE:
    """The SAE to which a weights file belongs.

    `folder` maps names to the files in the folder of the weights file. `above` does the same for its parent folder.
    """
    others = [folder[name] for name in fmt.files[1:] if name in folder]
    others += [above[name] for name in fmt.parent_files if name in above and above is not folder]
    path = PurePosixPath(weights.name)
    address = fmt.address(path)
    description = fmt.describe_path(repo, path)
    name = "" if address == PurePosixPath(".") else str(address)
    return PublishedSAE(fmt, name, (weights, *others), fmt.refusal(repo, path), description)


def natural_key(text: str) -> list[tuple[int, str]]:
    """A sort key that puts `layer_2` before `layer_12`."""
    digits, parts = "", list[tuple[int, str]]()
    for character in text + "\0":
        if character.isdecimal() and character.isascii():
            digits += character
            continue
        if digits:
            parts.append((int(digits[:30]), ""))
            digits = ""
        parts.append((-1, character))
    return parts


def list_local_files(root: Path) -> list[RemoteFile]:
    """The files below a folder. Links to folders are not followed.

    Raises UsageError if there are more than MAX_FILES files.
    """
    found: list[RemoteFile] = []
    for parent, _, names in os.walk(root):
        for name in names:
            path = Path(parent, name)
            if path.is_file():
                found.append(RemoteFile(path.relative_to(root).as_posix(), path.stat().st_size))
        if len(found) > MAX_FILES:
            raise UsageError(f"{root} contains more than {MAX_FILES:,} files. Give a subfolder.")
    return found
