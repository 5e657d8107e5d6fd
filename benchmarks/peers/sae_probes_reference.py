"""Compare sae-probes 0.4.2 with our metric sae_probes on the same rows, splits and SAEs, and time one more SAE.

    python -m venv env-sae-probes     # Python 3.11
    env-sae-probes/bin/pip install torch==2.13.0 numpy==1.26.4 transformer-lens==2.17.0 sae-lens==6.28.2 \\
        transformers==4.57.6 datasets==3.6.0 'pyarrow<21' scikit-learn==1.9.1 'pandas<3' xgboost-cpu zstandard \\
        safetensors
    env-sae-probes/bin/pip install --no-deps sae-probes==0.4.2 numpy==2.4.6 scipy==1.17.1

    sae data get sae-probes
    python benchmarks/peers/sae_probes_reference.py env-sae-probes/bin/python
    python benchmarks/peers/sae_probes_reference.py env-sae-probes/bin/python \\
        --fixtures tests/evaluate/fixtures/sae_probes

The first form runs gemma-2-mini once over some data sets, passes its rows to both sides, and prints for each setting
how far the AUCs are apart and how many chosen latents differ. It also compares the rows themselves with those that
sae-probes' code reads from TransformerLens, for `--model-texts` texts. The times are processor seconds of one thread
for one more SAE, when all activations are on disk: loading and running the model is not counted. The second form writes
the fixtures of the tests: made-up rows, and the scores of sae-probes on them.

scikit-learn, scipy and numpy have to be the same on both sides: the results depend on where the solvers stop, and those
of lbfgs also on the rounding of numpy's matrix products.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae.cache.context_format import ContextFormat
from sae.cache.contexts import Contexts
from sae.cache.hooks import Hook
from sae.evaluate.artifacts import ArtifactCache
from sae.evaluate.context import EvalContext
from sae.evaluate.datasets import sae_probes as data
from sae.evaluate.metrics.base import RowSet
from sae.evaluate.metrics.last_token_rows import last_token_rows
from sae.evaluate.metrics.sae_probes import DatasetScores, SaeProbes
from sae.harvest.mini import WEIGHTS
from sae.harvest.model import find_model, load_model, load_tokenizer

LAYER, SPECIAL = 12, (0, 1, 2)
FIXTURE_TEXTS, FIXTURE_SIZES, FIXTURE_SHARES = 340, [2, 3, 5, 38, 143], [0.05, 0.8]


class Coder:
    """max(0, x W + b), with all but the `keep` largest set to 0; if `keep` is 0, all are kept."""

    def __init__(self, weights: dict[str, Tensor], keep: int) -> None:
        self.weights, self.keep = weights, keep

    def encode(self, x: Tensor) -> Tensor:
        f = (x @ self.weights["W"] + self.weights["b"]).relu()
        if not self.keep:
            return f
        top = f.topk(self.keep, dim=-1)
        return torch.zeros_like(f).scatter_(-1, top.indices, top.values)

    def decode(self, f: Tensor) -> Tensor:
        raise NotImplementedError


def silent(done: int, total: int, note: str = "") -> None:
    pass


def make_coders(x_ND: Tensor, d_sae: int, keep: dict[str, int]) -> dict[str, dict[str, Tensor]]:
    """Random dictionaries, centred on the mean of the rows. A latent is positive in about one of eight rows."""
    generator = torch.Generator().manual_seed(0)
    mean_D, coders = x_ND.mean(0), {}
    for name in keep:
        direction = torch.randn(x_ND.shape[1], d_sae, generator=generator)
        direction /= direction.norm(dim=0)
        product = (x_ND - mean_D) @ direction
        coders[name] = {"W": direction, "b": -(mean_D @ direction) - 1.15 * product.std(0)}
    return coders


def ask(python: str, folder: Path) -> dict[str, Any]:
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    environment = {n: v for n, v in os.environ.items() if n != "PYTHONPATH"} | threads | {"TQDM_DISABLE": "1"}
    worker = str(Path(__file__).with_name("sae_probes_worker.py"))
    done = subprocess.run([python, worker, str(folder)], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"sae-probes ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


# --- fixtures ---------------------------------------------------------------------------------------------------------


def write_fixtures(python: str, to: Path) -> None:
    """Rows of eight numbers whose first two depend on the class, an SAE of 48 latents, and the scores of sae-probes."""
    generator = torch.Generator().manual_seed(1)
    label = torch.arange(FIXTURE_TEXTS)[torch.randperm(FIXTURE_TEXTS, generator=generator)] % 2
    x = torch.randn(FIXTURE_TEXTS, 8, generator=generator)
    x[:, :2] += 0.6 * (2 * label[:, None] - 1)
    x = x.half().float()
    weights = {part: value.half().float() for part, value in make_coders(x, 48, {"made-up": 0})["made-up"].items()}
    about = {
        "datasets": ["made-up"], "settings": ["normal", "scarcity", "imbalance"], "ks": [1, 5, 16],
        "saes": {"relu": 0}, "labels": {"made-up": label.tolist()}, "train_sizes": FIXTURE_SIZES,
        "shares": FIXTURE_SHARES,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_file({"made-up": x}, folder / "rows.safetensors")
        save_file({f"relu.{part}": value for part, value in weights.items()}, folder / "saes.safetensors")
        (folder / "problem.json").write_text(json.dumps(about))
        found = ask(python, folder)
    to.mkdir(parents=True, exist_ok=True)
    arrays = {"x": x.half(), "label": label.to(torch.uint8), "W": weights["W"].half(), "b": weights["b"].half()}
    save_file(arrays, to / "arrays.safetensors")
    probes = {setting: by_sae["relu"]["probes"] for setting, by_sae in found["saes"].items()}
    scores = {"versions": found["versions"], "sae": probes, "llm": found["llm"]}
    (to / "scores.json").write_text(json.dumps(scores, separators=(",", ":")) + "\n")


# --- real data sets ---------------------------------------------------------------------------------------------------


def mini_context(folder: Path) -> EvalContext:
    """A context with gemma-2-mini in float32, no held-out text and an empty artifact cache."""
    source, config = find_model(str(WEIGHTS))
    model = load_model(source, config, dtype="float32", device="cpu")
    no_text = Contexts(*(np.zeros(0) for _ in range(4)))
    form = ContextFormat(2, SPECIAL)
    return EvalContext(
        lambda: model, load_tokenizer(source), no_text, form, "0.6.0", source.identity(), {}, ArtifactCache(folder)
    )


def compare(python: str, asked: argparse.Namespace) -> None:
    keep = {"first": 16, "further": 16}
    metrics = {
        setting: SaeProbes(tuple(asked.datasets.split(",")), tuple(asked.ks), setting) for setting in asked.settings
    }
    names = next(iter(metrics.values())).names()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ctx = mini_context(folder / "artifacts")
        rows = {one: rows_of(ctx, one) for one in names}
        coders = make_coders(torch.cat([*rows.values()])[:: max(1, len(names))], asked.d_sae, keep)
        save_file(rows, folder / "rows.safetensors")
        weights = {f"{kind}.{part}": value for kind, parts in coders.items() for part, value in parts.items()}
        save_file({part: value.contiguous() for part, value in weights.items()}, folder / "saes.safetensors")
        texts = data.read_texts(names[0]).texts[: asked.model_texts]
        about = {
            "datasets": names, "settings": asked.settings, "ks": asked.ks, "saes": keep, "model": str(WEIGHTS),
            "layer": LAYER, "texts": texts,
        }  # fmt: skip
        (folder / "problem.json").write_text(json.dumps(about))
        theirs = ask(python, folder)
        print(f"{theirs['versions']}; {len(names)} data sets, {asked.d_sae} latents, k = {asked.ks}\n")
        peer, own = load_file(folder / "peer_rows.safetensors")["x"], rows[names[0]][: asked.model_texts]
        apart = float((peer - own).norm() / own.norm())
        print(f"rows of {len(texts)} texts of {names[0]}: relative difference {apart:.1e}\n")
        print(
            "| setting | probes | largest AUC difference | largest accuracy difference | different latents | "
            "sae-probes, s | ours, s | sae-probes / ours |"
        )
        print("|---|---|---|---|---|---|---|---|")
        for setting, metric in metrics.items():
            report(setting, metric, ctx, coders, keep, theirs)


def rows_of(ctx: EvalContext, name: str) -> Tensor:
    source = {"dataset": name, "data": data.dataset_digest(name), "texts": len(data.read_texts(name).texts)}
    return last_token_rows(ctx, [Hook(LAYER)], data.read_texts(name).texts, source, silent)[Hook(LAYER)]


def report(
    setting: str, metric: SaeProbes, ctx: EvalContext, coders: Any, keep: dict[str, int], theirs: dict[str, Any]
) -> None:
    row_set = RowSet(Hook(LAYER))
    for kind, weights in coders.items():
        started, found = time.process_time(), {}
        for name in metric.names():
            problem = metric.read_problems(ctx, [row_set], name, silent)[row_set]
            found[name] = metric.probe_sae(ctx, Coder(weights, keep[kind]), problem)
        spent = time.process_time() - started
        peer = theirs["saes"][setting][kind]
        pairs = match(found, peer["probes"], metric.ks)
        line = f"| {setting}, {kind} SAE | {describe(pairs)} | {peer['seconds']:.1f} | {spent:.1f} |"
        print(f"{line} {peer['seconds'] / spent:.1f} |", flush=True)
    found = {
        name: metric.probe_model(ctx, metric.read_problems(ctx, [row_set], name, silent)[row_set])
        for name in metric.names()
    }
    print(f"| {setting}, model | {describe(match(found, theirs['llm'][setting], [0]))} | | | |", flush=True)


def match(found: dict[str, DatasetScores], probes: list[dict[str, Any]], ks: Any) -> list[tuple[float, float, int]]:
    """For each probe, the differences in AUC and accuracy, and how many latents differ or have another rank."""
    pairs = []
    for probe in probes:
        scores = found[probe["dataset"]]
        number = next(n for n, split in enumerate(scores.splits) if is_of(probe, split, len(scores.splits)))
        place = list(ks).index(probe.get("k", 0))
        auc, accuracy = scores.score_SK4[number, place, :2].tolist()
        latents = probe.get("indices", [])
        other = sum(a != b for a, b in zip(latents, scores.latent_SK[number, : len(latents)].tolist(), strict=True))
        pairs.append((abs(auc - probe["test_auc"]), abs(accuracy - probe["test_acc"]), other))
    return pairs


def is_of(probe: dict[str, Any], split: Any, splits: int) -> bool:
    if "frac" in probe:
        return abs(probe["frac"] - split.share) < 1e-9
    return splits == 1 or probe["num_train"] == len(split.train_M)


def describe(pairs: list[tuple[float, float, int]]) -> str:
    auc, accuracy, other = zip(*pairs, strict=True)
    return f"{len(pairs)} | {max(auc):.1e} | {max(accuracy):.1e} | {sum(other)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("python", help="Python of an environment with sae-probes")
    parser.add_argument("--fixtures", type=Path, help="write the fixtures of the tests")
    parser.add_argument("--datasets", default="5,41,95,105,119,129,154", help="names or numbers, separated by commas")
    parser.add_argument("--settings", nargs="+", default=["normal"])
    parser.add_argument("--ks", nargs="+", type=int, default=[1, 2, 5, 16, 128])
    parser.add_argument("--d-sae", type=int, default=2048)
    parser.add_argument("--model-texts", type=int, default=64)
    asked = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    python = str(Path(asked.python).absolute())
    if asked.fixtures:
        write_fixtures(python, asked.fixtures)
    else:
        compare(python, asked)


if __name__ == "__main__":
    sys.exit(main())
