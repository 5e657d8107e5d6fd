"""Training from an object store gives the same bytes as from a disk, despite faults of the store or link, and kills."""

import functools
import json
import os
import random
import re
import shutil
import signal
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sae.cache import local_folder as folders
from sae.cache import object_store
from sae.cache.catalog import find_by_fingerprint
from sae.cache.opening import concat_caches
from sae.cache.pulled_files import contents, walk
from sae.cache.reading import ChunkReading
from sae.cli.main import app
from sae.common.errors import Interrupted, UnavailableError, UsageError
from sae.evaluate.run import evaluate_saes
from sae.train.plan import plan_training
from sae.train.progress import TrainProgress
from sae.train.run import run_training
from sae.train.store_reading import CALIBRATION_BATCHES, expected_readings

from .. import faulty_proxy as faulty_proxies
from ..faulty_proxy import Request, Schedule, faulty_proxy, seeded
from ..object_store import environment, make_bucket, upload
from ..worker_process import WorkerProcess
from .runs import make_config, train

FAILURES = ("500", "429", "slow", "half", "drop")
TRAIN = """
import sys
from pathlib import Path
from sae.cache.local_folder import OPENED
from sae.train.plan import TrainConfig, plan_training
from sae.train.run import run_training
address, out, size, variant = sys.argv[1:]
plan = plan_training(TrainConfig(
    [variant], layers=[0], caches=[address], out=Path(out), local_cache=int(size), steps=100, batch_size=74, width="64",
    device="cpu", checkpoint_every=20, log_every=10,
))
run_training(plan)
print(plan.runs[0].folder, next(iter(OPENED.values())).pulled_files, flush=True)
"""


def results(folders: list[Path]) -> list[bytes]:
    return [(folder / "sae.safetensors").read_bytes() for folder in folders]


@pytest.fixture
def fast_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Try again at once, and give up soon."""
    backoff = {"init_backoff": timedelta(milliseconds=1), "max_backoff": timedelta(milliseconds=5), "base": 2}
    monkeypatch.setattr(object_store, "RETRY", {**object_store.RETRY, "max_retries": 4, "backoff": backoff})
    monkeypatch.setattr(object_store, "PAUSE", 0.001)
    monkeypatch.setattr(faulty_proxies, "SLOW", 0.05)
    monkeypatch.setattr(folders, "LOOK_AGAIN", 0.1)


@pytest.fixture(scope="session")
def many_chunks(tiny_model: Path, sentences: Path, tmp_path_factory: pytest.TempPathFactory):
    """A cache of layer 0 of `tiny_model`, 8,000 rows in 63 chunks of 128. Do not modify."""
    from sae.harvest.plan import HarvestConfig, plan_harvest
    from sae.harvest.run import run_harvest

    out = tmp_path_factory.mktemp("activations") / "many"
    config = HarvestConfig(
        model=str(tiny_model), dataset=str(sentences), layers=(0,), tokens=8000, context=32, window=128, held_out=0.1,
        device="cpu", out=out,
    )  # fmt: skip
    return run_harvest(plan_harvest(config))


@pytest.fixture(scope="module")
def uploaded(many_chunks, s3_endpoint: str) -> str:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(s3_endpoint).items():
            patch.setenv(name, value)
        return upload(many_chunks.folder, f"{make_bucket(s3_endpoint)}/pile")


@pytest.fixture
def pile(uploaded: str, bucket: str) -> str:
    """The address of `many_chunks` in a store that this test's environment reaches. Do not modify."""
    return uploaded


@pytest.fixture(scope="module")
def trained_from_disk(many_chunks, tmp_path_factory: pytest.TempPathFactory, one_thread: None):
    """A function that returns the folders of the runs of these recipes, trained from a disk, once for all tests."""

    @functools.cache
    def runs(*variants: str) -> list[Path]:
        return train(config_of(many_chunks, tmp_path_factory.mktemp("disk"), *variants))

    return runs


def config_of(cache, out: Path, *variants: str, **changes):
    """A config of 100 steps of 74 rows. Each of two lanes gives 37 of them, so that six chunks at a time are enough."""
    settings = dict(steps=100, batch_size=74, width="64", out=out, checkpoint_every=20)
    return make_config(cache, *(variants or ("topk",)), **settings | changes)


def damaging_once(schedule: Schedule, seed: int) -> Schedule:
    """`schedule`, but about every fourth file arrives by half at its first request. Records are left alone."""
    seen = set[str]()

    def fault(request: Request) -> str | None:
        first = request.path not in seen
        seen.add(request.path)
        is_file = "/c." in request.path and request.method == "GET" and "range" not in request.path
        if first and is_file and zlib.crc32(f"{seed}{request.path}".encode()) % 4 == 0:
            return "short"
        return schedule(request)

    return fault


def small_size(address: str, chunks: int = 8) -> int:
    """The size of a local folder that has room for `chunks` chunks."""
    cache = concat_caches([address])
    cache.outlier_rows("layer_00"), cache.mean("layer_00")
    return contents(cache.local.folder).other + chunks * (128 * 32 * 2 + 4)


@contextmanager
def largest(folder: Path) -> Iterator[list[int]]:
    """Watch how many bytes the files in a local folder take. The last entry of the list is the largest number."""
    seen, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            seen.append(max(seen[-1], sum(size for name, size in walk(folder, "") if "/" in name)))

    thread = threading.Thread(target=watch)
    thread.start()
    yield seen
    done.set()
    thread.join()


def test_a_run_from_a_store_has_the_bytes_of_one_from_a_disk(tiny_cache, bucket: str, tmp_path: Path) -> None:
    address = upload(tiny_cache.folder, f"{bucket}/pile")
    on_disk = train(make_config(tiny_cache, "batchtopk", out=tmp_path / "disk", steps=30))
    config = make_config(tiny_cache, "batchtopk", out=tmp_path / "store", steps=30, caches=[address])
    plan = plan_training(config)
    assert [run.name for run in plan.runs] == [folder.name for folder in on_disk]
    assert f"store    0.5 MB to pull from {address} in 4 requests; 0.0 MB are already on the disk" in plan.describe()
    stored = train(config)
    assert results(stored) == results(on_disk)
    record = json.loads((stored[0] / "run.json").read_text())
    assert record["cache_folders"] == [address]
    assert find_by_fingerprint(tiny_cache.fingerprint, address).place == address
    assert not any("have no effect" in line for line in plan_training(replace(config, local_cache=10**9)).describe())
    again = plan_training(make_config(tiny_cache, "relu", out=tmp_path / "more", caches=[address])).describe()
    assert f"store    0.0 MB to pull from {address} in 0 requests; 0.5 MB are already on the disk" in again


@pytest.mark.slow
def test_runs_are_evaluated_on_their_cache_wherever_it_is(tiny_cache, bucket: str, tmp_path: Path) -> None:
    address = upload(tiny_cache.folder, f"{bucket}/pile")
    asked = dict(suite="core", tokens=60, device="cpu", references=False, force=True)
    (stored,) = train(make_config(tiny_cache, "topk", out=tmp_path / "store", caches=[address]))
    (on_disk,) = train(make_config(tiny_cache, "topk", out=tmp_path / "disk"))
    rows = [
        evaluate_saes([run], cache=cache, **asked)[0]
        for run in (stored, on_disk)
        for cache in (None, address, tiny_cache.folder)
    ]
    assert all(row.results == rows[0].results for row in rows)
    shutil.copytree(tiny_cache.folder, tmp_path / "activations" / "moved")  # what is under activations/ comes first
    assert find_by_fingerprint(tiny_cache.fingerprint, address).folder == tmp_path / "activations" / "moved"


@pytest.mark.slow
def test_the_command_plans_trains_stops_and_resumes(tiny_cache, bucket: str, tmp_path: Path) -> None:
    address = upload(tiny_cache.folder, f"{bucket}/pile")
    words = ["train", "--variant", "topk", "--layer", "0", "--width", "64", "--batch-size", "64", "--device", "cpu"]
    words += ["--cache", address, "--local-cache", "5MB", "--local-folder", str(tmp_path / "scratch"), "--steps"]
    planned = CliRunner().invoke(app, [*words, "60", "--dry-run"])
    assert planned.exit_code == 0 and not (tmp_path / "runs").exists()
    for line in (
        "store    0.5 MB to pull",
        f"local    {tmp_path / 'scratch'} keeps at most 5.0 MB",
        "link     training does",
    ):
        assert line in planned.stderr
    result = CliRunner().invoke(app, [*words, "60"])
    assert result.exit_code == 0, result.output
    (folder,) = (tmp_path / "runs").iterdir()
    shutil.rmtree(tmp_path / "scratch")
    (folder / "sae.json").unlink()
    result = CliRunner().invoke(app, ["train", "--resume", str(folder), "--device", "cpu"])
    assert result.exit_code == 0 and (folder / "sae.json").exists(), result.output
    assert contents(tmp_path / "activations" / ".pulled").whole == {}  # nothing is pulled, only the SAE is written


@pytest.mark.slow
@pytest.mark.usefixtures("fast_retries")
def test_the_size_of_the_local_folder_is_kept_over_epochs_and_passes(many_chunks, pile: str, tmp_path: Path) -> None:
    options = dict(steps=250, seeds=[0, 1], layers=[0])
    expected = train(config_of(many_chunks, tmp_path / "disk", "topk", "batchtopk", **options))
    size = small_size(pile)
    config = config_of(many_chunks, tmp_path / "store", "topk", "batchtopk", **options, caches=[pile], local_cache=size)
    plan = plan_training(config)
    (said,) = [line for line in plan.describe() if line.startswith("store ")]
    local = concat_caches([pile]).local
    before = local.pulled_files
    with largest(local.folder) as seen:
        run_training(plan)
    assert results([run.folder for run in plan.runs]) == results(expected)
    assert 0.5 * size < seen[-1] <= size
    pulled = local.pulled_files - before
    assert f" in {pulled} requests" in said or pulled <= 1.1 * int(said.split(" in ")[1].split(" ")[0])
    assert pulled > 2 * 63  # more than two epochs are pulled, as the folder keeps little of them


@pytest.mark.slow
@pytest.mark.usefixtures("fast_retries")
@pytest.mark.parametrize("seed", range(25))
def test_failures_of_the_store_change_no_byte(
    many_chunks,
    pile: str,
    trained_from_disk,
    s3_endpoint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
) -> None:
    expected = trained_from_disk()
    with faulty_proxy(s3_endpoint, damaging_once(seeded(seed, 0.15, FAILURES), seed)) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        size = small_size(pile)
        stored = train(config_of(many_chunks, tmp_path / "store", caches=[pile], local_cache=size))
    assert results(stored) == results(expected)
    assert {fault for fault, _ in proxy.injected} == {*FAILURES, "short"}


def logged_steps(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.usefixtures("fast_retries")
@pytest.mark.parametrize("log_every", [1, 7])
def test_the_last_steps_before_the_store_fails_are_logged_once(
    tiny_cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_every: int
) -> None:
    shutil.copytree(tiny_cache.folder, tmp_path / "store" / "pile")
    address = f"file://{tmp_path}/store/pile"
    config = config_of(tiny_cache, tmp_path / "runs", caches=[address], local_cache=10**9, log_every=log_every)
    plan = plan_training(config)

    def fail(reading: ChunkReading, step: int, chunks: list[int]) -> object:
        if step >= 10:
            raise failure
        return step_of(reading, step, chunks)

    failure, step_of = UnavailableError("the store failed."), ChunkReading.step
    monkeypatch.setattr(ChunkReading, "step", fail)
    with pytest.raises(UnavailableError, match="saved"):
        run_training(plan)
    (folder,) = [run.folder for run in plan.runs]
    (saved,) = [int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").glob("step-*")]
    assert logged_steps(folder) == [step for step in range(1, saved + 1) if step in (1, saved) or step % log_every == 0]


@pytest.mark.slow
@pytest.mark.usefixtures("fast_retries")
def test_a_store_that_is_gone_ends_training_with_a_checkpoint_and_the_same_command_goes_on(
    many_chunks, pile: str, trained_from_disk, s3_endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = trained_from_disk()
    gone = [False]
    with faulty_proxy(s3_endpoint, lambda request: "500" if gone[0] else None) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        config = config_of(many_chunks, tmp_path / "store", caches=[pile], local_cache=small_size(pile), log_every=1)

        def leave(step: int, steps: int, metrics: object) -> None:
            gone[0] = gone[0] or step == 30

        plan = plan_training(config)
        with pytest.raises(
            UnavailableError, match=r"500.*Everything up to step \d+ is saved; the same command continues"
        ):
            run_training(plan, TrainProgress(step=leave))
        (folder,) = [run.folder for run in plan.runs]
        saved = max(int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").glob("step-*"))
        assert 30 <= saved < 100
        assert logged_steps(folder) == list(range(1, saved + 1))
        gone[0] = False
        assert results(train(config)) == results(expected)


@pytest.mark.slow
@pytest.mark.usefixtures("fast_retries")
def test_ctrl_c_while_training_waits_for_the_store_saves_what_is_trained(
    many_chunks, pile: str, s3_endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faulty_proxies, "SLOW", 60.0)
    stuck = [False]
    with faulty_proxy(s3_endpoint, lambda request: "slow" if stuck[0] else None) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        config = config_of(many_chunks, tmp_path / "store", caches=[pile], local_cache=small_size(pile), log_every=1)

        def stick(step: int, steps: int, metrics: object) -> None:
            if step == 10:
                stuck[0] = True
                threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()

        started = time.monotonic()
        with pytest.raises(Interrupted, match=r"Stopped after step \d+; everything is saved"):
            run_training(plan_training(config), TrainProgress(step=stick))
        assert time.monotonic() - started < 30


@pytest.fixture
def start_process(launcher: WorkerProcess):
    """A function that trains from an address in another process: `(address, out, size, variant) -> process ID`."""

    def start(address: str, out: Path, size: int, variant: str = "topk") -> int:
        words = ["0", "-c", TRAIN, address, str(out), str(size), variant]
        return launcher("forked_ranks.start", words=words, folder=out.parent, environment=dict(os.environ))

    return start


@pytest.fixture
def end_process(launcher: WorkerProcess):
    """A function that waits until such a process succeeds: `(process ID) -> its run folder, its number of files`."""

    def end(process: int) -> list[str]:
        code, said, reported = launcher("forked_ranks.finish", pid=process)
        assert code == 0, reported
        return said.split()

    return end


@pytest.mark.slow
def test_processes_share_the_folder_and_no_chunk_is_pulled_twice(
    many_chunks, pile: str, trained_from_disk, tmp_path: Path, start_process, end_process
) -> None:
    variants = ("topk", "batchtopk", "relu")
    expected = trained_from_disk(*variants)
    processes = [start_process(pile, tmp_path / "store", 10**9, variant) for variant in variants]
    said = [end_process(process) for process in processes]
    assert results([Path(folder) for folder, _ in said]) == results(expected)
    assert sum(int(pulled) for _, pulled in said) == 63


@pytest.mark.slow
def test_processes_share_a_folder_that_is_too_small_for_all_chunks(
    many_chunks, pile: str, trained_from_disk, tmp_path: Path, start_process, end_process
) -> None:
    variants = ("topk", "batchtopk", "relu")
    expected = trained_from_disk(*variants)
    size = small_size(pile, 24)
    local = concat_caches([pile]).local.folder
    with largest(local) as seen:
        processes = [start_process(pile, tmp_path / "store", size, variant) for variant in variants]
        said = [end_process(process) for process in processes]
    assert results([Path(folder) for folder, _ in said]) == results(expected)
    assert seen[-1] <= size


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_ranks_share_the_folder(many_chunks, pile: str, tmp_path: Path, launcher: WorkerProcess, count: int) -> None:
    """Two of them are started by torchrun."""
    out = tmp_path / "store"
    expected = train(config_of(many_chunks, tmp_path / "disk", "topk", "batchtopk", "relu", steps=60))
    size = small_size(pile, 24)
    torchrun = ["python", "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", "-m", "sae"]
    words = ["train", "--cache", pile, "--layer", 0, "--steps", 60, "--batch-size", 74, "--width", 64]
    words += ["--device", "cpu", "--local-cache", size, "--out", out]
    words += "--variant topk --variant batchtopk --variant relu".split()
    variables = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    with largest(concat_caches([pile]).local.folder) as seen:
        command = [*(torchrun if count == 2 else [str(count)]), *map(str, words)]
        given = {"words": command, "folder": tmp_path, "environment": variables}
        code, _, said = launcher("forked_ranks.launch", **given)
        assert code == 0, said
    runs = [out / folder.name for folder in expected]
    assert results(runs) == results(expected)
    worlds = {json.loads((run / "run.json").read_text())["environment"]["variables"]["WORLD_SIZE"] for run in runs}
    assert worlds == {str(count)} and f"deal     3 runs to {count} processes" in said and "store    0." in said
    assert 0 < seen[-1] <= size


@pytest.mark.slow
def test_a_kill_leaves_a_folder_that_the_next_process_uses(
    many_chunks, pile: str, trained_from_disk, tmp_path: Path, launcher: WorkerProcess, start_process, end_process
) -> None:
    expected = trained_from_disk()
    size = small_size(pile)
    local, rng = concat_caches([pile]).local.folder, random.Random(0)
    for _ in range(6):
        process = start_process(pile, tmp_path / "store", size)
        state = Path(f"/proc/{process}/stat")
        while not any(contents(local).parts) and state.read_text().rpartition(")")[2].split()[0] != "Z":
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.4))
        os.kill(process, signal.SIGKILL)
        launcher("forked_ranks.finish", pid=process)
    folder = Path(end_process(start_process(pile, tmp_path / "store", size))[0])
    assert results([folder]) == results(expected)
    assert not contents(local).parts


@pytest.mark.parametrize("given", [{"local_cache": 10**9}, {"local_folder": Path("pulled")}])
def test_the_plan_says_that_a_disk_needs_no_local_folder(tiny_cache, tmp_path: Path, given: dict) -> None:
    lines = plan_training(make_config(tiny_cache, "topk", out=tmp_path / "runs", **given)).describe()
    assert "note     --local-cache and --local-folder have no effect: no cache is in an object store" in lines


def test_a_size_that_is_too_small_is_refused_before_anything_is_written(
    tiny_cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = upload(tiny_cache.folder, f"file://{tmp_path}/store/pile")
    config = make_config(tiny_cache, "topk", caches=[address], local_cache=300_000, out=tmp_path / "runs")
    with pytest.raises(UsageError, match=r"--local-cache 0.3 MB is too small: one step reads 0.5 MB of chunks"):
        plan_training(config)
    monkeypatch.setattr("sae.cache.room.free_space", lambda folder: 1000)  # no sufficient size fits on the disk
    with pytest.raises(
        UsageError, match=r"It needs 0.\d MB, but its disk has only 0.0 MB: free space, or give a --local-f"
    ):
        plan_training(config)
    assert not (tmp_path / "runs").exists()


def test_ranks_that_share_the_folder_are_refused_with_a_size_for_all(
    tiny_cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = upload(tiny_cache.folder, f"file://{tmp_path}/store/pile")
    options = dict(caches=[address], out=tmp_path / "runs")
    plan_training(make_config(tiny_cache, "topk", "relu", local_cache=1_000_000, **options))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")  # of which two read, because there are two runs
    with pytest.raises(UsageError, match=r"1.0 MB is too small: one step.* other processes that share") as info:
        plan_training(make_config(tiny_cache, "topk", "relu", local_cache=1_000_000, **options))
    enough = re.search(r"Give --local-cache ([\d.]+) MB or more", str(info.value))
    assert enough is not None
    plan_training(make_config(tiny_cache, "topk", "relu", local_cache=int(float(enough[1]) * 1e6), **options))


def test_what_does_not_fit_on_the_disk_is_refused_before_anything_is_written(
    tiny_cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = upload(tiny_cache.folder, f"file://{tmp_path}/store/pile")
    monkeypatch.setattr("sae.train.store_reading.free_space", lambda folder: 1000)
    config = make_config(tiny_cache, "topk", caches=[address], local_cache=10**9, out=tmp_path / "runs")
    with pytest.raises(UnavailableError, match="grow by 0.5 MB, but its disk has only 0.0 MB free: free space"):
        plan_training(config)
    monkeypatch.setattr("sae.train.store_reading.room_for", lambda size: 500)  # as if a step read one small chunk
    with pytest.raises(UnavailableError, match="MB free: give --local-cache 0.0 MB or more"):
        plan_training(config)
    assert not (tmp_path / "runs").exists()


def test_a_pass_reads_what_its_longest_run_does_and_then_what_fits_a_number(tiny_cache, tmp_path: Path) -> None:
    address = upload(tiny_cache.folder, f"file://{tmp_path}/store/pile")
    runs = [
        run
        for steps in (30, 12)
        for run in plan_training(make_config(tiny_cache, "topk", caches=[address], steps=steps, out=tmp_path)).runs
    ]
    (reading,) = expected_readings([runs])
    assert reading.steps == range(30 + CALIBRATION_BATCHES)
