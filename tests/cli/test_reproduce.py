"""`sae reproduce`: each of its flags is a field of ReproduceConfig."""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

from sae.workflows.reproduce import ReproduceConfig

PLAN = "sae.workflows.reproduce.plan_reproduction"
FLAGS = {
    "model": ("gpt2", "model", "gpt2"),
    "layer": ("3", "layers", [3]),
    "seed": ("7", "seeds", [7]),
    "reading": ("literal", "reading", "literal"),
    "cache": ("activations/one", "cache", Path("activations/one")),
    "out": ("folder", "out", Path("folder")),
    "device": ("cpu", "device", "cpu"),
    "steps": ("11", "steps", 11),
    "batch-size": ("64", "batch_size", 64),
    "width": ("2x", "width", "2x"),
    "dataset": ("text.jsonl", "dataset", "text.jsonl"),
    "suite": ("core", "suite", "core"),
    "evaluate-tokens": ("2k", "evaluate_tokens", 2000),
}


def test_every_flag_is_a_field_of_the_config_and_the_other_way_round(planned_with: Callable) -> None:
    config, _ = planned_with(PLAN, "reproduce", FLAGS, "000", "003", without=("dry-run",))
    assert config.papers == ["000", "003"]
    assert {field for _, field, _ in FLAGS.values()} == {f.name for f in fields(ReproduceConfig)} - {"papers"}


def test_without_flags_the_config_is_the_default(planned_with: Callable) -> None:
    config, _ = planned_with(PLAN, "reproduce", {}, "all", without=(*FLAGS, "dry-run"))
    assert config == ReproduceConfig(["all"])
