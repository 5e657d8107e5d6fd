"""The schemes of addresses, such as s3://bucket/pile, and a check that a path is not an address."""

import os
import re
from pathlib import Path

from .errors import UsageError

WRITABLE = ("s3", "gs", "az", "file")
SCHEMES = (*WRITABLE, "https", "http")
ADDRESS = re.compile(rf"({'|'.join(SCHEMES)}):/+", re.IGNORECASE)  # a Path drops slashes


def disk_path(path: str | os.PathLike[str], name: str = "") -> Path:
    """Convert a user's argument to a path on a disk. `name` says where the path was given, such as SAE_HOME.

    Raises UsageError for an address, even if it was converted to a Path. The message does not repeat credentials.
    """
    text = os.fspath(path)
    if (match := ADDRESS.match(text)) is not None:
        scheme, rest = match[1].lower(), text[match.end() :]
        if re.search("[@?#]", rest):
            rest = "..."
        raise UsageError(
            f"{name and f'{name}='}{scheme}:{'///' if scheme == 'file' else '//'}{rest} is an address, but only a path "
            "on a disk is accepted here. To read the files at the address, copy them to a folder first; to write "
            "there, copy the folder afterwards (for S3: aws s3 sync FROM TO)."
        )
    return Path(path)
