"""`sae demo`: the three stages on the embedded model."""

from shlex import quote
from typing import Annotated

import typer

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
    """The three stages on the embedded model and text, with nothing to download: harvest, train, evaluate, table."""
    from ..common.errors import UsageError
    from ..harvest import mini
    from ..harvest.plan import HarvestConfig as Harvest

    tokens = 200_000 if tokens is None else tokens
    if tokens < 2000:
        raise UsageError(f"--tokens {tokens} is too little to train on: give 2000 or more.")
    cache = execute(show_harvest(Harvest(model=mini.NAME, tokens=tokens)))
    from ..train.plan import TrainConfig as Train

    # At the paper's 0.1 % of pairs `decorrelation` does not lower the mean correlation here; docs/log.md has the numbers.
    runs = run_train(
        Train(
            variants=("relu", "topk", "batchtopk", "decorrelation"), layers=(12,), caches=(cache.folder,), steps=steps,
            batch_size=1024, width="4x", options=("decorrelation.fraction=0.05", "decorrelation.strength=0.2"),
        )
    )  # fmt: skip
    echo("note     decorrelation ran with fraction=0.05 and strength=0.2; its default is the paper's 0.1 % of pairs")
    from ..evaluate.plan import EvaluateConfig, plan_evaluation

    config = EvaluateConfig(runs=[run.folder for run in runs], suite="core", tokens=tokens // 12)
    if code := run_evaluate(plan_evaluation(config)):
        raise typer.Exit(code)
    first = next(quote(str(run.folder)) for run in runs if run.recipe.name == "topk")
    echo(f"next     sae dashboard {first}     (its latents, as a page)")
    echo(f"         sae evaluate {quote(str(runs[0].folder.parent))}/*     (absorption, probing, SCR and TPP, too)")
    echo(
        f"         sae train --variant jumprelu --layer 5 --cache {quote(str(cache.folder))}     (`sae variants` lists more)"
    )
    echo("         sae harvest --layer 12     (Gemma-2-2B: accept its licence, then `hf auth login`)")
