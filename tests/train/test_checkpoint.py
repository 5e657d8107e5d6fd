"""Damaged checkpoints are skipped, and checkpoints of other versions are rejected."""

import re
import shutil
from pathlib import Path

import pytest
import torch

from sae.common.errors import DamagedError, UsageError
from sae.common.schemas import CHECKPOINT_RECORD
from sae.train.checkpoint import read_checkpoint, restore_checkpoint, save_checkpoint, training_state
from sae.train.plan import TrainConfig
from sae.train.run import TrainProgress
from sae.train.sae import load_sae
from sae.train.step import Mechanism, Step

from .runs import make_config, train


@pytest.mark.parametrize(
    "damage", ["truncated", "flipped", "bad json", "no json", "no tensors", "another step", "another step, no digest"]
)
def test_a_damaged_checkpoint_is_skipped_and_removed_by_the_next(sparse_cache, tmp_path: Path, damage: str) -> None:
    config, said = make_config(sparse_cache, "relu"), []
    (folder,) = train(config)
    weights = (folder / "sae.safetensors").read_bytes()
    (folder / "sae.json").unlink()
    newest = folder / "checkpoints" / "step-00000012"
    data = (newest / "state.safetensors").read_bytes()
    if damage == "truncated":
        (newest / "state.safetensors").write_bytes(data[:-100])
    elif damage == "flipped":
        (newest / "state.safetensors").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "bad json":
        (newest / "state.json").write_text('{"format": 1, "st')
    elif damage.startswith("another step"):
        state = newest / "state.json"
        state.write_text(state.read_text().replace('"step": 12', '"step": 13'))
        if damage.endswith("no digest"):
            state.write_text(re.sub(r',\s*"content_digest": "\w*"', "", state.read_text()))
    elif damage == "no json":
        (newest / "state.json").unlink()
    else:
        (newest / "state.safetensors").unlink()
    train(config, TrainProgress(say=said.append))
    assert "Skipping the checkpoint step-00000012" in said[0] and said[1] == f"{folder.name} resumes from step 8."
    assert (folder / "sae.safetensors").read_bytes() == weights


def test_a_checkpoint_is_of_one_step(make_trainer, tmp_path: Path) -> None:
    """The folder's name, the record and the tensors each state the step. Any one of the three can be wrong."""
    trainer = make_trainer("relu")
    for step in (3, 5):
        trainer.i.fill_(step)
        save_checkpoint(trainer, tmp_path, step)
    third, fifth = (tmp_path / "checkpoints" / f"step-{step:08d}" for step in (3, 5))
    assert [read_checkpoint(path)[0] for path in (third, fifth)] == [3, 5]
    renamed = shutil.copytree(third, tmp_path / "step-00000004")
    with pytest.raises(DamagedError, match="has step 3 in state.json but step 3 in its tensors"):
        read_checkpoint(renamed)
    CHECKPOINT_RECORD.write(fifth / "state.json", CHECKPOINT_RECORD.read(third / "state.json") | {"step": 5})
    shutil.copy(third / "state.safetensors", fifth)
    with pytest.raises(DamagedError, match="has step 5 in state.json but step 3 in its tensors"):
        read_checkpoint(fifth)


def test_damaged_checkpoints_of_later_steps_do_not_push_out_valid_ones(make_trainer, tmp_path: Path) -> None:
    """The folder has two damaged checkpoints with higher numbers. The checkpoint that is written now must stay."""
    trainer = make_trainer("relu", 1000)
    for step in (900, 1000):
        trainer.i.fill_(step)
        save_checkpoint(trainer, tmp_path, step)
        (tmp_path / "checkpoints" / f"step-{step:08d}" / "state.json").unlink()
    trainer.i.fill_(50)
    save_checkpoint(trainer, tmp_path, 50)
    assert restore_checkpoint(trainer, tmp_path, pytest.fail) == 50


def test_a_checkpoint_of_another_version_is_rejected_and_kept(sparse_cache) -> None:
    config = make_config(sparse_cache, "relu")
    (folder,) = train(config)
    (folder / "sae.json").unlink()
    state = folder / "checkpoints" / "step-00000012" / "state.json"
    CHECKPOINT_RECORD.write(state, CHECKPOINT_RECORD.read(state) | {"format": 99})
    with pytest.raises(UsageError, match="has checkpoint format 99, but this version reads format 1"):
        train(config)
    assert state.exists()


def test_a_checkpoint_of_another_variant_is_rejected(make_trainer, tmp_path: Path) -> None:
    trainer = make_trainer("relu")
    trainer.i.fill_(3)
    save_checkpoint(trainer, tmp_path, 3)
    with pytest.raises(UsageError, match="does not contain the tensors that this version of the variant has"):
        restore_checkpoint(make_trainer("batchtopk"), tmp_path, pytest.fail)


class Counting(Mechanism):
    """A mechanism of a newer version, which counts its steps in buffers of the given names."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            self.register_buffer(name, torch.zeros((), dtype=torch.int64))

    def after_step(self, step: Step) -> None:
        for buffer in self.buffers():
            buffer.add_(1)


def test_a_counter_that_is_newer_than_the_checkpoint_starts_at_zero(make_trainer, batches, tmp_path: Path) -> None:
    """A counter decides nothing, so a checkpoint may lack it.

    Any other missing tensor is refused, and a counter that is there is loaded.
    """
    old, new, other, newest = (make_trainer("relu") for _ in range(4))
    new.variant.mechanisms.append(Counting("acted_pairs"))
    old.step(batches[0])
    save_checkpoint(old, tmp_path, 1)
    assert restore_checkpoint(new, tmp_path, pytest.fail) == 1
    (counter,) = new.variant.mechanisms[-1].buffers()
    assert int(counter) == 0 and torch.equal(new.variant.sae.W_enc, old.variant.sae.W_enc)
    new.step(batches[1])
    save_checkpoint(new, tmp_path, 2)
    newest.variant.mechanisms.append(Counting("acted_pairs"))
    assert restore_checkpoint(newest, tmp_path, pytest.fail) == 2
    assert [int(count) for count in newest.variant.mechanisms[-1].buffers()] == [1]
    other.variant.mechanisms.append(Counting("acted_pairs", "pairs_acted_on"))
    with pytest.raises(UsageError, match="does not contain the tensors that this version of the variant has"):
        restore_checkpoint(other, tmp_path, pytest.fail)


def test_a_tensor_of_another_shape_is_refused_though_it_could_be_broadcast(make_trainer, tmp_path: Path) -> None:
    old, new = make_trainer("relu"), make_trainer("relu")
    for trainer, shape in ((old, ()), (new, (3,))):
        trainer.variant.mechanisms.append(Mechanism())
        trainer.variant.mechanisms[-1].register_buffer("remembered", torch.ones(shape))
    save_checkpoint(old, tmp_path, 0)
    with pytest.raises(UsageError, match="does not contain the tensors that this version of the variant has"):
        restore_checkpoint(new, tmp_path, pytest.fail)


def test_what_a_checkpoint_restores_and_which_one_is_skipped(make_trainer, tmp_path: Path) -> None:
    """A checkpoint without the run's digest, as of earlier versions, is restored.

    One of a step after the run's last is skipped.
    """
    trainer, again, said = make_trainer("relu", steps=30), make_trainer("relu", steps=30), []
    for step, failed_at in ((30, 7), (31, 8)):
        trainer.i.fill_(step)
        trainer.failed_at.fill_(failed_at)
        save_checkpoint(trainer, tmp_path, step)
    assert restore_checkpoint(again, tmp_path, said.append, run="digest") == 30
    assert (int(again.i), int(again.failed_at)) == (30, 7)
    assert len(said) == 1 and "is for step 31, but the run has 30 steps" in said[0]


def test_a_checkpoint_holds_every_tensor_of_the_variant_and_the_optimizer(make_trainer, batches) -> None:
    trainer = make_trainer("batchtopk")
    trainer.step(batches[0])
    names = set(training_state(trainer))
    assert {"i", "failed_at", "variant.scale", "variant.mean_D", "variant.sae.activation.0.threshold"} <= names
    for parameter in ("W_enc", "W_dec", "b_enc", "b_dec"):
        assert {f"optimizer.sae.{parameter}.{key}" for key in ("step", "exp_avg", "exp_avg_sq")} <= names


def test_a_run_copied_onto_another_is_refused(sparse_cache, tmp_path: Path) -> None:
    """Both have the same tensors and steps; only their options differ.

    Nothing is lost: once the copied checkpoint is moved away, the run resumes.
    """
    (finished,) = train(make_config(sparse_cache, "relu"))
    (other,) = train(make_config(sparse_cache, "relu", options={"lr": 2e-3}))
    renamed, aside = other.rename(tmp_path / "renamed"), tmp_path / "aside"
    weights = (renamed / "sae.safetensors").read_bytes()
    for name in ("sae.json", "sae.safetensors"):
        shutil.copy(finished / name, renamed / name)
    with pytest.raises(DamagedError, match="sae.json and the run.json beside it belong to different runs"):
        load_sae(renamed)
    (renamed / "sae.json").unlink()
    newest = renamed / "checkpoints" / "step-00000012"
    shutil.rmtree(newest)
    shutil.copytree(finished / "checkpoints" / "step-00000012", newest)
    with pytest.raises(DamagedError, match="step-00000012 and .* belong to different runs.*move the checkpoint"):
        train(TrainConfig(resume=[renamed], device="cpu"))
    newest.rename(aside)
    train(TrainConfig(resume=[renamed], device="cpu"))
    assert (renamed / "sae.safetensors").read_bytes() == weights
    load_sae(renamed)
