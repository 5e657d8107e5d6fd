"""Runs from plan to folder: what survives a kill, a signal and a batch of infinities."""

import json
import math
import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

import sae
from sae.cache.batch_order import BatchOrder
from sae.cache.chunks import write_chunk
from sae.cache.loader import BatchLoader
from sae.cache.opening import open_cache
from sae.common.cache_schemas import MANIFEST_RECORD
from sae.common.errors import Interrupted, LeftOutWarning, SaeError, UnavailableError, UsageError
from sae.common.files import read_json
from sae.common.locks import no_readers
from sae.train.checkpoint import restore_checkpoint
from sae.train.loop import Trainer
from sae.train.plan import TrainConfig, default_log_interval, plan_training
from sae.train.progress import TrainProgress
from sae.train.run import build_variant, run_training
from sae.train.sae import load_sae
from sae.train.shared_pass import CALIBRATION_BATCHES

from ..kills import kill
from .runs import CHECKPOINTS, make_config, train

NAMES = ["batchtopk", "decorrelation", "relu", "topk"]


def checkpoints(folder: Path) -> list[str]:
    return [path.name for path in sorted((folder / "checkpoints").glob("*"))]


def test_a_run_folder_holds_what_a_reader_needs(sparse_cache) -> None:
    (folder,) = train(make_config(sparse_cache, "batchtopk", options=["k=4"]))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 4, 6, 8, 10, 12]
    assert lines[-1]["tokens"] == 12 * 64 and {"loss", "mse", "aux", "l0", "dead", "threshold"} <= lines[0].keys()
    assert all(line["l0"] == 4 for line in lines)
    assert checkpoints(folder) == ["step-00000008", "step-00000012"]  # the last two
    record = read_json(folder / "run.json")
    assert (record["options"], record["resolved"]["k"], record["steps"]) == ({"k": 4}, 4, 12)
    loaded = load_sae(folder)
    assert (loaded.d_in, loaded.d_sae, loaded.origin["hook_name"]) == (32, 128, "blocks.0.hook_resid_post")
    assert float(loaded.activation[0].threshold) > 0


def finished(config: TrainConfig) -> tuple[Path, Trainer]:
    """The folder of a finished run, and its trainer as the last checkpoint has it."""
    (run,) = plan_training(config).runs
    train(config)
    trainer = Trainer(build_variant(run), run.steps, "cpu")
    assert restore_checkpoint(trainer, run.folder, pytest.fail) == run.steps
    return run.folder, trainer


@pytest.mark.parametrize("name", ["relu", "topk", "decorrelation"])
def test_the_loaded_sae_of_centered_rows_is_the_trained_one_on_raw_rows(sparse_cache, batches, name: str) -> None:
    """Centre, scale and biases are folded in: latents times the scale, and the reconstruction in raw units."""
    folder, trainer = finished(make_config(sparse_cache, name, options=["center=true", "lr=1e-2"]))
    variant, loaded = trainer.variant, load_sae(folder)
    assert variant.mean_D.norm() > 1 and variant.sae.b_dec.norm() > 0.01 and abs(float(variant.scale) - 1) > 0.1
    with torch.no_grad():
        step = variant(trainer.i, batches[0], trainer.optimizer)
    f_BF = loaded.encode(batches[0].float())
    torch.testing.assert_close(f_BF, step.f_BF * variant.scale, rtol=1e-4, atol=1e-4)
    raw_BD = step.recon_BD * variant.scale + variant.mean_D
    torch.testing.assert_close(loaded.decode(f_BF), raw_BD, rtol=1e-4, atol=1e-4)


def test_a_cache_is_kept_from_deletion_while_it_is_read(sparse_cache) -> None:
    """The whole cache is kept until the last pass has ended, whichever layer that pass reads."""
    looks: list[int] = []

    def look(step: int, steps: int, metrics: object) -> None:
        if step < steps:
            return
        looks.append(step)
        with pytest.raises(UnavailableError, match=r"is being read by process \d+ on \S+ \(sae train\)"):
            with no_readers(sparse_cache.folder):
                pass

    train(make_config(sparse_cache, "relu", layers=[0, 1]), TrainProgress(step=look))
    with no_readers(sparse_cache.folder):
        assert looks == [12, 12]


def test_a_batchtopk_is_calibrated_on_the_batches_after_its_last(sparse_cache) -> None:
    """The saved threshold is the mean, over those batches, of the smallest latent that the batch keeps."""
    folder, trainer = finished(make_config(sparse_cache, "batchtopk", options=["k=4"]))
    (run,) = plan_training(make_config(sparse_cache, "batchtopk", options=["k=4"])).runs
    loaded, smallest = load_sae(folder), []
    with BatchLoader(sparse_cache, "layer_00", 64, seed=run.shuffle_seed, batch=12) as stream:
        for _ in range(CALIBRATION_BATCHES):
            with torch.no_grad():
                step = trainer.variant(trainer.i, next(stream), trainer.optimizer)
            smallest.append(float(step.pre_BF.flatten().topk(4 * 64).values.min() * trainer.variant.scale))
    assert float(loaded.activation[0].threshold) == pytest.approx(sum(smallest) / len(smallest), rel=1e-5)


def test_the_same_command_does_not_train_twice(sparse_cache) -> None:
    config, said = make_config(sparse_cache, "relu"), []
    (folder,) = train(config)
    before = (folder / "sae.safetensors").stat().st_mtime_ns
    assert train(config, TrainProgress(say=said.append)) == [folder]
    assert said == [f"{folder} is already trained."]
    assert (folder / "sae.safetensors").stat().st_mtime_ns == before


def test_layers_and_seeds_trained_together_are_what_they_are_alone(sparse_cache, tmp_path: Path) -> None:
    """A run trained with other layers and seeds has the bits of the run alone.

    Seeds and layers differ from each other.
    """
    folders = train(make_config(sparse_cache, "relu", layers=[0, 1], seeds=[0, 1]))
    (alone,) = train(make_config(sparse_cache, "relu", layers=[1], seeds=[1], out=tmp_path / "alone"))
    weights = [(folder / "sae.safetensors").read_bytes() for folder in folders]
    assert weights[3] == (alone / "sae.safetensors").read_bytes()
    assert len(set(weights)) == 4


def test_killed_and_stopped_runs_end_as_uninterrupted_ones(sparse_cache, tmp_path: Path) -> None:
    """60 steps are interrupted by SIGKILL, in a separate process, and later by SIGTERM.

    The runs end bit for bit the same.
    """
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    settings = {"steps": 60, "checkpoint_every": 5, "log_every": 30}
    second = 2 * len(NAMES)  # the first file of the checkpoints of step 10: each run writes two per checkpoint
    config = make_config(sparse_cache, *NAMES, out=stopped, **settings)
    kill(train, {"config": config}, CHECKPOINTS, "before", second)
    assert len(list(stopped.glob("*/checkpoints/step-00000005/state.json"))) == len(NAMES)
    seen: list[int] = []

    def press(number: int, *_: object) -> None:
        if not seen:  # at the first log line or checkpoint
            signal.raise_signal(signal.SIGTERM)
        seen.append(number)

    plan = plan_training(make_config(sparse_cache, *NAMES, out=stopped, **settings))
    with pytest.raises(Interrupted, match=f"everything is saved.*sae train --resume {stopped}"):
        run_training(plan, TrainProgress(step=press))
    assert 5 < seen[0] < seen[1] < 60 and len(seen) == 2
    runs = {}
    for out in (whole, stopped):
        runs[out] = {folder.name: folder for folder in train(make_config(sparse_cache, *NAMES, out=out, **settings))}
    assert runs[whole].keys() == runs[stopped].keys() and len(runs[whole]) == len(NAMES)
    for name, folder in runs[whole].items():
        for file in ("sae.safetensors", "checkpoints/step-00000060/state.safetensors"):
            assert (runs[stopped][name] / file).read_bytes() == (folder / file).read_bytes(), (name, file)


def test_a_stopped_run_is_saved_and_the_message_says_how_to_resume(sparse_cache, tmp_path: Path) -> None:
    config = make_config(sparse_cache, "relu", "topk", out=tmp_path / "stopped", log_every=1)
    whole = train(make_config(sparse_cache, "relu", "topk", out=tmp_path / "whole"))

    def press(number: int, *_: object) -> None:
        if number == 6:
            signal.raise_signal(signal.SIGINT)

    plan = plan_training(config)
    with pytest.raises(Interrupted, match="Stopped after step 7; everything is saved") as stopped:
        run_training(plan, TrainProgress(step=press))
    folders = [run.folder for run in plan.runs]
    assert stopped.value.exit_code == 130
    assert all(f"--resume {folder}" in str(stopped.value) for folder in folders)
    assert [checkpoints(folder)[-1] for folder in folders] == ["step-00000007"] * 2
    train(TrainConfig(resume=folders, device="cpu"))
    for left, right in zip(folders, whole, strict=True):
        assert (left / "sae.safetensors").read_bytes() == (right / "sae.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("steps", "interval"), [(1, 1), (100, 1), (200, 2), (1000, 10), (4999, 49), (5000, 50), (10**6, 50)]
)
def test_a_curve_has_a_hundred_points_and_a_line_at_least_every_50_steps(steps: int, interval: int) -> None:
    assert default_log_interval(steps) == interval
    assert steps // interval >= min(steps, 100)


def lines_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_short_run_logs_a_hundred_times_and_trains_the_same(sparse_cache, tmp_path: Path) -> None:
    """The mean of the lines of 50 steps also equals the one line of those 50 steps."""
    (fine,), (coarse,) = (
        train(make_config(sparse_cache, "topk", steps=200, log_every=every, checkpoint_every=1000, out=tmp_path / name))
        for every, name in ((None, "fine"), (50, "coarse"))
    )
    assert (fine / "sae.safetensors").read_bytes() == (coarse / "sae.safetensors").read_bytes()
    (first, *fines), (first_again, *coarses) = lines_of(fine), lines_of(coarse)
    assert [line["step"] for line in fines] == list(range(2, 201, 2))
    assert [line["step"] for line in coarses] == [50, 100, 150, 200]
    for number, line in enumerate(coarses):
        part = fines[25 * number : 25 * (number + 1)]
        for name in ("loss", "l0", "explained_variance"):
            assert sum(one[name] for one in part) / 25 == pytest.approx(line[name], rel=1e-5)
    timed = {"waited_for_data"}
    assert {key: first[key] for key in first.keys() - timed} == {key: first_again[key] for key in first.keys() - timed}


def test_the_first_step_has_a_line_of_its_own_and_counts_in_the_next(sparse_cache, tmp_path: Path) -> None:
    """With `log_every=3`, the first step has a line of its own.

    Each later line is the mean of three steps, and the first of these counts step 1 too.
    """
    (each,), (third,) = (
        train(make_config(sparse_cache, "topk", steps=6, log_every=every, checkpoint_every=1000, out=tmp_path / name))
        for every, name in ((1, "each"), (3, "third"))
    )
    assert [line["step"] for line in lines_of(each)] == [1, 2, 3, 4, 5, 6]  # and none twice
    assert [line["step"] for line in lines_of(third)] == [1, 3, 6]
    losses = [line["loss"] for line in lines_of(each)]
    assert [line["loss"] for line in lines_of(third)] == pytest.approx(
        [losses[0], sum(losses[:3]) / 3, sum(losses[3:]) / 3], rel=1e-6
    )
    assert lines_of(third)[0]["tokens"] == 64 and losses[0] > 1.01 * losses[1]


def test_a_resumed_run_keeps_the_interval_of_its_log(sparse_cache, tmp_path: Path) -> None:
    def stop(number: int, *_: object) -> None:
        if number == 6:
            signal.raise_signal(signal.SIGINT)

    plan = plan_training(make_config(sparse_cache, "topk", log_every=3, out=tmp_path / "stopped"))
    with pytest.raises(Interrupted):
        run_training(plan, TrainProgress(step=stop))
    (run,) = plan.runs
    train(TrainConfig(resume=[run.folder], device="cpu", checkpoint_every=1000))
    assert [line["step"] for line in lines_of(run.folder)] == [
        1,
        3,
        4,
        6,
        7,
        9,
        12,
    ]  # a checkpoint at 4, a stop at 7


def test_a_run_killed_between_its_last_checkpoint_and_its_end_is_finished(sparse_cache) -> None:
    config = make_config(sparse_cache, "batchtopk")
    (folder,) = train(config)
    weights = (folder / "sae.safetensors").read_bytes()
    (folder / "sae.json").unlink()
    (folder / "sae.safetensors").unlink()
    log = folder / "metrics.jsonl"
    damaged = ["[" * 50_000, '{"step": "9"}', "9" * 8000, "[3]", "\udcff"]
    log.write_text("\n".join(damaged) + "\n" + log.read_text() + '{"step": 12, "lo', errors="surrogateescape")  # a kill
    with pytest.warns(LeftOutWarning, match="Left out: 5 lines of .*metrics.jsonl"):
        train(config)
    assert (folder / "sae.safetensors").read_bytes() == weights
    assert [json.loads(line)["step"] for line in (folder / "metrics.jsonl").open()] == [1, 2, 4, 6, 8, 10, 12]


def test_a_batch_of_infinities_ends_the_run_and_keeps_its_last_checkpoint(sparse_cache, tmp_path: Path) -> None:
    """A row of the cache is infinite and is read at a known step. The last checkpoint before that step is kept."""
    folder = tmp_path / "cache"
    shutil.copytree(sparse_cache.folder, folder)
    cache = open_cache(folder)
    piece = BatchOrder(cache.chunk_rows, 64, 0).spans(9)[5]
    bits = cache.read_chunk("layer_00", piece.chunk).copy()
    bits[piece.start, 3] = torch.tensor(math.inf, dtype=torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    file, record = write_chunk(folder, cache.array("layer_00"), piece.chunk, bits)
    manifest = MANIFEST_RECORD.read(folder / "manifest.json")
    manifest["files"][file] = record  # the file is complete and matches its record; only its values are bad
    MANIFEST_RECORD.write(folder / "manifest.json", manifest)
    said: list[str] = []
    config = make_config(open_cache(folder), "relu", "topk", out=tmp_path / "runs")
    plan = plan_training(config)
    with pytest.raises(SaeError, match=r"not finite at step 9 \(batch 9 of shuffle seed 0\)") as failed:
        run_training(plan, TrainProgress(say=said.append))
    assert failed.value.exit_code == 1 and "--set relu.lr=" in str(failed.value) and len(said) == 2
    for run in plan.runs:
        assert checkpoints(run.folder) == ["step-00000004", "step-00000008"] and not run.done


def test_a_run_that_diverges_does_not_stop_the_others(sparse_cache, tmp_path: Path) -> None:
    (alone,) = train(make_config(sparse_cache, "topk", out=tmp_path / "alone"))
    config = make_config(sparse_cache, "relu", "topk", out=tmp_path / "both", options=["relu.lr=1e30", "relu.warmup=0"])
    plan = plan_training(config)
    runs = plan.runs
    with pytest.raises(SaeError, match="relu.*not finite at step") as failed:
        run_training(plan)
    assert "topk" not in str(failed.value) and "there is no checkpoint yet" in str(failed.value)
    assert not runs[0].done and runs[1].done
    assert (runs[1].folder / "sae.safetensors").read_bytes() == (alone / "sae.safetensors").read_bytes()


def test_an_int_is_a_float_where_one_is_meant(sparse_cache) -> None:
    (folder,) = train(make_config(sparse_cache, "jumprelu", options=["threshold=0", "beta1=0"]))
    assert load_sae(folder).activation[0].threshold.dtype == torch.float32


# --- train_saes -----------------------------------------------------------------------------------------------------


def test_train_saes_is_the_command(sparse_cache, tmp_path: Path, capsys) -> None:
    sizes = dict(steps=12, batch_size=64, width=128, device="cpu", out=tmp_path)
    run, other = sae.train_saes(
        ["topk", "relu"], cache=sparse_cache, layers=0, options={"topk.k": 4, "lr": 1e-3}, **sizes
    )
    config = make_config(sparse_cache, "topk", "relu", options=["topk.k=4", "lr=1e-3"], out=tmp_path)
    assert [run.folder, other.folder] == [run.folder for run in plan_training(config).runs] and run.done
    assert os.fspath(run) == str(run.folder) and Path(run) == run.folder
    assert run.load().d_sae == 128 and torch.equal(load_sae(run).W_dec, run.load().W_dec)
    before = (run.folder / "sae.safetensors").stat().st_mtime_ns
    (again,) = sae.train_saes("topk", cache=str(sparse_cache.folder), layers=[0], options=["k=4", "lr=1e-3"], **sizes)
    assert again.folder == run.folder and (run.folder / "sae.safetensors").stat().st_mtime_ns == before
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"batch_sise": 64}, "train_saes has no argument 'batch_sise'; did you mean batch_size?"),
        ({"options": {"kk": 3}}, "topk has no option kk; did you mean k?"),
        ({"options": {"k": "many"}}, "k='many' has the wrong type: expected int"),
        ({"options": {"relu.l1": 1}}, "relu is not one of the variants topk"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_train_saes_rejects_what_it_does_not_know(sparse_cache, arguments: dict, sentence: str) -> None:
    with pytest.raises(UsageError, match=re.escape(sentence)):
        sae.train_saes("topk", cache=sparse_cache, layers=0, **arguments)
