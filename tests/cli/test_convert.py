"""`sae export` and `sae import` as a user sees them."""

import json
import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

import sae
from sae.cli.main import app
from sae.train.activation_functions import TopK
from sae.train.sae import SAE, load_sae, save_sae

BAD_USAGE, DAMAGED = 2, 3


def call(*words) -> Result:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


@pytest.fixture
def run(tmp_path) -> Path:
    """A topk SAE of layer 12 of google/gemma-2-2b, with unit decoder rows."""
    torch.manual_seed(0)
    origin = {"model": {"name": "google/gemma-2-2b", "revision": None}, "layer": 12, "site": "resid_post"}
    save_sae(SAE(8, 16, [TopK(4)]), tmp_path / "runs" / "topk", {**origin, "context": 128, "variant": "topk"})
    return tmp_path / "runs" / "topk"


def test_export_then_import(run, tmp_path):
    result = call("export", run, "--to", "saelens", "--out", tmp_path / "out")
    assert result.exit_code == 0 and result.stdout == ""
    checked = r"^checked  4,096 rows \(synthetic, .*\): active sets equal, L0 [\d.]+; relative error"
    assert re.search(checked, result.stderr, re.M)
    assert re.findall(r"^file     (\S+) \([\d,]+ bytes\)$", result.stderr, re.M) == [
        str(tmp_path / "out" / name) for name in ("cfg.json", "sae_weights.safetensors")
    ]
    result = call("import", tmp_path / "out", "--name", "back")
    assert result.exit_code == 0, result.stderr
    assert result.stderr.splitlines()[-1] == f"next     sae evaluate {tmp_path / 'runs' / 'back'}"
    assert "found    saelens: 8 -> 16, blocks.12.hook_resid_post of google/gemma-2-2b" in result.stderr
    assert "sae harvest --model google/gemma-2-2b --layer 12" in result.stderr
    x = torch.randn(4, 8)
    assert torch.allclose(load_sae(tmp_path / "runs" / "back").encode(x), load_sae(run).encode(x), atol=1e-5)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ("--to", "gemma-scope"),
            "gemma-scope cannot store a topk SAE, only jumprelu; dictionary-learning, saelens, sparsify can",
        ),
        (("--to", "onnx"), "--to onnx is not a known format; available:"),
        (("--to", "hub"), "--to hub needs --repo owner/name"),
        (("--to", "hub", "--repo", "me/mine"), "No terminal to ask for confirmation; nothing was uploaded"),
        (("--to", "saelens", "--yes"), "--repo, --private and --yes need --to hub"),
        (("--to", "saelens", "--cache", "nowhere"), "nowhere holds no activation cache"),
    ],
)
def test_invalid_exports_are_rejected_in_one_sentence(run, words, sentence):
    result = call("export", run, *words)
    assert result.exit_code == BAD_USAGE
    assert sentence in result.stderr and "Traceback" not in result.stderr
    assert not (run / "exports").exists() or not list((run / "exports").iterdir())


def test_a_damaged_file_has_its_own_exit_code(run, tmp_path):
    call("export", run, "--to", "saelens", "--out", tmp_path / "out")
    weights = tmp_path / "out" / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-40])
    result = call("import", tmp_path / "out")
    assert result.exit_code == DAMAGED and "exceeds the size of the file" in result.stderr
    assert call("import", tmp_path / "none").exit_code == BAD_USAGE


def test_an_imported_run_cannot_be_resumed(run, tmp_path):
    call("export", run, "--to", "sparsify", "--out", tmp_path / "out")
    call("import", tmp_path / "out", "--name", "back")
    result = call("train", "--resume", tmp_path / "runs" / "back")
    assert result.exit_code == BAD_USAGE and "was imported from another library" in result.stderr


def test_from_python(run, tmp_path):
    exported = sae.export_sae(run, "dictionary-learning", tmp_path / "out")
    assert exported.check.passed and {path.name for path in exported.files} == {"ae.pt", "config.json"}
    imported = sae.import_sae(exported)  # the result of an export can be used as a path
    assert imported.sae.encode(torch.zeros(1, 8)).shape == (1, 16)
    assert json.loads((imported.folder / "run.json").read_text())["imported_from"]["format"] == "dictionary-learning"
    assert load_sae(imported).d_sae == 16


def test_an_upload_gets_the_flags_of_its_command(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[bool, str | None, bool]] = []

    def upload(run: Path, repo: str, *, private: bool, approximate: str | None, confirm, **others: object) -> str:
        asked.append((private, approximate, confirm("Upload?")))
        return f"https://huggingface.co/{repo}"

    monkeypatch.setattr("sae.train.formats.upload.upload_sae", upload)
    words = ["export", "run", "--to", "hub", "--repo", "me/sae", "--yes"]
    for flags in ([], ["--private", "--approximate", "topk"]):
        done = CliRunner().invoke(app, [*words, *flags])
        assert done.exit_code == 0 and "done     https://huggingface.co/me/sae" in done.output
    assert asked == [(False, None, True), (True, "topk", True)]
