"""The evaluation bench: four recipes and the frozen controls, three seeds each, on a real language model.

    python benchmarks/real_model/run.py            # first: its standing arm has the model, the text and the cache
    python benchmarks/real_model/evaluation.py [--folder FOLDER] [--seed 0 1 2] [--skip METRIC ...]

Trains RECIPES and CONTROLS on the cache that run.py harvested with its defaults (the `standing` arm), all with the same
width, L0 and number of steps; measures core, stability, absorption and sae_probes on all of them; and writes what `sae
compare --against` prints to benchmarks/results or --out. Every command skips what is done. If this script was stopped
and is run again, training continues at a checkpoint and sae_probes at a data set; the other metrics begin again.

sae_probes runs on up to 2,000 texts of each of the DATASETS. These are the data sets of sae-probes with the shortest
texts, since the length of the texts decides how long the metric takes on a CPU. Get them first, with
SAE_HOME=FOLDER/standing: `sae data get sae-probes`.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from make_model import LABEL, default_folder

BENCHMARKS = Path(__file__).resolve().parents[1]
sys.path.append(str(BENCHMARKS))
from common import machine  # noqa: E402

RECIPES = ("topk", "batchtopk", "jumprelu", "matryoshka")
CONTROLS = ("frozen-decoder", "soft-frozen-decoder", "frozen-encoder")
DATASETS = (  # the forty with the fewest tokens per text, as counted by SmolLM2's tokenizer
    5, 6, 7, 21, 22, 23, 24, 26, 50, 51, 52, 54, 87, 92, 105, 114, 115, 116, 117, 118, 119, 120, 121, 122, 123, 124,
    125, 126, 127, 128, 130, 131, 132, 133, 134, 135, 150, 154, 155, 156,
)  # fmt: skip


@dataclass(frozen=True)
class Bench:
    """Runs `sae` with the standing arm's home as SAE_HOME."""

    home: Path

    def sae(self, *arguments: str | Path) -> str:
        """The command's table and the notes below it. Exits if the command fails."""
        print("sae", *arguments[:3], "...", flush=True)
        command = [sys.executable, "-P", "-m", "sae", *map(str, arguments)]
        environment = os.environ | {"SAE_HOME": str(self.home), "COLUMNS": "200"}
        done = subprocess.run(command, env=environment, cwd=self.home, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"sae {arguments[0]} ended with {done.returncode}:\n{done.stderr[-2000:]}")
        notes = [line for line in done.stderr.splitlines() if line.startswith("note") and "content_digest" not in line]
        return "\n".join([done.stdout.rstrip(), *notes])

    def train(self, recipe: str, asked: argparse.Namespace) -> None:
        seeds = [option for seed in asked.seed for option in ("--seed", str(seed))]
        self.sae(
            "train", "--variant", recipe, "--layer", asked.layer, "--width", "4x", "--l0", asked.l0,
            "--steps", asked.steps, "--batch-size", "1024", "--checkpoint-every", "250", *seeds,
        )  # fmt: skip

    def runs(self, asked: argparse.Namespace) -> list[Path]:
        """The finished runs of the requested recipes, seeds, L0 and steps."""
        found = []
        for path in sorted(self.home.glob("runs/*/run.json")):
            run = json.loads(path.read_text())
            same = (run["layer"], run["l0"], run["steps"]) == (asked.layer, asked.l0, asked.steps)
            if same and run["variant"] in RECIPES + CONTROLS and run["seed"] in asked.seed and not run["options"]:
                found.append(path.parent)
        return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=default_folder(), help="folder of run.py (%(default)s)")
    parser.add_argument("--layer", type=int, default=15)
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--l0", type=float, default=32.0)
    parser.add_argument("--absorption-words", type=int, default=6000, help="words of the absorption metric; 0 is all")
    parser.add_argument("--dataset", nargs="+", default=list(map(str, DATASETS)), help="numbers or names of data sets")
    parser.add_argument("--max-texts", type=int, default=2000, help="most texts per data set")
    parser.add_argument("--against", default="topk")
    parser.add_argument("--skip", nargs="+", default=[], help="metrics to leave out")
    parser.add_argument("--note", default="", help="a sentence for the page of results")
    parser.add_argument("--out", type=Path, default=BENCHMARKS / "results", help="folder of the page of results")
    return parser.parse_args()


def page(asked: argparse.Namespace, table: str) -> str:
    seeds, numbers = (", ".join(map(str, some)) for some in (asked.seed, asked.dataset))
    about = (
        f"`python benchmarks/real_model/evaluation.py` compared {', '.join(RECIPES)} and the controls "
        f"{', '.join(CONTROLS)}, whose architecture is batchtopk, with seeds {seeds}. The SAEs are at layer "
        f"{asked.layer}, are four times as wide as the model, and were trained with `--l0 {asked.l0:g}` for "
        f"{asked.steps:,} steps of 1,024 rows. Absorption was measured on {asked.absorption_words or 'all'} words, and "
        f"sae_probes in its normal setting on {len(asked.dataset)} data sets with up to {asked.max_texts:,} texts each "
        f"(numbers {numbers}). "
        f"Machine: {machine('transformers', 'scikit-learn')}. {asked.note}"
    )
    return f"""# Evaluation on a real model, {date.today().isoformat()}: {LABEL}

{about.rstrip()}

```
{table.rstrip()}
```
"""


def measure(bench: Bench, runs: Sequence[Path], asked: argparse.Namespace) -> None:
    options = {
        "core": [], "stability": [],
        "absorption": ["--set", f"absorption.words={asked.absorption_words}"],
        "sae_probes": [
            "--set", f"sae_probes.datasets={','.join(asked.dataset)}",
            "--set", f"sae_probes.max_texts={asked.max_texts}",
        ],
    }  # fmt: skip
    for metric, extra in options.items():
        if metric not in asked.skip:
            bench.sae("evaluate", "--suite", metric, *runs, *extra)


def main() -> None:
    asked = parse()
    home = (asked.folder / "standing").resolve()
    if not list(home.glob("activations/*/manifest.json")):
        sys.exit(f"{home} has no cache. Run benchmarks/real_model/run.py first.")
    bench = Bench(home)
    for recipe in RECIPES + CONTROLS:
        bench.train(recipe, asked)
    runs = bench.runs(asked)
    measure(bench, runs, asked)
    name = asked.out / f"{date.today().isoformat()}-evaluation-real-model"
    table = bench.sae("compare", *runs, "--against", asked.against, "--out", home / "evaluation.html")
    asked.out.mkdir(parents=True, exist_ok=True)
    name.with_suffix(".md").write_text(page(asked, table))
    print(table)


if __name__ == "__main__":
    main()
