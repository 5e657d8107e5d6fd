"""Checkpoints: whole, verified, resumable. Tensors in safetensors, numbers in JSON, no pickle.

state.json is written last and holds the checksum of state.safetensors: its presence and their agreement are what makes
a checkpoint one. The last two are kept; a damaged one is passed over with a sentence.
"""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from safetensors.torch import save as to_safetensors
from torch import Tensor

from ..common.errors import DamagedError, UsageError
from ..common.files import atomic_write, read_json, write_json
from .loop import Trainer

FORMAT = 1
KEPT = 2


def training_state(training: Trainer) -> dict[str, Tensor]:
    """Every tensor that a restart needs, by name; parts that share one appear once."""
    variant = training.variant
    tensors = {f"variant.{n}": t.detach() for n, t in [*variant.named_parameters(), *variant.named_buffers()]}
    for name, parameter in variant.named_parameters():
        tensors |= {f"optimizer.{name}.{key}": value for key, value in training.optimizer.state[parameter].items()}
    return tensors | {"i": training.i, "failed_at": training.failed_at}


def save_checkpoint(training: Trainer, folder: Path, step: int) -> None:
    """Write the state after `step` steps into checkpoints/, and drop all but the newest two."""
    target = folder / "checkpoints" / f"step-{step:08d}"
    data = to_safetensors({n: t.contiguous().cpu() for n, t in training_state(training).items()})
    atomic_write(target / "state.safetensors", data)
    write_json(target / "state.json", {"format": FORMAT, "step": step, "sha256": hashlib.sha256(data).hexdigest()})
    everything = sorted((folder / "checkpoints").glob("step-*"))
    passed_over = [path for path in everything if path.name > target.name]  # or they would push out the whole ones
    for old in [*passed_over, *[path for path in everything if path.name <= target.name][:-KEPT]]:
        shutil.rmtree(old, ignore_errors=True)


def read_checkpoint(path: Path) -> tuple[int, dict[str, Tensor]]:
    """The step and the tensors; DamagedError when they are not what was written, UsageError for another version's."""
    record: dict[str, Any] = read_json(path / "state.json", "format", "step", "sha256")
    if record.get("format") != FORMAT:
        raise UsageError(
            f"{path} is a checkpoint of format {record.get('format')}; this version reads {FORMAT}. "
            "Go on with the version that wrote it, or remove it to begin again."
        )
    try:
        data = (path / "state.safetensors").read_bytes()
    except OSError as error:
        raise DamagedError(f"{path}/state.safetensors cannot be read: {error.strerror}.") from error
    if hashlib.sha256(data).hexdigest() != record["sha256"]:
        raise DamagedError(f"{path}/state.safetensors does not have the checksum that was recorded.")
    return record["step"], load(data)


def restore_checkpoint(training: Trainer, folder: Path, tell: Callable[[str], None]) -> int:
    """Load the newest whole checkpoint; returns how many steps were taken, 0 without one.

    Raises UsageError when it is another version's: beginning again in silence would throw training away.
    """
    for path in sorted((folder / "checkpoints").glob("step-*"), reverse=True):
        try:
            step, tensors = read_checkpoint(path)
        except DamagedError as error:
            tell(f"The checkpoint {path.name} is passed over: {error}")
            continue
        shapes = {name: t.shape for name, t in training_state(training).items()}
        if any(name not in tensors or tensors[name].shape != shape for name, shape in shapes.items()):
            raise UsageError(
                f"{path} is a checkpoint of other parts than this version builds. "
                "Go on with the version that wrote it, or remove the run to begin again."
            )
        load_training_state(training, tensors)
        return step
    return 0


@torch.no_grad()
def load_training_state(training: Trainer, tensors: dict[str, Tensor]) -> None:
    variant = training.variant
    for name, parameter in variant.named_parameters():
        keys = [k for k in tensors if k.startswith(f"optimizer.{name}.")]
        training.optimizer.state[parameter] = {k.rsplit(".", 1)[1]: tensors[k].to(training.device) for k in keys}
    for name, tensor in [*variant.named_parameters(), *variant.named_buffers()]:
        tensor.copy_(tensors[f"variant.{name}"])
    training.i.copy_(tensors["i"])
    training.failed_at.copy_(tensors["failed_at"])
    for mechanism in variant.mechanisms:
        mechanism.after_restore()
