"""What was cut of a text so far, on disk beside the cache, so that a kill does not start the reading over.

    tokens/draft/000000.safetensors    the contexts cut up to the first time: what Cutter.take returns
    tokens/draft/state.json            the checksum of every such file, and where the reading stands; written last

A draft is used by the very harvest that began it and by no other; one that is damaged is thrown away.
"""

import shutil
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import safetensors.numpy

from ..common.errors import DamagedError
from ..common.files import atomic_write, digest_of, read_json, write_json


class TokenizeCheckpoint:
    """The parts of a draft, checked, and the `state` that came with the last one; None when there is none."""

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder = folder / "tokens" / "draft"
        # The position in a stream is a state of `datasets`, which only the same version of it reads for certain.
        self.owner = digest_of([identity, version("datasets")])
        self.checksums: list[str] = []
        self.state: dict[str, Any] | None = None
        try:
            saved = read_json(self.folder / "state.json", "digest", "content")
            content = saved["content"]
            if digest_of(content) == saved["digest"] and content["owner"] == self.owner:
                self.checksums = content["checksums"]
                for _ in self.parts():
                    pass  # read to see that it is whole
                self.state = content["state"]
        except DamagedError:
            pass  # of a missing one too
        if self.state is None:
            self.checksums = []
            remove_checkpoint(folder)

    def add(self, part: dict[str, np.ndarray], state: dict[str, Any]) -> None:
        """Keep a part and the state after it: all or nothing."""
        data = safetensors.numpy.save(part)
        atomic_write(self.file(len(self.checksums)), data)
        self.checksums.append(f"{google_crc32c.value(data):08x}")
        content = {"owner": self.owner, "checksums": self.checksums, "state": state}
        write_json(self.folder / "state.json", {"digest": digest_of(content), "content": content}, indent=None)

    def parts(self) -> Iterator[dict[str, np.ndarray]]:
        """The parts in the order in which they were added; DamagedError when one is not what was written."""
        for number, checksum in enumerate(self.checksums):
            path = self.file(number)
            data = path.read_bytes() if path.exists() else b""
            if f"{google_crc32c.value(data):08x}" != checksum:
                raise DamagedError(f"{path} is not what was written there. Run the same command again: it is cut anew.")
            yield safetensors.numpy.load(data)

    def file(self, number: int) -> Path:
        return self.folder / f"{number:06d}.safetensors"


def remove_checkpoint(folder: Path) -> None:
    """Remove the draft of a cache."""
    shutil.rmtree(folder / "tokens" / "draft", ignore_errors=True)
