"""A table of all recipes on gemma-2-mini, for `docs/lab/recipes.md`.

    sae harvest --model gemma-2-mini --layer 5 --layer 12 --layer 19 --tokens 2400k
    sae train --layer 12 --width 4x --batch-size 2048 --steps 1000 --variant ...      (each of `sae variants`)
    python benchmarks/recipe_table.py runs/*-L12-* --suite core > table.md

Evaluates the runs that have no results yet and prints Markdown: one table per metric, one line per run, with recipes in
the order of `sae variants` and the reference rows last.
"""

import argparse
import re
import sys
from pathlib import Path

from sae.cli.console import bar
from sae.evaluate.metrics.registry import caveats
from sae.evaluate.plan import EvaluateConfig
from sae.evaluate.rows import EvalRow
from sae.evaluate.run import evaluate
from sae.evaluate.tables import tables
from sae.train import variants  # noqa: F401  (registers the recipes)
from sae.train.recipe import RECIPES


def sort_key(row: EvalRow) -> tuple[int, int, str]:
    """Layer, the recipe's position in the registry, name. References come last."""
    names = list(RECIPES)
    recipe = re.split(r"-L\d+-", row.name)[0]
    return row.target.layer, names.index(recipe) if recipe in names else len(names), row.name


def short_name(name: str) -> str:
    """A run's name without its digest and without the width and seed, which all runs of the table share."""
    return re.sub(r"-n\d+-s\d+-[0-9a-f]+$", "", name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--suite", default="core")
    parser.add_argument("--tokens", type=int, default=20_000, help="held-out tokens for core")
    args = parser.parse_args()
    config = EvaluateConfig(args.runs, suite=args.suite, tokens=args.tokens, device="cpu")
    rows = sorted(evaluate(config, lambda metric: bar(metric, "")), key=sort_key)
    for title, heads, lines in tables(rows):
        print(f"\n{title}\n")
        print("| " + " | ".join(head.replace("\n", " ") for head in heads) + " |")
        print("|---" * len(heads) + "|")
        for name, *cells in lines:
            print(f"| `{short_name(name)}` | " + " | ".join(cells) + " |")
    for caveat in caveats(dict.fromkeys(name for row in rows for name in row.results)):
        print(f"\n{caveat}")
    for row in rows:
        for metric, error in row.errors.items():
            print(f"not measured: {metric} of {row.name}: {error}", file=sys.stderr)


if __name__ == "__main__":
    main()
