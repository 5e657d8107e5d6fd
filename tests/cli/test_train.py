"""What `sae train` shows: the groups of its flags, and the runs that its progress names."""

import json
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer
from typer.testing import CliRunner

from sae.cli import train as train_command
from sae.cli.main import app
from sae.cli.options import parse_bytes
from sae.cli.train import Waits, progress_note
from sae.common.packages import EXTRAS
from sae.train import loggers
from sae.train.plan import TrainConfig

METRICS = {"loss": 0.51234, "l0": 32.0, "explained_variance": 0.75, "dead": 0.125, "waited_for_data": 0.0}
NUMBERS = "loss 0.5123, L0 32.0, EV 0.750, dead 12.5%"


@pytest.mark.parametrize(
    ("names", "live", "note"),
    [
        (["topk-a"], True, NUMBERS),
        (["topk-a"], False, NUMBERS),
        (["topk-a", "relu-b"], True, ""),  # the table below the progress bar shows all runs
        (["topk-a", "relu-b"], False, f"topk-a: {NUMBERS}"),
    ],
)
def test_progress_names_the_run_that_it_shows(names: list[str], live: bool, note: str) -> None:
    runs = [SimpleNamespace(name=name) for name in names]
    assert progress_note(dict.fromkeys(names, METRICS), runs, live) == note


def test_progress_without_metrics_has_no_note() -> None:
    assert progress_note({}, [SimpleNamespace(name="topk-a")], False) == ""


def test_the_progress_line_says_that_training_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([100.0, 110.0, 120.0])
    monkeypatch.setattr(train_command.time, "monotonic", lambda: next(times))
    waits = Waits(in_store=True)
    assert waits.note({"a": {"waited_for_data": 4.0}}) == ", waits for the store 40% of the time"
    assert waits.note({"a": {"waited_for_data": 4.5}}) == ""


def test_the_first_group_of_flags_is_short_and_the_others_are_named() -> None:
    text = CliRunner().invoke(app, ["train", "--help"], env={"COLUMNS": "200", "TERM": "dumb"}).stdout
    titles = re.findall(r"─ ([A-Z][^─]*?) ─", text)
    assert titles == [
        "Options", "Data and batches", "Harvesting while training (with --stream)", "Object stores",
        "Checkpoints and logging", "Machine",
    ]  # fmt: skip
    first = text.partition("Data and batches")[0]
    assert len(re.findall(r"^│ +--", first, re.M)) <= 13  # with --config and --help
    assert "--literal" not in text and "--order-seed" not in text


FLAGS = {
    "variant": ("topk", "variants", ["topk"]),
    "layer": ("3", "layers", [3]),
    "site": ("mlp_out", "site", "mlp_out"),
    "module": ("model.layers.{layer}.mlp:input", "modules", ["model.layers.{layer}.mlp:input"]),
    "seed": ("7", "seeds", [7]),
    "cache": ("activations/one", "caches", [Path("activations/one")]),
    "local-cache": ("200GB", "local_cache", 200 * 10**9),
    "local-folder": ("/scratch/me", "local_folder", Path("/scratch/me")),
    "model": ("gpt2", "model", "gpt2"),
    "steps": ("11", "steps", 11),
    "batch-size": ("64", "batch_size", 64),
    "accumulate": ("4", "accumulate", 4),
    "width": ("2x", "width", "2x"),
    "l0": ("8.5", "l0", [8.5]),
    "paper-exact": (None, "paper_exact", True),
    "set": ("lr=1e-3", "options", ["lr=1e-3"]),
    "shuffle-seed": ("5", "shuffle_seed", 5),
    "resume": ("runs/one", "resume", [Path("runs/one")]),
    "out": ("folder", "out", Path("folder")),
    "device": ("cpu", "device", "cpu"),
    "log-every": ("3", "log_every", 3),
    "checkpoint-every": ("4", "checkpoint_every", 4),
    "log": ("wandb", "log", ["wandb"]),
    "compile": (None, "compiled", True),
    "capture": ("off", "capture", "off"),
    "precision": ("tf32", "precision", "tf32"),
}
STREAM = {
    "tokens": ("3k", "tokens", 3000),
    "ring": ("6", "windows", 6),
    "dataset": ("text.jsonl", "dataset", "text.jsonl"),
    "context": ("64", "context", 64),
    "bos": ("none", "bos", "none"),
    "window": ("512", "window", 512),
    "max-norm": ("8", "max_norm", 8.0),
}


def test_every_flag_is_a_field_of_the_config_and_the_other_way_round(planned_with: Callable) -> None:
    config, keywords = planned_with(
        "sae.train.plan.plan_training", "train", FLAGS, without=("dry-run", "stream", *STREAM)
    )
    assert config.origins == dict.fromkeys(FLAGS, "flag") and keywords == {}
    assert {field for _, field, _ in FLAGS.values()} == {f.name for f in fields(TrainConfig)} - {"origins", "source"}


def test_with_stream_the_harvest_has_its_flags_too(planned_with: Callable) -> None:
    function = "sae.workflows.stream.plan_streaming"
    config, keywords = planned_with(function, "train", FLAGS | STREAM, "--stream", without=("dry-run", "stream"))
    assert config.origins == dict.fromkeys([*FLAGS, *STREAM, "stream"], "flag")
    assert keywords.keys() == {field for _, field, _ in STREAM.values()}
    only, others = {"variant": FLAGS["variant"]}, (*FLAGS, *STREAM, "dry-run", "stream")
    _, keywords = planned_with(function, "train", only, "--stream", "--max-norm", "none", without=others)
    assert keywords == {"max_norm": None}


def test_without_other_flags_the_config_is_the_default(planned_with: Callable) -> None:
    every = (*FLAGS, *STREAM, "dry-run", "stream")
    config, _ = planned_with("sae.train.plan.plan_training", "train", {"variant": FLAGS["variant"]}, without=every)
    assert config == TrainConfig(["topk"], origins={"variant": "flag"})


def test_a_logger_gets_every_line_of_metrics_jsonl(tiny_cache, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    logged: list[dict] = []

    class Recorder:
        def __init__(self, folder: Path, config: object) -> None:
            self.folder = folder

        def log(self, metrics: dict, step: int) -> None:
            logged.append({"step": step, **metrics})

        def finish(self) -> None:
            logged.append({"finished": self.folder.name})

    monkeypatch.setitem(loggers.LOGGERS, "json", Recorder)
    monkeypatch.setitem(EXTRAS, "json", "json")  # an extra whose module is installed
    words = [
        "--cache",
        tiny_cache.folder,
        "--layer",
        0,
        "--steps",
        4,
        "--batch-size",
        64,
        "--log-every",
        2,
        "--width",
        32,
    ]
    result = CliRunner().invoke(app, ["train", "--variant", "relu", *map(str, words), "--log", "json"])
    assert result.exit_code == 0, result.output
    (run,) = (tmp_path / "runs").iterdir()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 4]
    assert logged == [*lines, {"finished": run.name}]


SIZES = {"200GB": 200 * 10**9, "1.5tb": 15 * 10**11, "64 MB": 64 * 10**6, "7k": 7000, "1000": 1000}


@pytest.mark.parametrize("text", SIZES)
def test_sizes_have_the_units_of_disks(text: str) -> None:
    assert parse_bytes(text) == SIZES[text]


@pytest.mark.parametrize("text", ["0", "0.4", "-1GB", "GB", "", "nan", "inf", "7XB"])
def test_a_size_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="invalid size .*try 200GB or 1.5TB"):
        parse_bytes(text)
