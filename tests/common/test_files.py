"""Records, digests and the lock of a folder's writer."""

import errno
import os
import re
from pathlib import Path

import pytest

from sae.common.errors import UnavailableError, UsageError
from sae.common.files import (
    atomic_create,
    atomic_write,
    digest_of,
    remove_stale_files,
    temporary_path,
    temporary_process,
    writer_lock,
)


def test_digest_of_ignores_the_order_of_keys() -> None:
    assert digest_of({"a": 1, "b": [2, 3]}) == digest_of({"b": [2, 3], "a": 1}) != digest_of({"a": 1, "b": [3, 2]})


def test_two_writers_of_one_file_do_not_take_each_other_s_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second begins and ends before the first has flushed: of another container with the same process id."""
    path, flush, names = tmp_path / "a.json", os.fsync, []

    def second(descriptor: int) -> None:
        monkeypatch.setattr(os, "fsync", flush)
        names.extend(p.name for p in tmp_path.iterdir())
        atomic_write(path, b"second")
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", second)
    atomic_write(path, b"fir", b"st")
    assert path.read_bytes() == b"first" and [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert re.fullmatch(rf"a\.json\.tmp-{os.getpid()}-[0-9a-f]{{8}}", names[0])


def test_a_file_whose_temporary_file_was_removed_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that takes the lock removes the temporary files of those whom it takes for dead."""
    flush = os.fsync

    def removed(descriptor: int) -> None:
        monkeypatch.setattr(os, "fsync", flush)
        assert remove_stale_files(tmp_path) == 1

    monkeypatch.setattr(os, "fsync", removed)
    atomic_write(tmp_path / "a", b"content")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a", b"content")]
    monkeypatch.setattr(os, "fsync", lambda descriptor: remove_stale_files(tmp_path))
    with pytest.raises(UnavailableError, match="Cannot write"):
        atomic_write(tmp_path / "a", b"more")


@pytest.mark.parametrize("links", [True, False])
def test_of_several_that_create_a_file_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    if not links:  # as on exFAT
        monkeypatch.setattr(os, "link", refuse)
    assert atomic_create(tmp_path / "a", b"fir", b"st") and not atomic_create(tmp_path / "a", b"second")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a", b"first")]


@pytest.mark.parametrize(
    ("name", "process"),
    [
        ("c.0.0.tmp-12345", 12345), ("a.json.tmp-7-0badcafe", 7), (".writable.tmp-1-00000000", 1),
        *((name, None) for name in ("a.tmp-x", "a.tmp-", "a.tmp-5-xyz", "a.tmp-5-0badcafe0", "a.tmp-\u0663", "tmp-5")),
    ],
)  # fmt: skip
def test_a_temporary_file_names_its_process(name: str, process: int | None) -> None:
    assert temporary_process(Path(name)) == process


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
