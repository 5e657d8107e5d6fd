"""sae-probes' side: `python sae_probes_worker.py FOLDER`, in an environment that has sae-probes 0.4.2.

FOLDER/problem.json names data sets, settings, numbers of latents and SAEs; rows.safetensors has the activations of all
texts of each data set, and saes.safetensors has the weights of each SAE. An SAE computes max(0, x W + b) and keeps the
`keep` largest. The functions of sae-probes run on these files; a model is run only if `model` names a folder with a
Gemma 2. Labels are read from sae-probes' own data; for made-up data sets, they are read from the problem. Prints one
line of JSON: for each SAE the probes by data set and the processor seconds, the same for the model's activations, and
the versions.
"""

import contextlib
import importlib
import json
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from sae_probes import generate_sae_activations, run_baselines, utils_data
from safetensors.torch import load_file, save_file
from torch import Tensor

# `from sae_probes import run_sae_evals` would import the function of that name, not the module.
evals: Any = importlib.import_module("sae_probes.run_sae_evals")
MODEL, HOOK = "model", "blocks.0.hook_resid_post"


class Coder:
    """An SAE with the interface that sae-probes needs."""

    def __init__(self, weights: dict[str, Tensor], keep: int) -> None:
        self.weights, self.keep = weights, keep

    def encode(self, x: Tensor) -> Tensor:
        f = (x @ self.weights["W"] + self.weights["b"]).relu()
        if not self.keep:
            return f
        top = f.topk(self.keep, dim=-1)
        return torch.zeros_like(f).scatter_(-1, top.indices, top.values)


@contextlib.contextmanager
def replaced(about: dict[str, Any]) -> Any:
    """Replace sae-probes' labels by those of made-up data sets, and its training sizes and class shares by shorter
    lists."""
    with contextlib.ExitStack() as stack:
        if labels := {name: np.array(found) for name, found in about.get("labels", {}).items()}:
            sizes = {name: len(found) for name, found in labels.items()}
            stack.enter_context(patch.object(utils_data, "get_yvals", labels.__getitem__))
            for module in (generate_sae_activations, evals, run_baselines):
                stack.enter_context(patch.object(module, "DATASET_SIZES", sizes))
        if sizes := about.get("train_sizes"):
            stack.enter_context(patch.object(evals, "TRAIN_SIZES", sizes))
            stack.enter_context(patch.object(run_baselines, "get_training_sizes", lambda: sizes))
        if shares := about.get("shares"):
            stack.enter_context(patch.object(evals, "FRACS", shares))
            stack.enter_context(patch.object(run_baselines, "get_class_imbalance", lambda: shares))
        yield


def results_in(folder: Path) -> list[dict[str, Any]]:
    return [probe for path in sorted(folder.rglob("*.json")) for probe in json.loads(path.read_text())]


def run_model(folder: Path, texts: list[str]) -> None:
    """Write sae-probes' own activations of some texts, at the hook of the problem."""
    from sae_probes.generate_model_activations import _process_activations
    from transformerlens_model import load_model

    about = json.loads((folder / "problem.json").read_text())
    hook = f"blocks.{about['layer']}.hook_resid_post"
    model = load_model(Path(about["model"]))
    found = _process_activations(model, texts, 8, 1024, [hook], None, "cpu")
    save_file({"x": found[hook].contiguous()}, folder / "peer_rows.safetensors")


def main() -> None:
    folder = Path(sys.argv[1])
    about = json.loads((folder / "problem.json").read_text())
    torch.set_num_threads(1)
    rows = load_file(folder / "rows.safetensors")
    weights = load_file(folder / "saes.safetensors")
    out: dict[str, Any] = {"saes": {}, "llm": {}}
    with tempfile.TemporaryDirectory() as name, replaced(about), contextlib.redirect_stdout(sys.stderr):
        work = Path(name)
        cache = work / f"model_activations_{MODEL}"
        cache.mkdir()
        for dataset in about["datasets"]:
            torch.save(rows[dataset], cache / f"{dataset}_{HOOK}.pt")
        shared = {"model_name": MODEL, "hook_name": HOOK, "model_cache_path": work, "datasets": about["datasets"]}
        for setting in about["settings"]:
            for kind, keep in about["saes"].items():
                coder = Coder({part: weights[f"{kind}.{part}"] for part in ("W", "b")}, keep)
                results, started = work / "results" / setting / kind, time.process_time()
                evals.run_sae_evals(
                    sae=coder, reg_type="l1", setting=setting, ks=about["ks"], results_path=results, device="cpu",
                    **shared,
                )  # fmt: skip
                spent = time.process_time() - started
                out["saes"].setdefault(setting, {})[kind] = {"seconds": spent, "probes": results_in(results)}
            results = work / "results" / setting / "llm"
            run_baselines.run_baseline_evals(setting=setting, results_path=results, device="cpu", **shared)
            out["llm"][setting] = results_in(results)
        if about.get("model"):
            run_model(folder, about["texts"])
    out["versions"] = {name: version(name) for name in ("sae-probes", "scikit-learn", "numpy", "torch")}
    print(json.dumps(out))


if __name__ == "__main__":
    main()
