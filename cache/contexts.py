"""The token ids that were fed to the model, as contexts of equal length."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from ..common.cache_schemas import ARRAY_RECORD, GROUP_RECORD, TOKENS_RECORD
from ..common.errors import DamagedError
from ..common.files import digest_of
from .chunks import encode_chunk, files_exist, read_array, read_array_spec, write_chunk
from .consistency import check_names, contradiction, describe_array, token_files
from .layout import FORMAT, ArraySpec, group_metadata, token_arrays


@dataclass(frozen=True)
class Contexts:
    """N contexts of at most S tokens, padded on the right."""

    ids: np.ndarray  # (N, S) uint32
    length: np.ndarray  # (N,) uint16: tokens without padding
    document: np.ndarray  # (N,) uint32: the number of the document
    held_out: np.ndarray  # (N,) bool: whether its document is kept for evaluation
    rows: np.ndarray | None = None  # (N, S) bool: in conversations, the tokens of the roles that are harvested

    def __len__(self) -> int:
        return len(self.ids)

    def select(self, which: np.ndarray | slice) -> "Contexts":
        """The contexts selected by a mask, an array of indices or a slice."""
        return Contexts(**{name: values[which] for name, values in self.arrays().items()})

    def arrays(self) -> dict[str, np.ndarray]:
        """{name: array}, with the names from the folder tokens/; `rows` is left out if it is None."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: array for name, array in values.items() if array is not None}

    def specs(self) -> list[ArraySpec]:
        """The metadata of the arrays."""
        return token_arrays(*self.ids.shape, rows=self.rows is not None)

    def write(self, folder: Path) -> None:
        """Write the contexts into a cache's folder; their record, tokens/commit.json, is written last."""
        GROUP_RECORD.write(folder / "tokens" / "zarr.json", group_metadata({}))
        files = {}
        for array in self.specs():
            ARRAY_RECORD.write(folder / array.name / "zarr.json", array.metadata())
            file, record = write_chunk(folder, array, 0, getattr(self, array.name.removeprefix("tokens/")))
            files[file] = record
        commit = {"format": FORMAT, "contexts": len(self), "files": files}
        TOKENS_RECORD.write(folder / "tokens" / "commit.json", commit)

    def file_records(self) -> dict[str, dict[str, Any]]:
        """{file: record} of the files that `write` would write, without writing them."""
        values = self.arrays()
        return {a.chunk_file(0): encode_chunk(a, values[a.name.removeprefix("tokens/")])[1] for a in self.specs()}

    @classmethod
    def read(cls, folder: Path, digest: str | None = None) -> "Contexts":
        """Read the contexts of a cache, each file checked against tokens/commit.json.

        `digest` is the digest recorded in the cache's zarr.json, or None if there is no zarr.json yet. Raises
        DamagedError if a file is missing or differs from its record, or if `digest` differs from `digest_of` the
        record's files.
        """
        record = folder / "tokens" / "commit.json"
        commit = TOKENS_RECORD.read(record)
        files = commit["files"]
        if digest not in (None, digest_of(files)):
            raise DamagedError(
                f"{folder / 'tokens'} is not the text that this cache was harvested from: its commit.json comes from "
                f"another cache. Run `sae cache repair`, or delete {record} and run the same `sae harvest`."
            )
        check_token_arrays(folder, commit)
        always = [field.name for field in fields(cls) if field.default is MISSING]
        names = [*always, *(["rows"] if "tokens/rows/c.0.0" in files else [])]
        return cls(**{name: read_array(folder, f"tokens/{name}", files) for name in names})

    @staticmethod
    def is_complete(folder: Path) -> bool:
        """Whether `write` has finished in this folder and its output still exists with the recorded sizes."""
        record = folder / "tokens" / "commit.json"
        return record.exists() and files_exist(folder, TOKENS_RECORD.read(record)["files"])


def check_token_arrays(folder: Path, commit: Mapping[str, Any]) -> None:
    """Raise DamagedError unless the arrays in tokens/ match tokens/commit.json, including the number of contexts."""
    path = folder / "tokens" / "commit.json"
    check_names(path, commit["files"], token_files(commit["files"]))
    arrays = {name: read_array_spec(folder, name) for name in {file.rsplit("/", 1)[0] for file in commit["files"]}}
    length = arrays["tokens/ids"].shape[-1]
    for expected in token_arrays(commit["contexts"], length, rows="tokens/rows" in arrays):
        if arrays[expected.name] != expected:
            found = describe_array(arrays[expected.name])
            raise contradiction(path, f"it has {commit['contexts']:,} contexts", f"{expected.name} is {found}")
