"""Tokenization checkpoints in the cache's folder, so that a killed harvest does not read the text from the start.

    tokens/draft/000000.safetensors    the contexts up to the first checkpoint, as ContextCutter.take returns them
    tokens/draft/state.json            the checksum of each such file and the reading state; written last

A checkpoint is used only by the harvest that wrote it. A checkpoint that is damaged or was written by an earlier
version is discarded, and the text is read from its beginning.
"""

import shutil
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import safetensors.numpy

from ..common.cache_schemas import TOKENIZE_RECORD
from ..common.errors import DamagedError
from ..common.files import atomic_write, digest_of


class TokenizeCheckpoint:
    """The verified parts of a checkpoint. `check` is called before anything is written.

    Attributes:
        state: the reading state saved with the last part; None if there is no part.
        discarded: why an earlier checkpoint is not used; "" if there was none, or if it is used.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], check: Callable[[], None] = lambda: None) -> None:
        self.folder, self.check = folder / "tokens" / "draft", check
        # The position in a stream is a state of `datasets`, and only the version that wrote it reads it reliably.
        self.owner = digest_of([identity, version("datasets")])
        self.checksums: list[str] = []
        self.state: dict[str, Any] | None = None
        self.discarded = ""
        if self.folder.exists():
            try:
                self._restore()
            except DamagedError as error:
                self.checksums, self.discarded = [], str(error)
        if self.state is None:
            remove_checkpoint(folder)

    def _restore(self) -> None:
        """Load the checkpoint of an earlier, interrupted run. Raises DamagedError if the checkpoint cannot be used."""
        path = self.folder / "state.json"
        saved = TOKENIZE_RECORD.read(path)
        if saved["owner"] != self.owner:
            raise DamagedError(f"{path} was written by another harvest or with another version of `datasets`.")
        self.checksums = saved["checksums"]
        for _ in self.read_parts():
            pass  # only to verify them
        self.state = dict(saved["state"])

    def save(self, part: dict[str, np.ndarray], state: dict[str, Any]) -> None:
        """Add a part and the state after it, atomically."""
        self.check()
        data = safetensors.numpy.save(part)
        atomic_write(self.part_file(len(self.checksums)), data)
        self.checksums.append(f"{google_crc32c.value(data):08x}")
        TOKENIZE_RECORD.write(
            self.folder / "state.json", {"owner": self.owner, "checksums": self.checksums, "state": state}
        )

    def read_parts(self) -> Iterator[dict[str, np.ndarray]]:
        """The parts in order. Raises DamagedError if a part differs from its checksum."""
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
    """Remove the tokenization checkpoint from the folder of a cache."""
    shutil.rmtree(folder / "tokens" / "draft", ignore_errors=True)
