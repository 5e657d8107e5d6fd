"""The options of `sae reproduce`, and the training jobs that follow from them.

A paper (evaluate/papers) has systems, and a system has recipes. Each recipe of a system is a `Job`, to be trained at
every layer and seed. Jobs that read the same batches are trained together, in one pass over a cache.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..cache.planned import PlannedCache
from ..common.files import sae_home
from ..evaluate.papers.claims import Paper, PaperSystem, Reading
from ..evaluate.papers.report import find_reading
from ..train.plan import TrainConfig
from ..train.recipe import find_recipe


@dataclass(frozen=True)
class ReproduceConfig:
    """The options of `sae reproduce`. None means the paper's value or, if the paper has none, the stage's default."""

    papers: Sequence[str]  # "000" to "004", or "all"
    model: str = "google/gemma-2-2b"  # on other models only the ranking of systems is comparable
    layers: Sequence[int] | None = None
    seeds: Sequence[int] | None = None
    reading: str | None = None  # how the paper's units are read: "evidence", "field", "literal" ...
    steps: int | None = None
    batch_size: int | None = None  # tokens; on another model than the paper's: each recipe's default
    width: str | None = None  # latents, as for TrainConfig; systems with another width are scaled in proportion
    dataset: str | None = None
    cache: Path | None = None  # train on this cache instead of harvesting
    suite: str | None = None  # "full" on the papers' model, else `default_suite`
    evaluate_tokens: int | None = None  # held-out tokens to evaluate on
    out: Path | None = None  # folder of runs and pages; None: reproduce/<model>
    device: str = "auto"

    @property
    def folder(self) -> Path:
        return self.out or sae_home() / "reproduce" / model_folder_name(self.model)


@dataclass(frozen=True)
class Job:
    """A recipe for one of a paper's systems, to be trained at each of `layers` with each of `seeds`."""

    paper: str
    system: str
    recipe: str
    options: tuple[str, ...]  # option=value
    dataset: str | None
    steps: int
    batch_size: int | None
    width: str | None
    paper_exact: bool
    layers: tuple[int, ...]
    seeds: tuple[int, ...]

    @property
    def pass_key(self) -> tuple[Any, ...]:
        """A key that is equal for jobs that can be trained in one pass."""
        return self.dataset, self.steps, self.batch_size, self.width, self.paper_exact, self.layers, self.seeds


def jobs_of(paper: Paper, config: ReproduceConfig, on_paper_model: bool) -> list[Job]:
    """The jobs of a paper: one for each recipe of each system, with the options of the chosen `Reading`."""
    reading = find_reading(paper, on_paper_model, config.reading)
    paper_batches = paper.reproduction.batch_size if reading.is_papers or on_paper_model else None
    main = paper.systems["full" if "full" in paper.systems else next(iter(paper.systems))]

    def job(system: PaperSystem, recipe: str) -> Job:
        return Job(
            paper=paper.number,
            system=system.id,
            recipe=recipe,
            options=set_options(recipe, paper, reading, system),
            dataset=config.dataset or (paper.reproduction.dataset if on_paper_model else None),
            steps=config.steps or reading.steps or paper.reproduction.steps,
            batch_size=config.batch_size or reading.batch_size or paper_batches,
            width=scale_width(system.width, main.width, config.width),
            paper_exact=reading.literal,
            layers=tuple(config.layers or paper.setup.layers),
            seeds=tuple(config.seeds or paper.reproduction.seeds),
        )

    return [job(system, recipe) for system in paper.systems.values() for recipe in system.recipes]


def scale_width(system: str, main: str, width: str | None) -> str | None:
    """The width to train a system with, as in --width; None: the recipe's default.

    `system` and `main` are the `PaperSystem.width` of this system and of the paper's main system. `width` is the width
    that the user chose for the main system; a system that is twice as wide as the main system gets twice this width.
    """
    if width is None or system == main:
        return width or system or None
    number, unit = (width[:-1], width[-1]) if width[-1:].isalpha() else (width, "")
    factor = float(system.removesuffix("x")) / float(main.removesuffix("x"))
    try:
        return f"{float(number) * factor:g}{unit}"
    except ValueError:
        return width  # plan_training reports the error


def set_options(recipe: str, paper: Paper, reading: Reading, system: PaperSystem) -> tuple[str, ...]:
    """The options of a job, in the syntax of --set. In this order of precedence: the options of the system, the options
    of the chosen reading (if the recipe has them), and the optimizer settings of the paper.
    """
    known = find_recipe(recipe).option_types()
    printed = paper.setup.optimization() if reading.is_papers else {}
    options = printed | {name: value for name, value in reading.options.items() if name in known} | dict(system.options)
    return tuple(f"{name}={to_set_value(value)}" for name, value in options.items())


def to_set_value(value: Any) -> str:
    """A TOML value, or None, in the syntax of --set."""
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)


def group_by_pass(jobs: Iterable[Job]) -> list[list[Job]]:
    """Group the jobs that can be trained in one pass. All jobs of a group have the same `pass_key`, and those with the
    same recipe also have the same options.
    """
    groups: list[list[Job]] = []
    for job in jobs:
        for group in groups:
            options = options_by_recipe(group)
            if group[0].pass_key == job.pass_key and options.get(job.recipe, job.options) == job.options:
                group.append(job)
                break
        else:
            groups.append([job])
    return groups


def options_by_recipe(jobs: Iterable[Job]) -> dict[str, tuple[str, ...]]:
    """The recipes to train, with their options. A recipe that two papers use with equal options is trained once."""
    return {job.recipe: job.options for job in jobs}


def train_config(jobs: Sequence[Job], source: Path | PlannedCache, config: ReproduceConfig) -> TrainConfig:
    """The configuration for training `jobs` in one pass on the cache `source`, which may still have to be harvested."""
    first, recipes = jobs[0], options_by_recipe(jobs)
    return TrainConfig(
        variants=list(recipes),
        layers=first.layers,
        seeds=first.seeds,
        caches=(source,) if isinstance(source, Path) else (),
        source=None if isinstance(source, Path) else source,
        steps=first.steps,
        width=first.width,
        batch_size=first.batch_size,
        paper_exact=first.paper_exact,
        out=config.folder / "runs",
        device=config.device,
        options=[f"{recipe}.{option}" for recipe, options in recipes.items() for option in options],
    )


def model_folder_name(model: str) -> str:
    """The last part of a folder's path or of a Hub id."""
    return Path(model).resolve().name if Path(model).is_dir() else Path(model).name
