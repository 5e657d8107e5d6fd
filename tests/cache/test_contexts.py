"""Contexts are read back as they were written, and are complete only if all of their files exist."""

from pathlib import Path

import numpy as np
import pytest

from sae.cache.contexts import Contexts
from sae.common.errors import DamagedError
from sae.common.files import read_json


@pytest.fixture
def contexts() -> Contexts:
    ids = np.arange(24, dtype=np.uint32).reshape(3, 8)
    document = np.array([0, 0, 1], np.uint32)
    return Contexts(ids, np.array([8, 5, 8], np.uint16), document, np.array([False, False, True]))


def test_contexts_are_read_as_written(contexts: Contexts, tmp_path: Path) -> None:
    contexts.write(tmp_path)
    assert Contexts.is_complete(tmp_path)
    assert read_json(tmp_path / "tokens" / "commit.json")["files"] == contexts.file_records()
    held_out = Contexts.read(tmp_path).select(contexts.held_out)
    assert len(held_out) == 1 and np.array_equal(held_out.ids, contexts.ids[2:])
    assert held_out.length.tolist() == [8] and held_out.document.tolist() == [1]


def test_a_missing_file_makes_contexts_incomplete(contexts: Contexts, tmp_path: Path) -> None:
    assert not Contexts.is_complete(tmp_path)
    contexts.write(tmp_path)
    (tmp_path / "tokens/length/c.0").unlink()
    assert not Contexts.is_complete(tmp_path)
    with pytest.raises(DamagedError, match="tokens/length/c.0 is listed in the cache but missing"):
        Contexts.read(tmp_path)
