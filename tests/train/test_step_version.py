"""A run may continue under another version of the training step.

This gives one note and an entry in run.json, and `sae compare` counts the run to the same system.
"""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sae.common.schemas import CHECKPOINT_RECORD, RUN_RECORD
from sae.evaluate.rows import digest_without_seed
from sae.train.checkpoint import read_checkpoint
from sae.train.config import TrainConfig
from sae.train.plan import plan_training
from sae.train.recipe import RECIPES
from sae.train.run import TrainProgress
from sae.train.step_version import RANKING, STEP_VERSION, WIDER, rounding_bounds

from .runs import make_config, train

OTHER = STEP_VERSION + 1


@pytest.fixture
def unfinished(sparse_cache, tmp_path: Path):
    """A run as if killed after step 8, without the later of its two checkpoints, and the bytes of its SAE."""
    (folder,) = train(make_config(sparse_cache, "topk", out=tmp_path))
    weights = (folder / "sae.safetensors").read_bytes()
    (folder / "sae.json").unlink()
    newest = folder / "checkpoints" / "step-00000012"
    for path in newest.iterdir():
        path.unlink()
    newest.rmdir()
    return folder, weights


def rewrite(folder: Path, version: int | None, *, run: bool = True, checkpoint: bool = True) -> None:
    """Set the step version that a run and its checkpoints record. None removes it, as in runs that recorded none."""
    paths = [(RUN_RECORD, folder / "run.json")] * run
    paths += [(CHECKPOINT_RECORD, path) for path in folder.glob("checkpoints/*/state.json")] * checkpoint
    for kind, path in paths:
        record = {key: value for key, value in kind.read(path).items() if key != "step_version"}
        kind.write(path, record | ({} if version is None else {"step_version": version}))


def resume(folder: Path) -> list[str]:
    said: list[str] = []
    train(TrainConfig(resume=[folder], device="cpu", checkpoint_every=4, log_every=2), TrainProgress(say=said.append))
    return said


def test_a_run_of_the_same_version_resumes_without_a_note(unfinished) -> None:
    folder, weights = unfinished
    before = (folder / "run.json").read_bytes()
    assert resume(folder) == [f"{folder.name} resumes from step 8."]
    assert (folder / "sae.safetensors").read_bytes() == weights and (folder / "run.json").read_bytes() == before
    assert RUN_RECORD.read(folder / "run.json")["step_version"] == STEP_VERSION
    states = [read_checkpoint(path) for path in sorted((folder / "checkpoints").iterdir())]
    assert [state.step_version for state in states] == [STEP_VERSION, STEP_VERSION]


def test_a_checkpoint_of_another_version_resumes_with_one_note(unfinished) -> None:
    """The note states the bounds of the recipe.

    run.json records the step from which the new version trained, and a second resume adds nothing.
    """
    folder, weights = unfinished
    rewrite(folder, OTHER)
    bounds = rounding_bounds("topk")
    resumed, note = resume(folder)
    assert resumed == f"{folder.name} resumes from step 8."
    assert note.startswith(
        f"{folder.name}: its checkpoint was written by version {OTHER} of the training step, and the run"
    )
    assert f"of topk differ from those of a run with one version by at most {bounds.weights:g} of their norm" in note
    assert f"the loss by at most {bounds.loss:g} of its value" in note
    assert (folder / "sae.safetensors").read_bytes() == weights  # both versions are the same step here
    record = RUN_RECORD.read(folder / "run.json")
    assert (record["step_version"], record["step_version_since"]) == (OTHER, [[8, STEP_VERSION]])
    newest = read_checkpoint(folder / "checkpoints" / "step-00000012")
    assert (newest.step, newest.step_version) == (12, STEP_VERSION)
    (folder / "sae.json").unlink()
    assert resume(folder) == [f"{folder.name} resumes from step 12."]
    assert RUN_RECORD.read(folder / "run.json") == record


def test_without_an_entry_the_version_is_the_first(unfinished) -> None:
    folder, _ = unfinished
    rewrite(folder, None)
    (path,) = (folder / "checkpoints").glob("step-00000008")
    assert read_checkpoint(path).step_version == 1
    note = "" if STEP_VERSION == 1 else "its checkpoint was written by version 1 of the training step"
    assert len(said := resume(folder)) == (1 if STEP_VERSION == 1 else 2) and note in said[-1]
    changes = RUN_RECORD.read(folder / "run.json").get("step_version_since")
    assert changes == (None if STEP_VERSION == 1 else [[8, STEP_VERSION]])


def test_steps_that_are_taken_again_are_not_recorded(unfinished) -> None:
    """The run resumes from step 8, before its last change of version.

    Changes from step 8 on are replaced by the new one.
    """
    folder, _ = unfinished
    record = RUN_RECORD.read(folder / "run.json")
    changes = [[3, OTHER], [8, OTHER + 1], [10, OTHER + 2]]
    RUN_RECORD.write(folder / "run.json", record | {"step_version_since": changes})
    rewrite(folder, OTHER, run=False)
    assert "of the training step" in resume(folder)[-1]
    assert RUN_RECORD.read(folder / "run.json")["step_version_since"] == [[3, OTHER], [8, STEP_VERSION]]


def test_no_note_where_no_step_is_left(unfinished) -> None:
    """All steps were taken under the version of the checkpoint. Only the calibration and the SAE are computed again."""
    folder, weights = unfinished
    resume(folder)
    (folder / "sae.json").unlink()
    rewrite(folder, OTHER, run=False)
    assert resume(folder) == [f"{folder.name} resumes from step 12."]
    assert (folder / "sae.safetensors").read_bytes() == weights


def test_a_run_of_another_version_is_the_same_system_and_has_the_same_folder(unfinished, sparse_cache) -> None:
    folder, _ = unfinished
    before = RUN_RECORD.read(folder / "run.json")
    rewrite(folder, OTHER)
    resume(folder)
    after = RUN_RECORD.read(folder / "run.json")
    assert before != after and digest_without_seed(before) == digest_without_seed(after)
    (run,) = plan_training(make_config(sparse_cache, "topk", out=folder.parent)).runs
    assert run.folder == folder and run.done


def test_the_bounds_are_of_recipes_and_of_rounding() -> None:
    """Each named recipe exists, and each bound is positive and at most a tenth of the value."""
    assert WIDER.keys() <= RECIPES.keys() and len(set(RANKING)) == len(RANKING)
    for name in RECIPES:
        assert all(0 < bound <= 0.1 for bound in rounding_bounds(name))
        assert rounding_bounds(name) == WIDER.get(name, rounding_bounds("relu"))
    assert rounding_bounds("topk").weights > rounding_bounds("relu").weights


def test_another_order_of_sums_stays_within_the_bounds(sparse_cache, tmp_path: Path) -> None:
    """The second run divides its batches into four parts, so every sum over tokens is taken in another order."""
    (whole,) = train(make_config(sparse_cache, "relu", out=tmp_path / "whole"))
    (parts,) = train(make_config(sparse_cache, "relu", out=tmp_path / "parts", accumulate=4))
    one, other = (load_file(folder / "sae.safetensors") for folder in (whole, parts))
    distance = torch.cat([(other[name] - tensor).flatten() for name, tensor in one.items()]).norm()
    norm = torch.cat([tensor.flatten() for tensor in one.values()]).norm()
    bounds, losses = rounding_bounds("relu"), [last_loss(folder) for folder in (whole, parts)]
    assert 0 < distance <= bounds.weights * norm and losses[1] == pytest.approx(losses[0], rel=bounds.loss)


def last_loss(folder: Path) -> float:
    return float(re.findall(r'"loss": ([^,]+)', (folder / "metrics.jsonl").read_text())[-1])
