"""What training will take, before it begins: bytes on the disk, bytes on the device, and the time of its steps."""

import json
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..cache.device import best_device, free_memory
from ..cache.errors import OutsideError
from ..cache.files import bytes_text, free_space
from .checkpoint import KEPT
from .loop import Training
from .recipe import Recipe, Setting, Variant, find_recipe

Planned = tuple[Recipe, Mapping[str, Any], Setting]  # what a run is trained from

STEPS, ENOUGH = 5, 1.0  # a step is timed so often, or until so many seconds are spent
PRODUCTS = 10  # multiplications and additions of a step for each row and weight of W_enc, at least
AT_MOST = {"cpu": 2e11, "cuda": 1e14}  # of them in a timed step: a second or two


def state_bytes(planned: Planned) -> int:
    """Bytes of a run's weights, buffers and AdamW's two moments: what it has on the device, and a checkpoint."""
    variant = built(planned, "meta")
    weights, buffers = sizes(variant)
    return 3 * weights + buffers


def disk_bytes(planned: Planned) -> int:
    """Bytes that a run's folder holds at most: of the SAE and the checkpoints that are kept, the tensors."""
    return sizes(built(planned, "meta").sae)[0] + KEPT * state_bytes(planned)


def sizes(module: torch.nn.Module) -> tuple[int, int]:
    return sum(p.nbytes for p in module.parameters()), sum(b.nbytes for b in module.buffers())


def check_space(planned: Sequence[Planned], folder: Path, there: int = 0) -> None:
    """OutsideError where such runs, of whose bytes `there` are there already, do not fit on the disk of `folder`."""
    needed, free = sum(map(disk_bytes, planned)), free_space(folder)
    beside = max(map(state_bytes, planned))  # a checkpoint is whole before an older one goes
    if needed - there + beside > free:
        count = f"{len(planned):,} runs" if len(planned) > 1 else "The run"
        raise OutsideError(
            f"{count} of up to {bytes_text(max(map(disk_bytes, planned)))} each will need {bytes_text(needed - there + beside)}, "
            f"and {folder} has {bytes_text(free)} free. Train fewer, at a smaller --width, or give --out on another disk."
        )


def step_seconds(planned: Planned, device: str) -> float:
    """The time of a step on random rows. A batch whose products alone would take seconds is timed in part."""
    _, _, setting = planned
    limit = AT_MOST[torch.device(device).type] / PRODUCTS / (setting.d_in * setting.d_sae)
    rows = max(1, min(setting.batch_size, int(limit)))
    training = Training(built(planned, device), setting.steps, device)
    x_BD = torch.randn(rows, setting.d_in, device=device).bfloat16()
    times: list[float] = []
    while len(times) < 2 or (len(times) < STEPS and sum(times) < ENOUGH):  # the first one is slower
        started = time.perf_counter()
        training.step(x_BD)
        int(training.i)  # a GPU is waited for
        times.append(time.perf_counter() - started)
    del training
    free_memory(device)
    return min(times) * setting.batch_size / rows


def training_seconds(runs: Iterable[Planned], device: str) -> float:
    """The time of all steps of the runs, one run after the other, as they take turns on one device. Nothing is read."""
    device, alike = best_device(device), Counter()
    alike.update((recipe.name, json.dumps(options, sort_keys=True), setting) for recipe, options, setting in runs)
    return sum(
        count * setting.steps * step_seconds((find_recipe(name), json.loads(options), setting), device)
        for (name, options, setting), count in alike.items()
    )


def built(planned: Planned, device: str) -> Variant:
    recipe, options, setting = planned
    with torch.random.fork_rng(devices=[]), torch.device("meta") if device == "meta" else torch.device("cpu"):
        return recipe.make(setting, options).to(device)
