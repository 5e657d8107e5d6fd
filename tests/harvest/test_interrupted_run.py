"""A harvest that is killed again and again ends in the same bytes as an uninterrupted one."""

import signal
from pathlib import Path

import pytest

from sae.cache.reader import Cache
from sae.cli.main import app
from sae.harvest.run import harvest_activations

from ..kills import exit_code, finish, kill, run_until_killed
from .written import files_of

KILLS = [  # of over forty windows
    ("*/tokens/ids/c.*", "before"), ("*/tokens/ids/c.*", "after"), ("*/commits/000005.*", "before"),
    ("*/commits/000010.*", "after"), ("*/layer_01/c.15.0", "before"), ("*/row_ctx/c.20", "after"),
    ("*/commits/000025.*", "0.001"), ("*/commits/000030.*", "0.004"), ("*/commits/000035.*", "0.01"),
    ("*/manifest.json", "before"),
]  # fmt: skip


def reached(folder: Path, commits: int) -> bool:
    return (folder / "tokens").exists() and len(list(folder.glob("commits/*.json"))) >= commits


@pytest.mark.slow
def test_a_harvest_killed_at_any_instant_continues(tiny_model: Path, sentences: Path, tmp_path: Path) -> None:
    options = {
        "model": str(tiny_model), "dataset": str(sentences), "layers": (0, 1), "tokens": 6000, "context": 32,
        "window": 128, "held_out": 0.1, "device": "cpu", "batch_contexts": 8,
    }  # fmt: skip
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(harvest_activations, options | {"out": whole})
    for file, moment in KILLS:
        kill(harvest_activations, options | {"out": killed}, file, moment)
    finish(harvest_activations, options | {"out": killed})
    cache = Cache(killed)
    assert len(list(cache.verify())) == len(cache.manifest["files"])
    assert files_of(killed) == files_of(whole)


def test_sigterm_acts_like_ctrl_c(tiny_model: Path, sentences: Path, tmp_path: Path, capfd) -> None:
    """Exit code 130, the committed windows kept, and no lock left behind."""
    out = tmp_path / "stopped"
    words = ["harvest", "--model", tiny_model, "--dataset", sentences, "--layer", 0, "--tokens", 6000, "--context", 32]
    words += ["--window", 64, "--batch-contexts", 1, "--out", out]
    arguments = {"args": list(map(str, words)), "prog_name": "sae"}
    assert exit_code(run_until_killed, app, arguments, "*/commits/000002.*", "after", signal.SIGTERM) == 130
    assert "run the same command again to continue" in capfd.readouterr().err
    assert reached(out, 2) and not (out / ".lock.holder").exists()
