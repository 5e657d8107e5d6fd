"""Deleting a cache.

Only caches are deleted, and not while they are read. At no moment of a deletion do the remains count as a cache.
"""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sae.cache.reader import Cache
from sae.cache.removal import kept_caches, remove_cache
from sae.cache.writer import harvest_started
from sae.common.errors import UnavailableError, UsageError
from sae.common.locks import writer_lock

NOTHING = "holds no activation cache; nothing was deleted"


def test_only_a_cache_is_deleted(cache: Cache, tmp_path: Path) -> None:
    other, notes = tmp_path / "other.zarr", tmp_path / "notes"
    for folder in (other, notes):
        folder.mkdir()
        (folder / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}')
    (notes / ".lock").touch()
    for folder in (other, notes, cache.folder / "layer_05"):
        with pytest.raises(UsageError, match=NOTHING):
            remove_cache(folder)
        assert (folder / "zarr.json").exists()
    (tmp_path / "tree" / "empty").mkdir(parents=True)
    for folder in (tmp_path / "tree", tmp_path / "absent"):
        with pytest.raises(UsageError, match=NOTHING):
            remove_cache(folder)
    assert (tmp_path / "tree" / "empty").is_dir()


class Killed(BaseException):
    """Raised in place of a kill signal, so that one process can be killed many times. Nothing is deleted afterwards."""


def killed_at(number: int, work: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> int:
    """Do `work`, but raise `Killed` when it deletes a file or folder after `number` others.

    Returns the number of files and folders that it deleted or tried to delete.
    """
    done = 0

    def counted(delete: Callable[..., None]) -> Callable[..., None]:
        def one(*args: object, **more: object) -> None:
            nonlocal done
            done += 1
            if done <= number:
                delete(*args, **more)
            elif done == number + 1:
                raise Killed

        return one

    with monkeypatch.context() as patched, contextlib.suppress(Killed):
        patched.setattr(os, "unlink", counted(os.unlink))
        patched.setattr(os, "rmdir", counted(os.rmdir))
        work()
    return done


def without_records(folder: Path) -> None:
    (folder / "harvest.json").unlink(missing_ok=True)


def only_a_draft(folder: Path) -> None:
    without_records(folder)
    (folder / "tokens" / "commit.json").unlink()
    (folder / "tokens" / "draft").mkdir()
    (folder / "tokens" / "draft" / "part").touch()


@pytest.mark.parametrize("change", [lambda folder: (folder / "harvest.json").touch(), without_records, only_a_draft])
def test_a_deletion_that_is_killed_is_finished_by_the_next(
    change: Callable[[Path], object], two_layer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process that deletes is killed before each of several files and folders.

    After the first deletion the folder is no longer a cache; before the last one it is empty.
    """
    folder = tmp_path / "cache"

    def remove_until(number: int) -> int:
        shutil.copytree(two_layer_folder, folder)
        change(folder)
        return killed_at(number, lambda: remove_cache(folder), monkeypatch)

    deleted, left = remove_until(1000), []
    assert deleted > 30 and not folder.exists()
    for number in (*range(0, deleted - 12, 4), *range(deleted - 12, deleted)):
        remove_until(number)
        assert (folder / "zarr.json").exists() == (number == 0)
        if folder.exists():
            left.append(len(list(folder.iterdir())))
            remove_cache(folder)
            assert not folder.exists()
    assert left[-1] == 0 < left[-2]


def test_what_a_killed_deletion_leaves_is_not_harvested_into(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    (cache.folder / "harvest.json").touch()
    commits = len(list((cache.folder / "commits").iterdir()))
    killed_at(2 + commits, lambda: remove_cache(cache.folder), monkeypatch)
    with pytest.raises(
        UsageError, match=f"no activation cache .`sae cache rm {cache.folder}` deletes the remains of one"
    ):
        harvest_started(cache.folder, cache.fingerprint)
    assert remove_cache(cache.folder) > 0


def test_a_link_to_a_cache_goes_with_it(cache: Cache, tmp_path: Path) -> None:
    kept, link = tmp_path / "kept", tmp_path / "link"
    kept.mkdir()
    (kept / "notes.txt").write_text("mine")
    (cache.folder / "more").symlink_to(kept)
    link.symlink_to(cache.folder)
    remove_cache(link)
    assert not cache.folder.exists() and not link.is_symlink() and (kept / "notes.txt").read_text() == "mine"
    # A deletion that was killed before it removed the link leaves it like this, and so does a disk that is not mounted.
    link.symlink_to(cache.folder)
    with pytest.raises(
        UsageError, match=f"link is a link to {cache.folder}, which does not exist; nothing was deleted"
    ):
        remove_cache(link)
    assert link.is_symlink()


READ = """
import sys
from sae.cache.removal import kept_caches
with kept_caches([sys.argv[1]], "sae train"):
    print("reads", flush=True)
    sys.stdin.read()
"""


def test_a_cache_that_is_read_is_not_deleted(cache: Cache) -> None:
    """The error names a process that reads the cache. A process that was killed is not named and blocks nothing."""
    before = sorted(cache.folder.rglob("*"))

    def read() -> subprocess.Popen[str]:
        words = [sys.executable, "-c", READ, str(cache.folder)]
        process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None and process.stdout.readline() == "reads\n"
        return process

    first, second = read(), read()
    for process, end in ((second, second.kill), (first, lambda: first.communicate(""))):
        with pytest.raises(UnavailableError, match=rf"is being read by process {process.pid} on \S+ \(sae train\)"):
            remove_cache(cache.folder)
        with writer_lock(cache.folder, "sae harvest"):  # adds layers meanwhile
            pass
        end()
        process.wait()
    assert sorted(path for path in cache.folder.rglob("*") if path.name != ".lock") == before
    remove_cache(cache.folder)


def test_a_cache_that_is_deleted_is_not_read(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    def look(path: Path) -> None:
        with pytest.raises(UnavailableError, match=r"is being deleted by process \d+ on \S+ \(sae cache rm\)"):
            with kept_caches([str(cache.folder)], "sae train"):
                pass
        raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(os, "rmdir", look)
        remove_cache(cache.folder)
    with pytest.raises(UsageError, match="it has been deleted"), kept_caches([str(cache.folder)], "sae train"):
        pass
    remove_cache(cache.folder)
    with pytest.raises(UsageError, match="it has been deleted"), kept_caches([str(cache.folder)], "sae train"):
        pass
    assert not cache.folder.exists()


def test_reading_needs_no_lock(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder may belong to someone else, or its file system may have no locks."""
    before = sorted(cache.folder.rglob("*"))

    def refused(path: Path, *args: object) -> int:
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", refused)
        with kept_caches([str(cache.folder), "s3://bucket/pile"], "sae train"):
            pass
    assert sorted(cache.folder.rglob("*")) == before
