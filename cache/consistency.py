"""Compare the values that records of a cache share, to detect damage to one of the records.

The digest of a record detects changes to it. These checks also detect a record that belongs to another cache or window,
and damage to records of earlier versions, which have no digest. They read no files.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from ..common.cache_schemas import REPAIR_HINT
from ..common.errors import DamagedError, UsageError
from ..common.files import digest_of
from .layout import ArraySpec, Layout, describe_difference, fingerprint_of, token_arrays

SIDE_ARRAYS = (".row_norm", ".moments")  # suffixes of the arrays that belong to an array of activations


def layout_of(attributes: Mapping[str, Any]) -> Layout:
    """The layout that the attributes of a cache describe."""
    return Layout(*(attributes[name] for name in ("rows", "window_rows", "storage_dtype", "compress")))


def check_attributes(path: Path, attributes: Mapping[str, Any]) -> None:
    """Raise DamagedError if the attributes of a cache contradict each other; `path` is the cache's zarr.json."""
    identity, layout = attributes["identity"], layout_of(attributes)
    if fingerprint_of(identity) != attributes["fingerprint"]:
        raise contradiction(
            path, f"its fingerprint is {attributes['fingerprint'][:12]}", "its identity has another fingerprint"
        )
    expected = {key: identity[key] for key in ("window_rows", "chunk_rows", "storage_dtype") if key in identity}
    if "compress" in identity:
        expected["compress"] = identity["compress"] is not None
    if isinstance(identity.get("tokens"), int):
        expected["rows"] = identity["tokens"]
    for name, value in {**expected, "chunk_rows": layout.chunk_rows}.items():
        if attributes[name] != value:
            raise contradiction(path, f"{name} is {attributes[name]}", f"its other attributes require {value}")
    for name in attributes["complete"]:
        if not is_array_name(name):
            raise contradiction(path, f"it lists {name!r} as complete", "no array can have that name")


def check_array(path: Path, array: ArraySpec, layout: Layout, d_in: int | None) -> None:
    """Raise DamagedError unless an array's shape and storage match the layout of its cache.

    `path` is the array's zarr.json; `d_in` is the width of the activations that the moments belong to.
    """
    if array.name.startswith("tokens/"):
        return  # their shapes follow from the number of contexts: see contexts.check_token_arrays
    if array.name in ("row_ctx", "row_pos"):
        expected = layout.origin_arrays()
    else:
        width = array.shape[-1] if d_in is None else d_in
        expected = layout.activation_arrays(activations_of(array.name), width)
    if array not in expected:
        named = {one.name: one for one in expected}.get(array.name)
        raise contradiction(
            path, f"it describes {describe_array(array)}", f"the cache's zarr.json requires {describe_array(named)}"
        )


def describe_array(array: ArraySpec | None) -> str:
    """The shape and storage of an array in a few words."""
    if array is None:
        return "no such array"
    blocks = "" if array.block_rows is None else f", compressed in blocks of {array.block_rows} rows"
    return f"{array.dtype} {list(array.shape)} in chunks of {list(array.chunk_shape)}{blocks}"


def token_files(files: Collection[str]) -> set[str]:
    """The files of the arrays in tokens/, including `tokens/rows` if one of its files is listed."""
    rows = any(file.startswith("tokens/rows/") for file in files)
    return {array.chunk_file(0) for array in token_arrays(1, 1, rows=rows)}


def check_commit(path: Path, commit: Mapping[str, Any], fingerprint: str, layout: Layout) -> None:
    """Raise DamagedError if a commit does not belong to the cache, is not named after its window and array, or does not
    list exactly the files of that window and array.
    """
    window, name = commit["window"], commit["array"]
    if commit["fingerprint"] != fingerprint:
        raise DamagedError(f"{path} belongs to another harvest ({commit['fingerprint'][:8]}). {REPAIR_HINT}")
    if path.name != f"{window:06d}.{name}.json":
        raise contradiction(path, f"it describes window {window} of {name}", "its file is named after another")
    if window >= layout.n_windows:
        raise contradiction(path, f"it describes window {window}", f"the cache has only {layout.n_windows} windows")
    if commit["rows"] != (rows := len(layout.row_range(window))):
        raise contradiction(path, f"it has {commit['rows']:,} rows", f"window {window} has {rows:,}")
    check_names(path, commit["files"], window_files(layout, [name], range(window, window + 1)))


def check_manifest(path: Path, manifest: Mapping[str, Any], attributes: Mapping[str, Any]) -> None:
    """Raise DamagedError if the manifest contradicts itself, the layout, or the attributes of its cache."""
    layout, complete, statistics = layout_of(attributes), manifest["complete"], manifest["statistics"]
    if manifest["fingerprint"] != attributes["fingerprint"]:
        raise DamagedError(f"{path} comes from another harvest. {REPAIR_HINT}")
    if manifest["rows"] != layout.rows:
        raise contradiction(path, f"it has {manifest['rows']:,} rows", f"zarr.json has {layout.rows:,}")
    # A harvest that was killed between the two writes may have added arrays to the manifest only.
    if missing := sorted(set(attributes["complete"]) - set(complete)):
        raise contradiction(path, f"it does not list {missing[0]} as complete", "zarr.json does")
    if different := sorted(set(statistics) ^ set(complete)):
        raise contradiction(path, f"{different[0]} is in `complete` or `statistics`", "not in both")
    for name, one in statistics.items():
        if one["count"] + one["marked"] != layout.rows:
            rows = f"{name} has {one['count']:,} rows and {one['marked']:,} outlier rows"
            raise contradiction(path, rows, f"the cache has {layout.rows:,} rows")
        if (one["max_norm"] is None) != (one["norm_limit"] is None):
            raise contradiction(
                path, f"{name} has max_norm {one['max_norm']}", f"its norm_limit is {one['norm_limit']}"
            )
    check_manifest_files(path, manifest["files"], complete, attributes["tokens"], layout)


def check_manifest_files(
    path: Path, files: Mapping[str, Any], complete: Iterable[str], tokens: str, layout: Layout
) -> None:
    """Raise DamagedError unless a manifest lists the token files of its cache and all files of the complete arrays.

    The manifest may also list any files that incomplete arrays can have, but no others.
    """
    every = range(layout.n_windows)
    expected = token_files(files) | window_files(layout, complete, every)
    if files.keys() != expected:
        others = {activations_of(file.rsplit("/", 1)[0]) for file in files.keys() - expected}
        allowed = window_files(layout, sorted(others - set(complete) - {"row_ctx", "row_pos", "tokens"}), every)
        check_names(path, files, expected | (allowed & files.keys()))
    text = {file: record for file, record in files.items() if file.startswith("tokens/")}
    if digest_of(text) != tokens:
        raise contradiction(path, "its files in tokens/ contain one text", "zarr.json records the digest of another")


def window_files(layout: Layout, names: Iterable[str], windows: range) -> set[str]:
    """The files of activation arrays in these windows, including the files of row_ctx and row_pos."""
    arrays = layout.arrays({name: 1 for name in names if is_array_name(name)})  # no file name depends on the width
    return {array.chunk_file(chunk) for array in arrays for chunk in layout.chunk_range(array, windows)}


def is_array_name(name: str) -> bool:
    """Whether this is the name of an array of activations, such as layer_12 or layer_12.mlp_out."""
    return re.fullmatch(r"layer_\d{2,}(\.[\w.]+)?", name) is not None


def moments_of(name: str) -> str | None:
    """For an array of moments, the array of activations it belongs to; None for any other array."""
    return name.removesuffix(".moments") if name.endswith(".moments") else None


def activations_of(name: str) -> str:
    """The array of activations that an array belongs to: layer_12 for layer_12.moments and for itself."""
    for suffix in SIDE_ARRAYS:
        name = name.removesuffix(suffix)
    return name


def check_names(path: Path, files: Collection[str], expected: Collection[str]) -> None:
    """Raise DamagedError unless a record lists exactly the expected files."""
    for sentence, some in (("does not list", set(expected) - set(files)), ("lists", set(files) - set(expected))):
        if some:
            more = f" and {len(some) - 1:,} more" if len(some) > 1 else ""
            wrong = "which the cache must have" if sentence == "does not list" else "which the cache cannot have"
            raise DamagedError(f"{path} {sentence} {min(some)}{more}, {wrong}. {REPAIR_HINT}")


def contradiction(path: Path, one: str, other: str) -> DamagedError:
    """The error for a record that contradicts itself or another record; `one` and `other` are clauses that state the
    two contradictory facts.
    """
    return DamagedError(f"{path} contradicts itself or another record: {one}, but {other}. {REPAIR_HINT}")


def check_same_text(place: Path | str, recorded: Mapping[str, Any], rows: int, tokens: str) -> None:
    """Raise DamagedError unless the `recorded` attributes of the harvest at a place contain these `rows` and
    `tokens`.
    """
    if recorded["rows"] != rows:
        raise DamagedError(
            f"The harvest at {place} was started with {recorded['rows']:,} rows, but its text now has {rows:,}. Use "
            "another --out."
        )
    if recorded["tokens"] != tokens:
        raise DamagedError(
            f"The harvest at {place} was started with other tokens than the tokenizer now produces for its text, "
            "probably because the version of `tokenizers` has changed. Use another --out."
        )


def check_same_harvest(
    place: Path | str, existing: str, fingerprint: str,
    theirs: Mapping[str, Any] | None = None, ours: Mapping[str, Any] | None = None,
) -> None:  # fmt: skip
    """Raise UsageError unless `existing`, the fingerprint of the harvest at a folder or address, equals `fingerprint`.
    The message names the differences between the identities.
    """
    if existing != fingerprint:
        differs = f" Different: {describe_difference(theirs, ours)}." if theirs and ours else ""
        raise UsageError(
            f"{place} holds another harvest ({existing[:8]}, this one is {fingerprint[:8]}).{differs} Use another "
            f"--out{', or the same options' * bool(differs)}."
        )
