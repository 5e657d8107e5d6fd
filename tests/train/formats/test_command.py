"""`sae export` and `sae import` as a user meets them."""

import json
import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

import sae
from sae.cli.main import app
from sae.train.sae import load_sae, save_sae

FAILED, BAD_USAGE, DAMAGED = 1, 2, 3


def call(*words) -> Result:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


@pytest.fixture
def run(make_sae, tmp_path) -> Path:
    one = make_sae("topk", unit=True)
    save_sae(one, tmp_path / "runs" / "topk", {**one.origin, "variant": "topk"})
    return tmp_path / "runs" / "topk"


def test_out_and_in_again(run, tmp_path):
    shown = call("export", run, "--to", "saelens", "--out", tmp_path / "out")
    assert shown.exit_code == 0 and shown.stdout == ""
    assert re.search(r"^checked  4,096 rows \(synthetic, .*\): active sets equal, L0 [\d.]+; relative error", shown.stderr, re.M)  # fmt: skip
    assert re.findall(r"^file     (\S+) \([\d,]+ bytes\)$", shown.stderr, re.M) == [
        str(tmp_path / "out" / name) for name in ("cfg.json", "sae_weights.safetensors")
    ]
    back = call("import", tmp_path / "out", "--name", "back")
    assert back.exit_code == 0, back.stderr
    assert back.stderr.splitlines()[-1] == f"next     sae evaluate {tmp_path / 'runs' / 'back'}"
    assert "found    saelens: 8 -> 16, blocks.12.hook_resid_post of google/gemma-2-2b" in back.stderr
    assert "sae harvest --model google/gemma-2-2b --layer 12" in back.stderr
    x = torch.randn(4, 8)
    assert torch.allclose(load_sae(tmp_path / "runs" / "back").encode(x), load_sae(run).encode(x), atol=1e-5)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--to", "gemma-scope"), "gemma-scope cannot store a topk SAE, only jumprelu; dictionary-learning, saelens, sparsify can"),
        (("--to", "onnx"), "--to onnx is not a known format; there are"),
        (("--to", "hub"), "--to hub needs --repo owner/name"),
        (("--to", "hub", "--repo", "me/mine"), "No terminal to ask for confirmation; nothing was uploaded"),
        (("--to", "saelens", "--yes"), "--repo, --private and --yes need --to hub"),
        (("--to", "saelens", "--cache", "nowhere"), "nowhere holds no activation cache"),
    ],
)  # fmt: skip
def test_refusals_are_one_sentence(run, words, sentence):
    result = call("export", run, *words)
    assert result.exit_code == BAD_USAGE
    assert sentence in result.stderr and "Traceback" not in result.stderr
    assert not (run / "exports").exists() or not list((run / "exports").iterdir())


def test_a_damaged_file_has_its_own_exit_code(run, tmp_path):
    call("export", run, "--to", "saelens", "--out", tmp_path / "out")
    weights = tmp_path / "out" / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-40])
    result = call("import", tmp_path / "out")
    assert result.exit_code == DAMAGED and "would be outside of the file" in result.stderr
    assert call("import", tmp_path / "none").exit_code == BAD_USAGE


def test_an_imported_run_has_no_training_to_go_on_with(run, tmp_path):
    call("export", run, "--to", "sparsify", "--out", tmp_path / "out")
    call("import", tmp_path / "out", "--name", "back")
    result = call("train", "--resume", tmp_path / "runs" / "back")
    assert result.exit_code == BAD_USAGE and "was imported from another library" in result.stderr


def test_from_python(run, tmp_path):
    made = sae.export_sae(run, "dictionary-learning", tmp_path / "out")
    assert made.check.passed and {path.name for path in made.files} == {"ae.pt", "config.json"}
    back = sae.import_sae(made.folder)
    assert back.sae.encode(torch.zeros(1, 8)).shape == (1, 16)
    assert json.loads((back.folder / "run.json").read_text())["imported_from"]["format"] == "dictionary-learning"
