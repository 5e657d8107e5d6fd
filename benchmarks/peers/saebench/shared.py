"""Code shared by SAEBench's side: it makes SAEBench's objects from the problem, records results, and replaces
downloads."""

import contextlib
import json
import random
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from sae_bench.custom_saes.jumprelu_sae import JumpReluSAE
from sae_bench.custom_saes.relu_sae import ReluSAE
from sae_bench.custom_saes.topk_sae import TopKSAE
from sae_bench.sae_bench_utils import general_utils
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformerlens_model import NAME, load_model

SEED = 42

BIOS, AMAZON = "LabHC/bias_in_bios", "canrager/amazon_reviews_mcauley_1and5"

SETS = {"bios": f"{BIOS}_class_set1", "amazon": AMAZON, "sentiment": f"{AMAZON}_sentiment"}

PAIRS = {SETS["bios"]: [("professor", "nurse")], AMAZON: [("Books", "CDs_and_Vinyl")]}

spent: dict[str, dict[str, Any]] = {}  # run -> wall and processor seconds, and its metrics


class Problem:
    """The contents of a problem's folder, as SAEBench's objects."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.about = json.loads((folder / "problem.json").read_text())
        self.tables = json.loads((folder / "tables.json").read_text())
        self.contexts = load_file(folder / "contexts.safetensors")["tokens"].long()
        self.model = load_model(folder)

    def sae(self, kind: str) -> Any:
        return make_sae(self.folder, kind, self.about)

    def dataset(self, name: str, *_: Any, **__: Any) -> dict[str, dict[str, list[Any]]]:
        return self.tables[name]


def make_sae(folder: Path, kind: str, about: dict[str, Any]) -> Any:
    """Load one of our SAEs from `folder` into SAEBench's class for this kind of SAE. `about` is the content of
    problem.json."""
    found = load_file(folder / "saes" / kind / "sae.safetensors")
    arrays = {name.removeprefix("activation.0."): tensor for name, tensor in found.items()}
    d_in, d_sae = arrays["W_enc"].shape
    make = {"relu": ReluSAE, "topk": partial(TopKSAE, k=about["k"]), "jumprelu": JumpReluSAE}[kind]
    sae = make(
        d_in=d_in, d_sae=d_sae, model_name=NAME, hook_layer=about["layer"],
        device=torch.device("cpu"), dtype=torch.float32,
    )  # fmt: skip
    if kind == "topk":
        arrays["k"] = sae.k
    sae.load_state_dict(arrays)
    sae.cfg.architecture = kind
    assert sae.check_decoder_norms()
    general_utils._standardize_sae_cfg(sae.cfg)
    return sae.requires_grad_(False)


class Recorder:
    """Named tensors, and named values for JSON."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.json: dict[str, Any] = {}

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if self.tensors:
            save_file({n: t.detach().contiguous() for n, t in self.tensors.items()}, folder / "arrays.safetensors")
        (folder / "results.json").write_text(json.dumps(self.json, default=to_json))


def to_json(value: Any) -> Any:
    return value.tolist() if isinstance(value, (np.ndarray, np.generic, Tensor)) else str(value)


@contextlib.contextmanager
def record_calls(module: Any, name: str, callback: Callable[[tuple[Any, ...], Any], None]) -> Iterator[None]:
    """Call `callback(arguments, result)` after every call of SAEBench's function `name` that goes through `module`."""
    function = getattr(module, name)

    def call(*arguments: Any, **named: Any) -> Any:
        result = function(*arguments, **named)
        callback((*arguments, *named.values()), result)
        return result

    with patch.object(module, name, call):
        yield


def read_result(path: Path) -> dict[str, Any]:
    """A result file without the fields that differ from run to run."""
    found = json.loads(path.read_text())
    for name in ("eval_id", "datetime_epoch_millis", "sae_bench_commit_hash"):
        found.pop(name)
    return found


def load_saes(problem: Problem, kinds: list[str]) -> list[tuple[str, Any]]:
    return [(kind, problem.sae(kind.split(".")[0])) for kind in kinds]


def set_seed() -> None:
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)


@contextlib.contextmanager
def timed(run: str) -> Iterator[None]:
    wall, processor = time.perf_counter(), time.process_time()
    yield
    spent[run] = {"wall": time.perf_counter() - wall, "processor": time.process_time() - processor}
