"""Locks of folders: for one writer, for several that share a folder, and on a disk without locks."""

import errno
import fcntl
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sae.common import locks
from sae.common.errors import UnavailableError, UsageError
from sae.common.files import remove_stale_files, temporary_path
from sae.common.locks import is_locked, shared_lock, was_abandoned, writer_lock


def test_the_lock_deletes_stale_files(tmp_path: Path) -> None:
    folder = tmp_path / "layer_05"
    stale, other = [folder / "c.0.0.tmp-12345", temporary_path(folder / "c.1.0")], folder / "notes.tmp-x"
    folder.mkdir()
    for file in (*stale, other):
        file.write_bytes(b"half")
    with writer_lock(tmp_path, "sae harvest"):
        assert list(folder.iterdir()) == [other] and remove_stale_files(tmp_path) == 0


def test_taking_over_a_lock_names_its_dead_holder(tmp_path: Path) -> None:
    holder = "process 4121 on node7 (sae harvest) since 2026-11-21 09:00:00"
    (tmp_path / ".lock.holder").write_text(holder)
    messages: list[str] = []
    with writer_lock(tmp_path, "sae harvest", messages.append):
        pass
    assert messages == [f"{tmp_path} was locked by {holder}, which no longer runs; its lock was taken over."]
    with writer_lock(tmp_path, "sae harvest", messages.append):
        assert len(messages) == 1


def test_taking_over_a_lock_with_an_empty_note(tmp_path: Path) -> None:
    messages: list[str] = []
    (tmp_path / ".lock.holder").write_text("")
    with writer_lock(tmp_path, "a test", messages.append):
        pass
    assert messages == [f"{tmp_path} was locked by another process, which no longer runs; its lock was taken over."]


def test_a_file_in_the_way_of_the_folder_raises(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("years of work")
    for folder in (tmp_path / "file", tmp_path / "file" / "cache"):
        with pytest.raises(UsageError, match="is not a folder: a file is in its place"), writer_lock(folder, "a test"):
            pass


def test_a_second_writer_raises_and_names_the_first(tmp_path: Path) -> None:
    with writer_lock(tmp_path, "sae harvest"):
        with pytest.raises(
            UnavailableError, match=rf"is being written by process {os.getpid()} on .* \(sae harvest\)"
        ) as raised:
            with writer_lock(tmp_path, "sae harvest"):
                pass
        assert raised.value.exit_code == 4
    with writer_lock(tmp_path, "sae train"):
        pass


def test_shares_hold_the_folder_together_and_keep_others_out(tmp_path: Path) -> None:
    with shared_lock(tmp_path, "sae harvest --share 1/2"):
        with shared_lock(tmp_path, "sae harvest --share 2/2"):
            with pytest.raises(UnavailableError, match=r"is being written by process .*--share 2/2\) since"):
                with writer_lock(tmp_path, "sae cache repair"):
                    pass
            stale = tmp_path / "c.0.0.tmp-12345"
            stale.write_bytes(b"half")
        assert stale.exists()  # it could belong to the other share
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    with writer_lock(tmp_path, "sae harvest"):
        with (
            pytest.raises(UnavailableError, match=r"\(sae harvest\) since"),
            shared_lock(tmp_path, "sae harvest --share"),
        ):
            pass


def test_a_share_that_comes_while_the_last_one_tidies_up_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last share locks the folder exclusively to tidy up. A new share waits for it and is not refused."""
    held, tidied, remove = threading.Event(), [], locks.remove_stale_files

    def second() -> None:
        with shared_lock(tmp_path, "sae harvest --share 2/2"):
            held.set()

    def tidy(folder: Path) -> int:
        if not tidied:
            tidied.append(pool.submit(second))
            assert not held.wait(0.1)
        return remove(folder)

    monkeypatch.setattr(locks, "remove_stale_files", tidy)
    with ThreadPoolExecutor(1) as pool:
        with shared_lock(tmp_path, "sae harvest --share 1/2"):
            pass
        tidied[0].result(timeout=20)
    assert held.is_set() and [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_look_at_a_lock_does_not_refuse_a_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checking whether a folder is locked takes a shared lock for a moment; the writer waits for it."""
    monkeypatch.setattr(locks, "LOOK_SECONDS", 20.0)
    look, slept = locks.acquire(tmp_path / ".lock", fcntl.LOCK_SH), []

    def sleep(seconds: float) -> None:
        if not slept:
            locks.release(look)
        slept.append(seconds)

    monkeypatch.setattr(locks.time, "sleep", sleep)
    with writer_lock(tmp_path, "sae train"):
        assert is_locked(tmp_path) and len(slept) == 1


def test_a_lock_whose_file_was_removed_is_taken_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process waits for the lock while another one deletes the folder. A lock on a deleted file excludes nobody."""
    path = tmp_path / "cache" / ".lock"
    other, flock = locks.acquire(path, fcntl.LOCK_EX), locks.flock

    def remove_before(descriptor: int, mode: int) -> None:
        monkeypatch.setattr(locks, "flock", flock)
        shutil.rmtree(path.parent)
        locks.release(other)
        flock(descriptor, mode)

    monkeypatch.setattr(locks, "flock", remove_before)
    mine = locks.acquire(path, fcntl.LOCK_EX, 0)
    assert locks.is_file_of(path, mine)
    with pytest.raises(BlockingIOError):
        locks.acquire(path, fcntl.LOCK_EX, 0)
    locks.release(mine)


@pytest.mark.parametrize("error", [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP])
def test_a_disk_without_locks_is_refused_where_two_writers_would_mix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    """The mere existence of a file is not used as a lock: after a kill it would lock the folder forever."""

    def refuse(*_: object) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(fcntl, "flock", refuse)
    for _ in range(2):
        with (
            pytest.raises(UnavailableError, match=r"cannot be locked \(.*Mount its file system with locks"),
            writer_lock(tmp_path, "sae train"),
        ):
            pass
    assert not is_locked(tmp_path) and not was_abandoned(tmp_path)
    with (
        shared_lock(tmp_path, "sae harvest --share 1/2"),  # the windows of a share do not depend on the lock
        shared_lock(tmp_path, "sae harvest --share 2/2"),
    ):
        (tmp_path / "c.0.0.tmp-12345").touch()
    assert (tmp_path / "c.0.0.tmp-12345").exists()  # it could belong to a third share
    monkeypatch.undo()
    with writer_lock(tmp_path, "sae train"):
        assert is_locked(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_holder_that_has_just_ended_has_no_name(tmp_path: Path) -> None:
    lock = locks.acquire(tmp_path / ".lock", fcntl.LOCK_EX)
    with pytest.raises(UnavailableError, match="is being written by another process"), shared_lock(tmp_path, "a share"):
        pass
    locks.release(lock)
