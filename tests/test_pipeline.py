"""Text -> cache -> runs -> numbers on the tiny model, from the command line, with files in the documented places."""

import json
import re

import pytest
import torch
from safetensors import safe_open
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from sae.cli.main import app
from sae.harvest.mini import WEIGHTS

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
    assert [row["name"] for row in rows] == [*(run.name for run in runs), "identity", "zero", "pca-8", "random-8"]
    for run, row in zip(runs, rows, strict=False):
        files = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
        assert files - {".lock", "evaluations/.lock"} == {
            "run.json", "metrics.jsonl", "sae.json", "sae.safetensors", "evaluations/core.json",
            *(f"checkpoints/step-{step:08d}/state.{kind}" for step in (20, 30) for kind in ("json", "safetensors")),
        }  # fmt: skip
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [1, 10, 20, 30]
        with safe_open(run / "sae.safetensors", "pt") as file:
            expected = {"W_enc", "W_dec", "b_enc", "b_dec"}
            assert set(file.keys()) - expected == ({"activation.0.threshold"} if "batchtopk" in run.name else set())
        written = json.loads((run / "evaluations" / "core.json").read_text())["eval_result_metrics"]
        assert row["core.sparsity.l0"] == written["sparsity"]["l0"]
    l0 = {run.name.split("-")[0]: row["core.sparsity.l0"] for run, row in zip(runs, rows, strict=False)}
    assert 0 < l0["topk"] <= 8
    score = {row["name"]: row["core.model_behavior_preservation.kl_div_score"] for row in rows}
    assert score["identity"] == pytest.approx(1, abs=1e-5)
    assert score["zero"] == pytest.approx(0, abs=1e-5)

    table = call("evaluate", *runs, "--suite", "core", "--tokens", 100)  # nothing is measured again
    assert all(run.name in table for run in runs)


def test_the_same_commands_again_do_nothing_again(trained):
    files = [p for p in trained.rglob("*") if p.is_file() and ".lock" not in p.name]
    before = {path: path.stat().st_mtime_ns for path in files}
    call("train", *(f"--variant={name}" for name in VARIANTS), "--layer", 1, "--steps", 30, "--batch-size", 256,
         "--width", "2x", "--set", "k=8", "--log-every", 10, "--checkpoint-every", 20)  # fmt: skip
    assert {path: path.stat().st_mtime_ns for path in files} == before


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "qwen3"])
def test_another_family_goes_through_all_three_stages(kind, sentences, home):
    """Qwen's tokenizer has no BOS, so the tokenizer of that case has none either."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](
        vocab_size=8192, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, pad_token_id=0, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():  # the usual initial values are so small that blocks change almost nothing
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    tokenizer = AutoTokenizer.from_pretrained(WEIGHTS)
    if kind == "qwen3":
        tokenizer.bos_token = None
    model.save_pretrained(home / kind)
    tokenizer.save_pretrained(home / kind)
    plan = CliRunner().invoke(app, [
        "harvest", "--model", str(home / kind), "--dataset", str(sentences), "--layer", "1", "--tokens", "2000",
        *(word for site in ("resid_post", "mlp_out", "attn_z") for word in ("--site", site)),
        "--context", "32", "--window", "1024", "--held-out", "0.1",
    ])  # fmt: skip
    assert plan.exit_code == 0, plan.output
    block = {"gpt2": "transformer.h.1", "gpt_neox": "gpt_neox.layers.1", "qwen3": "model.layers.1"}[kind]
    (cache,) = (home / "activations").iterdir()
    for shown in (plan.stderr, call("cache", "info", cache)):
        assert f"blocks.1.hook_resid_post = {block}, hidden_states[2]" in shown
        assert f"blocks.1.hook_mlp_out = {block}.mlp" in shown
        assert f"blocks.1.attn.hook_z = the input of {block}." in shown
    for site in ("resid_post", "mlp_out"):
        call("train", "--variant", "topk", "--layer", 1, "--site", site, "--steps", 5, "--batch-size", 256,
             "--width", "2x", "--set", "k=8")  # fmt: skip
    runs = sorted((home / "runs").iterdir())
    of_stream = [run for run in runs if "mlp_out" not in run.name]
    rows = json.loads(call("evaluate", *of_stream, "--suite", "core", "--tokens", 100, "--json"))
    score = {row["name"]: row["core.model_behavior_preservation.kl_div_score"] for row in rows}
    assert score["identity"] == pytest.approx(1, abs=1e-5) and score["zero"] == pytest.approx(0, abs=1e-5)
    assert score[of_stream[0].name] < 1


@pytest.mark.slow
def test_the_demo_walks_through_all_three_stages(home) -> None:
    """The README's command with smaller sizes: the embedded model and text, four variants, one table."""
    table = call("demo", "--tokens", "4k", "--steps", "3")
    assert "KL score" in table
    for name in (*VARIANTS, "identity", "zero"):
        assert re.search(rf"^{name}\b", table, re.M), name
    assert [path.name for path in home.iterdir()] == ["demo"]  # so that `sae train` finds no cache of the demo
    assert len(list((home / "demo" / "runs").glob("*/evaluations/core.json"))) == len(VARIANTS)
