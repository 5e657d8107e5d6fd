"""Checks of pytorch_model.bin before torch reads it.

Such a file is a zip archive that contains a pickle and the bytes of the tensors. torch reads the pickle with
weights_only, which runs no code but does not limit the unpacked size of an entry.
"""

import zipfile
from pathlib import Path

from ..common.errors import DamagedError

ADVICE = "Download it again, preferably in safetensors format."


def check_pickled(path: Path) -> None:
    """Raise DamagedError if a weights file is truncated, or could unpack to more than its own size.

    Files that torch wrote before version 1.6 are not zip files; reading them needs no more memory than their size.
    """
    with path.open("rb") as file:
        if file.read(2) != b"PK":
            return
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise DamagedError(f"{path} is truncated or damaged: {error}. {ADVICE}") from error
    packed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
    if packed or sum(entry.file_size for entry in entries) > path.stat().st_size:
        what = f"its entry {packed[0]} is compressed" if packed else "its entries are larger than the file"
        raise DamagedError(f"{path} was not written by torch: {what}, and could unpack to any size. {ADVICE}")
