"""A cache on disk for what does not depend on an SAE: residuals, probes, dataset statistics."""

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import Tensor

from ..common.errors import DamagedError
from ..common.files import atomic_write, digest_of, read_json, write_json

STALE_SECONDS = 3600  # seconds without a write, after which what a dead process left half-written is removed


FORMAT = 1  # of what stands on the shelf: raised when how any of it is made changes


class ArtifactCache:
    """What does not depend on an SAE, kept on the disk under a digest of everything that it does depend on.

    A file that is cut off or of another checksum is made again. Several processes may use it at once: each writes under
    a name of its own, and what is renamed last stays.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get_or_compute(
        self, kind: str, depends: Mapping[str, Any], make: Callable[[], dict[str, Tensor]], device: str = "cpu"
    ) -> dict[str, Tensor]:
        """The tensors of `kind` that `depends` pins down: mapped from the disk, or made and written there."""
        path = self.path(kind, depends)
        if (found := self._read(path, device)) is None:
            data = to_safetensors({name: tensor.contiguous().cpu() for name, tensor in make().items()})
            atomic_write(path, data)
            digest = hashlib.sha256(data).hexdigest()
            write_json(path.with_suffix(".json"), {"kind": kind, "depends": dict(depends), "sha256": digest})
            found = load_file(path, device)
        return found

    def path(self, kind: str, depends: Mapping[str, Any]) -> Path:
        return self.folder / f"{kind}-{digest_of([FORMAT, kind, depends])[:16]}.safetensors"

    def contains(self, kind: str, depends: Mapping[str, Any]) -> bool:
        return self.path(kind, depends).with_suffix(".json").exists()

    def _read(self, path: Path, device: str) -> dict[str, Tensor] | None:
        try:
            record = read_json(path.with_suffix(".json"), "sha256")
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() == record["sha256"]:
                    return load_file(path, device)
        except (OSError, DamagedError, SafetensorError):
            pass
        return None


def remove_stale_temporaries(folder: Path) -> int:
    """Remove what killed processes left half-written in a folder that has no lock; returns how many files.

    A process of another machine may be writing there under a number that is dead here, so a fresh file stays.
    """
    strays = 0
    for path in folder.glob("**/*.tmp-*"):
        with contextlib.suppress(OSError):  # another process has just finished or swept it
            number = path.suffix.removeprefix(".tmp-")
            if (
                number.isdecimal()
                and not is_running(int(number))
                and time.time() - path.stat().st_mtime > STALE_SECONDS
            ):
                path.unlink()
                strays += 1
    return strays


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True
