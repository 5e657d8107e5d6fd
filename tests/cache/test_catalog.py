"""The caches under activations/: which one is found, and which folders may be deleted."""

from pathlib import Path

import pytest

from sae.cache.catalog import find_cache, list_caches, remove_cache
from sae.cache.layout import Hook
from sae.cache.reader import Cache
from sae.common.errors import DamagedError, UsageError

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


def test_a_broken_cache_does_not_hide_the_others(tmp_path: Path, write_cache, finite_bits) -> None:
    """find_cache uses the caches that open; its error message names those that do not."""
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "zarr.json").write_text("{ torn")
    with pytest.raises(UsageError, match=r"No cache holds layer 5.*(?s:.*)broken/zarr.json cannot be read"):
        find_cache(None, Hook(5), tmp_path)
    intact = write_cache({5: finite_bits(ROWS, D)}, name="intact")
    assert find_cache(None, Hook(5), tmp_path).folder == intact.folder
    assert isinstance(list_caches(tmp_path)[tmp_path / "broken"], DamagedError)


def test_only_a_cache_is_deleted(cache: Cache, tmp_path: Path) -> None:
    other = tmp_path / "other.zarr"
    other.mkdir()
    (other / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}')
    for folder in (other, cache.folder / "layer_05"):
        with pytest.raises(UsageError, match="holds no activation cache; nothing was deleted"):
            remove_cache(folder)
        assert (folder / "zarr.json").exists()
