"""`sae evaluate`: each of its flags is a field of EvaluateConfig."""

import math
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest

from sae.evaluate.plan import EvaluateConfig

PLAN = "sae.evaluate.plan.plan_evaluation"
FLAGS = {
    "suite": ("core", "suite", "core"),
    "tokens": ("2k", "tokens", 2000),
    "mode": ("2024-12", "mode", "2024-12"),
    "model": ("gpt2", "model", "gpt2"),
    "cache": ("activations/one", "cache", Path("activations/one")),
    "max-norm": ("none", "max_norm", math.inf),
    "set": ("core.batch_contexts=8", "options", ["core.batch_contexts=8"]),
    "data": ("datasets", "data", Path("datasets")),
    "force": (None, "force", True),
    "no-references": (None, "references", False),
    "dtype": ("float32", "dtype", "float32"),
    "precision": ("tf32", "precision", "tf32"),
    "device": ("cpu", "device", "cpu"),
}
# The flags that FLAGS lacks. --references is the opposite of --no-references. --layer is for a published SAE, which is
# imported first (workflows/published.py), and --controls for control SAEs, which are trained first
# (workflows/controls.py).
OUTPUT = ("references", "json", "dry-run", "layer", "controls")


@pytest.fixture(autouse=True)
def run_folders(home: Path) -> None:
    for name in ("a", "b"):
        (home / "runs" / name).mkdir(parents=True)


def test_every_flag_is_a_field_of_the_config_and_the_other_way_round(planned_with: Callable) -> None:
    config, _ = planned_with(PLAN, "evaluate", FLAGS, "runs/a", "runs/b", without=OUTPUT)
    assert config.runs == [Path("runs/a"), Path("runs/b")]
    assert {field for _, field, _ in FLAGS.values()} == {f.name for f in fields(EvaluateConfig)} - {"runs", "controls"}


def test_without_flags_the_config_is_the_default(planned_with: Callable) -> None:
    config, _ = planned_with(PLAN, "evaluate", {}, "runs/a", without=(*FLAGS, *OUTPUT))
    assert config == EvaluateConfig([Path("runs/a")], options=[])
