"""Loggers get every run's metrics at their steps, and are closed whatever happens."""

import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from sae.common.errors import UnavailableError, UsageError
from sae.train.loggers import LOGGERS, Loggers


def run_named(folder) -> SimpleNamespace:
    return SimpleNamespace(name=folder.name, folder=folder, identity=lambda: {"variant": "topk", "seed": 0})


class Recorder:
    def __init__(self, **settings) -> None:
        self.settings, self.logged, self.finished = settings, [], False

    def log(self, metrics, step: int) -> None:
        self.logged.append((step, metrics))

    def finish(self) -> None:
        self.finished = True


@pytest.fixture(params=["wandb", "trackio"])
def service(request, monkeypatch) -> tuple[str, list[Recorder]]:
    """A stand-in for the package that has only the part that is used."""
    begun: list[Recorder] = []
    module = ModuleType(request.param)
    module.Settings = dict
    module.init = lambda **settings: begun.append(Recorder(**settings)) or begun[-1]
    monkeypatch.setitem(sys.modules, request.param, module)
    return request.param, begun


def test_each_run_is_a_run_of_the_logger(service, tmp_path) -> None:
    name, begun = service
    runs = [run_named(tmp_path / "topk-a"), run_named(tmp_path / "relu-b")]
    with Loggers([name], runs) as loggers:
        loggers.log({"topk-a": {"step": 50, "loss": 1.5}})
        loggers.log({"topk-a": {"step": 100, "loss": 1.0}, "relu-b": {"step": 100, "loss": 2.0}})
        assert not begun[0].finished
    assert [(r.settings["name"], r.settings["project"], r.settings["resume"]) for r in begun] == [
        ("topk-a", "sae", "allow"),
        ("relu-b", "sae", "allow"),
    ]
    assert begun[0].settings["config"] == {"variant": "topk", "seed": 0}
    assert begun[0].logged == [(50, {"loss": 1.5}), (100, {"loss": 1.0})] and begun[1].logged == [(100, {"loss": 2.0})]
    assert all(recorder.finished for recorder in begun)


def test_loggers_are_closed_when_training_fails(service, tmp_path) -> None:
    name, begun = service
    with pytest.raises(RuntimeError), Loggers([name], [run_named(tmp_path / "a")]) as loggers:
        loggers.log({"a": {"step": 1, "loss": 0.0}})
        raise RuntimeError
    assert begun[0].finished


def test_an_unknown_logger_is_rejected() -> None:
    with pytest.raises(UsageError, match="unknown --log mlflow: expected one of tensorboard, wandb, trackio"):
        Loggers(["mlflow"], [])


@pytest.mark.parametrize("name", LOGGERS)
def test_a_logger_that_is_not_installed_is_an_error(name: str, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr("sae.common.packages.installed_version", lambda package: None)
    with pytest.raises(UnavailableError, match=rf"--log {name} needs .* pip install 'sae-pipeline\[{name}\]'"):
        Loggers([name], [])


def test_tensorboard_s_files_hold_the_numbers(tmp_path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Loggers(["tensorboard"], [run_named(tmp_path / "a")]) as loggers:
        loggers.log({"a": {"step": 7, "loss": 0.25, "l0": 32.0}})
    found = EventAccumulator(str(tmp_path / "a" / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in found.Scalars("loss")] == [(7, 0.25)]


USE = """
import sys
from pathlib import Path
from types import SimpleNamespace
from sae.train.loggers import Loggers
folder = Path(sys.argv[2])
run = SimpleNamespace(name=folder.name, folder=folder, identity=lambda: {"variant": "topk", "seed": 0})
with Loggers([sys.argv[1]], [run]) as loggers:
    for step in (7, 9):
        loggers.log({folder.name: {"step": step, "loss": 0.25, "l0": 32.0}})
"""


def use(name: str, folder: Path) -> None:
    """Log two steps with the package itself, offline and in a process of its own."""
    pytest.importorskip(name)
    folder.mkdir()
    environment = os.environ | {"WANDB_MODE": "offline", "TRACKIO_DIR": str(folder / "trackio"), "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, "-c", USE, name, str(folder)]
    used = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=300)
    assert used.returncode == 0, used.stderr


def test_wandb_itself_writes_a_run(tmp_path: Path) -> None:
    use("wandb", tmp_path / "a")
    (file,) = tmp_path.glob("a/wandb/offline-run-*/run-a.wandb")
    assert b"loss" in file.read_bytes()


def test_trackio_itself_writes_both_steps(tmp_path: Path) -> None:
    use("trackio", tmp_path / "a")
    with sqlite3.connect(tmp_path / "a" / "trackio" / "sae.db") as database:
        rows = database.execute("SELECT step, json_extract(metrics, '$.loss') FROM metrics ORDER BY step").fetchall()
    assert rows == [(7, 0.25), (9, 0.25)]
