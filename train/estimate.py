"""What training will take, before it begins: bytes on the disk, bytes on the device, and the time of its steps."""

import json
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..common.device import available_memory, empty_gpu_cache, resolve_device
from ..common.errors import UnavailableError, UsageError
from ..common.files import existing_parent, folder_bytes, free_space
from ..common.formatting import format_bytes, format_count
from .checkpoint import KEPT
from .loop import Trainer
from .recipe import Recipe, find_recipe
from .variant import RunConfig, Variant

Planned = tuple[Recipe, Mapping[str, Any], RunConfig]  # what a run is trained from

STEPS, ENOUGH = 5, 1.0  # a step is timed so often, or until so many seconds are spent
PRODUCTS = 10  # multiplications and additions of a step for each row and weight of W_enc, at least
AT_MOST = {"cpu": 2e11, "cuda": 1e14}  # of them in a timed step: a second or two
LATENTS = {"cpu": 3e7, "cuda": 3e9}  # of all rows of a timed step, at most
SHARE = 0.5  # of the memory that can be had, which a timed step takes at most
TENSORS = 6  # of a step that have the size of the latents, about, and half as many of that of their pairs


class RunBytes(NamedTuple):
    """Of a run: its SAE's tensors, and its state, which it has on the device and in each checkpoint."""

    sae: int
    state: int  # weights, buffers and AdamW's two moments

    @property
    def folder(self) -> int:
        """What its folder holds at most: the SAE and the checkpoints that are kept."""
        return self.sae + KEPT * self.state


def run_bytes(planned: Planned) -> RunBytes:
    variant = build_variant(planned, "meta")
    weights, buffers = tensor_bytes(variant)
    return RunBytes(tensor_bytes(variant.sae)[0], 3 * weights + buffers)


def tensor_bytes(module: torch.nn.Module) -> tuple[int, int]:
    return sum(p.nbytes for p in module.parameters()), sum(b.nbytes for b in module.buffers())


def check_disk_space(runs: Iterable[tuple[Planned, Path]], beside: Mapping[Path, float] = {}) -> None:
    """OutsideError where what runs write into their folders does not fit on a disk, with what goes into those `beside`.

    What a run that was begun has written needs no space again. UsageError where a file is in a folder's place.
    """
    by_disk: dict[int, list[tuple[Planned, Path]]] = {}
    for planned, folder in runs:
        by_disk.setdefault(disk_id(folder), []).append((planned, folder))
    for disk, here in by_disk.items():
        sizes = [run_bytes(planned) for planned, _ in here]
        activations = sum(size for folder, size in beside.items() if disk_id(folder) == disk)
        # A checkpoint is whole before an older one goes, and the last one of a run before its SAE is written.
        passing = max(size.state - size.sae for size in sizes)
        needed = sum(size.folder for size in sizes) - sum(checkpoint_bytes(folder) for _, folder in here) + passing
        place = existing_parent(here[0][1])
        if needed + activations > (free := free_space(place)):
            also = f" beside {format_bytes(activations)} of activations" if activations else ""
            raise UnavailableError(
                f"{format_count(len(here), 'run')} of up to {format_bytes(max(size.folder for size in sizes))} will need {format_bytes(needed)}{also}, "
                f"and the disk of {place} has {format_bytes(free)} free. "
                "Train fewer, at a smaller --width, or give --out on another disk."
            )


def disk_id(folder: Path) -> int:
    """The disk that will hold a folder, as the system numbers them."""
    place = existing_parent(folder)
    if not place.is_dir():
        raise UsageError(f"{place} is no folder: a file is in its place. Give a new folder with --out.")
    return place.stat().st_dev


def checkpoint_bytes(folder: Path) -> int:
    """Bytes of a run's checkpoints, and of what a kill left half-written. The SAE of a run to go on with is made anew."""
    strays = sum(path.stat().st_size for path in folder.glob("sae.safetensors.tmp-*"))
    return strays + folder_bytes(folder / "checkpoints")


def timed_rows(config: RunConfig, device: str) -> int:
    """Of a batch that would take seconds, as many rows as take one or two."""
    kind = torch.device(device).type
    limit = min(AT_MOST[kind] / PRODUCTS / config.d_in, LATENTS[kind]) / config.d_sae
    return max(1, min(config.batch_size, int(limit)))


def step_memory_bytes(planned: Planned, device: str) -> float:
    """Bytes that a timed step takes, about: the state, gradients, and tensors of latents and of their pairs."""
    config, variant = planned[2], build_variant(planned, "meta")
    weights, buffers = tensor_bytes(variant)
    latents = timed_rows(config, device) * config.d_sae
    pairs = config.d_sae**2 / 2 if any(term.all_pairs for term in variant.terms.values()) else 0
    return 4 * weights + buffers + 4 * TENSORS * (latents + pairs)


def step_seconds(planned: Planned, device: str) -> float:
    """The time of a step on random rows. A batch that would take seconds is timed in part.

    OutsideError where that would take too much of the memory.
    """
    config, rows = planned[2], timed_rows(planned[2], device)
    needed, available = step_memory_bytes(planned, device), available_memory(device)
    if needed > SHARE * available:
        raise UnavailableError(
            f"not timed: a step of {planned[0].name} takes {format_bytes(needed)} or more, "
            f"and {device} has {format_bytes(available)} of memory free"
        )
    training = Trainer(build_variant(planned, device), config.steps, device)
    x_BD = torch.randn(rows, config.d_in, device=device).bfloat16()
    seconds = fastest_step(training, x_BD)
    if 1 < rows < config.batch_size:  # a part of it is the optimizer's, however many the rows are
        of_one = fastest_step(training, x_BD[:1])
        seconds = of_one + max(seconds - of_one, 0.0) / (rows - 1) * (config.batch_size - 1)
    del training
    empty_gpu_cache(device)
    return seconds


def fastest_step(training: Trainer, x_BD: torch.Tensor) -> float:
    """The time of the fastest of a few steps."""
    times: list[float] = []
    while len(times) < 2 or (len(times) < STEPS and sum(times) < ENOUGH):  # the first one is slower
        started = time.perf_counter()
        training.step(x_BD)
        int(training.i)  # a GPU is waited for
        times.append(time.perf_counter() - started)
    return min(times)


def training_seconds(runs: Iterable[Planned], device: str) -> float:
    """The time of all steps of the runs, one run after the other, as they take turns on one device. Nothing is read."""
    device, alike = resolve_device(device), Counter()
    alike.update((recipe.name, json.dumps(options, sort_keys=True), config) for recipe, options, config in runs)
    return sum(
        count * config.steps * step_seconds((find_recipe(name), json.loads(options), config), device)
        for (name, options, config), count in alike.items()
    )


def build_variant(planned: Planned, device: str) -> Variant:
    recipe, options, config = planned
    with torch.random.fork_rng(devices=[]), torch.device("meta") if device == "meta" else torch.device("cpu"):
        return recipe.make(config, options).to(device)
