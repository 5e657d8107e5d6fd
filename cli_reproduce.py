"""`sae reproduce`: a paper's systems trained and evaluated, and every number that it claims beside the number measured."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import Annotated, Any

import typer

from .terminal import echo, show_table, spoken

ALL = "all"


@spoken
def reproduce(
    papers: Annotated[list[str], typer.Argument(help="000, 001, 002, 003, 004, or all.")],
    model: Annotated[str, typer.Option(help="The papers' is the default; another tells which systems have more.")] = "google/gemma-2-2b",
    layer: Annotated[list[int] | None, typer.Option("--layer", help="Default: each paper's. Repeats.")] = None,
    seed: Annotated[list[int] | None, typer.Option("--seed", help="Default: each paper's three. Repeats.")] = None,
    reading: Annotated[str | None, typer.Option(help="evidence, field or literal: how units are read. Default: evidence on the papers' model, else field.")] = None,
    steps: Annotated[int | None, typer.Option(help="Default: each paper's.")] = None,
    width: Annotated[str | None, typer.Option(help="Latents, as in `sae train`. Default: each system's.")] = None,
    cache: Annotated[Path | None, typer.Option(help="Read this one in the place of a harvest.")] = None,
    suite: Annotated[str | None, typer.Option(help="Default: full on the papers' model, else quick.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for runs and pages. Default: reproduce/<model>.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print tokens, disk, time and runs, and stop.")] = False,
) -> None:  # fmt: skip
    """A paper -> its systems trained and evaluated, and a page: each claimed number beside the measured one, with a verdict.

    What exists is not done again: the same command goes on after a kill, and after a new seed trains only that.
    """
    from .cache.errors import UsageError
    from .cache.layout import home
    from .cache.reader import model_name
    from .evaluate.claims import PAPERS, load

    chosen = [load(number) for number in (PAPERS if ALL in papers else dict.fromkeys(papers))]
    theirs = {paper.ran.reads_as for paper in chosen}
    on_paper_model = model in theirs
    used = {paper.number: reading_of(paper, reading, on_paper_model) for paper in chosen}
    folder = out or home() / "reproduce" / model_name(model).split("/")[-1]
    systems = {}  # (paper, system, recipe) -> run folders
    caches: dict[Any, Any] = {}
    for paper in chosen:
        dataset = paper.run.dataset if on_paper_model else None
        layers = layer or list(paper.ran.layers)
        sizes = replace(paper.run, steps=steps or paper.run.steps)
        text = (dataset, sizes.steps * sizes.batch_size)
        if text not in caches:
            caches[text] = (
                cache
                if cache is not None
                else harvested(model, dataset, layers_of(chosen, layer), text[1], device, dry_run)
            )
        if caches[text] is None:  # only planned
            echo(
                f"train    {paper.number}: {count(paper, layers, seed)} SAEs, {sizes.steps:,} steps each, when the cache is there"
            )
            continue
        for request, members in requests(
            paper, used[paper.number], sizes, layers, seed, width, caches[text], folder, device, on_paper_model
        ):
            from .cli import run_train

            runs = run_train(request, dry_run)
            for system, recipe in members:
                found = [run.folder for run in runs if run.recipe.name == recipe]
                systems[paper.number, system, recipe] = found
    if dry_run:
        return
    if not systems:
        raise UsageError("Nothing was trained.")
    pages = []
    for paper in chosen:
        own = {key[1:]: runs for key, runs in systems.items() if key[0] == paper.number}
        evaluated(
            paper,
            [run for runs in own.values() for run in runs],
            suite or ("full" if on_paper_model else "quick"),
            device,
        )
        pages.append(written(paper, own, folder, model, used[paper.number].name, on_paper_model))
    for page in pages:
        echo(f"written  {page}")
    echo(f"next     sae compare {quote(str(folder / 'runs'))}/* --mix --out {quote(str(folder / 'compare.html'))}")


def reading_of(paper: Any, asked: str | None, on_paper_model: bool) -> Any:
    from .cache.errors import UsageError

    names = {reading.name: reading for reading in paper.readings}
    if asked is not None and asked not in names:
        raise UsageError(f"Paper {paper.number} has no reading {asked}; it has {', '.join(names)}.")
    return names[asked or (paper.readings[0].name if on_paper_model else "field")]


def layers_of(papers: Sequence[Any], asked: Sequence[int] | None) -> list[int]:
    return sorted(set(asked or [layer for paper in papers for layer in paper.ran.layers]))


def count(paper: Any, layers: Sequence[int], seeds: Sequence[int] | None) -> int:
    recipes = sum(len(system.recipes) for system in paper.systems.values())
    return recipes * len(layers) * len(seeds or paper.run.seeds)


def harvested(
    model: str, dataset: str | None, layers: Sequence[int], tokens: int, device: str, dry_run: bool
) -> Path | None:
    """The cache for so many training tokens, made if it is not there; None where it is only planned."""
    from .cli_harvest import run_harvest
    from .harvest.plan import Request

    found = run_harvest(Request(model=model, dataset=dataset, layers=layers, tokens=tokens, device=device), dry_run)
    return found.folder if found is not None else None


def requests(
    paper: Any, reading: Any, sizes: Any, layers: Sequence[int], seeds: Sequence[int] | None, width: str | None, cache: Path, folder: Path,
    device: str, on_paper_model: bool,
) -> Iterator[tuple[Any, list[tuple[str, str]]]]:  # fmt: skip
    """What to train, each request with the (system, recipe) that it serves: as few as the systems' options and widths allow."""
    from .train.run import Request

    groups: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for system in paper.systems.values():
        options = json.dumps({**reading.options, **system.options}, sort_keys=True)
        for recipe in system.recipes:
            groups.setdefault((width or system.width, options), []).append((system.id, recipe))
    for (wide, options), members in groups.items():
        recipes = list(dict.fromkeys(recipe for _, recipe in members))
        given = [
            f"{recipe}.{name}={spelled(value)}" for recipe in recipes for name, value in json.loads(options).items()
        ]
        yield Request(
            variants=recipes, layers=layers, seeds=seeds or sizes.seeds, caches=(cache,), steps=sizes.steps, width=wide or None,
            batch_size=sizes.batch_size if on_paper_model else None, literal=reading.literal, options=given, out=folder / "runs",
            device=device,
        ), members  # fmt: skip


def spelled(value: Any) -> str:
    """A value of TOML as --set takes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def evaluated(paper: Any, runs: Sequence[Path], suite: str, device: str) -> None:
    from .cli_evaluate import run_evaluate
    from .evaluate.run import Request

    run_evaluate(Request(runs=list(dict.fromkeys(runs)), suite=suite, mode=paper.mode, device=device))


def written(
    paper: Any, systems: dict[tuple[str, str], list[Path]], folder: Path, model: str, reading: str, on_paper_model: bool
) -> Path:
    """The paper's page, and its verdicts as a table in the terminal."""
    from .evaluate.compare import read_run
    from .evaluate.pages.page import write_page
    from .evaluate.pages.reproduction import reproduction_page
    from .evaluate.report import report, trained

    runs = [trained(system, recipe, read_run(run)) for (system, recipe), found in systems.items() for run in found]
    found = report(paper, runs, on_paper_model)
    lines = [
        [
            row.claim.id,
            row.claim.system,
            f"{row.claim.value:g}{row.claim.unit and ' ' + row.claim.unit}",
            row.measured,
            str(row.seeds or ""),
            row.verdict,
        ]
        for row in found.rows
    ]
    show_table(f"{paper.number} {paper.title}", ["claim", "of", "claimed", "measured", "seeds", "verdict"], lines)
    page = folder / f"{paper.number}.html"
    write_page(page, reproduction_page(found, model, reading))
    return page
