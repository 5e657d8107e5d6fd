"""Every recipe on gemma-2-mini, side by side: what `docs/recipes.md` holds.

    sae harvest --model gemma-2-mini --layer 5 --layer 12 --layer 19 --tokens 2400k
    sae train --layer 12 --width 4x --batch-size 2048 --steps 1000 --variant ...      (each of `sae variants`)
    python benchmarks/recipe_table.py runs/*-L12-* --suite core > table.md

Evaluates what has not been evaluated yet and prints Markdown: one table a metric, one line a run, recipes in the order of
`sae variants`, then the references.
"""

import argparse
import re
import sys
from pathlib import Path

from sae.cli.console import bar
from sae.evaluate.plan import EvaluateConfig
from sae.evaluate.rows import EvalRow
from sae.evaluate.run import evaluate
from sae.evaluate.tables import tables
from sae.train import variants  # noqa: F401  (registers the recipes)
from sae.train.recipe import RECIPES


def place(row: EvalRow) -> tuple[int, int, str]:
    """Layer, the recipe's place in the registry, name; references last."""
    names = list(RECIPES)
    recipe = re.split(r"-L\d+-", row.name)[0]
    return row.subject.layer, names.index(recipe) if recipe in names else len(names), row.name


def short(name: str) -> str:
    """A run's name without its digest: what is the same in all of the table's runs."""
    return re.sub(r"-n\d+-s\d+-[0-9a-f]+$", "", name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--suite", default="core")
    parser.add_argument("--tokens", type=int, default=20_000, help="held-out tokens that core reads")
    asked = parser.parse_args()
    request = EvaluateConfig(asked.runs, suite=asked.suite, tokens=asked.tokens, device="cpu")
    rows = sorted(evaluate(request, lambda metric: bar(metric, "")), key=place)
    for title, heads, lines in tables(rows):
        print(f"\n{title}\n")
        print("| " + " | ".join(head.replace("\n", " ") for head in heads) + " |")
        print("|---" * len(heads) + "|")
        for name, *cells in lines:
            print(f"| `{short(name)}` | " + " | ".join(cells) + " |")
    for row in rows:
        for metric, error in row.errors.items():
            print(f"not measured: {metric} of {row.name}: {error}", file=sys.stderr)


if __name__ == "__main__":
    main()
