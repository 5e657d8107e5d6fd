"""Whole runs of `sae train` on the simulated GPU, to compare with the same runs on the CPU."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from sae.cache import loader as cache_loader
from sae.cache.loader import BatchLoader, ResidentLoader
from sae.cache.reader import Cache
from sae.common.files import read_json
from sae.train.capture import CapturedSteps
from sae.train.checkpoint_writer import CheckpointWriter
from sae.train.loop import Trainer
from sae.train.plan import Run, TrainConfig, plan_training
from sae.train.run import run_training

from .functions import GIB, Memory, simulated_gpu
from .ledger import Ledger, watched
from .training import same_arithmetic

STEPS = 12


def train(folder: Path, cache: Path, recipes: Sequence[str], resident: bool, capture: str) -> dict[str, Any]:
    """Train the same runs on both devices. On the GPU they also train a second time, stopped halfway and resumed.

    Every fortieth row is an outlier. `resident` says whether the loader keeps the rows on the GPU, `capture` whether
    steps are captured there. Returns what made the host wait in a step, for a batch or to save checkpoints (`waits`),
    the files that are not equal byte for byte (`apart`), and the number of queued copies, among others.
    """
    loader = ResidentLoader if resident else BatchLoader
    seen: dict[str, list[Ledger]] = {"step": [], "graph": [], "batch": [], "save": []}
    outliers = mock.patch.object(Cache, "outlier_rows", lambda self, name: np.arange(7, self.rows, 40))
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)  # set by an earlier call in this process
    with same_arithmetic(sparse=True), outliers:
        expected = finish(folder / "cpu", "cpu", cache, recipes)
        with (
            simulated_gpu(),
            mock.patch.object(Memory, "free", 100 * GIB),
            mock.patch.object(cache_loader, "DEVICE_SHARE", 0.4 if resident else 0.0),
            watched(Trainer, "step", seen["step"]),
            watched(CapturedSteps, "replay", seen["graph"]),
            watched(loader, "__next__", seen["batch"]),
            watched(CheckpointWriter, "save", seen["save"]),
        ):
            found = finish(folder / "cuda", "cuda", cache, recipes, capture)
            steps = len(seen["step"])
            apart = compare(expected, found)
            for run in found:
                (run.folder / "sae.json").unlink()
                (run.folder / "sae.safetensors").unlink()
                shutil.rmtree(run.folder / "checkpoints" / f"step-{STEPS:08d}")
            again = finish(folder / "cuda", "cuda", cache, recipes, capture)
    ledgers = [ledger for several in seen.values() for ledger in several]
    return {
        "waits": sorted({wait for ledger in ledgers for wait in ledger.waits}),
        "apart": apart,
        "apart_resumed": compare(expected, again),
        "steps": steps,
        "steps_resumed": len(seen["step"]) - steps,
        "replays": len(seen["graph"]),
        "batches": len(seen["batch"]),
        "workspace": [
            read_json(run.folder / "run.json")["environment"]["variables"] for run in (expected[0], found[0])
        ],
        "unordered": sorted({line for ledger in ledgers for line in ledger.unordered}),
        "queued": sum(ledger.queued for ledger in seen["batch"]),
        "saves": len(seen["save"]),
        "queued_to_save": min(ledger.queued for ledger in seen["save"]),
    }


def finish(out: Path, device: str, cache: Path, recipes: Sequence[str], capture: str = "auto") -> list[Run]:
    plan = plan_training(
        TrainConfig(
            list(recipes), caches=[cache], layers=[0], steps=STEPS, batch_size=64, width="4x", device=device, out=out,
            checkpoint_every=STEPS // 2, log_every=3, precision="float32", capture=capture,
        )
    )  # fmt: skip
    run_training(plan)
    return plan.runs


def compare(expected: Sequence[Run], found: Sequence[Run]) -> list[str]:
    """The files of the runs that are not equal. Of the metrics, the time spent waiting for data is not compared."""
    apart = []
    for one, other in zip(expected, found, strict=True):
        for name in ("sae.safetensors", f"checkpoints/step-{STEPS:08d}/state.safetensors"):
            if (one.folder / name).read_bytes() != (other.folder / name).read_bytes():
                apart.append(f"{one.name} {name}")
        if metrics(one) != metrics(other):
            apart.append(f"{one.name} metrics.jsonl")
    return apart


def metrics(run: Run) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "waited_for_data"} for line in lines]
