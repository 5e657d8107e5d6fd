"""Checkpoints of tokenizing a text, in the cache's folder, so that a killed harvest does not start reading again.

    tokens/draft/000000.safetensors    the contexts up to the first checkpoint, as ContextCutter.take returns them
    tokens/draft/state.json            the checksum of each such file and the reading state; written last

A checkpoint is used only by the harvest that wrote it, and is discarded if it is damaged.
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
    """The verified parts of a checkpoint. `state` is the one saved with the last part, or None without any."""

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder = folder / "tokens" / "draft"
        # The position in a stream is a state of the `datasets` library, which only the same version reads reliably.
        self.owner = digest_of([identity, version("datasets")])
        self.checksums: list[str] = []
        self.state: dict[str, Any] | None = None
        try:
            saved = read_json(self.folder / "state.json", "digest", "content")
            content = saved["content"]
            if digest_of(content) == saved["digest"] and content["owner"] == self.owner:
                self.checksums = content["checksums"]
                for _ in self.read_parts():
                    pass  # only to verify them
                self.state = content["state"]
        except DamagedError:
            pass  # or missing
        if self.state is None:
            self.checksums = []
            remove_checkpoint(folder)

    def save(self, part: dict[str, np.ndarray], state: dict[str, Any]) -> None:
        """Add a part and the state after it, atomically."""
        data = safetensors.numpy.save(part)
        atomic_write(self.part_file(len(self.checksums)), data)
        self.checksums.append(f"{google_crc32c.value(data):08x}")
        content = {"owner": self.owner, "checksums": self.checksums, "state": state}
        write_json(self.folder / "state.json", {"digest": digest_of(content), "content": content}, indent=None)

    def read_parts(self) -> Iterator[dict[str, np.ndarray]]:
        """The parts in order. Raises DamagedError if one differs from its checksum."""
        for number, checksum in enumerate(self.checksums):
            path = self.part_file(number)
            data = path.read_bytes() if path.exists() else b""
            if f"{google_crc32c.value(data):08x}" != checksum:
                raise DamagedError(
                    f"{path} is missing or damaged. Run the same command again: it tokenizes the text from the start."
                )
            yield safetensors.numpy.load(data)

    def part_file(self, number: int) -> Path:
        return self.folder / f"{number:06d}.safetensors"


def remove_checkpoint(folder: Path) -> None:
    """Remove the tokenizing checkpoint of a cache."""
    shutil.rmtree(folder / "tokens" / "draft", ignore_errors=True)
