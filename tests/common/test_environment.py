"""What a run was made with: which source, which versions, and never a token."""

import base64
import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from sae.cli.main import app
from sae.common import environment as module
from sae.common.environment import environment_record, source_revision

TOKEN = "hf_thisIsASecretThatNobodyMaySee"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package of two files, with a test and an environment that are not of it."""
    for name in ("__init__.py", "train/loop.py", "tests/test_it.py", ".venv/lib/other.py"):
        (tmp_path / "package" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "package" / name).write_text(f"# {name}\n")
    monkeypatch.setattr(module, "ROOT", tmp_path / "package")
    source_revision.cache_clear()
    yield tmp_path / "package"
    source_revision.cache_clear()


def again() -> dict:
    source_revision.cache_clear()
    return source_revision()


def commit(folder: Path) -> str:
    for words in (["init", "-q"], ["add", "-A"], ["-c", "user.name=a", "-c", "user.email=b", "commit", "-qm", "c"]):
        subprocess.run(["git", "-C", folder, *words], check=True)
    return subprocess.run(["git", "-C", folder, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()


@pytest.mark.skipif(shutil.which("git") is None, reason="no git")
def test_the_source_is_the_commit_of_the_package_and_whether_it_was_changed(package: Path) -> None:
    """Not of the working directory, which may be a repository too."""
    revision, first = commit(package), again()
    assert first == {"commit": revision, "changed": False, "sha256": first["sha256"]}
    (package / "tests/test_it.py").write_text("# another\n")
    assert again() == first
    (package / "train/new.py").write_text("# a new recipe\n")
    assert again()["changed"] is True and again()["sha256"] != first["sha256"]
    (package / "train/new.py").unlink()
    (package / "train/loop.py").write_text("# another\n")
    assert again()["changed"] is True and again()["commit"] == revision
    (package / "train/loop.py").unlink()
    assert again()["changed"] is True


def recorded(package: Path, name: str) -> SimpleNamespace:
    value = base64.urlsafe_b64encode(hashlib.sha256((package / name).read_bytes()).digest()).decode().rstrip("=")
    return SimpleNamespace(locate=lambda: package / name, hash=SimpleNamespace(value=value), suffix=".py")


def test_of_a_wheel_the_files_are_compared_with_what_was_installed(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = [recorded(package, name) for name in ("__init__.py", "train/loop.py")]
    monkeypatch.setattr(module.metadata, "files", lambda name: installed)
    assert (again()["commit"], again()["changed"]) == (None, False)
    (package / "train/loop.py").write_text("# another\n")
    assert again()["changed"] is True
    installed.clear()  # nothing can tell
    assert again()["changed"] is None


def test_versions_are_recorded_and_tokens_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "WANDB_API_KEY", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, TOKEN if name != "OMP_NUM_THREADS" else "1")
    found = environment_record()
    assert found["versions"]["torch"] == version("torch") and found["variables"]["OMP_NUM_THREADS"] == "1"
    assert TOKEN not in json.dumps(found)


def test_nothing_on_the_disk_or_the_screen_has_a_token(
    tiny_model: Path, sentences: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    out = home / "cache"
    commands = [
        ["harvest", "--model", tiny_model, "--dataset", sentences, "--layer", 0, "--tokens", 600, "--context", 32, "--out", out],
        ["train", "--variant", "relu", "--layer", 0, "--cache", out, "--steps", 2, "--batch-size", 64],
        ["env"],
    ]  # fmt: skip
    for words in commands:
        result = CliRunner().invoke(app, [str(word) for word in words])
        assert result.exit_code == 0, result.output
        assert TOKEN not in result.output
    assert "hub       logged in, files in" in result.stdout and version("torch") in result.stdout
    assert not [path for path in home.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    (run,) = (home / "runs").iterdir()
    for record in (json.loads((run / "run.json").read_text()), json.loads((out / "harvest.json").read_text())):
        assert record["environment"]["versions"]["transformers"] == version("transformers")
        assert record["environment"]["source"] == source_revision()
    made_with = json.loads(next((out / "commits").iterdir()).read_text())["made_with"]
    assert made_with["source"] == source_revision() and made_with["torch"] == version("torch")


def test_the_report_says_when_nobody_is_logged_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    get: Callable[[], None] = lambda: None  # noqa: E731
    monkeypatch.setattr(huggingface_hub, "get_token", get)
    assert "hub       not logged in" in CliRunner().invoke(app, ["env"]).stdout
