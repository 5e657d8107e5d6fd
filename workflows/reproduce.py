"""What `sae reproduce` is asked for, as jobs: each recipe of a paper's systems, and which of them train on one pass."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ReproduceConfig:
    """The command's options: None is what the paper says."""

    model: str
    layers: Sequence[int] | None
    seeds: Sequence[int] | None
    reading: str | None
    steps: int | None
    batch_size: int | None
    width: str | None
    dataset: str | None
    cache: Path | None
    suite: str | None
    evaluate_tokens: int | None
    folder: Path
    device: str
    on_paper_model: bool


@dataclass(frozen=True)
class Job:
    """One recipe of one of a paper's systems, to train at every layer and seed."""

    paper: str
    system: str
    recipe: str
    options: tuple[str, ...]  # option=value
    dataset: str | None
    steps: int
    batch_size: int | None
    width: str | None
    literal: bool
    layers: tuple[int, ...]
    seeds: tuple[int, ...]

    @property
    def together(self) -> tuple[Any, ...]:
        """Jobs that have this in common can be trained on one pass."""
        return self.dataset, self.steps, self.batch_size, self.width, self.literal, self.layers, self.seeds


def reading_of(paper: Any, asked: ReproduceConfig) -> Any:
    from ..common.errors import UsageError

    names = {reading.name: reading for reading in paper.readings}
    if asked.reading is not None and asked.reading not in names:
        raise UsageError(f"--reading {asked.reading}: paper {paper.number} has {', '.join(names)}.")
    return names[asked.reading or (paper.readings[0].name if asked.on_paper_model else "field")]


def jobs_of(paper: Any, asked: ReproduceConfig) -> list[Job]:
    """What to train for a paper: each recipe of each system, in the units of the reading."""
    reading, run = reading_of(paper, asked), paper.run
    return [
        Job(
            paper.number, system.id, recipe,
            options_of(recipe, reading.options, system.options),
            asked.dataset or (run.dataset if asked.on_paper_model else None),
            asked.steps or run.steps,
            asked.batch_size or (run.batch_size if asked.on_paper_model else None),
            width_of(system.width, paper.systems["full" if "full" in paper.systems else next(iter(paper.systems))].width, asked.width),
            reading.literal,
            tuple(asked.layers or paper.ran.layers),
            tuple(asked.seeds or run.seeds),
        )
        for system in paper.systems.values()
        for recipe in system.recipes
    ]  # fmt: skip


def width_of(own: str, main: str, asked: str | None) -> str | None:
    """A system's width; where another is asked for, as many times that as the paper's own is of its main system's."""
    if asked is None or own == main:
        return asked or own or None
    number, unit = (asked[:-1], asked[-1]) if asked[-1:].isalpha() else (asked, "")
    times = float(own.removesuffix("x")) / float(main.removesuffix("x"))
    try:
        return f"{float(number) * times:g}{unit}"
    except ValueError:
        return asked  # training says what is wrong with it


def options_of(recipe: str, reading: Mapping[str, Any], system: Mapping[str, Any]) -> tuple[str, ...]:
    """The system's options, and of the reading's those that the recipe has."""
    from ..train.recipe import find_recipe
    from ..train.variant import Optimization

    known = {*find_recipe(recipe).options, *vars(Optimization())}
    options = {name: value for name, value in reading.items() if name in known} | dict(system)
    return tuple(f"{name}={spelled(value)}" for name, value in options.items())


def spelled(value: Any) -> str:
    """A value of TOML as --set takes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def group_by_pass(jobs: Iterable[Job]) -> list[list[Job]]:
    """Groups that train on one pass: alike in all but recipe and options, and no recipe with two sets of options."""
    groups: list[list[Job]] = []
    for job in jobs:
        for group in groups:
            options = {one.recipe: one.options for one in group}
            if group[0].together == job.together and options.get(job.recipe, job.options) == job.options:
                group.append(job)
                break
        else:
            groups.append([job])
    return groups


def options_by_recipe(group: Iterable[Job]) -> dict[str, tuple[str, ...]]:
    """What the group trains: a recipe of two papers, with the same options, once."""
    return {job.recipe: job.options for job in group}


def train_config(group: Sequence[Job], cache: Any, asked: ReproduceConfig) -> Any:
    """What the group asks of training, on the folder of a cache or on a PlannedCache."""
    from ..train.plan import TrainConfig

    first = group[0]
    recipes = options_by_recipe(group)
    caches, source = ((cache,), None) if isinstance(cache, Path) else ((), cache)
    return TrainConfig(
        variants=list(recipes), layers=first.layers, seeds=first.seeds, caches=caches, source=source, steps=first.steps, width=first.width,
        batch_size=first.batch_size, paper_exact=first.literal, out=asked.folder / "runs", device=asked.device,
        options=[f"{recipe}.{option}" for recipe, options in recipes.items() for option in options],
    )  # fmt: skip


def suite_of(asked: ReproduceConfig) -> str:
    return asked.suite or ("full" if asked.on_paper_model else "quick")
