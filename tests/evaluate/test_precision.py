"""`sae evaluate --precision`, and numbers computed from the logits of a model in bfloat16."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sae.cache.reader import Cache
from sae.common import precision
from sae.common.errors import UnavailableError, UsageError
from sae.evaluate.against import digest_without_l0
from sae.evaluate.compare import group_by_system
from sae.evaluate.inputs import make_context
from sae.evaluate.metrics.core import Core
from sae.evaluate.plan import EvaluateConfig, plan_evaluation
from sae.evaluate.run import evaluate, evaluate_saes, run_evaluation
from sae.train.activation_functions import TopK
from sae.train.sae import SAE, load_sae, save_sae


@pytest.fixture(autouse=True)
def processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that the CPU supports bfloat16."""
    monkeypatch.setattr(precision, "cpu_flags", lambda: {"avx512_bf16"})


@pytest.fixture
def run(tiny_cache: Cache, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    folder = tmp_path / "runs" / "one"
    origin = {
        "model": tiny_cache.identity["model"],
        "layer": 0,
        "cache": str(tiny_cache.folder),
        "fingerprint": tiny_cache.attributes["fingerprint"],
    }
    save_sae(SAE(32, 64, [TopK(8)]), folder, origin)
    return folder


def ask(*runs: Path, **changes) -> EvaluateConfig:
    return replace(EvaluateConfig(runs=runs, suite="core", tokens=60, device="cpu", references=False), **changes)


def test_an_sae_computes_in_its_own_precision_whatever_is_around_it(run: Path) -> None:
    plain, rounded = load_sae(run), load_sae(run)
    plain.precision, rounded.precision = "float32", "bfloat16"
    x_TD = torch.randn(50, 32)
    expected_TF, own_TF = load_sae(run).encode(x_TD), plain.encode(x_TD)
    assert torch.equal(own_TF, expected_TF)
    assert torch.equal(plain.decode(own_TF), load_sae(run).decode(own_TF))
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        f_TF = rounded.encode(x_TD)
        assert f_TF.dtype == rounded.decode(f_TF).dtype == torch.float32
        assert not torch.equal(f_TF, expected_TF) and not torch.equal(rounded.decode(own_TF), plain.decode(own_TF))
        torch.testing.assert_close(rounded.decode(own_TF), plain.decode(own_TF), rtol=0.02, atol=0.05)
    seen = []
    plain.precision = "tf32"
    plain.activation[0].forward = lambda z: seen.append(torch.backends.cuda.matmul.fp32_precision) or z  # type: ignore
    plain.encode(x_TD)
    assert seen == ["tf32"] and torch.backends.cuda.matmul.fp32_precision != "tf32"


def test_a_result_of_another_precision_is_another_result(run: Path) -> None:
    """Both results are kept, each is found again by its own settings, and their numbers differ."""
    file, ways = run / "evaluations" / "core.json", ("float32", "bfloat16", "float32")
    numbers, files = [], []
    for kind in ways:
        plan = plan_evaluation(ask(run, precision=kind))
        files.append(plan.has_work)
        numbers.append(run_evaluation(plan)[0].results["core"].metrics["reconstruction_quality"]["mse"])
        written = json.loads(file.read_text())["eval_config"]
        assert written.get("sae_precision") == (None if kind == "float32" else kind)
    assert files == [True, True, False]  # the third result is already there
    assert numbers[0] == numbers[2] != numbers[1] == pytest.approx(numbers[0], rel=0.02)
    assert "SAEs     computed in bfloat16" in plan_evaluation(ask(run, precision="bfloat16")).describe()
    assert not any("computed in float32" in line and "SAEs" in line for line in plan_evaluation(ask(run)).describe())
    assert "--precision bfloat16" in plan_evaluation(ask(run, precision="bfloat16")).next_command()
    assert "--precision" not in plan_evaluation(ask(run)).next_command()


def test_references_and_objects_compute_in_it_too(run: Path, tiny_cache: Cache) -> None:
    asked = dict(cache=tiny_cache, layer=0, suite="core", tokens=60, device="cpu")
    mine = load_sae(run)
    plain, rounded = (evaluate_saes({"mine": mine}, precision=kind, **asked) for kind in ("float32", "bfloat16"))
    assert mine.precision is None  # the object is not modified

    def mse(rows, name: str) -> float:
        (row,) = [row for row in rows if row.name.startswith(name)]
        return row.results["core"].metrics["reconstruction_quality"]["mse"]

    assert [mse(plain, name) == mse(rounded, name) for name in ("mine", "random", "identity")] == [False, False, True]

    class Own:
        def encode(self, x: torch.Tensor) -> torch.Tensor:
            return x

        decode = encode

    with pytest.raises(
        UsageError, match="own is not an SAE of this package, so its precision cannot be chosen: omit precision="
    ):
        evaluate_saes({"own": Own()}, precision="bfloat16", **asked)


def test_what_cannot_be_computed_is_refused(run: Path) -> None:
    with pytest.raises(UnavailableError, match="tf32 cannot be used: the device is cpu"):
        plan_evaluation(ask(run, precision="tf32"))
    with pytest.raises(UsageError, match="unknown precision 'half'"):
        evaluate(ask(run, precision="half"))


def test_systems_that_differ_in_their_precision_are_named_by_it() -> None:
    def compared(name: str, **more: object) -> Any:
        record = {"variant": "topk", "seed": 0, "options": {"k": 4}, "device": "cpu", **more}
        return SimpleNamespace(name=name, folder=Path(name), record=record)

    runs = [compared("a"), compared("b", seed=1), compared("c", precision="bfloat16"), compared("d", device="cuda")]
    systems = group_by_system(runs)
    assert [(system.label, len(system.runs)) for system in systems] == [
        ("topk float32 k=4", 2),
        ("topk bfloat16 k=4", 2),  # with "d": earlier versions on a GPU recorded no precision
    ]
    assert [system.label for system in group_by_system(runs[:2])] == ["topk k=4"]
    one, seed, rounded, earlier = (digest_without_l0(run.record) for run in runs)
    assert one == seed != rounded == earlier  # the digest without L0 also includes the precision


def test_settings_of_float32_are_those_of_earlier_versions(tiny_cache: Cache) -> None:
    """Earlier results are found again, except for models in bfloat16, whose results came from rounded logits."""
    plain = make_context(tiny_cache)
    assert "sae_precision" not in plain.settings and "logits" not in Core().settings(plain)
    assert Core().settings(make_context(tiny_cache, dtype="bfloat16"))["logits"] == "float32"
    assert make_context(tiny_cache, precision="tf32").settings["sae_precision"] == "tf32"


def test_a_result_says_which_model_it_is_of_and_how_that_computed(tiny_cache: Cache) -> None:
    context = make_context(tiny_cache, dtype="bfloat16", tokens=60)
    model = tiny_cache.identity["model"]
    assert context.model_identity == {
        "model": model["name"], "revision": model["revision"], "attention": tiny_cache.identity["attention"],
        "llm_dtype": "bfloat16",
    }  # fmt: skip
    assert context.text_identity == {"text": tiny_cache.fingerprint, "contexts": len(context.contexts)}
    assert len(context.contexts) < len(make_context(tiny_cache).contexts)
