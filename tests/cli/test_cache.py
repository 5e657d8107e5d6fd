"""`sae cache rm`: with a question and without."""

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from sae.cache.reader import Cache
from sae.cli.main import app


@pytest.fixture
def folder(tiny_cache: Cache, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_cache.folder, tmp_path / "cache"))


def rm(folder: Path, *words: str, answer: str | None = None) -> Result:
    return CliRunner().invoke(app, ["cache", "rm", str(folder), *words], input=answer)


def test_yes_deletes_without_asking(folder: Path) -> None:
    result = rm(folder, "--yes")
    assert result.exit_code == 0, result.output
    assert "Delete" not in result.output and f"{folder} deleted" in result.output and "freed" in result.output
    assert not folder.exists()


def test_a_question_is_asked_first(folder: Path) -> None:
    kept = rm(folder, answer="n\n")
    assert kept.exit_code == 0 and f"Delete {folder} (" in kept.output and "nothing was deleted" in kept.output
    assert folder.exists()
    assert rm(folder, answer="y\n").exit_code == 0 and not folder.exists()


def test_nobody_answers(folder: Path) -> None:
    """Standard input is closed: nothing is deleted, and the message names --yes."""
    result = rm(folder)
    assert result.exit_code == 130 and "Use --yes to delete without confirmation" in result.output and folder.exists()


def test_a_folder_that_is_no_cache_is_never_deleted(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("do not delete")
    assert rm(tmp_path, "--yes").exit_code == 2 and (tmp_path / "thesis.txt").exists()
