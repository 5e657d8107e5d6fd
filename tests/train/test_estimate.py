"""Estimates of training: bytes equal those of a run, times follow the number of steps, and small disks raise."""

import shutil
from collections import namedtuple
from dataclasses import replace

import pytest

from sae.common.errors import UnavailableError, UsageError
from sae.common.memory import available_memory
from sae.train import estimate
from sae.train.estimate import check_disk_space, run_bytes, step_seconds, training_seconds
from sae.train.loop import Trainer
from sae.train.memory import run_memory, untrained_variant
from sae.train.passes import group_by_pass
from sae.train.plan import TrainConfig, plan_training
from sae.train.recipe import find_recipe
from sae.train.run import run_training
from sae.train.variant import RunConfig

from ..recipes import SOME_QUICK

find_recipe("relu")  # registers them all
USAGE = namedtuple("USAGE", "total used free")
Spec = namedtuple("Spec", "recipe options config stored", defaults=[None])


def make_config(cache, *variants, **more):
    sizes = dict(
        layers=[0], caches=[cache.folder], steps=12, batch_size=64, width="512", device="cpu", checkpoint_every=4
    )
    return TrainConfig(list(variants), **sizes | more)


def passing(run):
    """Bytes needed in passing: a third checkpoint is written before the first is removed, while there is no SAE yet."""
    return run_bytes(run).state - run_bytes(run).sae


def test_the_bytes_of_a_run_are_its_tensors():
    weights = 4 * (2 * 4 * 8 + 8 + 4)  # W_enc, W_dec, b_enc, b_dec in float32
    run = Spec(find_recipe("relu"), {}, RunConfig(4, 8, 10, 16))
    buffers = 4 * (4 + 1) + 8 * (
        8 + 1
    )  # mean and scale of the input; for each latent how long it has been silent, and whether it is dead
    assert run_bytes(run).state == 3 * weights + buffers
    assert run_bytes(run).folder == weights + 2 * run_bytes(run).state


@pytest.mark.parametrize("variant", ["relu", "jumprelu", "progressive", "competition", "frozen-decoder"])
def test_a_run_takes_the_estimated_bytes(sparse_cache, variant):
    plan = plan_training(make_config(sparse_cache, variant))
    (run,) = plan.runs
    run_training(plan)
    found = sum(path.stat().st_size for path in run.folder.rglob("*.safetensors"))
    assert 1 <= found / run_bytes(run).folder < 1.02  # the files also hold the names of the tensors


@pytest.mark.parametrize("variant", SOME_QUICK)
def test_a_step_of_every_recipe_is_timed(variant):
    assert 0 < step_seconds(Spec(find_recipe(variant), {}, RunConfig(16, 64, 10, 32)), "cpu") < 60


def test_a_batch_too_large_to_time_is_timed_in_part(monkeypatch):
    rows = []
    step = Trainer.step
    monkeypatch.setattr(Trainer, "step", lambda self, x_BD: rows.append(len(x_BD)) or step(self, x_BD))
    monkeypatch.setitem(estimate.MAX_OPERATIONS, "cpu", estimate.OPERATIONS * 16 * 64 * 5)
    step_seconds(Spec(find_recipe("relu"), {}, RunConfig(16, 64, 10, 32)), "cpu")
    assert set(rows) == {5, 1}


def test_the_optimizers_part_of_a_step_is_counted_once(monkeypatch):
    monkeypatch.setitem(estimate.MAX_LATENTS, "cpu", 5 * 64)
    monkeypatch.setattr(estimate, "fastest_step", lambda trainer, x_BD: 10 + 2 * len(x_BD))
    assert step_seconds(Spec(find_recipe("relu"), {}, RunConfig(16, 64, 10, 32)), "cpu") == 10 + 2 * 32


def test_runs_take_turns_and_those_that_are_alike_are_timed_once(monkeypatch):
    timed = []

    def seconds_of(run, device):
        timed.append(run.recipe.name)
        return {"relu": 2.0, "topk": 3.0}[run.recipe.name]

    monkeypatch.setattr(estimate, "step_seconds", seconds_of)
    relu, topk = (Spec(find_recipe(name), {}, RunConfig(4, 8, 10, 16)) for name in ("relu", "topk"))
    assert training_seconds([relu, topk, relu], "cpu") == 10 * (2 + 3 + 2)
    assert sorted(timed) == ["relu", "topk"]


def test_alike_runs_share_a_variant_without_values():
    """Equal specs share one variant on the meta device.

    A variant is not shared with another recipe object of the same name, with other options or sizes, or on a device
    where tensors have values.
    """
    relu, config = find_recipe("relu"), RunConfig(4, 8, 10, 16)
    variant = untrained_variant(Spec(relu, {}, config), "meta")
    assert untrained_variant(Spec(relu, {}, config), "meta") is variant
    for other in (
        Spec(replace(relu), {}, config), Spec(relu, {"l1": 0.5}, config), Spec(relu, {}, config._replace(d_sae=9)),
        Spec(find_recipe("jumprelu"), {}, config),
    ):  # fmt: skip
        assert untrained_variant(other, "meta") is not variant
    one, two = (untrained_variant(Spec(relu, {}, config), "cpu") for _ in range(2))
    assert one is not two and one.sae.W_enc.device.type == "cpu" and variant.sae.W_enc.is_meta


def test_seeds_share_a_pass_and_layers_do_not(sparse_cache):
    runs = plan_training(make_config(sparse_cache, "relu", "topk", seeds=[0, 1])).runs
    assert [len(stream) for stream in group_by_pass(runs)] == [4]


def test_too_little_disk_space_is_an_error_before_anything_is_written(sparse_cache, tmp_path, monkeypatch):
    config = make_config(sparse_cache, "relu", seeds=[0, 1], out=tmp_path / "runs")
    runs = plan_training(config).runs
    needed = sum(run_bytes(run).folder for run in runs) + passing(runs[0])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: USAGE(0, 0, needed - 1))
    with pytest.raises(UnavailableError, match="2 runs .* will need .* Train fewer"):
        plan_training(config)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: USAGE(0, 0, needed))
    assert len(plan_training(config).runs) == 2
    assert not (tmp_path / "runs").exists()


def test_existing_checkpoints_need_no_further_space(sparse_cache, tmp_path, monkeypatch):
    config = make_config(sparse_cache, "relu", out=tmp_path / "runs", steps=8)
    plan = plan_training(config)
    (run,) = plan.runs
    run_training(plan)
    (run.folder / "sae.json").unlink()  # killed just before its end
    monkeypatch.setattr(shutil, "disk_usage", lambda _: USAGE(0, 0, run_bytes(run).state))
    assert plan_training(config).runs[0].folder == run.folder
    (run.folder / "sae.safetensors").unlink()
    assert plan_training(config).runs[0].folder == run.folder
    monkeypatch.setattr(shutil, "disk_usage", lambda _: USAGE(0, 0, run_bytes(run).state // 2))
    with pytest.raises(UnavailableError, match="1 run of up to"):
        plan_training(config)


def test_a_dry_run_takes_little_of_the_memory(monkeypatch):
    monkeypatch.setattr(estimate, "available_memory", lambda device: 1e6)
    wide = RunConfig(16, 4096, 10, 32)
    with pytest.raises(UnavailableError, match="not timed: a step of relu takes .* MB, and cpu has 1.0 MB"):
        step_seconds(Spec(find_recipe("relu"), {}, wide), "cpu")
    memory = run_memory(Spec(find_recipe("relu"), {}, wide), "cpu", 32)
    monkeypatch.setattr(estimate, "available_memory", lambda device: 1.9 * (memory.state + memory.step))
    with pytest.raises(UnavailableError, match="not timed: a step of relu"):  # the step needs more than half of this
        step_seconds(Spec(find_recipe("relu"), {}, wide), "cpu")
    monkeypatch.setattr(estimate, "available_memory", lambda device: 1e8)
    assert step_seconds(Spec(find_recipe("relu"), {}, wide), "cpu") > 0
    with pytest.raises(
        UnavailableError, match="not timed: a step of decorrelation"
    ):  # a matrix of all pairs of latents
        step_seconds(Spec(find_recipe("decorrelation"), {"pair_choice": "exact"}, wide), "cpu")
    # This is enough for everything except the matrix of pairs.
    monkeypatch.setattr(estimate, "available_memory", lambda device: 5e8)
    with pytest.raises(UnavailableError, match="not timed: a step of competition"):
        step_seconds(Spec(find_recipe("competition"), {"pair_store": "dense"}, wide), "cpu")


def test_the_memory_of_this_machine_is_known():
    assert available_memory("cpu") > 1e6


def test_runs_on_one_disk_share_its_space_whatever_their_folders(sparse_cache, tmp_path, monkeypatch):
    folders = [tmp_path / name for name in "ab"]
    one, two = (plan_training(make_config(sparse_cache, "relu", out=folder)).runs[0] for folder in folders)
    needed = 2 * run_bytes(one).folder + passing(one)
    both = [one, two]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: USAGE(0, 0, needed))
    check_disk_space(both)
    check_disk_space(both, {tmp_path / "activations": 0})
    with pytest.raises(UnavailableError, match="besides 0.0 MB of activations"):
        check_disk_space(both, {tmp_path / "activations": 1})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: USAGE(0, 0, needed - 1))
    with pytest.raises(UnavailableError, match="2 runs"):
        check_disk_space(both)


def test_activations_on_another_disk_take_nothing_from_the_runs(sparse_cache, tmp_path, monkeypatch):
    (run,) = plan_training(make_config(sparse_cache, "relu", out=tmp_path / "runs")).runs
    needed = run_bytes(run).folder + passing(run)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: USAGE(0, 0, needed))
    monkeypatch.setattr(estimate, "disk_id", lambda folder: folder.name == "activations")
    check_disk_space([run], {tmp_path / "activations": 1e15})


def test_resuming_gets_no_space_back_from_a_finished_sae(tmp_path):
    for name, size in (("sae.safetensors", 1000), ("sae.safetensors.tmp-7", 200), ("checkpoints", 30)):
        (tmp_path / name).mkdir() if name == "checkpoints" else (tmp_path / name).write_bytes(bytes(size))
    (tmp_path / "checkpoints" / "state").write_bytes(bytes(30))
    assert estimate.checkpoint_bytes(tmp_path) == 230


def test_a_store_has_to_give_two_bytes_for_each_number_of_a_batch(monkeypatch):
    monkeypatch.setattr(estimate, "seconds_per_step", lambda runs, device: [0.25] * len(runs))
    monkeypatch.setattr(estimate, "describe_memory", lambda passes, device: "memory")
    run = Spec(find_recipe("relu"), {}, RunConfig(16, 64, 10, 1_000_000))
    lines = estimate.describe_time([[run, run]], "cpu", from_store=True)
    assert lines[-1].endswith("a store if it delivers 64.0 MB per second")


def test_other_files_in_a_run_folder_do_not_count_as_checkpoints(sparse_cache, tmp_path, monkeypatch):
    (run,) = plan_training(make_config(sparse_cache, "relu", out=tmp_path / "runs")).runs
    run.folder.mkdir(parents=True)
    (run.folder / "notes").write_bytes(bytes(10**6))
    needed = run_bytes(run).folder + passing(run)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: USAGE(0, 0, needed - 1))
    with pytest.raises(UnavailableError, match="1 run of up to"):
        plan_training(make_config(sparse_cache, "relu", out=tmp_path / "runs"))


def test_a_file_in_the_place_of_a_folder_is_rejected(sparse_cache, tmp_path):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "runs"):
        with pytest.raises(UsageError, match="file is not a folder: a file is in its place"):
            plan_training(make_config(sparse_cache, "relu", out=out))


@pytest.mark.parametrize(
    "sizes", [{"width": "1e99x"}, {"width": "9" * 20}, {"width": "1" + "0" * 15}, {"steps": 10**21}]
)
def test_impossible_sizes_are_rejected(sparse_cache, sizes):
    with pytest.raises(UsageError, match="is too large for any machine|more than 2\^63 tokens"):
        plan_training(make_config(sparse_cache, "relu", **sizes))
