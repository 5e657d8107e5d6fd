"""All records of a cache: which files they are, which of them are damaged, and which have no digest."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..common.cache_schemas import (
    ARRAY_RECORD,
    CACHE_RECORD,
    COMMIT_RECORD,
    GROUP_RECORD,
    HARVEST_RECORD,
    MANIFEST_RECORD,
    REPAIR_HINT,
    RING_RECORD,
    TOKENS_RECORD,
)
from ..common.errors import DamagedError
from ..common.records import RecordKind
from .chunks import read_array_spec, read_attributes
from .consistency import check_commit, check_manifest, contradiction, is_array_name, layout_of
from .contexts import check_token_arrays
from .layout import commit_file

IN_FOLDER: dict[str, RecordKind[Any]] = {
    "zarr.json": CACHE_RECORD,
    "harvest.json": HARVEST_RECORD,
    "manifest.json": MANIFEST_RECORD,
    "ring.json": RING_RECORD,
    "tokens/zarr.json": GROUP_RECORD,
    "tokens/commit.json": TOKENS_RECORD,
}


def record_files(folder: Path) -> Iterator[tuple[Path, RecordKind[Any]]]:
    """The path and the kind of every record in a cache's folder. Arrays that other software added to the group are
    ignored.
    """
    yield from ((folder / name, kind) for name, kind in IN_FOLDER.items() if (folder / name).exists())
    for path in sorted([*folder.glob("*/zarr.json"), *folder.glob("tokens/*/zarr.json")]):
        name = path.parent.relative_to(folder).as_posix()
        if name in ("row_ctx", "row_pos") or name.startswith("tokens/") or is_array_name(name):
            yield path, ARRAY_RECORD
    yield from ((path, COMMIT_RECORD) for path in sorted((folder / "commits").glob("*.json")))


def damaged_records(folder: Path) -> Iterator[tuple[Path, DamagedError]]:
    """The records of a cache that were changed or contradict other records, each with its error.

    Raises UsageError if the folder holds a cache of a newer format, or another kind of Zarr group.
    """
    attributes: Mapping[str, Any] | None = None
    for path, kind in record_files(folder):
        try:
            if kind is CACHE_RECORD:
                attributes = read_attributes(folder)
            else:
                check_record(folder, path, kind, attributes)
        except DamagedError as error:
            yield path, error


def check_record(
    folder: Path, path: Path, kind: RecordKind[Any], attributes: Mapping[str, Any] | None
) -> Mapping[str, Any]:
    """Read one record and raise DamagedError if it was changed or does not belong to the cache.

    `attributes` are the attributes of the cache; None if they are lost and cannot be compared.
    """
    content: Mapping[str, Any] = kind.read(path)
    layout = None if attributes is None else layout_of(attributes)
    if kind is ARRAY_RECORD:
        read_array_spec(folder, path.parent.relative_to(folder).as_posix(), layout)
    elif kind is TOKENS_RECORD:
        check_token_arrays(folder, content)
    elif attributes is not None and layout is not None:
        if kind is MANIFEST_RECORD:
            check_manifest(path, content, attributes)
        elif kind is COMMIT_RECORD:
            check_commit(path, content, attributes["fingerprint"], layout)
    return content


def verify_records(folder: Path, attributes: Mapping[str, Any]) -> None:
    """Read every record of a complete cache. Raises DamagedError at the first record that is missing, damaged, or
    contradicts another.
    """
    contents = {path: check_record(folder, path, kind, attributes) for path, kind in record_files(folder)}
    manifest = contents[folder / "manifest.json"]
    for name in manifest["complete"]:
        for window in range(layout_of(attributes).n_windows):
            path = folder / commit_file(window, name)
            if path not in contents:
                raise DamagedError(f"{path} is missing, but manifest.json lists the array {name}. {REPAIR_HINT}")
            for file, record in contents[path]["files"].items():
                if (listed := manifest["files"][file]) != record:
                    raise contradiction(path, f"it lists {file} with {record}", f"manifest.json lists it with {listed}")


def add_digests(folder: Path) -> int:
    """Add a digest to every record that an earlier version wrote without one. Returns the number of such records."""
    return sum(kind.add_digest(path) for path, kind in record_files(folder))


def read_hook_modules(folder: Path) -> dict[str, str]:
    """{array: name of the hooked module in transformers}, as recorded by the harvest; {} for older harvests."""
    try:
        return HARVEST_RECORD.read(folder / "harvest.json").get("modules", {})
    except DamagedError:  # also raised if the file is missing
        return {}
