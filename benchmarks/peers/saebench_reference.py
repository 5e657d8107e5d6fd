"""Runs SAEBench 0.6.0 on small inputs, as the reference for our metrics, and times SAEBench and our metrics on larger
inputs.

    python -m venv env-saebench     # Python 3.11
    env-saebench/bin/pip install torch==2.13.0 numpy==1.26.4 transformer-lens==2.17.0 sae-lens==6.28.2 \\
        transformers==4.57.6 datasets==3.6.0 'pyarrow<21' scikit-learn==1.9.1 pandas openai matplotlib seaborn \\
        collectibles xgboost-cpu zstandard safetensors tabulate
    env-saebench/bin/pip install --no-deps sae-bench==0.6.0 sae-probes==0.4.2

    python benchmarks/peers/saebench_reference.py env-saebench/bin/python --fixtures tests/evaluate/fixtures/saebench
    python benchmarks/peers/saebench_reference.py env-saebench/bin/python --time core,sparse_probing,scr,tpp,absorption
    python benchmarks/peers/saebench_reference.py --accept

saebench_problem.py makes the inputs, saebench_worker.py runs SAEBench on them in its own environment, and
saebench_ours.py runs our metrics. tests/evaluate/fixtures/saebench/README.md describes the fixtures. `--accept` runs
the tests that compare our numbers with the fixtures, and prints the differences. It does not need SAEBench.

With `--time` both sides read the same folder. Each metric and side has its own process, and the sides take turns in
rounds. The tables have the processor seconds of the first SAE and of each further SAE, and the peak memory of the
process, as medians over rounds. The time of the first SAE includes the work of the model, which is done only once.
Loading the model and the SAEs is not counted. Below each table is the largest difference between the two sides'
numbers, for the SAEs for which both sides drew the same random numbers.
"""

import argparse
import datetime
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from saebench_accept import accept
from saebench_problem import KINDS, SMALL, Size, make_problem
from saebench_ravel_problem import make_ravel_problem

from sae.harvest.mini import WEIGHTS

METRICS = ("core", "texts", "sparse_probing", "scr", "tpp", "absorption", "unlearning", "ravel")
LARGE = Size(4096, 64, 12, 128, 16, 4, 8, 400, 200, 1000)


def ask(python: str, folder: Path, metric: str, *options: str) -> str:
    """Run the worker and return its standard output."""
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
        if "ravel" in metrics:
            make_ravel_problem(folder / "ravel_problem", seed)
            shutil.copytree(folder / "ravel_problem", to / "ravel_problem", dirs_exist_ok=True)
        for metric in metrics:
            ask(python, folder, metric)
            results = folder / metric / "results.json"
            found = json.loads(results.read_text())
            about = {
                "versions": found.pop("versions"), "seed": seed, "date": datetime.date.today().isoformat(),
                "command": f"python benchmarks/peers/saebench_reference.py PYTHON --fixtures FOLDER --metrics {metric}",
            }  # fmt: skip
            if found:
                results.write_text(json.dumps(found, separators=(",", ":")) + "\n")
            else:
                results.unlink()
            (folder / metric / "provenance.json").write_text(json.dumps(about, indent=1) + "\n")
            shutil.copytree(folder / metric, to / metric, dirs_exist_ok=True)
            print(metric, "is written", flush=True)


def time_both(python: str, metrics: list[str], size: Size, model: Path, kinds: list[str], rounds: int) -> None:
    print(f"Load at the start: {os.getloadavg()[0]:.1f}. {size._asdict()}, {len(kinds)} SAEs: {' '.join(kinds)}\n")
    print("| metric | side | first SAE, s | wall, s | each additional SAE, s | wall, s | six SAEs, s | peak, MB |")
    print("|---|---|---|---|---|---|---|---|")
    apart = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_problem(folder, size, 0, model)
        for metric in metrics:
            own = [sys.executable, str(Path(__file__).with_name("saebench_ours.py")), str(folder), metric, *kinds]
            sides = {
                "SAEBench": lambda m=metric: ask(python, folder, m, "--time", *kinds),
                "ours": lambda own=own: subprocess.run(own, check=True, stdout=subprocess.PIPE, text=True).stdout,
            }
            found: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
            for number in range(rounds):
                for side in list(sides)[:: -1 if number % 2 else 1]:
                    found[side].append(json.loads(sides[side]().strip().splitlines()[-1]))
                    print(
                        metric, side, number + 1, [sae["processor"] for sae in found[side][-1]["saes"]], file=sys.stderr
                    )
            costs = {side: cost(its_rounds) for side, its_rounds in found.items()}
            for side, c in costs.items():
                print(f"| {metric} | {side} | {line(c, '.2f')} | {c[-1]:.0f} |")
            ratios = [theirs / ours for theirs, ours in zip(costs["SAEBench"], costs["ours"], strict=True)]
            print(f"| {metric} | **SAEBench / ours** | {line(ratios, '.1f')} | {ratios[-1]:.1f} |", flush=True)
            apart.append(difference(metric, found["SAEBench"][-1]["saes"], found["ours"][-1]["saes"]))
    print(f"\nLoad at the end: {os.getloadavg()[0]:.1f}.\n")
    print("\n".join(apart))


def line(numbers: list[float], form: str) -> str:
    return " | ".join(f"{number:{form}}" for number in numbers[:-1])


def cost(rounds: list[dict[str, Any]]) -> list[float]:
    """Medians over the rounds: processor and wall seconds of the first SAE and of a further one, processor seconds of
    six SAEs, and the peak memory. In each round, the time of a further SAE is the mean over the SAEs after the
    first."""
    columns = []
    for found in rounds:
        first, *further = found["saes"]
        mean = {clock: statistics.mean(sae[clock] for sae in further) for clock in ("processor", "wall")}
        six = first["processor"] + 5 * mean["processor"]
        columns.append([first["processor"], first["wall"], mean["processor"], mean["wall"], six, found["peak_mb"]])
    return [statistics.median(column) for column in zip(*columns, strict=True)]


# The numbers that are compared with --time, and the reasons why the two sides can differ.
HEADLINES = {
    "core": ("l0", "kl_div_score", "ce_loss_score", "cossim", "explained_variance"),
    "sparse_probing": tuple(f"sae{top}_test_accuracy" for top in ("", "_top_1", "_top_2", "_top_5")),
    "scr": ("scr_metric_threshold_10", "scr_metric_threshold_20"),
    "tpp": ("tpp_threshold_10_total_metric", "tpp_threshold_20_total_metric"),
    "absorption": ("mean_absorption_fraction_score", "mean_full_absorption_score"),
}
OTHERWISE = {
    "sparse_probing": "The first SAE is left out: SAEBench draws random numbers for the model's own probes before it.",
    "scr": "Each side trains its own probes, from different random numbers.",
    "tpp": "Each side trains its own probes, from different random numbers.",
    "absorption": "SAEBench sets no seed: prompts, probes and splits of the words differ.",
}


def difference(metric: str, theirs: list[dict[str, Any]], ours: list[dict[str, Any]]) -> str:
    pairs = {}
    for number, (other, own) in enumerate(zip(theirs, ours, strict=True)):
        flat, own_flat = ({k: v for group in sae["numbers"].values() for k, v in group.items()} for sae in (other, own))
        pairs |= {(number, name): (flat[name], own_flat[name]) for name in HEADLINES[metric] if name in flat}
    if metric == "sparse_probing":
        pairs = {key: pair for key, pair in pairs.items() if key[0] > 0}
    (number, name), (other, own) = max(pairs.items(), key=lambda item: abs(item[1][0] - item[1][1]))
    return (
        f"{metric}: of {len(pairs)} numbers the largest difference is {abs(other - own):.1e}: "
        f"{name} of SAE {number + 1}, SAEBench {other:.6f}, ours {own:.6f}. {OTHERWISE.get(metric, '')}".rstrip()
    )


def sized(text: str) -> Any:
    """LARGE with some numbers changed, as in the text "d_sae=16384,train=4000"."""
    changes = dict(part.split("=") for part in text.split(",") if part)
    return LARGE._replace(**{name: int(value) for name, value in changes.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("python", nargs="?", help="Python of an environment with SAEBench")
    parser.add_argument("--accept", action="store_true", help="print our numbers next to those of the fixtures")
    parser.add_argument("--fixtures", type=Path, help="write the fixtures of the tests")
    parser.add_argument("--metrics", default=",".join(METRICS), help="metrics of the fixtures, separated by commas")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--time", help="metrics to time, separated by commas")
    parser.add_argument("--size", type=sized, default=LARGE, help=f"for --time, changes to {LARGE._asdict()}")
    parser.add_argument("--model", type=Path, default=WEIGHTS, help="for --time, the folder of a Gemma 2")
    parser.add_argument(
        "--saes", nargs="+", default=list(KINDS), help="for --time, the kinds, in order; repeat them at will"
    )
    parser.add_argument("--rounds", type=int, default=2, help="for --time: how often each side runs")
    asked = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if asked.accept:
        sys.exit(accept())
    if (asked.fixtures or asked.time) and not asked.python:
        parser.error("name the Python of an environment with SAEBench")
    if asked.fixtures:
        write_fixtures(str(Path(asked.python).absolute()), asked.fixtures, asked.metrics.split(","), asked.seed)
    if asked.time:
        python = str(Path(asked.python).absolute())
        time_both(python, asked.time.split(","), asked.size, asked.model, asked.saes, asked.rounds)


if __name__ == "__main__":
    main()
