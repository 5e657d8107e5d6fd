"""Harvesting while training: interruptions do not change a bit, the disk never holds more than the ring, and invalid
requests are refused.

3,000 tokens are twelve windows of 256 rows, of which the disk holds four, and six groups of 512 rows. Each group except
the last has 8 batches of 60.
"""

import contextlib
import json
import re
import shutil
import signal
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from sae.cache.catalog import find_cache
from sae.cache.hooks import Hook
from sae.cache.reader import Cache
from sae.cache.ring import RingCache
from sae.cli.main import app
from sae.cli.train import run_streaming
from sae.common.errors import Interrupted, SaeError, UnavailableError, UsageError
from sae.common.files import read_json
from sae.evaluate.plan import EvaluateConfig as Evaluate
from sae.evaluate.run import evaluate
from sae.harvest.plan import HarvestConfig as Harvest
from sae.harvest.plan import plan_harvest
from sae.harvest.repair import repair
from sae.harvest.run import run_harvest
from sae.harvest.streaming import check_room, harvest_ahead, plan_ring
from sae.train import checkpoint_writer
from sae.train.checkpoint import training_state
from sae.train.loop import Trainer
from sae.train.plan import TrainConfig, TrainPlan, plan_training
from sae.train.recipe import RECIPES, find_recipe
from sae.train.run import TrainProgress
from sae.train.streaming import train_streaming
from sae.train.variant import RunConfig
from sae.workflows.stream import plan_streaming

from ..kills import finish, kill

TOKENS, WINDOW, RING, BATCH = 3000, 256, 4, 60
PER_GROUP, LEFT_FOR_THE_LAST = 8, 440 // BATCH
STEPS = 5 * PER_GROUP + LEFT_FOR_THE_LAST
WINDOW_BYTES = WINDOW * (2 * 32 + 4) + 2 * 32 * 8 + 3 * 4  # bytes of one array: rows, norms, moments, checksums
ORIGIN_BYTES = WINDOW * (4 + 2) + 2 * 4


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def asked(tiny_model: Path, sentences: Path) -> dict:
    """The options of the harvest."""
    sizes = dict(tokens=TOKENS, context=32, window=WINDOW, batch_contexts=8)
    return dict(model=str(tiny_model), dataset=str(sentences), device="cpu", **sizes)


def request_of(*variants: str, **changes) -> TrainConfig:
    settings = dict(
        layers=[1], batch_size=BATCH, width="64", options=["k=4"], device="cpu", checkpoint_every=1000, log_every=1
    )
    return TrainConfig(list(variants), **settings | changes)


def stream(asked: dict, request: TrainConfig, report: TrainProgress | None = None, ring: int = RING) -> list[Path]:
    planned, windows = plan_ring(Harvest(layers=request.layers, **asked), ring)
    request = TrainConfig(**vars(request) | {"source": windows})
    plan = plan_training(request)
    train_streaming(plan, report or TrainProgress(), partial(harvest_ahead, planned, windows))
    return [run.folder for run in plan.runs]


def the_ring() -> Path:
    (folder,) = Path("activations").glob("*--stream")
    return folder


def windows_there(folder: Path) -> set[int]:
    return {int(path.name[:6]) for path in folder.glob("commits/*.json")}


def bytes_of_windows(folder: Path) -> int:
    """Every file of windows on disk, including half-written ones."""
    sizes = []
    for path in [*folder.glob("layer_*/c.*"), *folder.glob("row_*/c.*")]:
        try:
            sizes.append(path.stat().st_size)
        except FileNotFoundError:  # renamed meanwhile
            continue
    return sum(sizes)


def weights(folder: Path) -> bytes:
    return (folder / "sae.safetensors").read_bytes()


def test_the_bits_are_those_of_training_by_hand_on_the_order_of_the_groups(asked, tmp_path: Path) -> None:
    """The order is computed with numpy: the number of a group decides the order of its chunks, which are read in thirty
    lanes; a batch has two rows of each lane."""
    (folder,) = stream(asked, request_of("topk", shuffle_seed=5))
    cache = run_harvest(plan_harvest(Harvest(layers=[1], out=tmp_path / "whole", **asked)))
    rows = [
        torch.from_numpy(cache.read_chunk("layer_01", n).astype(np.int32)).short().view(torch.bfloat16)
        for n in range(12)
    ]
    first = torch.cat(rows[:2]).double()

    torch.manual_seed(0)
    variant = find_recipe("topk").make(RunConfig(32, 64, STEPS, BATCH), {"k": 4})
    variant.set_normalization(first.mean(0).float(), float(first.square().sum(1).mean()))
    training = Trainer(variant, STEPS, "cpu")
    number, dropped = 0, 0
    for group in range(6):
        chunks = rows[2 * group : 2 * group + 2]
        order = np.random.Generator(np.random.Philox(key=[5, group])).permutation(len(chunks))
        laid = torch.cat([chunks[chunk] for chunk in order])
        lanes = laid[: len(laid) // 30 * 30].view(30, -1, 32)
        for at in range(0, lanes.shape[1] - 1, 2):
            training.run_periodic(number, training.step(lanes[:, at : at + 2].reshape(BATCH, 32)))
            number += 1
        dropped += len(laid) - BATCH * (lanes.shape[1] // 2)
    assert (number, dropped) == (STEPS, TOKENS - BATCH * STEPS)
    state = load_file(folder / "checkpoints" / f"step-{STEPS:08d}" / "state.safetensors")
    expected = training_state(training)
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name


def test_the_disk_never_holds_more_than_the_ring(asked, monkeypatch) -> None:
    """Only windows of the current and of the next group are on disk, and in the end only the text. A group is removed
    once the checkpoints after it are complete."""
    seen, most, saved = [], 0, []
    write, release = checkpoint_writer.write_checkpoint, RingCache.release_group

    def slowly(*of: object) -> None:
        time.sleep(0.01)
        write(*of)

    def look_again(ring: RingCache, group: int) -> None:
        newest = [max(run.glob("checkpoints/*/state.json")).parent.name for run in Path("runs").iterdir()]
        saved.append([int(name.removeprefix("step-")) for name in newest])
        release(ring, group)

    monkeypatch.setattr(checkpoint_writer, "write_checkpoint", slowly)
    monkeypatch.setattr(RingCache, "release_group", look_again)

    def look(step: int, *_: object) -> None:
        nonlocal most
        folder, group = the_ring(), (step - 1) // PER_GROUP
        patience = time.monotonic() + 60
        while step == 2 and len(windows_there(folder)) < RING and time.monotonic() < patience:
            time.sleep(0.001)  # until the harvest has filled the ring
        most = max(most, bytes_of_windows(folder))
        there = windows_there(folder)
        assert {2 * group, 2 * group + 1} <= there <= set(range(2 * group, 2 * group + 4))
        seen.append(there)
        time.sleep(0.003)  # the harvest gets ahead

    stream(asked, request_of("topk", layers=[0, 1]), TrainProgress(step=look))
    assert len(seen) == 2 * STEPS and max(map(len, seen)) == RING
    assert saved == [[min(PER_GROUP * group, STEPS)] * 2 for group in range(1, 7)]
    assert 3 * WINDOW_BYTES < most <= RING * (2 * WINDOW_BYTES + ORIGIN_BYTES)
    assert bytes_of_windows(the_ring()) == 0 and windows_there(the_ring()) == set()
    assert Cache(the_ring()).contexts(held_out=False).length.sum() > TOKENS


@pytest.mark.slow
def test_variants_and_layers_together_equal_each_alone(asked, tmp_path: Path) -> None:
    together = stream(asked, request_of("topk", "batchtopk", layers=[0, 1]))
    alone = stream(asked | {"out": tmp_path / "alone"}, request_of("batchtopk", layers=[1], out=tmp_path / "runs"))
    assert weights(together[3]) == weights(alone[0])
    assert len({weights(folder) for folder in together}) == 4


@pytest.mark.slow
def test_a_resumed_run_keeps_its_options_when_defaults_change(asked, tmp_path: Path, monkeypatch) -> None:
    """The weights are those of the run that was never stopped."""
    (whole,) = stream(asked | {"out": tmp_path / "whole"}, request_of("topk", out=tmp_path / "of_whole"))
    request = request_of("topk")

    def press(step: int, *_: object) -> None:
        if step == PER_GROUP + 2:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted):
        stream(asked, request, TrainProgress(step=press))
    recipe = find_recipe("topk")
    monkeypatch.setitem(RECIPES, "topk", replace(recipe, options={**recipe.options, "multi": 0.5}))
    said: list[str] = []
    (folder,) = stream(asked, request, TrainProgress(say=said.append))
    assert f"{folder.name} keeps the options that it was started with: multi=0.0 (0.5 in a new run)." in said
    assert weights(folder) == weights(whole)


# --- stopped, killed, failed --------------------------------------------------------------------------------------


def test_what_was_released_is_not_harvested_again(asked, tmp_path: Path) -> None:
    """After a stop in the third group, the repeated command keeps only windows of the third group and later on disk."""
    request, seen = request_of("topk"), set()

    def press(step: int, *_: object) -> None:
        if step == 2 * PER_GROUP + 2:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(
        Interrupted, match=rf"Stopped after step {2 * PER_GROUP + 3}; .* Resume with the same command\.$"
    ):
        stream(asked, request, TrainProgress(step=press))
    before = {path: path.stat().st_mtime_ns for path in the_ring().glob("commits/*.json")}
    assert {4, 5} <= windows_there(the_ring()) <= {4, 5, 6, 7}
    half_removed = the_ring() / "layer_01" / "c.3.0"  # as a kill during the removal would leave it
    half_removed.write_bytes(b"rows")

    def look(*_: object) -> None:
        assert not half_removed.exists()
        seen.update(windows_there(the_ring()))
        assert all(path.stat().st_mtime_ns == at for path, at in before.items() if path.exists())

    (folder,) = stream(asked, request, TrainProgress(step=look))
    assert seen == set(range(4, 12))
    (whole,) = stream(asked | {"out": tmp_path / "ring"}, request_of("topk", out=tmp_path / "whole"))
    assert weights(folder) == weights(whole)


@pytest.mark.slow
def test_rows_over_the_limit_of_the_first_window_are_masked_to_the_end(asked, tmp_path: Path) -> None:
    """The limit is recorded. After a stop it is the same, even if the folder of the windows has been removed."""
    asked, request = asked | {"max_norm": 1.2}, request_of("topk")
    said: list[str] = []
    elsewhere = asked | {"out": tmp_path / "ring"}
    (whole,) = stream(elsewhere, request_of("topk", out=tmp_path / "whole"), TrainProgress(say=said.append))
    cache = run_harvest(plan_harvest(Harvest(layers=[1], **asked | {"max_norm": None, "out": tmp_path / "cache"})))
    norms = cache.row_norms("layer_01")
    limit = read_json(whole / "sae.json")["origin"]["norm_limit"]
    assert limit == pytest.approx(1.2 * np.median(norms[:WINDOW]), rel=1e-6)
    assert f"layer_01: rows with a norm over {limit:.4g}, 1.2x the median of the first window, are masked." in said
    (unmasked,) = stream(elsewhere | {"max_norm": None}, request_of("topk", out=tmp_path / "all"))
    assert (norms > limit).any() and weights(unmasked) != weights(whole)

    def press(step: int, *_: object) -> None:
        if step == 2 * PER_GROUP + 2:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted):
        stream(asked, request, TrainProgress(step=press))
    shutil.rmtree(the_ring())
    (folder,) = stream(asked, request)
    assert weights(folder) == weights(whole)
    assert read_json(folder / "sae.json")["origin"]["norm_limit"] == limit


@pytest.mark.slow
def test_a_run_goes_on_where_one_with_another_limit_has_been_since(asked, tmp_path: Path) -> None:
    """All windows that the run needs exist, but not its limit. To find it, the first window is harvested again."""
    request, seen = request_of("topk"), set()

    def stop(step: int, *_: object) -> None:
        if step == 4 * PER_GROUP + 1:
            while len(windows_there(the_ring())) < RING:
                time.sleep(0.001)
            signal.raise_signal(signal.SIGINT)

    for max_norm in (1.2, 1.3):
        with pytest.raises(Interrupted):
            stream(asked | {"max_norm": max_norm}, request, TrainProgress(step=stop))
    assert windows_there(the_ring()) == {8, 9, 10, 11}
    look = TrainProgress(step=lambda *_: seen.update(windows_there(the_ring())))
    (folder,) = stream(asked | {"max_norm": 1.2}, request, look)
    assert seen == {8, 9, 10, 11}
    (whole,) = stream(asked | {"max_norm": 1.2, "out": tmp_path / "ring"}, request_of("topk", out=tmp_path / "whole"))
    assert weights(folder) == weights(whole)


@pytest.mark.slow
def test_a_run_added_later_starts_at_the_first_group(asked, tmp_path: Path, monkeypatch) -> None:
    """Windows that another run has released are harvested again and have the same bits. This also holds if copies of
    the states do not fit into memory, so that training waits for its checkpoints."""
    stream(asked, request_of("topk"))
    with monkeypatch.context() as patch:
        patch.setattr(TrainPlan, "in_background", False)
        patch.setattr(checkpoint_writer.CheckpointWriter, "_copy", pytest.fail)
        (later,) = stream(asked, request_of("relu", options=[]))
    (alone,) = stream(asked | {"out": tmp_path / "ring"}, request_of("relu", options=[], out=tmp_path / "alone"))
    assert weights(later) == weights(alone)


def test_a_failed_harvest_stops_training_with_its_message_after_a_checkpoint(asked, tmp_path: Path) -> None:
    request = request_of("topk")

    def obstruct(step: int, *_: object) -> None:
        origins = the_ring() / "row_pos"
        if step == 1:
            origins.rename(tmp_path / "away")
            origins.write_text("in the way")

    with pytest.raises(UnavailableError, match="Cannot write .*row_pos"):
        stream(asked, request, TrainProgress(step=obstruct))
    (the_ring() / "row_pos").unlink()
    (tmp_path / "away").rename(the_ring() / "row_pos")
    said: list[str] = []
    (folder,) = stream(asked, request, TrainProgress(say=said.append))
    assert re.fullmatch(r"topk-\S+ resumes from step (8|16|24).", said[0])
    (whole,) = stream(asked | {"out": tmp_path / "ring"}, request_of("topk", out=tmp_path / "whole"))
    assert weights(folder) == weights(whole)


KILLS = [
    ("*/ring/ring.json", "after"), ("*/ring/commits/000001.*", "0.01"), ("*/step-00000008/state.json", "before"),
    ("*/step-00000016/state.json", "after"), ("*/step-00000024/state.safetensors", "after"),
    ("*/step-00000032/state.json", "0.01"), ("*/sae.json", "before"), ("*/sae.json", "after"),
]  # fmt: skip


@pytest.mark.parametrize("kills", [KILLS[5:6], pytest.param(KILLS, marks=pytest.mark.slow)], ids=["one", "eight"])
def test_killed_at_any_instant(asked, tmp_path: Path, kills: list[tuple[str, str]]) -> None:
    """SIGKILL comes before the text is read, while windows are written, and between checkpoints and removals. The
    results are the same bit for bit."""
    given = {name: value for name, value in asked.items() if name not in ("model", "device")} | {"windows": RING}

    def arguments(place: Path) -> dict[str, object]:
        request = request_of("topk", "batchtopk", model=asked["model"], caches=[place / "ring"], out=place / "runs")
        return {"config": request, "harvest_options": given, "dry_run": False}

    def finished(place: Path) -> dict[str, bytes]:
        finish(run_streaming, arguments(place))
        return {
            path.relative_to(place).as_posix(): path.read_bytes() for path in place.rglob("*")
            if path.is_file() and path.name[0] != "." and path.name not in ("metrics.jsonl", "sae.json", "run.json")
        }  # fmt: skip

    whole, killed = finished(tmp_path / "whole"), tmp_path / "killed"
    for file, moment in kills:
        kill(run_streaming, arguments(killed), file, moment)
    assert finished(killed) == whole


def test_training_stops_while_waiting_for_the_first_group(asked) -> None:
    @contextlib.contextmanager
    def never(groups: range, say: object):
        signal.raise_signal(signal.SIGTERM)
        yield

    _, windows = plan_ring(Harvest(layers=[1], **asked), RING)
    request = request_of("topk", source=windows)
    with pytest.raises(Interrupted, match="Stopped while waiting for the harvest"):
        train_streaming(plan_training(request), TrainProgress(), never)


def test_nothing_is_harvested_for_failed_runs(asked) -> None:
    seen: set[int] = set()
    with pytest.raises(SaeError, match="was not finite at step"):
        stream(
            asked,
            request_of("topk", options=["lr=1e38"]),
            TrainProgress(say=lambda _: seen.update(windows_there(the_ring()))),
        )
    assert max(seen) <= 3 and windows_there(the_ring()) <= {2, 3, 4, 5}


# --- what comes after ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_streamed_run_is_evaluated_on_the_text_that_was_held_out(asked) -> None:
    (folder,) = stream(asked, request_of("topk"))
    (row,) = evaluate(Evaluate(runs=[folder], suite="core", tokens=60, device="cpu", references=False))
    assert 0 < row.results["core"].metrics["sparsity"]["l0"] <= 4
    origin = read_json(folder / "sae.json")["origin"]
    assert (origin["layer"], origin["context"], origin["cache"]) == (1, 32, str(the_ring().resolve()))
    assert json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])["waited_for_data"] > 0


def test_removed_windows_do_not_count_as_missing(asked) -> None:
    def stop(step: int, *_: object) -> None:
        if step == PER_GROUP + 1:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted):
        stream(asked, request_of("topk"), TrainProgress(step=stop))
    shown = CliRunner().invoke(app, ["cache", "list"]).stdout
    assert re.search(r"--stream   \S+, a ring with windows 2-[345] of 12, 3,000 rows", shown)
    with pytest.raises(UsageError, match="keeps only the windows"):
        run_harvest(plan_harvest(Harvest(layers=[1], out=the_ring(), **asked)))
    with pytest.raises(UsageError, match="keeps only the windows"):
        repair(the_ring())
    with pytest.raises(UsageError, match="is a ring with windows 2-"):
        plan_training(request_of("topk", caches=[the_ring()]))
    with pytest.raises(UsageError, match="No cache holds layer 1. Create one with"):
        find_cache(None, Hook(1))
    (folder,) = Path("runs").iterdir()
    with pytest.raises(UsageError, match="repeat the `sae train --stream` command"):
        plan_training(TrainConfig(resume=[folder]))


# --- rejected -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--stream --ring 3", "--ring 3 cannot be halved"),
        (f"--stream --steps {STEPS + 1}", f"--steps {STEPS + 1} is too many: 3,000 tokens are {STEPS} batches of 60"),
        ("--stream --batch-size 600", "Half of the ring holds 512 rows, fewer than one batch of 600"),
        ("--stream --resume runs/topk", "--resume cannot be combined with --stream"),
        ("--stream --cache a --cache b", "--stream writes one folder"),
        ("--stream --cache kept", "kept is an ordinary cache"),
        ("--stream --cache theirs", "theirs holds thesis.tex, but no activation cache"),
        ("--ring 4", "--tokens, --ring, --dataset, --context, --window can only be given with --stream"),
    ],
)  # fmt: skip
def test_invalid_combinations_are_rejected_and_nothing_is_written(asked, home: Path, words: str, sentence: str) -> None:
    (home / "kept").mkdir()
    (home / "kept" / "zarr.json").write_text("{}")
    (home / "theirs").mkdir()
    (home / "theirs" / "thesis.tex").write_text("")
    words += f" --model {asked['model']} --dataset {asked['dataset']} --tokens {TOKENS} --context 32 --window {WINDOW}"
    result = CliRunner().invoke(app, f"train --variant topk --layer 1 --batch-size {BATCH} {words}".split())
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    assert f"error: {sentence}" in result.stderr
    assert {path.name for path in home.rglob("*")} == {"kept", "zarr.json", "theirs", "thesis.tex"}


def test_an_address_is_refused(home: Path) -> None:
    words = ["train", "--stream", "--variant", "topk", "--tokens", "3000", "--cache", "s3://bucket/pile"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2 and "--stream writes into a folder, not a store" in result.output
    assert not list(home.iterdir())


def test_several_processes_are_refused(home: Path, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    result = CliRunner().invoke(app, ["train", "--stream", "--variant", "topk", "--tokens", "3000"])
    assert result.exit_code == 2 and "a launcher has started 8. Harvest first with the same launcher" in result.output
    assert not list(home.iterdir())


def test_the_number_of_tokens_is_required(asked) -> None:
    with pytest.raises(UsageError, match="--stream needs --tokens"):
        stream(asked | {"tokens": None}, request_of("topk"))


@pytest.mark.parametrize(
    ("windows", "said"),
    [(3.5, "--ring 2 would fit"), (1.5, "--ring 2 --window 191 would fit"), (0, "Free space first")],
)
def test_a_disk_too_small_for_the_ring_is_rejected_with_sizes_that_fit(asked, monkeypatch, windows, said) -> None:
    planned, ring = plan_ring(Harvest(layers=[1], **asked), RING)
    free = 1.02 * (windows * WINDOW * planned.bytes_per_token + 5 * TOKENS)
    monkeypatch.setattr("sae.harvest.streaming.free_space", lambda folder: int(free))
    with pytest.raises(UnavailableError, match=f"4 windows of 256 rows needs .* {said}"):
        check_room(planned, ring)


def test_the_harvest_has_the_options_of_training(monkeypatch) -> None:
    asked = []
    monkeypatch.setattr("sae.workflows.stream.plan_ring", lambda config, windows: asked.append(config) or 1 / 0)
    given = dict(device="cuda:3", modules=["h.{layer}.mlp"], model="gpt2", origins={"model": "flag"}, caches=["there"])
    with pytest.raises(ZeroDivisionError):
        plan_streaming(request_of("topk", **given), tokens=7)
    (harvest,) = asked
    assert (harvest.device, harvest.modules, harvest.sites) == ("cuda:3", ["h.{layer}.mlp"], ())
    assert (harvest.model, harvest.out, harvest.tokens) == ("gpt2", "there", 7) and harvest.origins == given["origins"]


def test_a_ring_takes_no_more_than_the_windows_of_the_text(asked) -> None:
    sizes = [check_room(*plan_ring(Harvest(layers=[1], **asked), ring)) for ring in (10, 12, 40)]
    assert sizes[0] < sizes[1] == sizes[2]


def test_the_window_that_is_being_written_is_whole_when_training_ends(asked, monkeypatch) -> None:
    planned, ring = plan_ring(Harvest(layers=[1], **asked), RING)
    begun, ended = threading.Event(), []

    def slowly(*_: object) -> None:
        begun.set()
        time.sleep(0.2)
        ended.append(1)

    monkeypatch.setattr("sae.harvest.streaming.write_windows", slowly)
    monkeypatch.setattr(RingCache, "fix_norm_limits", lambda ring: [])
    with harvest_ahead(planned, ring, range(1), print):
        assert begun.wait(60)
    assert ended


def test_what_is_on_the_disk_already_needs_no_further_room(asked, monkeypatch) -> None:
    options, reserved = {name: value for name, value in asked.items() if name != "device"}, []
    monkeypatch.setattr("sae.workflows.stream.plan_training", lambda config, needed: reserved.extend(needed.values()))
    for written in (0, 1000, 10**12):
        monkeypatch.setattr("sae.workflows.stream.folder_bytes", lambda folder, written=written: written)
        size = plan_streaming(request_of("topk"), windows=RING, **options).ring_bytes
    assert reserved == [size, size - 1000, 0]
