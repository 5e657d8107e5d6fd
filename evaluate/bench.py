"""What every metric measures with: the model, its tokenizer, text, and a shelf for what no SAE changes."""

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import Tensor

from ..cache.contexts import Contexts
from ..cache.errors import DamagedError
from ..cache.files import digest_of, publish, read_json, write_json
from ..harvest.model import LanguageModel

STRAY = 3600  # seconds without a write, after which what a dead process left half-written is removed
FORMAT = 1  # of what stands on the shelf: raised when how any of it is made changes


@dataclass(frozen=True)
class Batch:
    """Contexts, padded on the right: their ids, which positions hold a token, and which of those count; each (N, S).

    `document` (N,), on the CPU, says which of them are cut from one text.
    """

    ids: Tensor
    inside: Tensor
    kept: Tensor
    document: Tensor


class Shelf:
    """What does not depend on an SAE, kept on the disk under a digest of everything that it does depend on.

    A file that is cut off or of another checksum is made again. Several processes may use it at once: each writes under
    a name of its own, and what is renamed last stays.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def keep(
        self, kind: str, depends: Mapping[str, Any], make: Callable[[], dict[str, Tensor]], device: str = "cpu"
    ) -> dict[str, Tensor]:
        """The tensors of `kind` that `depends` pins down: mapped from the disk, or made and written there."""
        path = self.path(kind, depends)
        if (found := self._read(path, device)) is None:
            data = to_safetensors({name: tensor.contiguous().cpu() for name, tensor in make().items()})
            publish(path, data)
            digest = hashlib.sha256(data).hexdigest()
            write_json(path.with_suffix(".json"), {"kind": kind, "depends": dict(depends), "sha256": digest})
            found = load_file(path, device)
        return found

    def path(self, kind: str, depends: Mapping[str, Any]) -> Path:
        return self.folder / f"{kind}-{digest_of([FORMAT, kind, depends])[:16]}.safetensors"

    def holds(self, kind: str, depends: Mapping[str, Any]) -> bool:
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


def sweep(folder: Path) -> int:
    """Remove what killed processes left half-written in a folder that has no lock; returns how many files.

    A process of another machine may be writing there under a number that is dead here, so a fresh file stays.
    """
    strays = 0
    for path in folder.glob("**/*.tmp-*"):
        with contextlib.suppress(OSError):  # another process has just finished or swept it
            number = path.suffix.removeprefix(".tmp-")
            if number.isdecimal() and not alive(int(number)) and time.time() - path.stat().st_mtime > STRAY:
                path.unlink()
                strays += 1
    return strays


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True


@dataclass(frozen=True)
class Bench:
    """The model and the held-out text; `skip` are the ids that no number is taken at (pad, eos, bos).

    `identity` pins the model and how it computes; `text` pins the held-out text, for the metrics that read it. `data`
    is a folder where a dataset is looked for before the Hub: <data>/<name on the Hub>/<split>.jsonl or .parquet.
    """

    load: Callable[[], LanguageModel]  # may be asked again and again, and gives the same one
    tokenizer: Any
    contexts: Contexts
    skip: list[int]
    mode: str
    identity: dict[str, Any]
    text: dict[str, Any]
    shelf: Shelf
    data: Path | None = None
    device: str = "cpu"  # where the model computes
    config: Any = None  # of the model

    @property
    def model(self) -> LanguageModel:
        """Loaded when it is first needed: what was measured before can be read without."""
        return self.load()

    @property
    def settings(self) -> dict[str, Any]:
        """What of the bench decides every metric's result."""
        return {"mode": self.mode, **self.identity}

    def batches(self, size: int, count: int, text: Contexts | None = None) -> Iterator[Batch]:
        """At most `count` batches of `size` contexts of the held-out text or another, as wide as their longest."""
        text = self.contexts if text is None else text
        for start in range(0, min(len(text), count * size), size):
            part = text.select(slice(start, start + size))
            ids = torch.from_numpy(part.ids[:, : int(part.length.max())].astype(np.int64))
            inside = torch.arange(ids.shape[1]) < torch.from_numpy(part.length.astype(np.int64))[:, None]
            kept = inside & ~torch.isin(ids, torch.tensor(self.skip, dtype=torch.int64))
            document = torch.from_numpy(part.document.astype(np.int64))
            yield Batch(*(tensor.to(self.model.device) for tensor in (ids, inside, kept)), document)
