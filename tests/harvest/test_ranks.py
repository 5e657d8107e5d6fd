"""Several processes, as ranks or as shares, write the bytes of one process, even if they are killed at any moment."""

import contextlib
import itertools
import os
import random
import re
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from sae.cache.hooks import Hook
from sae.cache.layout import Layout
from sae.cache.reader import Cache
from sae.common.cache_schemas import HARVEST_RECORD
from sae.common.errors import UsageError
from sae.common.formatting import format_bytes
from sae.common.process_group import rank_and_count
from sae.common.records import RecordKind
from sae.harvest.config import HarvestConfig
from sae.harvest.division import describe_division, weight_bytes
from sae.harvest.plan import HarvestPlan, plan_harvest
from sae.harvest.progress import HarvestProgress
from sae.harvest.request import request_differs, request_of, request_turn
from sae.harvest.run import harvest_activations
from sae.harvest.share import HarvestShare, shares_of

from ..worker_process import WorkerProcess
from .ranks import Kill, Started, start_ranks
from .written import files_of

WINDOWS = 12


@pytest.fixture(scope="module")
def options(tiny_model: Path, sentences: Path) -> dict[str, Any]:
    """Two layers, 3,000 rows in twelve windows."""
    return {
        "model": str(tiny_model), "dataset": str(sentences), "layers": (0, 1), "tokens": 3000, "context": 32,
        "window": 256, "held_out": 0.1, "device": "cpu", "batch_contexts": 8,
    }  # fmt: skip


@pytest.fixture(scope="module")
def whole(options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> dict[str, bytes]:
    """The files of one process."""
    return files_of(harvest_activations(**options, out=tmp_path_factory.mktemp("whole") / "cache").folder)


def test_two_ranks_write_the_bytes_of_one_process(options: dict, whole: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "cache"
    ended = [process.end() for process in start_ranks([options | {"out": out}] * 2, tmp_path)]
    assert [(one["code"], one["world_size"], one["error"]) for one in ended] == [(0, 2, "")] * 2
    assert [one["windows"] for one in ended] == [list(range(0, WINDOWS, 2)), list(range(1, WINDOWS, 2))]
    assert files_of(out) == whole  # including harvest.json, and no other file is left


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_the_command_in_several_processes(
    tiny_model: Path, sentences: Path, tmp_path: Path, launcher: WorkerProcess, count: int
) -> None:
    """The two processes are started by torchrun, the usual launcher."""
    words = ["harvest", "--model", tiny_model, "--dataset", sentences, "--layer", 0, "--layer", 1, "--tokens", 3000]
    words = [*map(str, words), "--context", "32", "--window", "256", "--batch-contexts", "8", "--out"]
    one, several = tmp_path / "one", tmp_path / "several"
    given = {"folder": tmp_path, "environment": os.environ | {"OMP_NUM_THREADS": "1"}}
    assert launcher("forked_ranks.launch", words=["0", *words, str(one)], **given)[0] == 0
    if count == 2:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "sae"]
        done = subprocess.run(
            [*torchrun, *words, str(several)], check=True, env=given["environment"], capture_output=True, text=True
        )
        told = done.stderr
    else:
        code, _, told = launcher("forked_ranks.launch", words=[str(count), *words, str(several)], **given)
        assert code == 0, told
    each = -(-WINDOWS // count)
    assert f"ranks    {count} processes on 1 machine: each at most {each} of 12 windows" in told
    assert files_of(one) == files_of(several)
    # only the first process prints these lines
    assert told.count("done     3,000 rows") == told.count("memory   ") == 1


@pytest.mark.slow
def test_shares_in_any_order_with_one_run_twice(options: dict, whole: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "cache"
    for number in (3, 1, 3):
        ended = Started(options | {"out": out, "share": f"{number}/3"}, tmp_path / "note").end()
        assert ended["code"] == 0 and not (out / "manifest.json").exists()
    assert ended["windows"] == []  # nothing is repeated
    assert ended["said"][-1].startswith("Share 3/3 is done. 4 of 12 windows are missing, from share 2: ")
    assert Started(options | {"out": out, "share": "2/3"}, tmp_path / "note").end()["windows"] == [1, 4, 7, 10]
    assert files_of(out) == whole
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert Started(options | {"out": out, "share": "2/3"}, tmp_path / "note").end()["windows"] == []
    assert {path: path.stat().st_mtime_ns for path in before if path.exists()} == {
        path: time for path, time in before.items() if path.name != ".lock.holder"
    }


@pytest.mark.slow
def test_all_shares_at_once_and_one_of_them_twice(options: dict, whole: dict[str, bytes], tmp_path: Path) -> None:
    """One task cuts the text. The others wait and name the process that they wait for."""
    out = tmp_path / "cache"
    numbers = (1, 2, 3, 2)
    started = [
        Started(options | {"out": out, "share": f"{number}/3"}, tmp_path / f"note{place}")
        for place, number in enumerate(numbers)
    ]
    ended = [process.end() for process in started]
    assert [one["code"] for one in ended] == [0] * 4
    assert set(itertools.chain(*(one["windows"] for one in ended))) == set(range(WINDOWS))
    waiting = [one for one in ended if any("Waiting for the text, which process" in line for line in one["said"])]
    assert len(waiting) < 4
    assert files_of(out) == whole


@pytest.mark.slow
def test_prepared_text_is_read_by_every_share(options: dict, whole: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "cache"
    said: list[str] = []
    cache = harvest_activations(**options, out=out, prepare=True, progress=HarvestProgress(say=said.append))
    assert said[-1].startswith(
        "The text is cut: 3,000 rows in 12 windows. Run the shares now, in any order: --share 1/N"
    )
    assert cache.hooks == [] and not (out / "commits").exists()
    tokens = {path: path.stat().st_mtime_ns for path in (out / "tokens").rglob("*")}
    for number in (2, 1):
        assert Started(options | {"out": out, "share": f"{number}/2"}, tmp_path / "note").end()["code"] == 0
    assert {path: path.stat().st_mtime_ns for path in (out / "tokens").rglob("*")} == tokens
    assert files_of(out) == whole


@pytest.mark.slow
@pytest.mark.parametrize("dead", [0, 1])
def test_a_dead_rank_is_named(options: dict, whole: dict[str, bytes], tmp_path: Path, dead: int) -> None:
    """No launcher ends the other ranks, so they finish their windows and then name the rank that is missing."""
    out = tmp_path / "cache"
    ranks = start_ranks([options | {"out": out}] * 3, tmp_path, {dead: Kill("before", 25)})
    ended = [process.end() for process in ranks]
    assert ended[dead]["code"] == -9 and 0 < len(list(out.glob("commits/*.json"))) < 2 * WINDOWS
    for rank in {0, 1, 2} - {dead}:
        assert ended[rank]["code"] == 1 and ended[rank]["windows"] == list(range(rank, WINDOWS, 3))
        name = (
            "Rank 0 of 3, or the launcher on its machine (127.0.0.1), no longer answers. "
            if dead == 0
            else f"Rank 1 of 3 (process {ranks[1].process.pid} on "
        )
        assert ended[rank]["error"].startswith(name)
        assert dead == 0 or ") has ended. " in ended[rank]["error"]
        assert ended[rank]["error"].endswith("run the same command again, with any number of processes.")
    assert [one.end()["code"] for one in start_ranks([options | {"out": out}] * 2, tmp_path)] == [0, 0]
    assert files_of(out) == whole


@pytest.mark.slow
def test_ranks_without_a_common_folder_are_refused(options: dict, tmp_path: Path) -> None:
    both = [options | {"out": tmp_path / name} for name in ("disk0", "disk1")]
    ended = [process.end() for process in start_ranks(both, tmp_path)]
    assert [one["windows"] for one in ended] == [[], []]
    assert "does not see what" in ended[1]["error"]
    assert "set --out to a folder on a disk that all of them share" in ended[1]["error"]
    assert ended[0]["error"] == ended[1]["error"]


@pytest.mark.slow
def test_an_error_of_one_rank_ends_all_of_them(options: dict, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    ended = [process.end() for process in start_ranks([options | {"out": tmp_path / "cache"}] * 3, tmp_path)]
    assert [one["error"] for one in ended] == [ended[0]["error"]] * 3 and "is not a folder" in ended[0]["error"]


# The first process writes about 20 files of text and metadata. Then each process writes 10 files for each of its four
# windows.
KILLS = [
    *((kind, moment, file) for kind in ("ranks", "shares") for moment in ("before", "after")
      for file in (2, 9, 11, 14)),
    *((kind, moment, random.Random(file).randrange(14, 40)) for kind in ("ranks", "shares")
      for moment, file in (("before", 1), ("after", 2), ("later", 3), ("later", 4))),
    ("shares", "later", 5),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "moment", "file"), KILLS)
def test_kills_of_ranks_and_shares(
    options: dict, whole: dict[str, bytes], tmp_path: Path, kind: str, moment: str, file: int
) -> None:
    """One or two of three processes are killed. A different number of ranks, or the killed shares, then continue."""
    out, rng = tmp_path / "cache", random.Random(f"{kind} {moment} {file}")
    victims = {victim: Kill(moment, file) for victim in rng.sample(range(3), rng.choice([1, 2]))}
    if kind == "ranks":
        first = start_ranks([options | {"out": out}] * 3, tmp_path, victims)
    else:
        first = [
            Started(options | {"out": out, "share": f"{n + 1}/3"}, tmp_path / f"n{n}", kill=victims.get(n))
            for n in range(3)
        ]
    ended = [process.end() for process in first]
    died = [victim for victim in victims if ended[victim]["code"] == -9]
    assert died or moment == "later"  # if rank 0 dies first, another rank that was to be killed ends with an error
    if kind == "ranks":
        again = start_ranks([options | {"out": out}] * rng.choice([1, 2, 4]), tmp_path)
    else:
        again = [Started(options | {"out": out, "share": f"{n + 1}/3"}, tmp_path / f"n{n}") for n in died]
    assert all(process.end()["code"] == 0 for process in again)
    assert files_of(out) == whole
    assert len(list(Cache(out).verify())) == len(Cache(out).manifest["files"])
    shutil.rmtree(out)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("0/64", r"shares are numbered from 1 to 64. For a job array that begins at 0, .*ID \+ 1\)\)/64"),
        ("65/64", "shares are numbered from 1 to 64.$"), ("3", "expected the share's number"),
        ("3/-4", "expected the share"), ("a/b", "expected the share"), ("0/0", "numbered from 1 to 0"),
    ],
)  # fmt: skip
def test_shares_of_another_form_are_refused(text: str, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        HarvestShare.parse(text)


@pytest.mark.parametrize(("windows", "count"), [(12, 5), (3, 8), (0, 2), (64, 64)])
def test_every_window_is_in_one_share(windows: int, count: int) -> None:
    shares = [HarvestShare(number, count) for number in range(1, count + 1)]
    assert sorted(itertools.chain(*(share.windows(windows) for share in shares))) == list(range(windows))
    assert {len(share.windows(windows)) for share in shares} <= {windows // count, windows // count + 1}
    for share in shares:
        assert HarvestShare.parse(str(share)) == share
        if mine := share.windows(windows):
            assert shares_of(mine, count) == f"share {share.number}"


def test_missing_shares_are_named() -> None:
    assert shares_of([4, 8, 12], 4) == "share 1" and shares_of([4, 5, 11], 4) == "shares 1, 2, 4"
    assert shares_of(range(100), 10) == "shares 1, 2, 3, 4, 5, 6, 7, 8 and 2 others"


def test_shares_and_a_launcher_exclude_each_other(options: dict, tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(UsageError, match="--prepare cuts the text for every share. Leave --share out."):
        harvest_activations(**options, out=tmp_path / "c", share="1/2", prepare=True)
    monkeypatch.setenv("WORLD_SIZE", "4")
    for given in ({"share": "1/2"}, {"prepare": True}):
        with pytest.raises(UsageError, match="a launcher has started 4 processes that work together. Leave out --"):
            harvest_activations(**options, out=tmp_path / "c", **given)


def test_launchers_that_start_one_process_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rank_and_count() == (0, 1)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    assert rank_and_count() == (0, 1)  # accelerate launch --cpu --num_processes 1
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(UsageError, match="`accelerate launch --cpu` starts one process, whatever --num_processes says"):
        rank_and_count()
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "1")
    assert rank_and_count() == (0, 1)
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    with pytest.raises(UsageError, match="4 processes were started .OMPI_COMM_WORLD_SIZE. without WORLD_SIZE. Use"):
        rank_and_count()


@pytest.mark.slow
def test_accelerate_launch(options: dict, tmp_path: Path, launcher: WorkerProcess) -> None:
    """The installed version starts one process with --cpu, and the requested number with --multi_gpu, even on CPUs."""
    launch = ["python", "-m", "accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no"]
    words = ["-m", "sae", "harvest", "--model", options["model"], "--dataset", options["dataset"], "--layer", "0"]
    words += ["--tokens", "3000", "--context", "32", "--window", "256", "--device", "cpu", "--out"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def run(*flags: str) -> tuple[int, str]:
        """Return the exit code and stderr."""
        command = [*launch, *flags, "--num_processes", "2", *words, str(tmp_path / "cache")]
        code, _, said = launcher("forked_ranks.launch", words=command, folder=tmp_path, environment=environment)
        return code, said

    code, said = run("--cpu")
    assert code and "error: `accelerate launch --cpu` starts one process" in said
    assert not (tmp_path / "cache").exists()
    code, said = run("--multi_gpu")
    assert code == 0 and "ranks    2 processes on 1 machine" in said, said


def test_the_record_of_a_request_says_nothing_of_tasks(options: dict, tmp_path: Path) -> None:
    """A task replaces the record only if it requests something else."""

    def plan(**more: Any) -> HarvestPlan:
        return plan_harvest(HarvestConfig(**options | more, out=tmp_path))

    given = {"tokens": "--tokens"}
    both, one = plan(origins=given), plan(origins=given, layers=(0,))
    for task in ({"share": "1/2"}, {"prepare": True}):
        assert request_of(plan(origins=given | dict.fromkeys(task, "--flag"), **task)) == request_of(both)
    assert request_differs(both)
    HARVEST_RECORD.write(tmp_path / "harvest.json", request_of(one))
    assert request_differs(both) and not request_differs(one)
    HARVEST_RECORD.write(tmp_path / "harvest.json", request_of(both) | {"device": "cuda"})
    assert not request_differs(both) and not request_differs(one)  # a new request keeps the layers that are recorded


def test_tasks_that_add_other_layers_at_once_keep_each_other_s_modules(
    options: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One task reads harvest.json while the other is about to replace it."""
    plans = [plan_harvest(HarvestConfig(**options | {"layers": (layer,)}, out=tmp_path)) for layer in (0, 1)]
    write, inside = RecordKind.write, threading.Barrier(2)

    def write_together(self: RecordKind, path: Path, content: Any) -> None:
        with contextlib.suppress(threading.BrokenBarrierError):
            inside.wait(0.3)  # the barrier breaks if the other task has to wait
        write(self, path, content)

    def record(plan: HarvestPlan) -> None:
        with request_turn(plan.folder):
            assert request_differs(plan)
            HARVEST_RECORD.write(plan.folder / "harvest.json", request_of(plan))

    monkeypatch.setattr(RecordKind, "write", write_together)
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(record, plans))
    assert list(HARVEST_RECORD.read(tmp_path / "harvest.json")["modules"]) == ["layer_00", "layer_01"]
    assert [path.name for path in tmp_path.iterdir()] == ["harvest.json"]


def test_the_plan_of_ranks_counts_windows_machines_and_weights(tiny_model: Path, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "5")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    config, widths = AutoConfig.from_pretrained(tiny_model), {Hook(0): 32, Hook(1): 32}
    said = describe_division(None, Layout(3000, 256), [0, 5, 11], 32, config, widths, "bfloat16", "cpu")
    assert said[0] == "ranks    5 processes on 3 machines: each at most 3 of 12 windows, 696 rows, 0.1 MB"
    weights = format_bytes(weight_bytes(config, list(widths), "bfloat16"))
    assert re.fullmatch(
        rf"memory   about 0.6 MB in each process: 2 windows of .*, {weights} of weights on cpu", said[1]
    )
    shallow, whole = (weight_bytes(config, [Hook(layer)], "bfloat16") for layer in (0, 1))
    assert shallow < whole <= (tiny_model / "model.safetensors").stat().st_size < 1.05 * whole
