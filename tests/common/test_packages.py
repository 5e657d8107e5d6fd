"""Messages name packages that are older than declared, and the extra that a missing package belongs to."""

import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from sae.cli.console import cli_command
from sae.cli.main import app
from sae.common.errors import UnavailableError
from sae.common.packages import EXTRAS, PACKAGE, import_extra, numbers, outdated_packages

OUTSIDE = 4


def install(folder: Path, name: str, version: str) -> None:
    """Write the metadata that pip would write for a package, as far as its version needs it."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


@pytest.fixture
def old_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose packages take precedence over installed ones. It also replaces the declared lowest versions."""
    declared = ["transformers>=5.0", "numpy>=2.2", 'peft>=0.18; extra == "adapters"', 'hypothesis>=6; extra == "test"']
    monkeypatch.setattr("sae.common.packages.metadata.requires", {PACKAGE: declared}.get)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("older", "newer"),
    [
        ("4.57.6", "5.0"),
        ("5.9", "5.10"),
        ("2", "2.0.1"),
        ("0.9.3rc1", "0.10"),
        ("2.9.1+cpu", "2.13.0+cpu"),
        ("2026.1", "2026.10.5"),
    ],
)
def test_versions_are_compared_by_their_numbers(older: str, newer: str) -> None:
    assert numbers(older) < numbers(newer)


@pytest.mark.parametrize("version", ["2.13", "2.13.0", "2.13.0+cpu", "2.13.0rc1", "2.13.0.post2"])
def test_what_follows_the_numbers_does_not_count(version: str) -> None:
    assert numbers(version) == (2, 13)


def test_nothing_installed_here_is_older_than_declared() -> None:
    assert outdated_packages() == []


def test_an_older_package_is_named_with_the_version_that_is_needed(old_packages: Path) -> None:
    install(old_packages, "transformers", "4.57.6")
    (sentence,) = outdated_packages()
    assert sentence == (
        "transformers 4.57.6 is installed, but sae-pipeline needs 5.0 or newer: pip install 'transformers>=5.0'."
    )
    install(old_packages, "peft", "0.1.0")  # needed by an extra
    install(old_packages, "hypothesis", "1.0")  # needed by the tests
    assert [s.split()[0] for s in outdated_packages()] == ["transformers", "peft"]


def test_every_command_names_it_before_it_begins(old_packages: Path) -> None:
    install(old_packages, "transformers", "4.57.6")
    result = CliRunner().invoke(app, ["cache", "info", "nothing/here"])
    assert result.stderr.startswith("note     transformers 4.57.6 is installed, but sae-pipeline needs ")
    report = CliRunner().invoke(app, ["env"])
    assert "outdated  transformers 4.57.6 is installed" in report.stdout


def test_what_an_older_package_lacks_is_a_sentence(old_packages: Path) -> None:
    @cli_command
    def use() -> None:
        from json import a_newer_function  # noqa: F401

    program = typer.Typer(add_completion=False)
    program.command()(use)
    result = CliRunner().invoke(program)
    assert isinstance(result.exception, ImportError)  # a bug of ours: with its traceback
    install(old_packages, "transformers", "4.57.6")
    result = CliRunner().invoke(program)
    assert result.exit_code == OUTSIDE and "Traceback" not in result.output
    assert "error: ImportError: cannot import name 'a_newer_function'" in result.stderr
    assert "Update the packages in the notes above" in result.stderr


@pytest.mark.parametrize("extra", EXTRAS)
def test_a_missing_extra_is_named(extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, EXTRAS[extra], None)
    monkeypatch.setattr("sae.common.packages.installed_version", lambda name: None)
    with pytest.raises(UnavailableError) as error:
        import_extra(extra, "What I want")
    needed = f"What I want needs {EXTRAS[extra]}, which is not installed: pip install 'sae-pipeline[{extra}]'."
    assert str(error.value) == needed


def test_an_extra_that_cannot_be_imported_is_named_with_its_version(old_packages: Path, monkeypatch) -> None:
    monkeypatch.delitem(sys.modules, "peft", raising=False)
    install(old_packages, "peft", "0.3.0")
    (old_packages / "peft.py").write_text("raise ImportError(\"cannot import name 'Cache' from 'transformers'\")\n")
    with pytest.raises(UnavailableError, match=r"peft 0.3.0 cannot be imported \(cannot import name.*install -U"):
        import_extra("adapters", "--adapter")
