"""`sae data` lists the data sets, and downloads each only once."""

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from sae.cli.main import app
from sae.evaluate.datasets import sae_probes

from ..probe_wheel import write_wheel


def ask(*words: str) -> Result:
    return CliRunner().invoke(app, ["data", *words])


def test_the_list_says_source_license_size_and_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = ask("list")
    assert listed.exit_code == 0 and ask().output == listed.output
    for part in (
        "source   PyPI, sae-probes",
        "arXiv 2502.16681",
        "license  MIT",
        "45.0 MB",
        "not on this machine; `sae data get sae-probes` downloads it",
    ):
        assert part in listed.output
    missing = ask("list", "sae-probes")
    assert missing.exit_code == 4 and "Get them with `sae data get sae-probes`" in missing.output
    got = ask("get", "sae-probes", "--wheel", str(write_wheel(tmp_path, monkeypatch)))
    assert got.exit_code == 0 and f"done     sae-probes is in {sae_probes.data_folder()}" in got.output
    assert "with pip or uv" not in got.output and "license  MIT" in got.output and "next     sae evaluate" in got.output
    again = ask("get", "sae-probes")
    assert again.exit_code == 0 and "is already in" in again.output
    assert f"in {sae_probes.data_folder()} (45.0 MB)" in ask().output
    table = ask("list", "sae-probes")
    assert table.exit_code == 0 and "2 data sets of sae-probes" in table.output and "license" not in table.output
    assert all(part in table.output for part in ("5_pets", "cat?", "https://pets.test", "21_more pets"))


def test_what_is_downloaded_is_said_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = write_wheel(tmp_path, monkeypatch)
    monkeypatch.setattr(sae_probes, "download_wheel", lambda folder: wheel)
    for is_first in (True, False):
        got = ask("get", "sae-probes")
        assert got.output.startswith("get      45.0 MB from PyPI, sae-probes 0.4.2") == is_first, got.output


def test_unknown_data_and_a_wheel_that_is_not_there(tmp_path: Path) -> None:
    unknown = ask("get", "sae-probe")
    assert unknown.exit_code == 2 and "did you mean sae-probes" in unknown.output
    absent = ask("get", "sae-probes", "--wheel", str(tmp_path / "none.whl"))
    assert absent.exit_code == 2 and "is not a file" in absent.output
