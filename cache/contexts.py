"""The text as the model saw it."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from ..common.files import read_json, write_json
from .chunks import all_there, encode_chunk, read_whole, write_chunk
from .layout import FORMAT, group_metadata, tokens_arrays


@dataclass(frozen=True)
class Contexts:
    """N contexts of at most S tokens, padded on the right.

    ids (N, S) uint32, length (N,) uint16, document (N,) uint32, held_out (N,) bool.
    """

    ids: np.ndarray
    length: np.ndarray
    document: np.ndarray
    held_out: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def select(self, which: np.ndarray | slice) -> "Contexts":
        return Contexts(self.ids[which], self.length[which], self.document[which], self.held_out[which])

    def write(self, folder: Path) -> None:
        """Write them into a cache, and the record of them; the record comes last."""
        write_json(folder / "tokens" / "zarr.json", group_metadata({}))
        files = {}
        for array in tokens_arrays(*self.ids.shape):
            write_json(folder / array.name / "zarr.json", array.metadata())
            file, record = write_chunk(folder, array, 0, getattr(self, array.name.removeprefix("tokens/")))
            files[file] = record
        write_json(folder / "tokens" / "commit.json", {"format": FORMAT, "contexts": len(self), "files": files})

    def records(self) -> dict[str, dict[str, Any]]:
        """What `write` would record of each file."""
        arrays = tokens_arrays(*self.ids.shape)
        return {a.file(0): encode_chunk(a, getattr(self, a.name.removeprefix("tokens/")))[1] for a in arrays}

    @classmethod
    def read(cls, folder: Path) -> "Contexts":
        return cls(*(read_whole(folder, f"tokens/{field.name}") for field in fields(cls)))

    @staticmethod
    def written(folder: Path) -> bool:
        """Whether `write` came to its end here and its files are still there."""
        record = folder / "tokens" / "commit.json"
        return record.exists() and all_there(folder, read_json(record, "files")["files"])
