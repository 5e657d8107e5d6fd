"""SAEBench 0.6.0 on small inputs, as the reference of our metrics; and its time beside ours on larger ones.

    python -m venv env-saebench     # Python 3.11
    env-saebench/bin/pip install torch==2.13.0 numpy==1.26.4 transformer-lens==2.17.0 sae-lens==6.28.2 \\
        transformers==4.57.6 datasets==3.6.0 'pyarrow<21' scikit-learn==1.9.1 pandas openai matplotlib seaborn \\
        collectibles xgboost-cpu zstandard safetensors tabulate
    env-saebench/bin/pip install --no-deps sae-bench==0.6.0 sae-probes==0.4.2

    python benchmarks/peers/saebench_reference.py env-saebench/bin/python --fixtures tests/evaluate/fixtures/saebench
    python benchmarks/peers/saebench_reference.py env-saebench/bin/python --time core,sparse_probing,scr,tpp,absorption

saebench_problem.py makes the inputs, saebench_worker.py runs SAEBench on them, in its own environment.
tests/evaluate/fixtures/saebench/README.md says what is written. `--time` gives both sides the same folder, each metric
and side in a process of its own: seconds of the first SAE, mean seconds of a later one, and the process' largest memory.
What the first SAE of a metric costs beyond a later one is the work on the model, which is done once.
"""

import argparse
import datetime
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from saebench_problem import BOS, EOS, KINDS, PAD, SMALL, Size, make_problem

from sae.cache.contexts import Contexts
from sae.evaluate.core import Core
from sae.evaluate.metric import Bench, Subject
from sae.harvest.mini import WEIGHTS
from sae.harvest.model import find_model, load_model
from sae.train.sae import load_sae

METRICS = ("core", "texts", "sparse_probing", "scr", "tpp", "absorption", "unlearning")
LARGE = Size(4096, 64, 12, 128, 16, 4, 8, 400, 200, 1000)


def ours_core(folder: Path, kinds: list[str]) -> None:
    """Our core of these SAEs, all in one pass over the contexts."""
    about = json.loads((folder / "problem.json").read_text())
    source, config = find_model(str(folder))
    model = load_model(source, config, dtype="float32", device="cpu")
    bench = Bench(model, contexts_of(folder), [PAD, EOS, BOS], {"mode": "0.6.0"})
    metric = Core(about["contexts_per_batch"], about["reconstruction_batches"], about["sparsity_batches"])
    subjects = [Subject(load_sae(folder / "saes" / kind), about["layer"]) for kind in kinds]
    metric.measure(bench, subjects, lambda done, total: None)


def contexts_of(folder: Path) -> Contexts:
    from safetensors.numpy import load_file

    ids = load_file(folder / "contexts.safetensors")["tokens"].astype(np.uint32)
    n, length = ids.shape
    return Contexts(ids, np.full(n, length, np.uint16), np.arange(n, dtype=np.uint32), np.ones(n, bool))


OURS: dict[str, Callable[[Path, list[str]], None]] = {"core": ours_core}  # a metric of ours joins here


def time_ours(folder: Path, metric: str, kinds: list[str]) -> None:
    """One line of JSON, as the worker prints it: the first alone, then all, as ours shares what SAEs have in common."""
    seconds = []
    for some in (kinds[:1], kinds):
        started = time.perf_counter()
        OURS[metric](folder, some)
        seconds.append(time.perf_counter() - started)
    later = (seconds[1] - seconds[0]) / max(1, len(kinds) - 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    print(json.dumps({"seconds": [seconds[0], *[later] * (len(kinds) - 1)], "peak_mb": peak}))


def ask(python: str, folder: Path, metric: str, *options: str) -> str:
    """Run the worker; its standard output."""
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TQDM_DISABLE": "1"}
    environment = {n: v for n, v in os.environ.items() if n != "PYTHONPATH"} | offline
    command = [python, str(Path(__file__).with_name("saebench_worker.py")), str(folder), metric, *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"SAEBench's {metric} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return done.stdout


def write_fixtures(python: str, to: Path, metrics: list[str], seed: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_problem(folder, SMALL, seed)
        inputs = to / "problem"
        inputs.mkdir(parents=True, exist_ok=True)
        for file in ("config.json", "model.safetensors", "contexts.safetensors", "tables.json", "problem.json"):
            shutil.copyfile(folder / file, inputs / file)
        shutil.copytree(folder / "saes", inputs / "saes", dirs_exist_ok=True)
        for metric in metrics:
            ask(python, folder, metric)
            results = folder / metric / "results.json"
            found = json.loads(results.read_text())
            about = {
                "versions": found.pop("versions"), "seed": seed, "date": datetime.date.today().isoformat(),
                "command": f"python benchmarks/peers/saebench_reference.py PYTHON --fixtures FOLDER --metrics {metric}",
            }  # fmt: skip
            results.write_text(json.dumps(found, separators=(",", ":")) + "\n")
            (folder / metric / "provenance.json").write_text(json.dumps(about, indent=1) + "\n")
            shutil.copytree(folder / metric, to / metric, dirs_exist_ok=True)
            print(metric, "is written", flush=True)


def time_both(python: str, metrics: list[str], size: Size, model: Path, kinds: list[str]) -> None:
    print("| metric | side | first SAE, s | a later SAE, s | peak, MB |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_problem(folder, size, 0, model)
        for metric in metrics:
            sides = {"SAEBench": lambda m=metric: ask(python, folder, m, "--time", *kinds)}
            if metric in OURS:
                own = [sys.executable, __file__, python, "--ours", metric, str(folder), *kinds]
                sides["ours"] = lambda own=own: (
                    subprocess.run(own, check=True, stdout=subprocess.PIPE, text=True).stdout
                )
            for side, run in sides.items():
                found = json.loads(run().strip().splitlines()[-1])
                first, *later = found["seconds"]
                mean = f"{sum(later) / len(later):.2f}" if later else "-"
                print(f"| {metric} | {side} | {first:.2f} | {mean} | {found['peak_mb']:.0f} |", flush=True)


def sized(text: str) -> Any:
    """LARGE with some numbers changed: d_sae=16384,train=4000."""
    changes = dict(part.split("=") for part in text.split(",") if part)
    return LARGE._replace(**{name: int(value) for name, value in changes.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("python", help="the python of an environment that has SAEBench")
    parser.add_argument("--fixtures", type=Path, help="write what the tests compare with")
    parser.add_argument("--metrics", default=",".join(METRICS), help="of the fixtures, with commas between")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--time", help="metrics to time, with commas between")
    parser.add_argument("--size", type=sized, default=LARGE, help=f"for --time, changes to {LARGE._asdict()}")
    parser.add_argument("--model", type=Path, default=WEIGHTS, help="for --time, the folder of a Gemma 2")
    parser.add_argument(
        "--saes", nargs="+", default=list(KINDS), help="for --time, the kinds, in order; repeat them at will"
    )
    parser.add_argument("--ours", nargs="+", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if asked.ours:
        metric, folder, *kinds = asked.ours
        time_ours(Path(folder), metric, kinds)
    if asked.fixtures:
        write_fixtures(str(Path(asked.python).absolute()), asked.fixtures, asked.metrics.split(","), asked.seed)
    if asked.time:
        time_both(str(Path(asked.python).absolute()), asked.time.split(","), asked.size, asked.model, asked.saes)


if __name__ == "__main__":
    main()
