"""SAEBench's side: `python saebench_worker.py FOLDER METRIC [--time ACTIVATION ...]`.

FOLDER is a problem written by saebench_problem.py. SAEBench's own functions run on it; only what they would download is
replaced: the model and the two datasets. The results of these functions, and the choices that they made on the way, are
written to FOLDER/METRIC. With `--time` nothing is recorded; one line of JSON has the time of each SAE, its metrics, and
the peak memory.
"""

import argparse
import contextlib
import json
import os
import resource
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from saebench.absorption import run_absorption
from saebench.core import record_core_inputs, run_core
from saebench.ravel import run_ravel
from saebench.scr_tpp import record_scr_edge_cases, run_scr_and_tpp
from saebench.shared import Problem, Recorder, set_seed, spent, timed
from saebench.sparse_probing import run_sparse_probing
from saebench.texts import Texts
from saebench.unlearning import run_unlearning


def run(problem: Problem, metric: str, kinds: list[str], record: Recorder | None) -> None:
    texts = Texts(problem) if record and metric in ("texts", "sparse_probing", "scr", "tpp") else None
    numbered = [f"{kind}.{number}" for number, kind in enumerate(kinds)]  # SAEBench skips names that it has seen
    runs = [f"{kinds[0]}.first", *kinds] if record else numbered
    if metric == "core":
        for kind in kinds if record else numbered:
            with timed(kind):
                run_core(problem, kind, record)
        if record:
            record_core_inputs(problem, record)
    elif metric == "texts":
        assert texts and record
        record.tensors = texts.arrays
    elif metric == "sparse_probing":
        run_sparse_probing(problem, runs, texts, record)
    elif metric in ("scr", "tpp"):
        run_scr_and_tpp(problem, runs, texts, record, metric == "scr")
        if record and metric == "scr":
            record_scr_edge_cases(record)
    elif metric == "absorption":
        run_absorption(problem, kinds if record else numbered, record)
    elif metric == "unlearning" and record:
        run_unlearning(problem, record)
    elif metric == "ravel" and record:
        run_ravel(problem.folder / "ravel_problem", record)
    else:
        raise SystemExit(f"unknown metric {metric}, or one that cannot be timed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("metric")
    parser.add_argument("--time", nargs="+", metavar="ACTIVATION", help="SAEs to time, one after the other")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    folder = args.folder.resolve()
    problem = Problem(folder)
    with contextlib.redirect_stdout(sys.stderr), tempfile.TemporaryDirectory() as work, contextlib.chdir(work):
        Path("results").mkdir()
        record = None if args.time else Recorder()
        if record:
            set_seed()
        run(problem, args.metric, args.time or ["relu", "topk", "jumprelu"], record)
        for name, found in spent.items() if args.time else ():
            (path,) = Path("results").rglob(f"{name}_custom_sae_eval_results.json")
            found["numbers"] = json.loads(path.read_text())["eval_result_metrics"]
    if record:
        names = (
            "sae-bench",
            "sae-lens",
            "transformer-lens",
            "transformers",
            "torch",
            "numpy",
            "scikit-learn",
            "pandas",
        )
        record.json["versions"] = {name: version(name) for name in names}
        record.write(folder / args.metric)
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
        print(json.dumps({"saes": list(spent.values()), "peak_mb": peak}))


if __name__ == "__main__":
    main()
