"""The environment record: the source revision, versions, and never an access token."""

import base64
import hashlib
import json
import shutil
import subprocess
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from sae.cli.main import app
from sae.common import environment as module
from sae.common.environment import describe_environment, environment_record, source_revision

TOKEN = "hf_thisIsASecretThatNobodyMaySee"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package of two files, in a folder with a test and a virtual environment that do not belong to the package."""
    for name in ("__init__.py", "train/loop.py", "tests/test_it.py", ".venv/lib/other.py"):
        (tmp_path / "package" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "package" / name).write_text(f"# {name}\n")
    monkeypatch.setattr(module, "ROOT", tmp_path / "package")
    source_revision.cache_clear()
    yield tmp_path / "package"
    source_revision.cache_clear()


def fresh_revision() -> dict:
    source_revision.cache_clear()
    return source_revision()


def commit(folder: Path) -> str:
    for words in (["init", "-q"], ["add", "-A"], ["-c", "user.name=a", "-c", "user.email=b", "commit", "-qm", "c"]):
        subprocess.run(["git", "-C", folder, *words], check=True)
    return subprocess.run(["git", "-C", folder, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()


@pytest.mark.skipif(shutil.which("git") is None, reason="no git")
def test_the_revision_is_the_commit_of_the_package_and_whether_it_changed(package: Path) -> None:
    """It is not that of the working directory, which may be another repository."""
    revision, first = commit(package), fresh_revision()
    assert first == {"commit": revision, "changed": False, "sha256": first["sha256"]}
    (package / "tests/test_it.py").write_text("# another\n")
    assert fresh_revision() == first
    (package / "train/new.py").write_text("# a new recipe\n")
    assert fresh_revision()["changed"] is True and fresh_revision()["sha256"] != first["sha256"]
    (package / "train/new.py").unlink()
    (package / "train/loop.py").write_text("# another\n")
    assert fresh_revision()["changed"] is True and fresh_revision()["commit"] == revision
    (package / "train/loop.py").unlink()
    assert fresh_revision()["changed"] is True


def recorded(package: Path, name: str) -> SimpleNamespace:
    value = base64.urlsafe_b64encode(hashlib.sha256((package / name).read_bytes()).digest()).decode().rstrip("=")
    return SimpleNamespace(locate=lambda: package / name, hash=SimpleNamespace(value=value), suffix=".py")


def test_an_installed_package_is_compared_with_its_wheel(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = [recorded(package, name) for name in ("__init__.py", "train/loop.py")]
    monkeypatch.setattr(module.metadata, "files", lambda name: installed)
    assert (fresh_revision()["commit"], fresh_revision()["changed"]) == (None, False)
    (package / "train/loop.py").write_text("# another\n")
    assert fresh_revision()["changed"] is True
    installed.clear()  # as if not installed from a wheel
    assert fresh_revision()["changed"] is None


def test_versions_are_recorded_and_tokens_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "WANDB_API_KEY", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, TOKEN if name != "OMP_NUM_THREADS" else "1")
    record = environment_record()
    assert record["versions"]["torch"] == version("torch") and record["variables"]["OMP_NUM_THREADS"] == "1"
    assert TOKEN not in json.dumps(record)


def test_no_file_and_no_output_contains_a_token(
    tiny_model: Path, sentences: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    out = home / "cache"
    commands = [
        f"harvest --model {tiny_model} --dataset {sentences} --layer 0 --tokens 600 --context 32 --out {out}",
        f"train --variant relu --layer 0 --cache {out} --steps 2 --batch-size 64",
        "env",
    ]
    for command in commands:
        result = CliRunner().invoke(app, command.split())
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


def test_the_report_says_if_the_hub_has_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert any(line.startswith("hub       not logged in") for line in describe_environment())
