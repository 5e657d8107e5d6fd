"""Records: the JSON files that this package writes. Each contains a digest of its content, and has a schema with the
types of its fields.

    SAE_RECORD.write(folder / "sae.json", content)
    content = SAE_RECORD.read(folder / "sae.json")

A record contains `content_digest`, the sha256 of its content without the digest (`digest_of`: keys sorted, no
whitespace, so reformatting a file does not affect it). Every reader checks it. The digest detects accidents, such as a
flipped bit; it does not detect forgery. The schemas are in schemas.py, evaluation_schemas.py and
cache_schemas.py.

Records written before 2026-11-29 have no digest. Such records are read without this check, and the first one causes a
warning.
"""

import contextlib
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec

from .errors import DamagedError
from .files import atomic_create, atomic_write, digest_of, parse_json, read_file

DIGEST = "content_digest"

Content = TypeVar("Content", bound=Mapping[str, Any])


class UncheckedRecordWarning(UserWarning):
    """A record has no content digest, so damage to it is not noticed."""


@dataclass(frozen=True)
class RecordKind(Generic[Content]):
    """How one kind of record is written, read and checked.

    `Content` is the TypedDict of its fields. Fields that `Content` does not name are kept, since newer versions can add
    fields.
    """

    schema: type[Content]
    remedy: str  # a sentence about how to replace a damaged record
    digest_in: str = ""  # the object in the record to which the digest is added; "": the record itself
    covered: Callable[[dict[str, Any]], Any] = dict  # the part of the content that the digest covers
    indent: int | None = 2  # None: the record is one line

    def read(self, path: Path) -> Content:
        """The content, without the digest.

        Raises DamagedError if the file is missing, is not JSON or does not match its digest, or if a field is missing
        or has the wrong type.
        """
        content, has_digest = self.read_unwarned(path)
        if not has_digest:
            warn_unchecked(path)
        return content

    def read_unwarned(self, path: Path) -> tuple[Content, bool]:
        """The content as returned by `read`, and whether the record has a digest. Never warns; raises like `read`."""
        return self.parse_unwarned(read_file(path, self.remedy), path)

    def parse(self, data: bytes, source: Path | str) -> Content:
        """Parse the bytes of a record and return its content. `source` is where the bytes come from, for errors. Raises
        like `read`.
        """
        return self.parse_unwarned(data, source)[0]

    def parse_unwarned(self, data: bytes, source: Path | str) -> tuple[Content, bool]:
        """Parse the bytes of a record and return its content, and whether it has a digest. Raises like `read`."""
        content = parse_json(data, source, self.remedy)
        recorded = self._remove_digest(content)
        try:
            msgspec.convert(content, self.schema)
            digest = digest_of(self.covered(content))
        except (msgspec.ValidationError, RecursionError) as error:
            raise DamagedError(
                f"{source} is not as it was written ({describe(error)}): it was damaged or edited. {self.remedy}"
            ) from error
        if recorded not in (None, digest):
            raise DamagedError(
                f"{source} does not match its {DIGEST}: it was damaged or edited. {self.remedy} "
                f"To keep an edit that you made on purpose, delete {DIGEST!r} from the file; it is then not checked."
            )
        return content, recorded is not None

    def write(self, path: Path, content: Mapping[str, Any]) -> None:
        """Write the content and its digest, atomically.

        Raises UnavailableError if the disk is full or not writable, msgspec.ValidationError if the content does not
        match the schema.
        """
        atomic_write(path, self.encode(content))

    def create(self, path: Path, content: Mapping[str, Any]) -> bool:
        """Write content and digest unless the file exists; returns whether it was written. Raises like `write`."""
        return atomic_create(path, self.encode(content))

    def encode(self, content: Mapping[str, Any]) -> bytes:
        """The bytes of a record. Raises msgspec.ValidationError if the content does not match the schema."""
        content = as_read(content)
        msgspec.convert(content, self.schema)
        digest = {DIGEST: digest_of(self.covered(content))}
        sealed = content | ({self.digest_in: content[self.digest_in] | digest} if self.digest_in else digest)
        return (json.dumps(sealed, indent=self.indent) + "\n").encode()

    def write_if_changed(self, path: Path, content: Mapping[str, Any]) -> None:
        """Write the content and its digest, unless the file already contains both. Raises like `write`."""
        with contextlib.suppress(DamagedError):  # also raised for a missing file
            if self.read_unwarned(path) == (as_read(content), True):
                return
        self.write(path, content)

    def add_digest(self, path: Path) -> bool:
        """Add a digest to a record of an earlier version. Returns whether it had none. Raises like `read` and `write`.

        Call this only for content that was verified in another way: a digest asserts that the content is unchanged.
        """
        content, has_digest = self.read_unwarned(path)
        if not has_digest:
            self.write(path, content)
        return not has_digest

    def _remove_digest(self, content: Any) -> Any:
        """Remove the digest from the content, and return the digest; None if the content has none.

        A field with almost the digest's name ("content_dygest") is a damaged digest: its value is returned, but the
        field stays in the content, so the content does not match the digest.
        """
        holder = content.get(self.digest_in) if self.digest_in and isinstance(content, dict) else content
        if isinstance(holder, dict) and DIGEST not in holder:
            return next((holder[name] for name in get_close_matches(DIGEST, holder, 1, cutoff=0.9)), None)
        return holder.pop(DIGEST) if isinstance(holder, dict) else None


def as_read(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content as it would be read back after writing: keys become strings, tuples become lists."""
    return json.loads(json.dumps(dict(content)))


def describe(error: Exception) -> str:
    """The message of msgspec: "expected `int`, got `str` - at `$.step`"."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    text = str(error)
    return text[:1].lower() + text[1:]


_warned = False


def warn_unchecked(path: Path) -> None:
    """Warn, once per process, that a record has no digest."""
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            f"{path} has no {DIGEST}: it was written by an earlier version, or its digest was deleted. Such records "
            "are read, but damage to them is not noticed. `sae cache repair` adds the digests of a cache.",
            UncheckedRecordWarning,
            stacklevel=3,
        )
