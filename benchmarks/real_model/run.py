"""Run a real language model through every stage of the package, and check the numbers independently.

    python benchmarks/real_model/run.py [--folder FOLDER] [--tokens 500k] [--steps 2000] ...

There are two arms, each with its own SAE_HOME, FOLDER/<arm>:

    standing   the defaults: harvest, train, core, absorption, a dashboard, a comparison
    sinks      the same model with <|im_start|> before every context, which creates attention sinks: rows whose norm is
               a hundred times the median. This arm measures the effect of masking these rows

Three checks use forward_hooks.py and share no code with the package: KL, CE and explained variance of every SAE, the
bits of stored activations, and the loss for different beginnings of a context. Each stage writes a file
FOLDER/stages/NAME.json when it is done and is skipped afterwards. A stage that was killed is run again, and
its `sae` command resumes where it stopped. At the end, a JSON file and a Markdown table of everything are written to
benchmarks/results/ or --out.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

from beginnings import compare_beginnings
from dashboards import first_examples
from forward_hooks import (
    PlainCache,
    PlainSAE,
    hidden_state_differences,
    load_plain_model,
    load_plain_sae,
    measure,
)
from make_model import LABEL, default_folder, make
from outlier_rows import (
    explained_variance_of_rows,
    first_example_outliers,
    order_stability,
    read_table,
    save_table,
    variance_of_rows,
)
from packages import Missing
from report import markdown

BENCHMARKS = Path(__file__).resolve().parents[1]
sys.path.append(str(BENCHMARKS))
from common import commit, machine  # noqa: E402

RECIPES = ("topk", "batchtopk", "jumprelu", "matryoshka", "decorrelation", "hierarchical")
BEGINNINGS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
TOLERANCE = 1e-5  # between `sae evaluate` and the independent check
CHECKED = {
    "fve": "reconstruction_quality",
    "kl_div_with_sae": "model_behavior_preservation",
    "ce_loss_with_sae": "model_performance_preservation",
}


@dataclass(frozen=True)
class Arm:
    """One harvest and the runs that are trained on it."""

    name: str
    home: Path
    harvest: list[str]  # options of `sae harvest`
    steps: int

    @cached_property
    def cache(self) -> PlainCache:
        (manifest,) = self.home.glob("activations/*/manifest.json")
        return PlainCache(manifest.parent)

    @property
    def runs(self) -> list[Path]:
        return sorted(path.parent for path in self.home.glob("runs/*/sae.json"))

    @property
    def saes(self) -> list[PlainSAE]:
        return [load_plain_sae(run) for run in self.runs]


class Bench:
    """Runs stages and keeps the result and the duration of each."""

    def __init__(self, args: argparse.Namespace, model: Path, text: Path) -> None:
        self.args, self.model, self.text, self.folder = args, model, text, args.folder
        self.array = f"layer_{args.layer[0]:02}"
        window = ["--window", str(args.window)]
        self.standing = Arm("standing", self.folder / "standing", ["--tokens", args.tokens, *window], args.steps)
        sinks = ["--tokens", args.sink_tokens, "--bos", args.sink_bos, *window]
        self.sinks = Arm("sinks", self.folder / "sinks", sinks, args.sink_steps)

    def stage(self, name: str, work: Callable[[], Any]) -> Any:
        """The result of a stage, read from its file or computed now. Its seconds include interrupted attempts."""
        path = self.folder / "stages" / f"{name}.json"
        if path.exists():
            print(f"{name:24} done before", flush=True)
            return json.loads(path.read_text())["result"]
        if name in self.args.skip:
            print(f"{name:24} left out (--skip)", flush=True)
            return None
        path.parent.mkdir(parents=True, exist_ok=True)
        attempts = path.with_suffix(".attempts")
        print(f"{name:24} ...", flush=True)
        seconds, cpu_seconds = json.loads(attempts.read_text()) if attempts.exists() else (0.0, 0.0)
        started, cpu_started = time.monotonic(), cpu_time()
        try:
            result = work()
        finally:
            seconds += time.monotonic() - started
            cpu_seconds += cpu_time() - cpu_started
            attempts.write_text(json.dumps([seconds, cpu_seconds]))
        record = {
            "stage": name, "seconds": round(seconds, 1), "cpu_seconds": round(cpu_seconds, 1),
            "date": date.today().isoformat(), "commit": commit(),
        }  # fmt: skip
        path.write_text(json.dumps(record | {"result": result}, indent=1))
        attempts.unlink()
        print(f"{name:24} {seconds:,.0f} s", flush=True)
        return result

    def sae(self, arm: Arm, *arguments: str | Path) -> None:
        """Run `sae` with the arm's SAE_HOME and keep its output in FOLDER/logs. If `sae` fails, exit with the end of
        its output."""
        log = self.folder / "logs" / f"{arm.name}-{arguments[0]}.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        arm.home.mkdir(parents=True, exist_ok=True)
        with open(log, "a") as file:
            command = [sys.executable, "-m", "sae", *map(str, arguments)]
            done = subprocess.run(
                command, env=os.environ | {"SAE_HOME": str(arm.home)}, cwd=arm.home, stdout=file, stderr=file
            )
        if done.returncode:
            sys.exit(f"sae {arguments[0]} failed with code {done.returncode}:\n{log.read_text()[-1500:]}")

    @property
    def tokens_flag(self) -> list[str]:
        return ["--tokens", str(self.args.eval_tokens)] if self.args.eval_tokens else []

    def harvest(self, arm: Arm) -> dict[str, Any]:
        layers = [option for layer in self.args.layer for option in ("--layer", str(layer))]
        self.sae(arm, "harvest", "--model", self.model, "--dataset", self.text, *layers, *arm.harvest)
        identity = arm.cache.identity
        return {
            "cache": arm.cache.folder.name,
            "bos": identity.get("bos", "as the tokenizer has it"),
            "skip": identity["skip"],
        }

    def train(self, arm: Arm) -> dict[str, Any]:
        variants = [option for recipe in self.args.recipe for option in ("--variant", recipe)]
        self.sae(
            arm, "train", *variants, "--layer", str(self.args.layer[0]), "--width", "4x", "--l0", self.args.l0,
            "--steps", str(arm.steps), "--batch-size", "1024", "--checkpoint-every", "250",
        )  # fmt: skip
        return {run.name: last_line(run / "metrics.jsonl") for run in arm.runs}

    def evaluate(self, arm: Arm, suite: str, *options: str) -> dict[str, Any]:
        """Evaluate all runs of an arm. Returns each run's result file, without its entries per latent.

        If the text has outlier rows, there are two entries for a category: over all rows, and masked_<category> without
        them.
        """
        self.sae(arm, "evaluate", *arm.runs, "--suite", suite, *self.tokens_flag, *options)
        results = {}
        for run in arm.runs:
            envelope = json.loads((run / "evaluations" / f"{suite}.json").read_text())
            extra = envelope["eval_result_unstructured"]
            results[run.name] = {
                "metrics": envelope["eval_result_metrics"],
                "intervals": extra["intervals"], "n": extra["n"], "flags": extra["flags"],
            }  # fmt: skip
        return results

    def pages(self, arm: Arm) -> dict[str, Any]:
        """Make a dashboard of each run and a page that compares all runs.

        Returns the size of each page in bytes, and for each dashboard the share of latents whose first example is a row
        over the norm limit. The norms are those that `rows` measured.
        """
        for run in arm.runs:
            self.sae(arm, "dashboard", run, *self.tokens_flag)
        self.sae(arm, "compare", *arm.runs, "--out", arm.home / "compare.html")
        table = read_table(self.rows_file(arm, masked=False))
        norm = dict(zip(zip(table.context.tolist(), table.position.tolist(), strict=True), table.norm, strict=True))
        limit = arm.cache.norm_limit(self.array) or float("inf")
        shares = {}
        for run in arm.runs:
            first = first_examples((run / "dashboard.html").read_text())
            shares[run.name] = sum(bool(norm[place] > limit) for place in first) / max(1, len(first))
        pages = [*(run / "dashboard.html" for run in arm.runs), arm.home / "compare.html"]
        return {
            "bytes": {str(page.relative_to(arm.home)): page.stat().st_size for page in pages},
            "outliers_first": shares,
        }

    def rows_file(self, arm: Arm, masked: bool) -> Path:
        return self.folder / "stages" / f"{arm.name}-rows{'' if masked else '-unmasked'}.npz"

    def rows(self, arm: Arm, masked: bool) -> dict[str, Any]:
        """Measure each held-out row with forward hooks only. Without masking, KL and CE are left out, since EV
        suffices."""
        limit = arm.cache.norm_limit(self.array)
        model = load_plain_model(self.model, arm.cache)
        table = measure(
            model,
            arm.cache.held_out(self.args.eval_tokens),
            arm.saes,
            limit if masked else None,
            loss=masked,
            say=say_progress,
        )
        save_table(table, self.rows_file(arm, masked))
        return {
            "summary": table.summary(), "rows": len(table.norm), "documents": len(set(table.document.tolist())),
            "order": order_stability(table),
            "first_example_outliers": first_example_outliers(table, limit or float("inf")),
            "training_rows_ev": explained_variance_of_rows(arm.cache, self.array, arm.saes, limit if masked else None),
        }  # fmt: skip

    def variance(self, arm: Arm) -> dict[str, Any]:
        decode = self.tokenizer.decode
        return {f"layer_{n:02}": variance_of_rows(arm.cache, f"layer_{n:02}", decode) for n in self.args.layer}

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.model, trust_remote_code=False)

    def beginnings(self) -> dict[str, Any]:
        known = self.tokenizer.get_vocab()
        tokens = {"nothing": None} | {name: known[name] for name in self.args.beginning if name in known}
        cache = self.standing.cache
        model = load_plain_model(self.model, cache)
        begins = cache.identity.get("bos", "") is not None
        return compare_beginnings(model, cache.held_out(self.args.eval_tokens), tokens, self.args.layer, begins)

    def bits(self) -> dict[str, int]:
        """How many stored rows differ from transformers' hidden states, at three layers of a harvest of 4,096 rows."""
        arm = Arm("bits", self.folder / "bits", [], 0)
        first = self.args.layer[0] // 3
        layers = sorted({first, *self.args.layer})
        chosen = [option for layer in layers for option in ("--layer", str(layer))]
        self.sae(arm, "harvest", "--model", self.model, "--dataset", self.text, *chosen, "--tokens", "4096")
        batch = json.loads(next(arm.cache.folder.glob("commits/*.json")).read_text())["made_with"]["batch_contexts"]
        model = load_plain_model(self.model, arm.cache)
        return hidden_state_differences(model, arm.cache, [f"layer_{layer:02}" for layer in layers], batch)


def sound_numbers(result: dict[str, Any]) -> dict[str, float]:
    """EV, KL and CE of an evaluation: without outlier rows if the text has any, otherwise over all rows."""
    metrics = result["metrics"]
    return {name: metrics.get(f"masked_{category}", metrics[category])[name] for name, category in CHECKED.items()}


def compare_with_check(core: dict[str, Any], rows: dict[str, Any]) -> dict[str, float]:
    """The largest difference of each number between `sae evaluate` and the independent check, over all runs."""
    return {
        name: max(abs(sound_numbers(core[run])[name] - checked[name]) for run, checked in rows["summary"].items())
        for name in CHECKED
    }


def cpu_time() -> float:
    """Seconds of processor time that this process and its finished children have used."""
    return sum(os.times()[:4])


def say_progress(sentence: str) -> None:
    print(f"    {sentence}", end="\r", flush=True)


def last_line(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text().splitlines()[-1])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=default_folder(), help="model, text and results (%(default)s)")
    parser.add_argument("--model", type=Path, help="another model of Llama's layout instead of SmolLM2")
    parser.add_argument("--text", type=Path, help="another text instead of the packages'")
    parser.add_argument("--layer", type=int, action="append", help="layers; SAEs are trained on the first (15, 22)")
    parser.add_argument("--recipe", action="append", help=f"a recipe; can be repeated ({', '.join(RECIPES)})")
    parser.add_argument("--tokens", default="500k")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--sink-tokens", default="250k")
    parser.add_argument("--sink-steps", type=int, default=1000)
    parser.add_argument("--sink-bos", default="<|im_start|>", help="the token that makes attention sinks")
    parser.add_argument("--beginning", action="append", help="token to try before contexts; can be repeated")
    parser.add_argument("--eval-tokens", type=int, help="held-out tokens that evaluation reads (all)")
    parser.add_argument("--absorption-words", type=int, default=6000, help="words of the absorption metric; 0 is all")
    parser.add_argument("--window", type=int, default=65_536)
    parser.add_argument("--l0", default="32")
    parser.add_argument("--skip", action="append", default=[], help="stage to leave out; can be repeated")
    parser.add_argument("--note", default="", help="a sentence for the page of results")
    parser.add_argument("--out", type=Path, default=BENCHMARKS / "results", help="folder of the result files")
    args = parser.parse_args()
    args.layer, args.beginning = args.layer or [15, 22], args.beginning or list(BEGINNINGS)
    args.recipe = args.recipe or list(RECIPES)
    args.folder = args.folder.resolve()
    return args


def run_stages(bench: Bench) -> dict[str, Any]:
    found: dict[str, Any] = {}

    def stage(name: str, work: Callable[[], Any]) -> None:
        found[name] = bench.stage(name, work)

    standing, sinks = bench.standing, bench.sinks
    stage("bits", bench.bits)
    for arm in (standing, sinks):
        stage(f"{arm.name}-harvest", lambda arm=arm: bench.harvest(arm))
        stage(f"{arm.name}-variance", lambda arm=arm: bench.variance(arm))
        stage(f"{arm.name}-train", lambda arm=arm: bench.train(arm))
        stage(f"{arm.name}-core", lambda arm=arm: bench.evaluate(arm, "core"))
        stage(f"{arm.name}-rows-unmasked", lambda arm=arm: bench.rows(arm, masked=False))
        stage(f"{arm.name}-rows", lambda arm=arm: bench.rows(arm, masked=True))
        stage(f"{arm.name}-pages", lambda arm=arm: bench.pages(arm))
    stage("beginnings", bench.beginnings)
    words = f"absorption.words={bench.args.absorption_words}"
    stage("standing-absorption", lambda: bench.evaluate(standing, "absorption", "--set", words))
    return found


def main() -> None:
    args = parse()
    try:
        model, text = (args.model, args.text) if args.model and args.text else make(args.folder)
    except Missing as error:
        sys.exit(str(error))
    bench = Bench(args, model.resolve(), text.resolve())
    found = run_stages(bench)
    records = {path.stem: json.loads(path.read_text()) for path in (args.folder / "stages").glob("*.json")}
    checks = {
        arm: compare_with_check(found[f"{arm}-core"], found[f"{arm}-rows"])
        for arm in ("standing", "sinks")
        if found[f"{arm}-core"] and found[f"{arm}-rows"]
    }
    result = {
        "date": date.today().isoformat(), "machine": machine("transformers"), "note": args.note,
        "model": model.name if args.model else LABEL, "l0": args.l0, "eval_tokens": args.eval_tokens,
        "tokens": args.tokens, "steps": args.steps, "sink_tokens": args.sink_tokens, "sink_steps": args.sink_steps,
        "layer": args.layer, "absorption_words": args.absorption_words,
        "seconds": {name: [record["seconds"], record.get("cpu_seconds")] for name, record in records.items()},
        "check": checks, "stages": found,
    }  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    name = args.out / f"{result['date']}-real-model"
    name.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    name.with_suffix(".md").write_text(markdown(result))
    print(name.with_suffix(".md").read_text())
    wrong = [
        f"{arm} {number}: {value:.2g}"
        for arm, one in checks.items()
        for number, value in one.items()
        if value > TOLERANCE
    ]
    if wrong:
        sys.exit(f"`sae evaluate` and the independent check differ by more than {TOLERANCE:g}: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
