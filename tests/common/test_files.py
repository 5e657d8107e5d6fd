"""Files that are whole or absent, their temporary names, and digests."""

import errno
import os
import re
from pathlib import Path

import pytest

from sae.common.errors import UnavailableError
from sae.common.files import (
    atomic_create,
    atomic_write,
    digest_of,
    remove_stale_files,
    temporary_process,
)


def test_digest_of_ignores_the_order_of_keys() -> None:
    assert digest_of({"a": 1, "b": [2, 3]}) == digest_of({"b": [2, 3], "a": 1}) != digest_of({"a": 1, "b": [3, 2]})


def test_two_writers_of_one_file_do_not_take_each_other_s_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second writer, in a container with the same process ID, starts and ends before the first has flushed."""
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
    """A worker that acquires the lock removes the temporary files of workers that it assumes to be dead."""
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
