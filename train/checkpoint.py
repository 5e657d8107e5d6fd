"""The checkpoint format: complete, verified and resumable. Tensors are in safetensors, numbers in JSON; no pickle.

    checkpoints/step-00001000/
        state.safetensors    every tensor of the variant ("variant.<name>"), Adam's state ("optimizer.<name>.<key>"),
                             the step index "i" and "failed_at"
        state.json           {"format", "step", "step_version", "sha256" of state.safetensors, "run"}, written last

A checkpoint is valid if state.json exists and its checksum matches. The newest two checkpoints are kept. Damaged
checkpoints are skipped with a message.
"""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load
from safetensors.torch import save as to_safetensors
from torch import Tensor

from ..common.errors import DamagedError, UsageError
from ..common.files import atomic_write, read_file
from ..common.schemas import CHECKPOINT_RECORD
from .loop import Trainer
from .step_version import STEP_VERSION

FORMAT = 1
KEPT = 2
COUNTER = "acted_"  # prefix of buffers that only count how often a mechanism acted


def training_state(trainer: Trainer) -> dict[str, Tensor]:
    """Every tensor that a restart needs, by name. A tensor that several modules share appears once."""
    variant = trainer.variant
    tensors = {f"variant.{n}": t.detach() for n, t in [*variant.named_parameters(), *variant.named_buffers()]}
    for name, parameter in variant.named_parameters():
        tensors |= {f"optimizer.{name}.{key}": value for key, value in trainer.optimizer.state[parameter].items()}
    return tensors | {"i": trainer.i, "failed_at": trainer.failed_at}


def save_checkpoint(trainer: Trainer, folder: Path, step: int, run: str | None = None) -> None:
    """Write the state after `step` steps into the run folder's checkpoints/, and remove all but the newest two.

    `run` is the digest of everything that determines the result of the run.
    """
    state = {name: tensor.contiguous().cpu() for name, tensor in training_state(trainer).items()}
    write_checkpoint(folder, step, to_safetensors(state), run)


def write_checkpoint(folder: Path, step: int, data: bytes | memoryview, run: str | None) -> None:
    """Write a checkpoint whose state.safetensors is `data`."""
    target = folder / "checkpoints" / f"step-{step:08d}"
    atomic_write(target / "state.safetensors", data)
    digest = hashlib.sha256(data).hexdigest()
    record = {"format": FORMAT, "step": step, "step_version": STEP_VERSION, "sha256": digest}
    record |= {} if run is None else {"run": run}
    CHECKPOINT_RECORD.write(target / "state.json", record)
    checkpoints = sorted((folder / "checkpoints").glob("step-*"))
    # If there are checkpoints of later steps, they are damaged: they were skipped when the run was resumed. If damaged
    # checkpoints were kept, they would displace valid ones.
    skipped = [path for path in checkpoints if path.name > target.name]
    for old in [*skipped, *[path for path in checkpoints if path.name <= target.name][:-KEPT]]:
        shutil.rmtree(old, ignore_errors=True)


class SavedState(NamedTuple):
    """A checkpoint that was read."""

    step: int
    run: str | None  # digest of everything that determines its run; None: not recorded by the version that wrote it
    tensors: dict[str, Tensor]
    step_version: int  # `step_version` of the steps that produced it


def read_checkpoint(path: Path) -> SavedState:
    """Read a checkpoint and verify it.

    Raises:
        DamagedError: a file is missing or differs from what was written.
        UsageError: the checkpoint has another format version.
    """
    record = CHECKPOINT_RECORD.read(path / "state.json")
    if record["format"] != FORMAT:
        raise UsageError(
            f"{path} has checkpoint format {record['format']}, but this version reads format {FORMAT}. "
            "Resume with the version that wrote it, or remove it to start over."
        )
    data = read_file(path / "state.safetensors", CHECKPOINT_RECORD.remedy)
    if hashlib.sha256(data).hexdigest() != record["sha256"]:
        raise DamagedError(f"{path}/state.safetensors does not have the checksum that state.json records.")
    tensors, step = load(data), record["step"]
    if path.name != f"step-{step:08d}" or int(tensors["i"]) != step:
        raise DamagedError(f"{path} has step {step} in state.json but step {int(tensors['i'])} in its tensors.")
    return SavedState(step, record.get("run"), tensors, record.get("step_version", 1))


def restore_checkpoint(trainer: Trainer, folder: Path, say: Callable[[str], None], run: str | None = None) -> int:
    """Load the newest valid checkpoint of a run folder; returns its step, or 0 if there is none.

    `run` is the digest of everything that determines the result of the run.

    Raises:
        UsageError: the checkpoint comes from another version. Starting over silently would discard the training so far.
        DamagedError: the checkpoint comes from another run.
    """
    for path in sorted((folder / "checkpoints").glob("step-*"), reverse=True):
        try:
            step, written_by, tensors, version = read_checkpoint(path)
            if step > trainer.steps:
                raise DamagedError(f"{path} is for step {step}, but the run has {trainer.steps} steps.")
        except DamagedError as error:
            say(f"Skipping the checkpoint {path.name}: {error}")
            continue
        if None not in (run, written_by) and run != written_by:
            raise DamagedError(
                f"{path} and {folder / 'run.json'} belong to different runs: their options differ. If run.json is the "
                "right one, move the checkpoint elsewhere and resume. Otherwise restore run.json from a copy. To "
                "continue from this checkpoint with other options, delete 'run' and 'content_digest' in its state.json."
            )
        state = training_state(trainer)
        for name in state.keys() - tensors.keys():
            if is_counter(name):  # the checkpoint is from before this counter existed: start counting now
                tensors[name] = state[name]
        if any(name not in tensors or tensors[name].shape != tensor.shape for name, tensor in state.items()):
            raise UsageError(
                f"{path} does not contain the tensors that this version of the variant has. "
                "Resume with the version that wrote it, or remove the run to start over."
            )
        load_training_state(trainer, tensors)
        trainer.restored_version = version
        return step
    return 0


def is_counter(name: str) -> bool:
    """Whether a tensor of `training_state` only counts how often a mechanism acted, and so affects no result."""
    return name.rpartition(".")[2].startswith(COUNTER)


@torch.no_grad()
def load_training_state(trainer: Trainer, tensors: dict[str, Tensor]) -> None:
    """Copy the tensors of `training_state` into a trainer."""
    variant = trainer.variant
    for name, parameter in variant.named_parameters():
        keys = [k for k in tensors if k.startswith(f"optimizer.{name}.")]
        trainer.optimizer.state[parameter] = {k.rsplit(".", 1)[1]: tensors[k].to(trainer.device) for k in keys}
    for name, tensor in [*variant.named_parameters(), *variant.named_buffers()]:
        tensor.copy_(tensors[f"variant.{name}"])
    trainer.i.copy_(tensors["i"])
    trainer.failed_at.copy_(tensors["failed_at"])
    for mechanism in variant.mechanisms:
        mechanism.after_restore()
    trainer.update.renew_copies()
