"""`--compile`: the same step up to rounding, an exact resume, and a message if a recipe cannot be compiled."""

import shutil
from pathlib import Path

import pytest
import torch

from sae.common.errors import UsageError
from sae.train import run
from sae.train.checkpoint import restore_checkpoint, save_checkpoint, training_state
from sae.train.compile import compile_step
from sae.train.loop import Trainer
from sae.train.plan import TrainConfig, plan_training
from sae.train.run import TrainProgress, run_training

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="torch.compile needs a C++ compiler on a CPU"
)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(("name", "kernels"), [("topk", False), ("frozen-encoder", False), ("topk", True)])
def test_compiled_steps_are_the_eager_ones_and_resume_exactly(
    name, kernels, make_trainer, take, batches, tmp_path: Path, compiled_by_one_thread: None
) -> None:
    def make() -> Trainer:
        trainer = make_trainer(name)
        if kernels:
            trainer.variant.use_kernels()
            trainer = Trainer(trainer.variant, trainer.steps, "cpu")
        return trainer

    def compiled_one() -> Trainer:
        torch._dynamo.reset()
        trainer = make()
        assert compile_step(trainer, len(batches[0])) is None
        return trainer

    eager, whole = make(), compiled_one()
    list(take(whole, range(2)))
    save_checkpoint(whole, tmp_path, 2)
    list(take(whole, range(2, 3)))
    list(take(eager, range(3)))
    for key, tensor in training_state(eager).items():
        found = training_state(whole)[key]
        torch.testing.assert_close(found, tensor, rtol=1e-4, atol=1e-6, msg=lambda m, n=key: f"{n}: {m}")
    again = compiled_one()
    assert restore_checkpoint(again, tmp_path, pytest.fail) == 2
    list(take(again, range(2, 3)))
    assert [n for n, t in training_state(again).items() if not torch.equal(t, training_state(whole)[n])] == []


def make_config(sparse_cache, out: Path, **other: object) -> TrainConfig:
    sizes = {"steps": 4, "batch_size": 64, "width": "4x"}
    return TrainConfig(["relu"], layers=[0], caches=[sparse_cache.folder], device="cpu", out=out, **sizes | other)


def test_a_recipe_that_cannot_be_compiled_is_trained_without(sparse_cache, tmp_path: Path, monkeypatch) -> None:
    def refused(function, **_: object):
        def call(*_: object):
            raise RuntimeError("no compiler\n\n and much more")

        return call

    monkeypatch.setattr(torch, "compile", refused)
    said: list[str] = []
    for out, asked in (("compiled", True), ("eager", False)):
        config = make_config(sparse_cache, tmp_path / out, compiled=asked)
        run_training(plan_training(config), TrainProgress(say=said.append))
    (line,) = said
    assert "is trained without --compile: relu cannot be compiled here (no compiler)." in line
    left, right = (sorted(tmp_path.glob(f"{out}/*/sae.safetensors")) for out in ("compiled", "eager"))
    assert left[0].read_bytes() == right[0].read_bytes()


def test_compiling_is_part_of_a_run(sparse_cache, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(run, "compile_step", lambda trainer, batch_size: None)
    (eager,), (other,) = (plan_training(make_config(sparse_cache, tmp_path, compiled=c)).runs for c in (False, True))
    assert eager.folder != other.folder
    config = make_config(sparse_cache, tmp_path, compiled=True)
    run_training(plan_training(config))
    (resumed,) = plan_training(TrainConfig(resume=[other.folder])).runs
    assert resumed.compiled and resumed.identity() == other.identity()
    with pytest.raises(UsageError, match="--compile cannot be changed"):
        plan_training(TrainConfig(resume=[other.folder], compiled=True))
