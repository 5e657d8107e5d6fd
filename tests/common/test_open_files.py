"""If too many files are open, the error says the limit, and no file is reported as damaged."""

import errno
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from sae.cache.chunks import FEW_CHUNKS, OPEN_CHUNKS, most_open_chunks
from sae.cache.contexts import Contexts
from sae.cache.layout import FORMAT, Layout
from sae.cache.opening import concat_caches
from sae.cache.place import FolderPlace
from sae.cache.reader import Cache
from sae.cache.writer import CacheWriter, WindowRows
from sae.common.errors import DamagedError, Interrupted, UnavailableError
from sae.common.files import atomic_write, read_file
from sae.common.open_files import (
    ENOUGH_FILES,
    explaining_files_limit,
    files_limits,
    raise_files_limit,
    ran_out_of_files,
)
from sae.harvest.repair import remove_damaged_records

SENTENCE = r"Too many files are open.*The limit is 3 open files: `ulimit -n` shows it, and `ulimit -n 4096` raises it"
CHUNKS = 80


@pytest.fixture
def set_limit() -> Iterator[Callable[[int | None], None]]:
    """set_limit(n) lets this process open n files. set_limit(None), or the end of the test, restores the old limit."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)

    def limit(files: int | None) -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, before if files is None else (files, before[1]))

    yield limit
    limit(None)


@pytest.fixture
def make_cache(tmp_path: Path) -> Callable[[int], Cache]:
    """make_cache(seed) -> a cache of one layer in 80 windows of one chunk each."""

    def make(seed: int) -> Cache:
        folder, rows = tmp_path / f"cache{seed}", 4 * CHUNKS
        ids = np.zeros((rows, 2), np.uint32)
        Contexts(ids, np.full(rows, 2, np.uint16), np.arange(rows, dtype=np.uint32), np.zeros(rows, bool)).write(folder)
        model = {"name": "none", "revision": "0"}
        identity = {
            "format": FORMAT, "model": model, "data": {"name": f"text {seed}", "revision": str(seed)},
            "dtype": "float32", "attention": "eager", "tokenizer": "0" * 64, "context": 2, "held_out": 0, "skip": [],
            "pack": False, "seed": 0,
        }  # fmt: skip
        writer = CacheWriter(folder, identity, Layout(rows, 4), {"layer_05": 2})
        bits = np.full((4, 2), 0x3F80, np.uint16)  # 1.0
        for window in range(CHUNKS):
            row_ctx, row_pos = np.arange(4, dtype=np.uint32) + 4 * window, np.ones(4, np.uint16)
            writer.write_window(window, WindowRows({"layer_05": bits}, row_ctx, row_pos), {})
        writer.finish()
        return Cache(folder)

    return make


def test_reading_and_writing_name_the_limit(set_limit, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}")
    set_limit(3)
    for call in (lambda: read_file(tmp_path / "a.json"), lambda: atomic_write(tmp_path / "b.json", b"{}")):
        with pytest.raises(UnavailableError, match=SENTENCE) as raised:
            call()
        assert raised.value.exit_code == 4 and str(tmp_path) in str(raised.value)
    set_limit(None)
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_cache_is_not_called_damaged(set_limit, make_cache) -> None:
    cache = make_cache(0)
    files = {path: path.read_bytes() for path in cache.folder.rglob("*") if path.is_file()}
    listed = len(cache.manifest["files"])
    set_limit(3)
    for call in (
        lambda: Cache(cache.folder),
        lambda: list(cache.verify()),
        lambda: cache.read_chunk("layer_05", 0),
        lambda: cache.row_norms("layer_05"),
        lambda: cache.contexts(held_out=False),
        lambda: list(remove_damaged_records(FolderPlace(cache.folder))),  # deletes damaged records
    ):
        with pytest.raises(UnavailableError, match=SENTENCE), explaining_files_limit():
            call()
    set_limit(None)
    assert {path: path.read_bytes() for path in cache.folder.rglob("*") if path.is_file()} == files
    assert len(list(cache.verify())) == listed


@pytest.mark.slow
def test_caches_keep_to_the_limit(set_limit, make_cache) -> None:
    """Every chunk and norm of two caches is read, though fewer files can be opened than one of them has chunks."""
    folders = [make_cache(seed).folder for seed in (0, 1)]
    used = max(map(int, os.listdir("/proc/self/fd"))) if Path("/proc/self/fd").exists() else 40
    set_limit(used * 4 // 3 + 30)  # maps take at most a quarter of the limit
    caches = concat_caches(folders)
    assert len(caches.outlier_rows("layer_05")) == 0 and len(caches.caches[1].row_norms("layer_05")) == 4 * CHUNKS
    for _ in range(2):
        for chunk in range(2 * CHUNKS):
            (rows,) = caches.read_rows("layer_05", chunk, 0, 4)
            assert (rows == 0x3F80).all()


def test_the_limit_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    for soft, caches, chunks in ((1024, 1, OPEN_CHUNKS), (1024, 4, 64), (64, 1, 16), (64, 4, FEW_CHUNKS), (8, 1, 4)):
        monkeypatch.setattr("sae.cache.chunks.files_limits", lambda soft=soft: (soft, soft))
        assert most_open_chunks(caches) == chunks


def test_the_soft_limit_is_raised(set_limit) -> None:
    set_limit(100)
    raise_files_limit()
    soft, hard = files_limits()
    assert soft == min(hard, ENOUGH_FILES) >= 100


def test_what_libraries_make_of_it_is_recognized() -> None:
    system = OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    assert ran_out_of_files(system) and ran_out_of_files(RuntimeError("opening x: Too many open files (os error 24)"))
    try:
        try:
            raise system
        except OSError as error:
            raise DamagedError("model.safetensors was overwritten") from error
    except DamagedError as error:
        wrapped = error
    with pytest.raises(UnavailableError, match="ulimit -n"), explaining_files_limit():
        raise wrapped
    with pytest.raises(DamagedError, match="really"), explaining_files_limit():
        raise DamagedError("really")
    with pytest.raises(Interrupted), explaining_files_limit():
        raise Interrupted("Stopped.") from system
