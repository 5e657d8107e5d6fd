"""Check that SAEBench's core computes our numbers from our exports: `python formats_core.py PYTHON`. PYTHON is the
interpreter of an environment with SAEBench. The SAEs of tests/evaluate/fixtures/saebench are exported for SAELens,
loaded by `SAE.load_from_disk`, and measured by SAEBench's own core on the fixtures' model. The results are compared
with those of our core on the same contexts. The tests show that for the same SAEs without the export, our core agrees
with SAEBench to 1e-6. `--worker FOLDER` runs SAEBench's side.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "evaluate" / "fixtures" / "saebench"
ACTIVATIONS = ("relu", "topk", "jumprelu")


def worker(folder: Path) -> None:
    import torch
    from sae_bench.sae_bench_utils import general_utils
    from sae_lens import SAE
    from saebench.core import run_core
    from saebench.shared import Problem, Recorder

    class Exported(Problem):
        def sae(self, kind: str) -> SAE:
            sae = SAE.load_from_disk(folder / kind)
            sae.fold_W_dec_norm()  # as SAEBench does to every SAE of SAELens; a topk that was exported badly is refused
            general_utils._standardize_sae_cfg(sae.cfg)
            return sae.requires_grad_(False)

    torch.set_num_threads(1)
    problem, record = Exported(folder / "problem"), Recorder()
    os.chdir(folder)
    for kind in ACTIVATIONS:
        run_core(problem, kind, record)
    (folder / "results.json").write_text(json.dumps(record.json, default=str))


def main(python: str) -> None:
    from sae.harvest.mini import WEIGHTS
    from sae.train.formats.export import export_sae
    from sae.train.sae import load_sae

    model = {"name": "google/gemma-2-2b", "revision": None}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        shutil.copytree(FIXTURES / "problem", folder / "problem")
        shutil.copy(WEIGHTS / "tokenizer.json", folder / "problem")
        for kind in ACTIVATIONS:
            sae = load_sae(FIXTURES / "problem" / "saes" / kind)
            sae.origin |= {"model": model, "context": 12}
            print(kind, export_sae(sae, "saelens", folder / kind).check)
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        subprocess.run([python, __file__, "--worker", str(folder)], check=True, env=environment)
        exported = json.loads((folder / "results.json").read_text())
    before = json.loads((FIXTURES / "core" / "results.json").read_text())
    print("\n| SAE | KL score | CE score | explained variance | L0 | largest relative difference of all numbers |")
    print("|---|---|---|---|---|---|")
    for kind in ACTIVATIONS:
        mine, theirs = (r[kind]["rewound"]["eval_result_metrics"] for r in (before, exported))
        worst = max(abs(theirs[c][n] - v) / max(abs(v), 1e-9) for c, group in mine.items() for n, v in group.items())
        shown = [
            theirs["model_behavior_preservation"]["kl_div_score"],
            theirs["model_performance_preservation"]["ce_loss_score"],
            theirs["reconstruction_quality"]["explained_variance"],
            theirs["sparsity"]["l0"],
        ]
        print(f"| {kind} | " + " | ".join(f"{value:.6f}" for value in shown) + f" | {worst:.0e} |")


if __name__ == "__main__":
    worker(Path(sys.argv[2])) if sys.argv[1] == "--worker" else main(sys.argv[1])
