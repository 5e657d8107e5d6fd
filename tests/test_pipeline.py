"""Text -> cache -> runs -> numbers on the tiny model, through the command line, with files where the design says."""

import json
import re

import pytest
from safetensors import safe_open
from typer.testing import CliRunner

from sae.cli import app

VARIANTS = ("relu", "topk", "batchtopk", "decorrelation")


def call(*words) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def trained(tiny_model, sentences, home):
    call("harvest", "--model", tiny_model, "--dataset", sentences, "--layer", 0, "--layer", 1, "--tokens", 3000,
         "--context", 32, "--window", 1024, "--held-out", 0.1)  # fmt: skip
    call("train", *(f"--variant={name}" for name in VARIANTS), "--layer", 1, "--steps", 30, "--batch-size", 256,
         "--width", "2x", "--set", "k=8", "--log-every", 10, "--checkpoint-every", 20)  # fmt: skip
    return home


def test_harvest_train_evaluate(trained):
    (cache,) = (trained / "activations").iterdir()
    assert cache.name.startswith("tiny-gemma--sentences--")
    for name in ("zarr.json", "layer_00", "layer_01", "row_ctx", "row_pos", "tokens", "commits", "manifest.json"):
        assert (cache / name).exists(), name

    runs = sorted((trained / "runs").iterdir())
    assert sorted(run.name.split("-L01-n64-s0-")[0] for run in runs) == sorted(VARIANTS)
    rows = json.loads(call("evaluate", *runs, "--suite", "core", "--tokens", 100, "--json"))
    assert [row["name"] for row in rows] == [*(run.name for run in runs), "identity", "zero"]
    for run, row in zip(runs, rows, strict=False):
        files = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
        assert files - {".lock"} == {
            "run.json", "metrics.jsonl", "sae.json", "sae.safetensors", "evaluations/core.json",
            *(f"checkpoints/step-{step:08d}/state.{kind}" for step in (20, 30) for kind in ("json", "safetensors")),
        }  # fmt: skip
        assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [10, 20, 30]
        with safe_open(run / "sae.safetensors", "pt") as file:
            expected = {"W_enc", "W_dec", "b_enc", "b_dec"}
            assert set(file.keys()) - expected == ({"activation.0.threshold"} if "batchtopk" in run.name else set())
        written = json.loads((run / "evaluations" / "core.json").read_text())["eval_result_metrics"]
        assert row["core.sparsity.l0"] == written["sparsity"]["l0"]
    l0 = {run.name.split("-")[0]: row["core.sparsity.l0"] for run, row in zip(runs, rows, strict=False)}
    assert 0 < l0["topk"] <= 8
    assert rows[-2]["core.model_behavior_preservation.kl_div_score"] == pytest.approx(1, abs=1e-5)
    assert rows[-1]["core.model_behavior_preservation.kl_div_score"] == pytest.approx(0, abs=1e-5)

    table = call("evaluate", *runs, "--suite", "core", "--tokens", 100)  # nothing is measured again
    assert all(run.name in table for run in runs)


def test_the_same_commands_again_do_nothing_again(trained):
    files = [p for p in trained.rglob("*") if p.is_file() and ".lock" not in p.name]
    before = {path: path.stat().st_mtime_ns for path in files}
    call("train", *(f"--variant={name}" for name in VARIANTS), "--layer", 1, "--steps", 30, "--batch-size", 256,
         "--width", "2x", "--set", "k=8", "--log-every", 10, "--checkpoint-every", 20)  # fmt: skip
    assert {path: path.stat().st_mtime_ns for path in files} == before


def test_the_demo_walks_through_all_three_stages(home) -> None:
    """The README's command with less of everything: the embedded model and text, four variants, one table."""
    table = call("demo", "--tokens", "4k", "--steps", "3")
    assert "KL score" in table
    for name in (*VARIANTS, "identity", "zero"):
        assert re.search(rf"^{name}\b", table, re.M), name
    assert len(list((home / "runs").glob("*/evaluations/core.json"))) == len(VARIANTS)
