"""`sae harvest`: each of its flags is a field of HarvestConfig."""

import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

from typer.testing import CliRunner

from sae.cache.opening import open_cache
from sae.cli.main import app
from sae.harvest.plan import HarvestConfig

FLAGS = {
    "model": ("gpt2", "model", "gpt2"),
    "layer": ("3", "layers", [3]),
    "site": ("mlp_out", "sites", ["mlp_out"]),
    "module": ("model.layers.{layer}.mlp:input", "modules", ["model.layers.{layer}.mlp:input"]),
    "dataset": ("text.jsonl", "dataset", "text.jsonl"),
    "tokens": ("3k", "tokens", 3000),
    "context": ("64", "context", 64),
    "out": ("folder", "out", Path("folder")),
    "device": ("cpu", "device", "cpu"),
    "held-out": ("0.25", "held_out", 0.25),
    "bos": ("none", "bos", "none"),
    "skip-positions": ("4", "skip_positions", 4),
    "skip-token": ("<eos>", "skip_tokens", ["<eos>"]),
    "keep-special": (None, "keep_special", True),
    "pack": (None, "pack", True),
    "text-column": ("content", "text_column", "content"),
    "chat-column": ("messages", "chat_column", "messages"),
    "roles": ("assistant", "roles", ["assistant"]),
    "subset": ("en", "subset", "en"),
    "split": ("validation", "split", "validation"),
    "dataset-revision": ("abc", "dataset_revision", "abc"),
    "seed": ("7", "seed", 7),
    "revision": ("def", "revision", "def"),
    "adapter": ("lora", "adapters", ["lora"]),
    "dtype": ("float32", "dtype", "float32"),
    "attention": ("sdpa", "attention", "sdpa"),
    "batch-contexts": ("5", "batch_contexts", 5),
    "compile": (None, "compiled", True),
    "window": ("512", "window", 512),
    "compress": (None, "compress", True),
    "max-norm": ("8", "max_norm", 8.0),
    "storage-dtype": ("uint16", "storage_dtype", "uint16"),
    "share": ("3/64", "share", "3/64"),
    "prepare": (None, "prepare", True),
}


def test_every_flag_is_a_field_of_the_config_and_the_other_way_round(planned_with: Callable) -> None:
    config, _ = planned_with("sae.harvest.plan.plan_harvest", "harvest", FLAGS, without=("dry-run",))
    assert config.origins == dict.fromkeys(FLAGS, "flag")
    assert {field for _, field, _ in FLAGS.values()} == {f.name for f in fields(HarvestConfig)} - {"origins"}


def test_max_norm_takes_a_number_or_none(planned_with: Callable) -> None:
    function, others = "sae.harvest.plan.plan_harvest", tuple({**FLAGS, "dry-run": ()})
    assert planned_with(function, "harvest", {}, "--max-norm", "none", without=others)[0].max_norm is None
    for wrong, sentence in (
        ("many", "invalid multiple 'many'; try 10, or none"),
        ("nan", "invalid multiple 'nan'; try 10, or none"),
        ("-inf", "invalid multiple '-inf'; try 10, or none"),
    ):
        result = CliRunner().invoke(app, ["harvest", "--model", "gemma-2-mini", "--max-norm", wrong])
        assert result.exit_code == 2 and sentence in result.output


def test_without_flags_the_config_is_the_default(planned_with: Callable) -> None:
    every = tuple({**FLAGS, "dry-run": ()})
    assert planned_with("sae.harvest.plan.plan_harvest", "harvest", {}, without=every)[0] == HarvestConfig()


def test_the_end_of_a_harvest_is_its_summary_and_a_command_on_the_middle_layer(
    tiny_model, sentences, home: Path
) -> None:
    words = [
        "--model",
        tiny_model,
        "--dataset",
        sentences,
        "--layer",
        0,
        "--layer",
        1,
        "--tokens",
        300,
        "--window",
        256,
    ]
    result = CliRunner().invoke(app, ["harvest", *map(str, words)])
    assert result.exit_code == 0, result.output
    (folder,) = (home / "activations").iterdir()
    *_, layer_0, largest_0, layer_1, largest_1, done, following = result.stderr.splitlines()
    assert layer_0.startswith("layer_00 mean norm") and layer_1.startswith("layer_01 mean norm")
    assert "; the largest row by position: 1 at " in largest_0 and re.search(r"; by token: 1 of '[^']+'$", largest_1)
    assert done.startswith(f"done     {open_cache(folder).rows:,} rows")
    assert following == f"next     sae train --variant decorrelation --layer 1 --cache {folder}"
