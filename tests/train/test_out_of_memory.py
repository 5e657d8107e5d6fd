"""Out of memory in training: every run of the pass is saved before the step, the error says what to lower, and the
resumed runs are those that were never disturbed."""

import re
from pathlib import Path

import pytest
import torch

from sae.common.errors import SaeError, UnavailableError, UsageError
from sae.common.files import read_json
from sae.train import checkpoint, memory_error, shared_pass
from sae.train.loop import Trainer
from sae.train.plan import TrainConfig, plan_training
from sae.train.progress import TrainProgress
from sae.train.variant import Variant

from .runs import make_config, train

NAMES = ["relu", "topk", "batchtopk"]
CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity")
HOST = RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried")


def files_of(folder: Path) -> list[bytes]:
    last = sorted(folder.glob("checkpoints/step-*"))[-1]
    return [(folder / "sae.safetensors").read_bytes(), (last / "state.safetensors").read_bytes()]


def steps_saved(folder: Path) -> list[int]:
    return sorted(int(path.parent.name[5:]) for path in folder.glob("checkpoints/*/state.json"))


@pytest.fixture
def fail_once(monkeypatch):
    """A function that makes call number `at` of a method raise an error, once.

    With `after`, the call first does its work.
    """

    def arm(owner: type, name: str, at: int, error: BaseException, after: bool = False) -> None:
        method, calls = getattr(owner, name), []

        def failing(self, *args, **more):
            calls.append(None)
            if len(calls) != at:
                return method(self, *args, **more)
            if after:
                method(self, *args, **more)
            raise error

        monkeypatch.setattr(owner, name, failing)

    return arm


@pytest.mark.parametrize(
    "error",
    [
        pytest.param(CUDA, id="cuda"),
        pytest.param(HOST, id="host", marks=pytest.mark.slow),
        pytest.param(MemoryError("Unable to allocate 3.0 GiB"), id="numpy", marks=pytest.mark.slow),
    ],
)
def test_every_run_is_saved_before_the_step_and_goes_on(sparse_cache, tmp_path: Path, fail_once, error) -> None:
    """The second of three runs fails in step 7. The first run has taken that step, and the others have not."""
    whole = train(make_config(sparse_cache, *NAMES, out=tmp_path / "whole"))
    config = make_config(sparse_cache, *NAMES, out=tmp_path / "out")
    runs = plan_training(config).runs
    fail_once(Variant, "losses", 3 * 6 + 2, error)
    with pytest.raises(UnavailableError) as raised:
        train(config)
    assert [steps_saved(run.folder)[-1] for run in runs] == [7, 6, 6] and raised.value.exit_code == 4
    said = str(raised.value)
    assert said.startswith(
        f"cpu is out of memory ({str(error).rstrip('.')}). Nothing is lost: {runs[0].name} continues from"
    )
    assert f"{runs[1].name} continues from step 6" in said and said.count("--resume") == 3
    assert re.search(
        r"set SAE_MEMORY_GB=\S+ to get passes with fewer runs or add --accumulate 2, which gives the same", said
    )
    heard: list[str] = []
    train(
        TrainConfig(resume=[run.folder for run in runs], device="cpu", checkpoint_every=4),
        TrainProgress(say=heard.append),
    )
    assert [line.partition(" resumes from ")[2] for line in heard] == ["step 7.", "step 6.", "step 6."]
    for one, run in zip(whole, runs, strict=True):
        assert files_of(one) == files_of(run.folder)


def test_runs_that_resume_from_different_steps_share_a_pass_from_where_they_meet(
    sparse_cache, tmp_path: Path, fail_once, monkeypatch
) -> None:
    config = make_config(sparse_cache, *NAMES, out=tmp_path / "out")
    fail_once(Variant, "losses", 3 * 6 + 2, CUDA)
    with pytest.raises(UnavailableError):
        train(config)
    taken, loop = [], shared_pass.train_loop

    def record(trainers, batches, steps, *others):
        taken.append((len(trainers), steps))
        loop(trainers, batches, steps, *others)

    monkeypatch.setattr(shared_pass, "train_loop", record)
    train(config)
    assert taken == [(2, range(6, 7)), (3, range(7, 12))]


@pytest.mark.parametrize(
    ("owner", "name", "at"),
    [
        (torch.optim.AdamW, "step", 7), pytest.param(Trainer, "_add_metrics", 7, marks=pytest.mark.slow),
        pytest.param(Trainer, "run_periodic", 7, marks=pytest.mark.slow),
    ],
)  # fmt: skip
@pytest.mark.parametrize("after", [False, True])
def test_a_step_that_was_changing_the_state_is_taken_again_from_the_last_checkpoint(
    sparse_cache, tmp_path: Path, fail_once, owner, name, at, after
) -> None:
    (whole,) = train(make_config(sparse_cache, "topk", out=tmp_path / "whole"))
    config = make_config(sparse_cache, "topk", out=tmp_path / "out")
    (run,) = plan_training(config).runs
    fail_once(owner, name, at, HOST, after)
    with pytest.raises(UnavailableError, match=f"Nothing is lost: {run.name} continues from step") as raised:
        train(config)
    step = 7 if name == "run_periodic" and after else 4  # the step is complete after run_periodic
    assert f"continues from step {step}." in str(raised.value) and steps_saved(run.folder)[-1] == step
    train(config)
    assert files_of(run.folder) == files_of(whole)


def test_in_the_first_step_there_is_nothing_to_save(sparse_cache, tmp_path: Path, fail_once) -> None:
    config = make_config(sparse_cache, "topk", out=tmp_path / "out")
    (run,) = plan_training(config).runs
    fail_once(Variant, "losses", 1, CUDA)
    with pytest.raises(UnavailableError, match="continues from step 0"):
        train(config)
    assert steps_saved(run.folder) == []
    assert train(config) == [run.folder] and run.done


def test_a_checkpoint_that_does_not_fit_either_leaves_the_one_before(
    sparse_cache, tmp_path: Path, fail_once, monkeypatch
) -> None:
    config = make_config(sparse_cache, "relu", out=tmp_path / "out")
    (run,) = plan_training(config).runs
    fail_once(Variant, "losses", 7, CUDA)

    def full(*_):
        raise MemoryError("no room for a copy")

    with monkeypatch.context() as patched:
        patched.setattr(memory_error, "save_checkpoint", full)
        with pytest.raises(UnavailableError, match="continues from step 4"):
            train(config)
    train(config)
    (whole,) = train(make_config(sparse_cache, "relu", out=tmp_path / "whole"))
    assert files_of(run.folder) == files_of(whole)


def test_other_errors_are_not_taken_for_it(sparse_cache, tmp_path: Path, fail_once) -> None:
    fail_once(Variant, "losses", 7, RuntimeError("shapes cannot be multiplied"))
    config = make_config(sparse_cache, "relu", out=tmp_path / "out")
    with pytest.raises(RuntimeError, match="shapes"):
        train(config)
    assert steps_saved(plan_training(config).runs[0].folder) == [4]


def test_tensors_of_the_failed_step_are_freed_before_anything_is_saved(
    sparse_cache, tmp_path: Path, monkeypatch
) -> None:
    """When the checkpoint is written, no gradient and no latents of the step are alive."""
    config = make_config(sparse_cache, "relu", out=tmp_path / "out")
    losses, alive, kept = Variant.losses, [], []

    def fail(self, step):
        if int(step.i) == 6:
            kept.append(torch.multiprocessing.reductions.StorageWeakRef(step.f_BF.untyped_storage()))
            raise CUDA
        return losses(self, step)

    def look(trainer, *args):
        alive.append((not kept[0].expired(), any(p.grad is not None for p in trainer.variant.parameters())))
        checkpoint.save_checkpoint(trainer, *args)

    monkeypatch.setattr(Variant, "losses", fail)
    monkeypatch.setattr(memory_error, "save_checkpoint", look)
    with pytest.raises(UnavailableError):
        train(config)
    assert alive == [(False, False)]


# --- resume in more parts -------------------------------------------------------------------------------------------


def test_a_run_can_be_resumed_in_more_parts(sparse_cache, tmp_path: Path, fail_once) -> None:
    """The rest of the run differs by rounding.

    run.json records the step of the change, and the number of parts stays.
    """
    (whole,) = train(make_config(sparse_cache, "topk", out=tmp_path / "whole"))
    config = make_config(sparse_cache, "topk", out=tmp_path / "out")
    (run,) = plan_training(config).runs
    fail_once(Variant, "losses", 7, CUDA)
    with pytest.raises(UnavailableError, match="add --accumulate 2"):
        train(config)
    seen = []
    resume = TrainConfig(resume=[run.folder], accumulate=4, device="cpu", checkpoint_every=4)
    train(resume, TrainProgress(step=lambda step, *_: seen.append(step)))
    record = read_json(run.folder / "run.json")
    assert record["accumulate_since"] == [[6, 4]] and "accumulate" not in record and seen[-1] == 12
    assert plan_training(config).runs[0].config.accumulate == 4  # the same command keeps the number of parts
    assert plan_training(TrainConfig(resume=[run.folder])).runs[0].config.accumulate == 4
    one, other = (torch.frombuffer(bytearray(files_of(f)[0][-4000:]), dtype=torch.float32) for f in (whole, run.folder))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_what_cannot_be_divided_is_not_resumed_in_parts(sparse_cache, tmp_path: Path, fail_once) -> None:
    config = make_config(sparse_cache, "decorrelation", out=tmp_path / "out")
    fail_once(Variant, "losses", 7, CUDA)
    with pytest.raises(SaeError) as raised:
        train(config)
    assert "--accumulate" not in str(raised.value)
    with pytest.raises(UsageError, match="decorrelation cannot be trained with --accumulate: the correlations of"):
        plan_training(TrainConfig(resume=[plan_training(config).runs[0].folder], accumulate=2))
    with pytest.raises(UsageError, match="--accumulate 3 does not divide a batch of 64 tokens"):
        plan_training(TrainConfig(resume=[plan_training(config).runs[0].folder], accumulate=3))
