"""`sae demo`: the three stages on the embedded model."""

import os
from typing import Annotated

import typer

from ..common.escaping import quote
from ..common.files import sae_home
from .console import cli_command, echo
from .evaluate import run_evaluate
from .harvest import execute, show_harvest
from .options import Tokens
from .train import run_train


@cli_command
def demo(
    tokens: Tokens = None,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of 1,024 tokens.")] = 900,
) -> None:
    """Run all three stages on the embedded model, print a table, and keep every file in the folder demo/."""
    from ..evaluate.plan import plan_evaluation
    from ..workflows.demo import evaluate_config, harvest_config, train_config

    config = harvest_config(tokens)
    folder = sae_home() / "demo"
    os.environ["SAE_HOME"] = str(folder)  # so that no later command mistakes the demo's cache or runs for the user's
    cache = execute(show_harvest(config))
    runs = run_train(train_config(cache.folder, steps))
    echo("note     decorrelation ran with fraction=0.05 and strength=0.2; its default is the paper's 0.1 % of pairs")
    folders = [run.folder for run in runs]
    code = run_evaluate(plan_evaluation(evaluate_config(folders, tokens)))
    topk = next(run.folder for run in runs if run.recipe.name == "topk")
    runs_folder, cache_folder = quote(folders[0].parent), quote(cache.folder)
    echo(f"files    everything is in {quote(folder)}; to remove it, delete that folder")
    echo(f"next     sae dashboard {quote(topk)}     (its latents, as a page)")
    echo(f"         sae evaluate {runs_folder}/*     (also absorption and probing)")
    echo(f"         sae train --variant jumprelu --layer 5 --cache {cache_folder}     (`sae variants` lists more)")
    echo("         sae harvest --layer 12     (Gemma-2-2B: accept its license, then `hf auth login`)")
    if code:
        raise typer.Exit(code)
