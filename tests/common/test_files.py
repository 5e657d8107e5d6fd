"""Records, digests and the lock of a folder's writer."""

import os
from pathlib import Path

import pytest

from sae.common.errors import UnavailableError, UsageError
from sae.common.files import digest_of, remove_stale_files, writer_lock


def test_digest_of_ignores_the_order_of_keys() -> None:
    assert digest_of({"a": 1, "b": [2, 3]}) == digest_of({"b": [2, 3], "a": 1}) != digest_of({"a": 1, "b": [3, 2]})


def test_the_lock_deletes_stale_files(tmp_path: Path) -> None:
    stale, other = tmp_path / "layer_05" / "c.0.0.tmp-12345", tmp_path / "layer_05" / "notes.tmp-x"
    stale.parent.mkdir()
    for file in (stale, other):
        file.write_bytes(b"half")
    with writer_lock(tmp_path, "sae harvest"):
        assert not stale.exists() and other.exists() and remove_stale_files(tmp_path) == 0


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
