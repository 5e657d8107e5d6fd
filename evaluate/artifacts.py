"""A cache on disk for what does not depend on an SAE: activations, probes, dataset statistics."""

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
from ..common.files import atomic_write, digest_of, temporary_process, utf8_path
from ..common.records import as_read
from ..common.schemas import DATA_RECORD

FORMAT = 1  # version of the cached artifacts: increased when the way any of them is computed changes
STALE_SECONDS = 3600  # seconds without a write after which a dead process's temporary file is removed


class ArtifactCache:
    """Tensors on disk, keyed by a digest of everything that they depend on.

    A file that is truncated or does not match its checksum is computed again. Several processes can share a cache: each
    writes to its own temporary file, and the last rename wins.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get_or_compute(
        self, kind: str, depends: Mapping[str, Any], compute: Callable[[], dict[str, Tensor]], device: str = "cpu"
    ) -> dict[str, Tensor]:
        """The tensors of `kind` for the inputs `depends`: memory-mapped from disk, or computed and written."""
        path = self.path(kind, depends)
        if (tensors := self._read(path, depends, device)) is None:
            data = to_safetensors({name: tensor.contiguous().cpu() for name, tensor in compute().items()})
            atomic_write(path, data)
            digest = hashlib.sha256(data).hexdigest()
            DATA_RECORD.write(path.with_suffix(".json"), {"kind": kind, "depends": dict(depends), "sha256": digest})
            with utf8_path(path) as readable:
                tensors = load_file(readable, device)
        return tensors

    def path(self, kind: str, depends: Mapping[str, Any]) -> Path:
        return self.folder / f"{kind}-{digest_of([FORMAT, kind, depends])[:16]}.safetensors"

    def contains(self, kind: str, depends: Mapping[str, Any]) -> bool:
        return self.path(kind, depends).with_suffix(".json").exists()

    def _read(self, path: Path, depends: Mapping[str, Any], device: str) -> dict[str, Tensor] | None:
        try:
            record = DATA_RECORD.read(path.with_suffix(".json"))
            if record["depends"] != as_read(depends):
                return None
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() == record["sha256"]:
                    with utf8_path(path) as readable:
                        return load_file(readable, device)
        except (OSError, DamagedError, SafetensorError):
            pass
        return None


def remove_stale_temporaries(folder: Path) -> int:
    """Remove temporary files of killed processes from a folder that has no lock. Returns how many were removed.

    Recent files stay: a process on another machine can be writing one under an id that no process has here.
    """
    removed = 0
    for path in folder.glob("**/*.tmp-*"):
        with contextlib.suppress(OSError):  # another process has just renamed or removed it
            process = temporary_process(path)
            if process is None or is_running(process):
                continue
            if time.time() - path.stat().st_mtime > STALE_SECONDS:
                path.unlink()
                removed += 1
    return removed


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it belongs to another user
        return True
    return True
