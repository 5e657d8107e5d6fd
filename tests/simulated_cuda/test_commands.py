"""The command line from text to a page, on a machine with a GPU: `--device auto` chooses the GPU."""

import json
from pathlib import Path

import pytest

from .gpu import SimulatedGPU

SIZES = ("--layer", "0", "--steps", "8", "--batch-size", "64", "--width", "4x")


def run(gpu: SimulatedGPU, home: Path, *command: str) -> str:
    ((code, output),) = gpu("commands.run", home=home, commands=[command])
    assert code == 0, output
    return output


@pytest.mark.slow
def test_every_stage_works_on_a_gpu(gpu: SimulatedGPU, tiny_model: Path, sentences: Path, tmp_path: Path) -> None:
    """This includes what only plans do: they time a block and a step on the GPU."""
    text = ("--model", str(tiny_model), "--dataset", str(sentences), "--tokens", "1500", "--context", "32")
    variants = ("--variant", "topk", "--variant", "batchtopk")
    found = run(gpu, tmp_path, "harvest", *text, "--layer", "0", "--out", "cache", "--held-out", "0.2")
    assert "computed in bfloat16 on cuda" in found and "of model time on cuda" in found
    found = run(gpu, tmp_path, "train", *variants, "--cache", "cache", *SIZES, "--dry-run")
    assert (
        "of training on cuda, estimated by timing a few steps of each recipe" in found
        and "products in bfloat16; " in found
    )
    found = run(gpu, tmp_path, "train", *variants, "--cache", "cache", *SIZES, "--dry-run", "--precision", "tf32")
    assert "products in tf32; weights, moments and sums are in float32" in found
    run(gpu, tmp_path, "train", *variants, "--cache", "cache", *SIZES, "--out", "runs")
    runs = sorted(map(str, (tmp_path / "runs").iterdir()))
    assert len(runs) == 2
    run(gpu, tmp_path, "evaluate", *runs, "--suite", "core", "--tokens", "400", "--controls")
    record = json.loads((Path(runs[0]) / "run.json").read_text())
    result = json.loads((Path(runs[0]) / "evaluations" / "core.json").read_text())
    assert record["device"] == "cuda" and result["eval_config"]["llm_dtype"] == "bfloat16"
    assert record["precision"] == "bfloat16" and result["eval_config"]["logits"] == "float32"
    found = run(gpu, tmp_path, "evaluate", *runs, "--suite", "core", "--tokens", "400", "--precision", "tf32")
    assert "SAEs     computed in tf32" in found
    assert "dashboard.html" in run(gpu, tmp_path, "dashboard", runs[0], "--tokens", "400")
    assert "latent 0" in run(gpu, tmp_path, "inspect", runs[0], "--latent", "0", "--tokens", "400")
    assert "simulated GPU" in run(gpu, tmp_path, "env")


@pytest.mark.slow
def test_a_harvest_while_training_works_on_a_gpu(
    gpu: SimulatedGPU, tiny_model: Path, sentences: Path, tmp_path: Path
) -> None:
    text = ("--model", str(tiny_model), "--dataset", str(sentences), "--tokens", "1500", "--context", "32")
    found = run(gpu, tmp_path, "train", "--stream", *text, "--variant", "topk", *SIZES, "--out", "runs")
    assert "trained (means over the last logged steps)" in found
    assert list((tmp_path / "runs").glob("*/sae.json"))
