"""Finding caches under activations/ by hook or fingerprint."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from sae.cache.catalog import find_by_fingerprint, find_cache, list_caches
from sae.cache.hooks import Hook
from sae.cache.reader import Cache
from sae.common.errors import DamagedError, LeftOutWarning, SaeError, UsageError
from sae.common.files import read_json, write_json

D = 8
ROWS = 40


def test_find_cache_returns_the_only_match(tmp_path: Path, write_cache, finite_bits) -> None:
    with pytest.raises(UsageError, match="No cache holds layer 5. Create one with `sae harvest --layer 5`"):
        find_cache(None, Hook(5), tmp_path)
    one = write_cache({5: finite_bits(ROWS, D)}, name="one")
    assert find_cache(None, Hook(5), tmp_path).folder == find_cache("none", Hook(5), tmp_path).folder == one.folder
    with pytest.raises(UsageError, match=r"No cache holds layer 5 of gemma.*--model gemma.*\n.* holds layer 5 of none"):
        find_cache("gemma", Hook(5), tmp_path)
    with pytest.raises(UsageError, match="No cache holds layer 12"):
        find_cache(None, Hook(12), tmp_path)
    write_cache({5: finite_bits(ROWS, D)}, name="two")
    assert [folder.name for folder in list_caches(tmp_path)] == ["one", "two"]
    with pytest.raises(UsageError, match=r"2 caches hold layer 5. Choose one:\n  --cache .*one .*\n  --cache .*two "):
        find_cache(None, Hook(5), tmp_path)


def test_find_cache_names_a_half_written_cache(tmp_path: Path, finite_bits, make_writer) -> None:
    make_writer(tmp_path / "half", {5: finite_bits(ROWS, D)}, 16)
    with pytest.raises(UsageError, match="No complete cache holds layer 5; .*half is half written"):
        find_cache(None, Hook(5), tmp_path)
    with pytest.raises(UsageError, match="No cache holds layer 7. Create .* --layer 7 --model none"):
        find_cache(None, Hook(7), tmp_path)  # completing the half-written cache would not add layer 7


def test_a_broken_cache_does_not_hide_the_others(tmp_path: Path, write_cache, finite_bits) -> None:
    """find_cache uses the caches that can be opened and warns about the others."""
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "zarr.json").write_text("{ torn")
    with (
        pytest.warns(LeftOutWarning, match="broken is left out: .*broken/zarr.json cannot be read"),
        pytest.raises(UsageError, match="No cache holds layer 5"),
    ):
        find_cache(None, Hook(5), tmp_path)
    intact = write_cache({5: finite_bits(ROWS, D)}, name="intact")
    with pytest.warns(LeftOutWarning, match="broken is left out"):
        assert find_cache(None, Hook(5), tmp_path).folder == intact.folder
    assert isinstance(list_caches(tmp_path)[tmp_path / "broken"], DamagedError)


def overwrite(folder: Path, **attributes: object) -> None:
    """Replace attributes of a cache, and remove its digest if it has one."""
    root = read_json(folder / "zarr.json")
    root["attributes"] = {k: v for k, v in (root["attributes"] | attributes).items() if k != "content_digest"}
    write_json(folder / "zarr.json", root)


NEIGHBOURS: dict[str, Callable[[Path], object]] = {
    "empty": lambda folder: (folder / "zarr.json").write_text(""),
    "a list": lambda folder: (folder / "zarr.json").write_text("[1]"),
    "binary": lambda folder: (folder / "zarr.json").write_bytes(bytes(range(256))),
    "a folder": lambda folder: ((folder / "zarr.json").unlink(), (folder / "zarr.json").mkdir()),
    "deep": lambda folder: (folder / "zarr.json").write_text("[" * 100_000),
    "a number of digits": lambda folder: (folder / "zarr.json").write_text("9" * 5000),
    "no attributes": lambda folder: (folder / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group"}'),
    "a newer format": lambda folder: overwrite(folder, format=99),
    "a format that is text": lambda folder: overwrite(folder, format="1"),
    "no identity": lambda folder: overwrite(folder, identity={}),
    "an identity that is a list": lambda folder: overwrite(folder, identity=[]),
    "a model that is text": lambda folder: overwrite(folder, identity={"model": "gemma", "data": {"name": "x"}}),
    "rows that are text": lambda folder: overwrite(folder, rows="forty"),
    "windows of no rows": lambda folder: overwrite(folder, window_rows=0),
    "an array of no hook": lambda folder: overwrite(folder, complete=["layer_5x"]),
    "an array that is a number": lambda folder: overwrite(folder, complete=[5]),
}


@pytest.mark.parametrize("spoil", NEIGHBOURS.values(), ids=NEIGHBOURS)
def test_whatever_a_neighbour_is_the_others_are_found(spoil, tmp_path: Path, write_cache, finite_bits) -> None:
    intact = write_cache({5: finite_bits(ROWS, D)}, name="intact")
    broken = Path(shutil.copytree(intact.folder, tmp_path / "broken"))
    spoil(broken)
    with pytest.warns(LeftOutWarning, match="broken is left out"):
        assert find_cache("none", Hook(5), tmp_path).folder == intact.folder
    listed = list_caches(tmp_path)
    assert isinstance(listed[broken], SaeError) and str(broken) in str(listed[broken])
    assert isinstance(listed[intact.folder], Cache)


def test_a_cache_is_found_by_its_fingerprint_wherever_a_good_copy_is(tmp_path: Path, write_cache, finite_bits) -> None:
    activations = tmp_path / "activations"
    cache = write_cache({5: finite_bits(ROWS, D)}, name="old")
    assert find_by_fingerprint(cache.fingerprint, cache.folder, activations).folder == cache.folder
    assert find_by_fingerprint("0" * 64, cache.folder, activations) is None
    moved = Path(shutil.copytree(cache.folder, activations / "moved"))
    assert find_by_fingerprint(cache.fingerprint, tmp_path / "gone", activations).folder == moved
    (cache.folder / "zarr.json").write_text("torn")
    assert find_by_fingerprint(cache.fingerprint, cache.folder, activations).folder == moved
    shutil.rmtree(moved)
    # the damage is reported, not a missing cache
    with pytest.raises(DamagedError, match="old/zarr.json cannot be read"):
        find_by_fingerprint(cache.fingerprint, cache.folder, activations)
