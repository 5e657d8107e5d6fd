"""Damage to any field of any record of a cache is detected, and other Zarr programs may rewrite the records."""

import json
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore
import zarr

from sae.cache.contexts import Contexts
from sae.cache.models import read_remembered, remember
from sae.cache.opening import open_cache
from sae.cache.reader import Cache
from sae.cache.record_files import add_digests, damaged_records, record_files
from sae.common import records
from sae.common.cache_schemas import COMMIT_RECORD, MANIFEST_RECORD
from sae.common.errors import DamagedError, SaeError, UsageError
from sae.common.records import DIGEST, UncheckedRecordWarning
from sae.common.schemas import MODELS_RECORD

from ..json_trees import leaves, with_leaf

unchecked = pytest.mark.filterwarnings("ignore::sae.common.records.UncheckedRecordWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, two_layer_folder: Path) -> Path:
    """A copy of a complete cache that each test leaves as it was."""
    return Path(shutil.copytree(two_layer_folder, tmp_path_factory.mktemp("records") / "cache"))


def other(value: Any) -> Any:
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return 2 * value + 1
    if isinstance(value, str):
        return value[:-1] + ("1" if value[-1:] == "0" else "0")
    if value is None:
        return 1
    return [1] if value == [] else {"another": 1}


def read_all(folder: Path) -> None:
    """Read what is read by opening a cache, by showing it and by the beginning of `sae cache verify`."""
    cache = open_cache(folder)
    next(iter(cache.verify()))
    cache.describe_contexts(), cache.state, cache.statistics("layer_05"), repr(cache)


def each_change(folder: Path, *, digests: bool) -> Iterator[tuple[str, Path]]:
    """Change one value of one record at a time, and restore the record.

    Yields the path of the value in its record, and the file of the record.
    """
    for path, _ in record_files(folder):
        whole = path.read_text()
        content = json.loads(whole if digests else without_digest(whole))
        for at in leaves(content):
            path.write_text(json.dumps(with_leaf(content, at, other)))
            yield ".".join(map(str, at)), path
        path.write_text(whole)


def without_digest(text: str) -> str:
    return re.sub(rf',?\s*"{DIGEST}": "\w*"', "", text)


def test_a_changed_value_is_found_wherever_it_is(folder: Path) -> None:
    """The only exception is the fill value, which only other readers use and each of them spells in its own way."""
    unnoticed, tried = set(), 0
    for what, _ in each_change(folder, digests=True):
        tried += 1
        try:
            read_all(folder)
        except (DamagedError, UsageError):
            continue
        unnoticed.add(what)
    assert tried > 400 and unnoticed == {"fill_value"}
    read_all(folder)


@pytest.mark.slow
@unchecked
def test_a_changed_value_without_a_digest_gives_a_sentence_or_is_one_of_few(folder: Path) -> None:
    """A change to a record of an earlier version is detected only if another record contradicts it.

    No change causes a traceback.
    """
    unnoticed = set()
    for what, path in each_change(folder, digests=False):
        try:
            read_all(folder)
        except SaeError:
            continue
        unnoticed.add(f"{path.name}: {re.sub('layer_(05|12)', 'L', what)}")
    statistics = {one for one in unnoticed if one.startswith("manifest.json: statistics.L.")}
    assert not {one for one in statistics if re.search(r"\.(count|marked|max_norm|norm_limit)$", one)}
    harmless = (": format", "fill_value", "to_read", "made_with", "json: attributes")
    names = {f"zarr.json: attributes.identity.{one}.name" for one in ("data", "model")}
    assert {one for one in unnoticed - statistics if not one.endswith(harmless)} == names


@pytest.mark.parametrize(
    ("file", "at", "value", "message"),
    [
        ("zarr.json", ("attributes", "identity", "seed"), 5, "its fingerprint is"),
        ("zarr.json", ("attributes", "window_rows"), 24, "window_rows is 24, but its other attributes require 16"),
        ("zarr.json", ("attributes", "chunk_rows"), 8, "chunk_rows is 8, but its other attributes require 16"),
        ("zarr.json", ("attributes", "storage_dtype"), "uint16", "but its other attributes require bfloat16"),
        ("zarr.json", ("attributes", "compress"), True, "compress is True, but its other attributes require False"),
        ("zarr.json", ("attributes", "rows"), 39, "rows is 39, but its other attributes require 40"),
        ("zarr.json", ("attributes", "complete"), ["layer_05", "layer_19"], "not list layer_19 as complete, but"),
        ("zarr.json", ("attributes", "complete"), ["nonsense"], "no array can have that name"),
        ("zarr.json", ("attributes", "tokens"), "0" * 64, "its files in tokens/ contain one text, but zarr.json"),
        ("layer_05/zarr.json", ("shape",), [39, 8], r"bfloat16 \[39, 8\] .* zarr.json requires bfloat16 \[40, 8\]"),
        ("layer_05/zarr.json", ("codecs", 1, "name"), "adler32", "it lists unexpected codecs"),
        ("layer_05/zarr.json", ("data_type",), "uint16", r"uint16 \[40, 8\] .* requires bfloat16 \[40, 8\]"),
        ("layer_05.moments/zarr.json", ("shape",), [3, 2, 9], r"\[3, 2, 9\] .* requires float64 \[3, 2, 8\]"),
        ("layer_05.row_norm/zarr.json", ("shape",), [39], r"\[39\] .* requires float32 \[40\]"),
        ("row_pos/zarr.json", ("shape",), [39], r"\[39\] .* requires uint16 \[40\]"),
        ("tokens/length/zarr.json", ("shape",), [5], r"it has 6 contexts, but tokens/length is uint16 \[5\]"),
        ("tokens/commit.json", ("contexts",), 5, r"it has 5 contexts, but tokens/\w+ is"),
        ("manifest.json", ("rows",), 39, "it has 39 rows, but zarr.json has 40"),
        ("manifest.json", ("fingerprint",), "0" * 64, "manifest.json comes from another harvest"),
        ("manifest.json", ("complete",), ["layer_05"], "it does not list layer_12 as complete, but zarr.json"),
        ("manifest.json", ("complete",), ["layer_05", "layer_12", "layer_19"], "layer_19 is in `complete` or"),
        ("manifest.json", ("statistics", "layer_05", "count"), 39, "39 rows and 0 outlier rows, but the cache has 40"),
        ("manifest.json", ("statistics", "layer_05", "norm_limit"), 3.0, "max_norm None, but its norm_limit is 3"),
        ("commits/000001.layer_05.json", ("window",), 2, "it describes window 2 of layer_05, but its file"),
        ("commits/000001.layer_05.json", ("array",), "layer_12", "it describes window 1 of layer_12, but its file"),
        ("commits/000001.layer_05.json", ("rows",), 15, "it has 15 rows, but window 1 has 16"),
        ("commits/000001.layer_05.json", ("fingerprint",), "0" * 64, "belongs to another harvest"),
        ("commits/000001.layer_05.json", ("files", "row_ctx/c.1", "bytes"), 1, "it lists row_ctx/c.1 with"),
    ],
)  # fmt: skip
@unchecked
def test_records_are_compared(folder: Path, file: str, at: tuple[str, ...], value: Any, message: str) -> None:
    path = folder / file
    whole = path.read_text()
    path.write_text(json.dumps(with_leaf(json.loads(without_digest(whole)), at, lambda _: value)))
    try:
        with pytest.raises(DamagedError, match=f"{message}.*sae cache repair") as raised:
            read_all(folder)
    finally:
        path.write_text(whole)
    assert raised.value.exit_code == 3


@pytest.mark.parametrize("change", ["missing", "extra", "of an array that cannot exist"])
@pytest.mark.parametrize("file", ["manifest.json", "commits/000001.layer_05.json"])
def test_a_file_too_many_or_too_few_is_found(cache: Cache, file: str, change: str) -> None:
    path = cache.folder / file
    kind = MANIFEST_RECORD if file == "manifest.json" else COMMIT_RECORD
    content = kind.read(path)
    if change == "missing":
        del content["files"]["layer_05/c.1.0"]
    else:
        name = "layer_05/c.3.0" if change == "extra" else "nonsense/c.0"
        content["files"][name] = {"bytes": 1, "crc32c": "0" * 8}
    kind.write(path, content)
    with pytest.raises(DamagedError, match="does not list layer_05/c.1.0" if change == "missing" else "lists .*c"):
        read_all(cache.folder)


def test_the_files_of_an_array_that_is_not_complete_may_be_listed(
    cache: Cache, finite_bits, make_writer, write_windows
) -> None:
    """Earlier versions listed these files; the next manifest omits them."""
    bits, path = {layer: finite_bits(40, 8, layer) for layer in (5, 19)}, cache.folder / "manifest.json"
    write_windows(make_writer(cache.folder, bits, 16), {19: bits[19]}, [1])
    files = COMMIT_RECORD.read(cache.folder / "commits/000001.layer_19.json")["files"]
    manifest = MANIFEST_RECORD.read(path)
    MANIFEST_RECORD.write(path, manifest | {"files": manifest["files"] | files})
    again = open_cache(cache.folder)
    assert again.layers == [5, 12] and len(list(again.verify())) == len(manifest["files"]) + 3
    make_writer(cache.folder, {5: bits[5]}, 16).finish()
    assert MANIFEST_RECORD.read(path) == manifest


def test_a_commit_beyond_the_last_window_is_found(cache: Cache) -> None:
    content = COMMIT_RECORD.read(cache.folder / "commits/000001.layer_05.json")
    COMMIT_RECORD.write(cache.folder / "commits/000003.layer_05.json", content | {"window": 3})
    with pytest.raises(DamagedError, match="it describes window 3, but the cache has only 3 windows"):
        read_all(cache.folder)


def test_a_missing_commit_is_found_by_verify(cache: Cache) -> None:
    (cache.folder / "commits/000001.layer_05.json").unlink()
    with pytest.raises(DamagedError, match="000001.layer_05.json is missing, but manifest.json lists the array"):
        list(open_cache(cache.folder).verify())


@pytest.mark.parametrize("compress", [False, True], ids=["raw", "compressed"])
def test_a_cache_that_another_zarr_program_has_written_into_is_as_before(
    tmp_path: Path, finite_bits, make_writer, write_windows, compress: bool
) -> None:
    """zarr-python rewrites all metadata. It adds attributes to the group and the arrays, and consolidated metadata."""
    bits = {5: finite_bits(1100, 8)}
    writer = make_writer(tmp_path / "c", bits, 1024, compress=compress)
    write_windows(writer, bits, [0, 1])
    writer.finish()
    before = {path: path.read_text() for path, _ in record_files(tmp_path / "c")}
    group = zarr.open_group(str(tmp_path / "c"), mode="r+")
    group.attrs["note"] = "mine"
    for name, array in group.members(max_depth=None):
        array.attrs["note"] = f"about {name}"
    group.create_array("features", shape=(3,), dtype="float32")
    zarr.consolidate_metadata(group.store)
    rewritten = {path for path in before if path.read_text() != before[path]}
    assert rewritten == {path for path in before if path.name == "zarr.json"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache = open_cache(tmp_path / "c")
        assert len(list(cache.verify())) == len(cache.manifest["files"])
        assert np.array_equal(np.concatenate([cache.read_chunk("layer_05", n) for n in (0, 1)]), bits[5])
    assert list(damaged_records(tmp_path / "c")) == []
    store = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(tmp_path / "c" / "layer_05")}}
    assert np.array_equal(tensorstore.open(store).result().read().result().view(np.uint16), bits[5])
    assert np.array_equal(zarr.open_group(str(tmp_path / "c"), mode="r")["layer_05"][:], bits[5])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("shape", [40, 9]),
        ("data_type", "uint16"),
        ("chunk_grid", {"name": "regular", "configuration": {"chunk_shape": [8, 8]}}),
        ("chunk_key_encoding", {"name": "default", "configuration": {"separator": "/"}}),
        ("codecs", [{"name": "bytes", "configuration": {"endian": "little"}}]),
        ("attributes", {"logical_dtype": "bfloat16"}),
    ],
)
def test_what_decides_how_bytes_are_read_is_in_the_digest(folder: Path, field: str, value: Any) -> None:
    path = folder / "layer_05" / "zarr.json"
    whole = path.read_text()
    metadata = json.loads(whole)
    digest = {DIGEST: metadata["attributes"][DIGEST]}
    path.write_text(json.dumps(metadata | {field: value | digest if field == "attributes" else value}))
    try:
        with pytest.raises(DamagedError, match="layer_05/zarr.json (does not match|is not as it was written)"):
            open_cache(folder).array("layer_05")
    finally:
        path.write_text(whole)


def test_a_cache_of_an_earlier_version_warns_once_and_gets_digests(cache: Cache, monkeypatch) -> None:
    before = {path: path.read_bytes() for path, _ in record_files(cache.folder)}
    for path in before:
        path.write_text(without_digest(path.read_text()))
    monkeypatch.setattr(records, "_warned", False)
    with pytest.warns(UncheckedRecordWarning) as warned:
        read_all(cache.folder)
    assert len(warned) == 1
    assert add_digests(cache.folder) == len(before) and add_digests(cache.folder) == 0
    assert {path: path.read_bytes() for path in before} == before


def test_extending_a_cache_of_an_earlier_version_adds_digests(
    cache: Cache, finite_bits, make_writer, write_windows
) -> None:
    for path, _ in record_files(cache.folder):
        path.write_text(without_digest(path.read_text()))
    bits = {19: finite_bits(40, 8, 19)}
    writer = make_writer(cache.folder, bits, 16)
    write_windows(writer, bits, [0, 1, 2])
    writer.finish()
    assert [path for path, _ in record_files(cache.folder) if DIGEST not in path.read_text()] == []
    read_all(cache.folder)


def test_the_text_of_another_length_is_refused(cache: Cache) -> None:
    with pytest.raises(DamagedError, match="it has 7 contexts"):
        record = cache.folder / "tokens" / "commit.json"
        record.write_text(without_digest(record.read_text()).replace('"contexts": 6', '"contexts": 7'))
        Contexts.read(cache.folder)


# --- activations/.models.json ---------------------------------------------------------------------------------------


def test_damage_to_the_remembered_digests_is_not_believed(tmp_path: Path, monkeypatch) -> None:
    """A changed digest could be taken for that of another model."""
    monkeypatch.setenv("SAE_HOME", str(tmp_path))
    file = str(tmp_path)
    remember("files", {file: [1, 2, 3, 4, 5, "ab" * 32]})
    path = tmp_path / "activations" / ".models.json"
    assert read_remembered("files") == {file: [1, 2, 3, 4, 5, "ab" * 32]}
    path.write_text(path.read_text().replace("abab", "abad", 1))
    assert read_remembered("files") == {} == read_remembered("folders")
    remember("folders", {"cd" * 32: ["/models/a"]})
    assert MODELS_RECORD.read(path) == {"files": {}, "folders": {"cd" * 32: ["/models/a"]}}
