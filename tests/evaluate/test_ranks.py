"""Evaluation over any number of ranks of a launcher gives the same files and tables as one process."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

import sae
from sae.__main__ import main
from sae.cache.reader import Cache
from sae.train.sae import save_sae

from ..run_records import write_run_record
from ..worker_process import WorkerProcess
from .metrics.test_stability import make_sae

pytestmark = pytest.mark.usefixtures("one_thread")
FORKED = str(Path(__file__).parents[1] / "forked_ranks.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
CORE = ["--suite", "core", "--tokens", "400", "--device", "cpu", "--set", "core.batch_contexts=4"]
STABILITY = ["--set", "stability.tokens=50", "--set", "stability.draws=1"]
QUICK = [*CORE, "--suite", "core,stability", *STABILITY]
WIDTHS = {"a-0": 48, "a-1": 48, "b-0": 64}  # two seeds of a system at layer 0, and a run at layer 1


@pytest.fixture
def make_home(tiny_cache: Cache, tmp_path: Path):
    """A function that creates a home folder with the same three runs: `(name) -> folder`."""

    def make(name: str) -> Path:
        folder = tmp_path / name
        for run, width in WIDTHS.items():
            layer, seed = "ab".index(run[0]), int(run[-1])
            origin = {"model": tiny_cache.identity["model"], "layer": layer, "cache": str(tiny_cache.folder)}
            origin |= {"fingerprint": tiny_cache.fingerprint}
            save_sae(make_sae(seed, latents=width), folder / "runs" / run, origin)
            write_run_record(
                folder / "runs" / run, d_in=32, d_sae=width, layer=layer, variant="topk", seed=seed,
                options={"k": layer},
            )  # fmt: skip
        return folder

    return make


def command(words: Sequence[str], runs: Sequence[str] = tuple(WIDTHS)) -> list[str]:
    return ["evaluate", *(f"runs/{run}" for run in runs), *(words or QUICK)]


def variables_of(home: Path, more: Mapping[str, str]) -> dict[str, str]:
    return {**os.environ, "SAE_HOME": str(home), "OMP_NUM_THREADS": "1", **more}


def torchrun(home: Path, ranks: int, words: Sequence[str], **variables: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [*TORCHRUN, str(ranks), *words], env=variables_of(home, variables), cwd=home, capture_output=True, text=True,
        timeout=600,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def launch(launcher: WorkerProcess):
    """A function that runs a command in forked ranks: `(home, ranks, words, **variables) -> exit code, out, err`.

    If `ranks` is "python" instead of a number, it runs a Python program; see forked_ranks.py.
    """

    def launch(home: Path, ranks: int | str, words: Sequence[str], **variables: str) -> tuple[int, str, str]:
        asked = {"words": [str(ranks), *words], "folder": home, "environment": variables_of(home, variables)}
        return launcher("forked_ranks.launch", **asked)

    return launch


@pytest.fixture
def evaluate(launch):
    """A function that runs `sae evaluate` in forked ranks: `(home, ranks, *words) -> exit code, out, err`."""

    def evaluate(home: Path, ranks: int, *words: str, runs: Sequence[str] = tuple(WIDTHS), **variables: str):
        return launch(home, ranks, command(words, runs), **variables)

    return evaluate


@pytest.fixture
def evaluate_here(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    """A function that runs the same command in this process, without ranks: `(home, *words)`."""

    def evaluate(home: Path, *words: str, runs: Sequence[str] = tuple(WIDTHS)) -> tuple[int, str, str]:
        monkeypatch.setenv("SAE_HOME", str(home))
        monkeypatch.chdir(home)
        monkeypatch.setattr(sys, "argv", ["sae", *command(words, runs)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), *capfd.readouterr()

    return evaluate


def numbers(home: Path) -> dict[str, Any]:
    """The result files of all runs and reference rows, without the fields that change with every evaluation."""
    found = {}
    for path in [*home.glob("runs/*/evaluations/**/*.json"), *home.glob("activations/evaluation/references/**/*.json")]:
        record = json.loads(path.read_text())
        for name in ("eval_id", "datetime_epoch_millis"):
            del record[name]
        del record["eval_result_unstructured"]["content_digest"]
        found[str(path.relative_to(home))] = record
    return found


def without_times(err: str) -> list[str]:
    """The lines that ranks and a single process both print."""
    own = re.compile(r"(deal |rank \d|codes |writes|done|evaluate |\[|.*torch/)")
    return [line for line in err.splitlines() if not own.match(line)]


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_ranks_give_the_files_and_tables_of_one_process(make_home, evaluate_here, evaluate, count: int) -> None:
    one, many = make_home("one"), make_home("many")
    alone, together = evaluate_here(one), evaluate(many, count)
    assert alone[0] == together[0] == 1  # stability lacks a second seed of b-0
    assert len(numbers(one)) == 5 + 8 and numbers(many) == numbers(one)
    assert together[1] == alone[1] and "stability" in alone[1]
    assert without_times(together[2]) == without_times(alone[2])
    ranks = re.findall(r"^rank (\d) +(.*)", together[2], re.M)
    assert [int(rank) for rank, _ in ranks] == list(range(count)) and f"codes{' 1' * count}\n" in together[2]
    assert not list((many / "activations/evaluation/locks").glob("*.lock"))


@pytest.fixture(scope="module")
def alone_with_more_metrics() -> dict[str, Any]:
    return {}


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 3])
def test_any_number_of_ranks_gives_the_numbers_of_one_process_for_more_metrics(
    make_home, evaluate_here, launch, alone_with_more_metrics: dict[str, Any], count: int
) -> None:
    """With a count of two, torchrun starts the ranks."""
    words = [
        *QUICK, "--suite", "core,absorption,sparse_probing_stdlib,stability", "--set", "absorption.words=400",
        "--set", "absorption.min_GT_probe_f1=0", "--set", "sparse_probing_stdlib.train_set_size=40",
        "--set", "sparse_probing_stdlib.test_set_size=20",
    ]  # fmt: skip
    many, alone = make_home("many"), alone_with_more_metrics
    if not alone:
        one = make_home("one")
        alone |= {"tables": evaluate_here(one, *words)[1], "numbers": numbers(one)}
    if count == 2:
        _, out, err = launch(many, "python", [*TORCHRUN[1:], "2", "-m", "sae", *command(words)])
    else:
        _, out, err = launch(many, count, command(words))
    found = numbers(many)
    assert found == alone["numbers"] and out == alone["tables"]
    assert {Path(path).stem for path in found} == {"core", "absorption", "sparse_probing_stdlib", "stability"}
    dealt = re.findall(r"^rank (\d) +(.*)", err, re.M)
    assert len(dealt) == (count if count > 1 else 0) and not any(share == "nothing" for _, share in dealt)
    assert err.count("done     in ") == 1 and "rank 1:" not in err


MOMENTS = [  # pattern, N, ranks before, ranks after: a rank dies just before the N-th rename to a matching path
    (r"/text_pass-\w+\.safetensors$", 1, 2, 3),
    (r"/text_pass-\w+\.safetensors$", 7, 3, 2),
    (r"/text_pass-\w+\.json$", 4, 3, 1),
    (r"/sample-\w+\.safetensors$", 1, 2, 1),
    (r"/sample-\w+\.json$", 2, 3, 2),
    (r"/held_out-\w+\.safetensors$", 1, 2, 3),
    (r"/held_out-\w+\.json$", 1, 3, 1),
    (r"/runs/.*/core\.json$", 2, 3, 2),
    (r"/runs/.*/stability\.json$", 2, 2, 3),
    (r"/references/.*/core\.json$", 5, 3, 2),
]


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, Any]:
    return {}


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS, ids=str)
def test_a_rank_that_dies_costs_its_own_saes_alone(
    make_home, evaluate_here, undisturbed, moment, tmp_path, evaluate
) -> None:
    """The other ranks finish their shares; running the command again with more or fewer ranks measures the rest."""
    pattern, number, before, after = moment
    if not undisturbed:
        evaluate_here(make_home("one"))
        undisturbed |= numbers(tmp_path / "one")
    home, marks = make_home("killed"), tmp_path / "marks"
    marks.mkdir()
    code, out, err = evaluate(home, before, KILL_AT=f"{pattern}:{number}", KILL_MARKS=str(marks))
    codes = re.findall(r"^codes (.*)", err, re.M)[0].split()
    assert sorted(codes) == ["-9", *["4"] * (before - 1)]
    assert re.search(rf"Rank \d of {before}\b.* (has ended|no longer answers)\. Everything committed is safe;", err)
    left = numbers(home)
    assert all(undisturbed[path] == record for path, record in left.items()) and len(left) < len(undisturbed)
    code, out, err = evaluate(home, after)
    assert code == 1 and numbers(home) == undisturbed
    measured = sum(map(int, re.findall(r"^metric .* (\d+) to measure", err, re.M)))
    assert measured == 5 - sum(path.startswith("runs") for path in left)


@pytest.mark.slow
def test_a_launcher_that_ends_all_ranks_leaves_what_was_written(
    make_home, evaluate_here, tmp_path, evaluate, launch
) -> None:
    one, home, marks = make_home("one"), make_home("killed"), tmp_path / "marks"
    evaluate_here(one)
    marks.mkdir()
    killed = {"KILL_AT": r"/runs/.*/core\.json$:2", "KILL_MARKS": str(marks)}
    code, _, err = launch(home, "python", [*TORCHRUN[1:], "2", FORKED, "2", *command(())], **killed)
    assert "-9" in err and 0 < len(numbers(home)) < len(numbers(one))
    assert code == 1
    evaluate(home, 3)
    assert numbers(home) == numbers(one)


@pytest.mark.slow
def test_a_rank_without_work_says_nothing(make_home, evaluate_here, evaluate) -> None:
    one, two = make_home("one"), make_home("two")
    words = [*CORE, "--no-references"]
    alone, together = evaluate_here(one, *words, runs=["a-0"]), evaluate(two, 2, *words, runs=["a-0"])
    assert alone[:2] == together[:2] and alone[0] == 0
    assert re.findall(r"^rank (\d) +(.*)", together[2], re.M)[1] == ("1", "nothing")
    assert numbers(one) == numbers(two) and "codes 0 0" in together[2]
    again = evaluate(two, 2, *words, runs=["a-0"])  # there is nothing left to measure
    assert again[:2] == alone[:2]
    forced = evaluate(two, 2, *words, "--force", runs=["a-0", "a-1"])
    assert forced[0] == 0 and len(numbers(two)) == 2


IN_PYTHON = """
import json, os
import torch
import sae
from sae.common.errors import UsageError
asked = {"suite": "core", "tokens": 400, "device": "cpu", "options": ["core.batch_contexts=4"]}
rows = sae.evaluate_saes(["runs/a-0", "runs/b-0"], **asked)
assert torch.distributed.get_world_size() == int(os.environ["WORLD_SIZE"]) == 2
try:
    sae.evaluate_saes({"mine": object()}, cache="nowhere", layer=0)
except UsageError as error:
    refused = str(error)
with open(f"rows{os.environ['RANK']}.json", "w") as file:
    json.dump([refused, [row.flat() for row in rows]], file)
"""


@pytest.mark.slow
def test_evaluate_saes_returns_all_rows_in_each_process(make_home, evaluate_here, launch) -> None:
    one, two = make_home("one"), make_home("two")
    code, _, err = launch(two, 2, ["-c", IN_PYTHON])
    assert code == 0, err
    _, out, _ = evaluate_here(one, *CORE, "--json", runs=["a-0", "b-0"])
    for rank in range(2):
        refused, rows = json.loads((two / f"rows{rank}.json").read_text())
        assert rows == json.loads(out) and len(rows) == 2 + 8
        assert refused.startswith("A launcher has started several processes, and only run folders can be divided")


@pytest.mark.slow
def test_what_is_wrong_with_an_sae_is_said_by_the_first_process(make_home, evaluate_here, evaluate) -> None:
    """Only one rank reads the damaged weights; the results of that run and of its system are missing, no others."""
    home, other = make_home("damaged"), make_home("other")
    weights = home / "runs" / "a-1" / "sae.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    code, out, err = evaluate(home, 3)
    assert code == 3 and "codes 3 3 3" in err and "does not have the checksum that sae.json records" in err
    evaluate_here(other, *CORE, runs=["a-0", "b-0"])
    found = numbers(home)
    assert found == numbers(other) and "runs/a-1/evaluations/core.json" not in found
    assert "Traceback" not in err and err.count("checksum") == 2  # once for core and once for stability


@pytest.mark.slow
def test_torchrun_shows_all_tables_when_some_results_are_missing(make_home, evaluate_here) -> None:
    """Every rank fails. torchrun stops all ranks when one exits, so the others wait until the first has printed."""
    one, many = make_home("one"), make_home("many")
    alone, together = evaluate_here(one), torchrun(many, 3, ["-m", "sae", *command(())])
    assert alone[0] == together[0] == 1 and together[1] == alone[1] and "done     in " in together[2]
    assert "has ended" not in together[2]


@pytest.mark.slow
def test_every_rank_fails_where_nothing_can_be_measured(make_home, evaluate_here, evaluate) -> None:
    home = make_home("damaged")
    for weights in home.glob("runs/*/sae.safetensors"):
        weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    alone = evaluate_here(home)
    code, out, err = evaluate(home, 3)
    assert code == alone[0] == 3 and "codes 3 3 3" in err and out == ""
    assert err.count("error: ") == 1 and "rank 1" not in err.replace("rank 1   ", "") and "has ended" not in err


@pytest.mark.slow
def test_a_published_sae_is_imported_by_the_first_process(make_home, tiny_cache: Cache, launch) -> None:
    home = make_home("home")
    sae.export_sae(home / "runs" / "a-0", "saelens", home / "exported")
    shutil.rmtree(home / "runs")
    words = ["evaluate", "exported", *CORE, "--no-references", "--cache", str(tiny_cache.folder)]
    code, out, err = launch(home, 2, words)
    assert code == 0 and "codes 0 0" in err, err
    (run,) = (home / "runs").iterdir()
    assert list(numbers(home)) == [f"runs/{run.name}/evaluations/core.json"] and run.name in out


@pytest.mark.slow
def test_an_error_of_the_plan_is_said_once(make_home, evaluate) -> None:
    code, out, err = evaluate(make_home("home"), 3, "--suite", "cor")
    assert code == 2 and "codes 2 2 2" in err and err.count("there is no metric cor") == 1


@pytest.mark.slow
def test_a_dry_run_says_the_deal_and_writes_nothing(make_home, evaluate) -> None:
    home = make_home("home")
    code, out, err = evaluate(home, 2, *QUICK, "--dry-run")
    assert code == 0 and "deal     3 SAEs to 2 processes, by width and metrics" in err
    shares = re.findall(r"^rank (\d) +(.*)$", err, re.M)
    assert [rank for rank, _ in shares] == ["0", "1"]
    assert all(re.fullmatch(r".*, about [\d.]+ \w+, [\d.]+ MB for the model and these SAEs", s) for _, s in shares)
    assert not list(home.glob("runs/*/evaluations")) and not (home / "activations").exists()


@pytest.mark.slow
def test_controls_are_trained_over_ranks_and_evaluated(
    tiny_cache, tmp_path, evaluate_here, monkeypatch, evaluate
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    monkeypatch.setenv("SAE_HOME", str(one))
    sizes = {"steps": 20, "batch_size": 64, "width": "64", "layers": 1, "l0": 4}
    runs = [run.name for run in sae.train_saes("batchtopk", cache=tiny_cache, seeds=[0, 1], **sizes)]
    shutil.copytree(one, two)
    words = [*CORE, "--controls", "--no-references"]
    alone, together = evaluate_here(one, *words, runs=runs), evaluate(two, 2, *words, runs=runs)
    assert alone[0] == 0, alone[2]
    assert together[0] == 0 and "codes 0 0" in together[2], together[2]
    assert numbers(two) == numbers(one) and len(numbers(one)) == 2 + 3
    table = "core, on held-out text"
    assert together[1].partition(table)[2] == alone[1].partition(table)[2] != "" and "share of" in alone[1]
    weights = [{p.name: (p / "sae.safetensors").read_bytes() for p in controls_of(home)} for home in (one, two)]
    assert weights[0] == weights[1] and len(weights[0]) == 3


def controls_of(home: Path) -> list[Path]:
    return [path.parent for path in home.glob("activations/evaluation/controls/*/sae.json")]
