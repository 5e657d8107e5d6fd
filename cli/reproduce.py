"""`sae reproduce`: a paper's systems trained and evaluated, and every number that it claims beside the number measured."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import Annotated, Any

import typer

from ..workflows.reproduce import (
    Job,
    ReproduceConfig,
    group_by_pass,
    jobs_of,
    options_by_recipe,
    reading_of,
    suite_of,
    train_config,
)
from .console import cli_command, echo, show_table
from .options import Device, parse_tokens

ALL = "all"


@cli_command
def reproduce(
    papers: Annotated[list[str], typer.Argument(help="000, 001, 002, 003, 004, or all.")],
    model: Annotated[
        str, typer.Option(help="The default is the papers'. Of another, what can hold is which system has more.")
    ] = "google/gemma-2-2b",
    layer: Annotated[list[int] | None, typer.Option("--layer", help="Default: each paper's. Repeats.")] = None,
    seed: Annotated[list[int] | None, typer.Option("--seed", help="Default: each paper's three. Repeats.")] = None,
    reading: Annotated[
        str | None,
        typer.Option(help="How units are read: evidence (default on the papers' model), field (elsewhere) or literal."),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Default: each paper's.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Tokens. Default: each paper's; off its model each recipe's.")
    ] = None,
    width: Annotated[str | None, typer.Option(help="Latents, as in `sae train`. Default: each system's.")] = None,
    dataset: Annotated[
        str | None, typer.Option(help="As in `sae harvest`. Default: each paper's on its model.")
    ] = None,
    cache: Annotated[Path | None, typer.Option(help="Train on this one instead of harvesting.")] = None,
    suite: Annotated[
        str | None, typer.Option(help="As in `sae evaluate`. Default: full on the papers' model, else quick.")
    ] = None,
    evaluate_tokens: Annotated[
        int | None, typer.Option(parser=parse_tokens, metavar="N", help="Of held-out text. Default: as `sae evaluate`.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of runs and pages. Default: reproduce/<model>.")] = None,
    device: Device = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print tokens, disk, time and runs, and stop.")] = False,
) -> None:
    """A paper -> its systems, trained and evaluated, and a page: each claimed number beside the measured one, with a verdict.

    What exists is not made again: the same command goes on after a kill, and with one more seed trains only that.
    """
    from ..cache.catalog import canonical_model_name
    from ..common.errors import UsageError
    from ..common.files import sae_home
    from ..evaluate.metrics.registry import metrics_of_suite
    from ..evaluate.papers.claims import PAPERS, load_paper

    for flag, number in (("steps", steps), ("batch-size", batch_size)):
        if number is not None and number < 1:
            raise UsageError(f"--{flag} {number} is not positive. Leave it out for the paper's.")
    if suite is not None:  # now, and not when hours of training are over
        metrics_of_suite(suite)
    chosen = [load_paper(number) for number in (PAPERS if ALL in papers else dict.fromkeys(papers))]
    asked = ReproduceConfig(
        model, layer, seed, reading, steps, batch_size, width, dataset, cache, suite, evaluate_tokens,
        out or sae_home() / "reproduce" / Path(canonical_model_name(model)).name, device,
        on_paper_model=model in {paper.ran.reads_as for paper in chosen},
    )  # fmt: skip
    jobs = [job for paper in chosen for job in jobs_of(paper, asked)]
    groups = group_by_pass(jobs)
    sources = sources_of(jobs, asked)
    show_plan(groups, sources, asked, dry_run)  # what is wrong with it is seen before the hours of a harvest
    if dry_run:
        return
    caches = {dataset: cache_of(source) for dataset, source in sources.items()}
    runs: dict[Job, list[Path]] = {}
    for group in groups:
        runs |= trained(group, caches[group[0].dataset], asked)
    code = 0
    for paper in chosen:
        own = {job: folders for job, folders in runs.items() if job.paper == paper.number}
        code = max(code, evaluated(paper, own, asked))
        written(paper, own, asked)
    echo(
        f"next     sae compare {quote(str(asked.folder / 'runs'))}/* --mix --out {quote(str(asked.folder / 'all.html'))}"
    )
    if code:
        raise typer.Exit(code)


def sources_of(jobs: Sequence[Job], asked: ReproduceConfig) -> dict[str | None, Any]:
    """For each dataset the --cache, or the plan of a harvest with the tokens of its longest job."""
    from ..cache.catalog import canonical_model_name
    from ..cache.reader import Cache
    from ..common.errors import UsageError
    from ..harvest.plan import HarvestConfig
    from ..train.recipe import find_recipe
    from .harvest import show_harvest

    if asked.cache is not None and (held := Cache(asked.cache).model) != canonical_model_name(asked.model):
        raise UsageError(
            f"--cache {asked.cache} holds activations of {held}, and the claims would be read of {asked.model}. "
            f"Give --model {held}, or a cache of {asked.model}."
        )
    sources: dict[str | None, Any] = {}
    for dataset in dict.fromkeys(job.dataset for job in jobs):
        own = [job for job in jobs if job.dataset == dataset]
        tokens = max(job.steps * (job.batch_size or find_recipe(job.recipe).batch_size) for job in own)
        layers = sorted({layer for job in own for layer in job.layers})
        if asked.cache is not None:
            sources[dataset] = Cache(asked.cache)
            continue
        request = HarvestConfig(model=asked.model, dataset=dataset, layers=layers, tokens=tokens, device=asked.device)
        sources[dataset] = show_harvest(request)
    return sources


def cache_of(source: Any) -> Path:
    """The folder of a cache, which is harvested where it is planned."""
    from ..cache.reader import Cache
    from .harvest import execute

    return source.folder if isinstance(source, Cache) else execute(source).folder


def estimate_runs(
    group: Sequence[Job], source: Any, asked: ReproduceConfig, reserved: Mapping[Path, float]
) -> list[list[Any]]:
    """The runs of a group that are still to be trained: a list for each pass. `reserved` is that of plan_training."""
    from ..cache.reader import Cache
    from ..train.plan import plan_training

    cache = source if isinstance(source, Cache) else source.finished_cache
    config = train_config(group, source.planned_cache() if cache is None else cache.folder, asked)
    return plan_training(config, reserved).passes


def show_plan(
    groups: Sequence[Sequence[Job]], sources: Mapping[str | None, Any], asked: ReproduceConfig, dry_run: bool
) -> None:
    """What there is to train in all, as lines; OutsideError where it does not fit on the disk."""
    from ..common.formatting import format_count
    from ..harvest.plan import HarvestPlan
    from ..train.estimate import check_disk_space, describe_size, describe_time

    plans = [source for source in sources.values() if isinstance(source, HarvestPlan)]
    reserved = {plan.folder: plan.bytes_to_write for plan in plans}
    group_by_pass: list[list[Any]] = []
    for group in groups:
        of_group = estimate_runs(group, sources[group[0].dataset], asked, reserved)
        first, recipes, todo = group[0], options_by_recipe(group), sum(map(len, of_group))
        count = len(recipes) * len(first.layers) * len(first.seeds)
        there = f"; {count - todo:,} of them are there" if todo < count else ""
        echo(
            f"train    {format_count(count, 'SAE')}: {format_count(len(recipes), 'recipe')}, {first.steps:,} steps each{there}"
        )
        group_by_pass += of_group
    if runs := [run for stream in group_by_pass for run in stream]:
        check_disk_space(runs, reserved)
        echo(describe_size(runs, asked.folder))
        if dry_run:
            for line in describe_time(group_by_pass, asked.device):
                echo(line)
    echo(f"evaluate the runs of each paper in the suite {suite_of(asked)}; how long that takes is not foreseen")


def trained(group: Sequence[Job], cache: Path, asked: ReproduceConfig) -> dict[Job, list[Path]]:
    """Train the group on one pass; the run folders of each job."""
    from .train import run_train

    runs = run_train(train_config(group, cache, asked))
    return {job: [run.folder for run in runs if run.recipe.name == job.recipe] for job in group}


def evaluated(paper: Any, runs: Mapping[Job, Sequence[Path]], asked: ReproduceConfig) -> int:
    """Evaluate in the paper's definitions; returns the exit code. What could not be measured is on the page, too."""
    from ..evaluate.plan import EvaluateConfig, plan_evaluation
    from .evaluate import run_evaluate

    folders = dict.fromkeys(folder for found in runs.values() for folder in found)
    config = EvaluateConfig(
        runs=list(folders), suite=suite_of(asked), tokens=asked.evaluate_tokens, mode=paper.mode, device=asked.device
    )
    return run_evaluate(plan_evaluation(config))


def written(paper: Any, runs: Mapping[Job, Sequence[Path]], asked: ReproduceConfig) -> None:
    """The paper's page, and its verdicts as a table in the terminal."""
    from ..evaluate.compare import read_run
    from ..evaluate.pages.page import write_page
    from ..evaluate.pages.reproduction import reproduction_page
    from ..evaluate.papers.report import build_report, load_system_run

    found = build_report(
        paper,
        [
            load_system_run(job.system, job.recipe, read_run(folder))
            for job, folders in runs.items()
            for folder in folders
        ],
        asked.on_paper_model,
    )
    lines = [
        [row.claim.id, row.claim.system, f"{row.claim.value:g} {row.claim.unit}", row.measured, str(row.seeds or ""), row.verdict]
        for row in found.rows
    ]  # fmt: skip
    show_table(f"{paper.number} {paper.title}", ["claim", "of", "claimed", "measured", "seeds", "verdict"], lines)
    page = asked.folder / f"{paper.number}.html"
    write_page(page, reproduction_page(found, asked.model, reading_of(paper, asked).name))
    echo(f"written  {page}")
