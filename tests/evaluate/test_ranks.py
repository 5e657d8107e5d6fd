"""Evaluation over the ranks of a launcher gives the files and tables of one process, whatever their number."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from sae.__main__ import main
from sae.cache.reader import Cache
from sae.train.sae import save_sae

from ..run_records import write_run_record
from .metrics.test_stability import make_sae

pytestmark = pytest.mark.usefixtures("one_thread")
FORKED = [sys.executable, str(Path(__file__).parents[1] / "forked_ranks.py")]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "-m", "--nproc_per_node"]
QUICK = [
    "--suite", "core,stability", "--tokens", "400", "--device", "cpu", "--set", "core.batch_contexts=4",
    "--set", "stability.tokens=50", "--set", "stability.draws=1",
]  # fmt: skip
WIDTHS = {"a-0": 48, "a-1": 48, "b-0": 64}  # two seeds of a system at layer 0, and a run at layer 1


@pytest.fixture
def make_home(tiny_cache: Cache, tmp_path: Path):
    """A function that makes a home with the same three runs in it: `(name) -> folder`."""

    def make(name: str) -> Path:
        folder = tmp_path / name
        for run, width in WIDTHS.items():
            layer, seed = "ab".index(run[0]), int(run[-1])
            origin = {"model": tiny_cache.identity["model"], "layer": layer, "cache": str(tiny_cache.folder)}
            origin |= {"fingerprint": tiny_cache.fingerprint}
            save_sae(make_sae(seed, latents=width), folder / "runs" / run, origin)
            write_run_record(
                folder / "runs" / run,
                d_in=32,
                d_sae=width,
                layer=layer,
                variant="topk",
                seed=seed,
                options={"k": layer},
            )
        return folder

    return make


def command(ranks: int, words: Sequence[str], runs: Sequence[str], launcher: Sequence[str]) -> list[str]:
    asked = ["evaluate", *(f"runs/{run}" for run in runs), *(words or QUICK)]
    return [*launcher, str(ranks), *(["sae"] if launcher is TORCHRUN else []), *asked]


def start(home: Path, words: Sequence[str]) -> subprocess.Popen[str]:
    environment = os.environ | {"SAE_HOME": str(home), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        words, env=environment, cwd=home, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
    )


def evaluate(
    home: Path, ranks: int, *words: str, runs: Sequence[str] = tuple(WIDTHS), launcher: Sequence[str] = FORKED
) -> tuple[int, str, str]:
    """`sae evaluate` of some runs by so many ranks: the exit code, stdout and stderr."""
    process = start(home, command(ranks, words, runs, launcher))
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err


@pytest.fixture
def evaluate_here(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    """The same in this process, without ranks: `(home, *words)`."""

    def evaluate(home: Path, *words: str, runs: Sequence[str] = tuple(WIDTHS)) -> tuple[int, str, str]:
        monkeypatch.setenv("SAE_HOME", str(home))
        monkeypatch.chdir(home)
        monkeypatch.setattr(sys, "argv", ["sae", *command(1, words, runs, [])[1:]])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), *capfd.readouterr()

    return evaluate


def numbers(home: Path) -> dict[str, Any]:
    """Every result file of the runs and of the reference rows, without what changes from time to time."""
    found = {}
    for path in [*home.glob("runs/*/evaluations/**/*.json"), *home.glob("activations/evaluation/references/**/*.json")]:
        record = json.loads(path.read_text())
        for name in ("eval_id", "datetime_epoch_millis"):
            del record[name]
        del record["eval_result_unstructured"]["content_digest"]
        found[str(path.relative_to(home))] = record
    return found


def without_times(err: str) -> list[str]:
    """The lines that ranks have in common with one process."""
    own = re.compile(r"(deal |rank \d|ranks |codes |writes|done|evaluate |\[|.*torch/)")
    return [line for line in err.splitlines() if not own.match(line)]


def test_three_ranks_give_the_files_and_tables_of_one_process(make_home, evaluate_here) -> None:
    one, three = make_home("one"), make_home("three")
    alone, together = evaluate_here(one), evaluate(three, 3)
    assert alone[0] == together[0] == 1  # stability lacks a second seed of b-0
    assert len(numbers(one)) == 5 + 8 and numbers(three) == numbers(one)
    assert together[1] == alone[1] and "stability" in alone[1]
    assert without_times(together[2]) == without_times(alone[2])
    ranks = re.findall(r"^rank (\d) +(.*)", together[2], re.M)
    assert [rank for rank, _ in ranks] == ["0", "1", "2"] and "codes 1 0 0" in together[2]
    assert not (three / "activations/evaluation/locks").exists()
