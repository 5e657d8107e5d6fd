"""Reproduce a paper: train its systems, evaluate them, and report each claimed number next to the measured one.

Existing caches, runs and results are reused, so a reproduction can be interrupted and repeated.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..cache.models import GivenModel
from ..cache.planned import PlannedCache
from ..cache.reader import Cache
from ..common.errors import UsageError
from ..common.escaping import quote
from ..common.formatting import format_count
from ..common.process_group import current_process_group, rank_and_count
from ..evaluate.compared_runs import read_run
from ..evaluate.metrics.registry import METRICS, SUITES, metrics_of_suite
from ..evaluate.pages.page import write_page
from ..evaluate.pages.reproduction import reproduction_page
from ..evaluate.papers.claims import PAPERS, Paper, Reading
from ..evaluate.papers.parse import load_paper
from ..evaluate.papers.report import PaperReport, build_report, find_reading
from ..evaluate.papers.runs import load_system_run
from ..evaluate.plan import EvaluateConfig
from ..harvest.description import describe_harvest
from ..harvest.plan import HarvestConfig, HarvestPlan, plan_harvest
from ..train.config import check_seeds
from ..train.estimate import check_disk_space, describe_size, describe_time
from ..train.parse import split_width
from ..train.plan import Run, TrainPlan, plan_training
from ..train.recipe import find_recipe
from ..train.shares import describe_shares
from .jobs import Job, ReproduceConfig, group_by_pass, jobs_of, options_by_recipe, train_config

ALL = "all"  # means every paper


def default_suite(papers: Sequence[Paper]) -> str:
    """The suite for models that the papers do not use: the metrics of `quick`, and for each metric in the papers'
    claims its stand-in `<metric>_stdlib`, if there is one.
    """
    claimed = {claim.metric.split(".")[0] for paper in papers for claim in paper.claims}
    stand_ins = [name for name in METRICS if name.endswith("_stdlib") and name.removesuffix("_stdlib") in claimed]
    more = [name for name in stand_ins if name not in SUITES["quick"]]
    if not more:
        return "quick"
    # A named metric must be available. stability is not available for a single seed, and no paper makes claims about
    # it.
    return ",".join([*(name for name in SUITES["quick"] if name != "stability"), *more])


@dataclass(frozen=True)
class ReproducePlan:
    """The jobs of a reproduction and the caches they need. Nothing has been written yet."""

    config: ReproduceConfig
    papers: Sequence[Paper]
    passes: Sequence[Sequence[Job]]
    sources: Mapping[str | None, Cache | HarvestPlan]  # dataset -> its cache, or its planned harvest

    @property
    def on_paper_model(self) -> bool:
        return is_paper_model(self.config, self.papers)

    @property
    def suite(self) -> str:
        """The suite of metrics that the runs are evaluated with."""
        return self.config.suite or ("full" if self.on_paper_model else default_suite(self.papers))

    @cached_property
    def train_plans(self) -> list[TrainPlan]:
        """The training plan of each pass. It uses the existing cache or, if there is none yet, the planned one."""
        configs = [train_config(jobs, self.source_of(jobs), self.config) for jobs in self.passes]
        return [plan_training(config, self.harvest_bytes) for config in configs]

    @property
    def harvests(self) -> list[HarvestPlan]:
        return [source for source in self.sources.values() if isinstance(source, HarvestPlan)]

    @property
    def harvest_bytes(self) -> dict[Path, float]:
        """The number of bytes that the harvests will write into each folder."""
        return {harvest.folder: harvest.bytes_to_write for harvest in self.harvests}

    def source_of(self, jobs: Sequence[Job]) -> Path | PlannedCache:
        source = self.sources[jobs[0].dataset]
        if isinstance(source, HarvestPlan):
            finished = source.finished_cache
            return source.planned_cache() if finished is None else finished.folder
        return source.folder

    def describe(self, time: bool = False) -> list[str]:
        """The lines that `sae reproduce` prints first. If `time` is set, the lines include the estimated memory and
        time; estimating these takes some seconds.

        Of several launched processes, only the first returns any lines.
        """
        if rank_and_count()[0]:
            return []
        lines = [line for harvest in self.harvests for line in describe_harvest(harvest)]
        for jobs, plan in zip(self.passes, self.train_plans, strict=True):
            recipes, done = options_by_recipe(jobs), len(plan.runs) - len(plan.unfinished)
            lines.append(
                f"train    {format_count(len(plan.runs), 'SAE')}: {format_count(len(recipes), 'recipe')}, "
                f"{jobs[0].steps:,} steps each{f'; {done:,} already done' if done else ''}"
            )
        lines += describe_notes(run for plan in self.train_plans for run in plan.runs)
        if runs := self.unfinished:
            lines.append(describe_size(runs, self.config.folder))
            if rank_and_count()[1] > 1:
                whole = as_one_plan(self.train_plans)
                lines += describe_shares(whole.shares, whole.runs, self.config.device, time)
            elif time:
                lines += describe_time([runs for plan in self.train_plans for runs in plan.passes], self.config.device)
        return [*lines, f"evaluate each paper's runs, suite {self.suite} (time not estimated)"]

    @property
    def unfinished(self) -> list[Run]:
        """The runs that have not been trained yet."""
        return [run for plan in self.train_plans for run in plan.unfinished]


def describe_notes(runs: Iterable[Run]) -> list[str]:
    """The training plans' notes about options: one line per note, with the recipes that it applies to."""
    recipes: dict[str, list[str]] = {}  # sentence -> recipes
    for run in runs:
        for note in run.notes:
            recipe, _, sentence = note.partition(": ")
            if not sentence.startswith("--paper-exact"):  # set by the chosen `Reading`, not by the user
                recipes.setdefault(sentence, []).append(recipe)
    return [
        f"note     {names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}: {sentence}"
        for sentence, names in ((sentence, list(dict.fromkeys(names))) for sentence, names in recipes.items())
    ]


def plan_reproduction(config: ReproduceConfig, say: Callable[[str], None] = lambda sentence: None) -> ReproducePlan:
    """Check a reproduction as a whole, before starting hours of work.

    Raises:
        UsageError: an option or a paper is unknown, or the cache belongs to another model.
        UnavailableError: the model or the dataset cannot be reached, or the disk is too small for caches and runs.
    """
    counts = {"steps": config.steps, "batch-size": config.batch_size, "evaluate-tokens": config.evaluate_tokens}
    for flag, number in counts.items():
        if number is not None and number < 1:
            raise UsageError(f"--{flag} {number} is not positive. Leave it out to use the paper's value.")
    check_seeds(*config.seeds or ())
    if config.width is not None:
        split_width(config.width)
    if config.suite is not None:
        metrics_of_suite(config.suite)
    papers = [load_paper(number) for number in (PAPERS if ALL in config.papers else dict.fromkeys(config.papers))]
    check_reading(config.reading, papers)
    jobs = [job for paper in papers for job in jobs_of(paper, config, is_paper_model(config, papers))]
    plan = ReproducePlan(config, papers, group_by_pass(jobs), sources_of(jobs, config, say))
    check_disk_space(plan.unfinished, plan.harvest_bytes)
    return plan


def model_name(plan: ReproducePlan) -> str:
    """The model's name on the page."""
    source = next(iter(plan.sources.values()))
    return source.model if isinstance(source, Cache) else source.source.name


def is_paper_model(config: ReproduceConfig, papers: Iterable[Paper]) -> bool:
    """Whether the model is the papers' own."""
    return config.model in {paper.setup.reads_as for paper in papers}


def sources_of(
    jobs: Sequence[Job], config: ReproduceConfig, say: Callable[[str], None]
) -> dict[str | None, Cache | HarvestPlan]:
    """{dataset: cache}, if the configuration names a cache. Otherwise {dataset: plan of a harvest}, where the harvest
    is long enough for the longest job.
    """
    if config.cache is not None:
        cache = Cache(config.cache)
        if not (given := GivenModel(config.model)).is_model_of(cache.identity["model"]):
            raise UsageError(
                f"--cache {config.cache} holds activations of {cache.model}, not of {given.describe()}. "
                f"Give --model {quote(cache.model_argument)}, or a cache of {config.model}."
            )
        return dict.fromkeys((job.dataset for job in jobs), cache)
    sources: dict[str | None, Cache | HarvestPlan] = {}
    for dataset in dict.fromkeys(job.dataset for job in jobs):
        same = [job for job in jobs if job.dataset == dataset]
        tokens = max(job.steps * (job.batch_size or find_recipe(job.recipe).batch_size) for job in same)
        layers = sorted({layer for job in same for layer in job.layers})
        harvest = HarvestConfig(model=config.model, dataset=dataset, layers=layers, tokens=tokens, device=config.device)
        sources[dataset] = plan_harvest(harvest, say)
    return sources


def check_reading(name: str | None, papers: Sequence[Paper]) -> None:
    """Raise UsageError if one of the papers has no `Reading` called `name`."""
    readings = {paper.number: [reading.name for reading in paper.readings] for paper in papers}
    without = [number for number, names in readings.items() if name is not None and name not in names]
    if not without:
        return
    expected = "; ".join(f"{', '.join(readings[number])} ({number})" for number in without)
    others = f" Run a separate command for each of the papers {', '.join(readings)}." if len(papers) > 1 else ""
    raise UsageError(f"unknown --reading {name!r} for paper {', '.join(without)}: expected one of {expected}.{others}")


def as_one_plan(plans: Sequence[TrainPlan]) -> TrainPlan:
    """Merge the plans into one, so that all their runs can be distributed over the launched processes in one step."""
    runs: dict[Any, Run] = {}
    for run in (run for plan in plans for run in plan.runs):
        # Before the harvest, names of run folders contain no digest, so runs with different options can share a name.
        options = json.dumps(run.options, sort_keys=True)
        runs.setdefault((run.folder, run.config, options), run)
    return TrainPlan(plans[0].config, list(runs.values()))


@dataclass(frozen=True)
class Stages:
    """The functions that run the stages of a reproduction. Those of `sae reproduce` also show progress and tables."""

    harvest: Callable[[HarvestPlan], Cache]
    train: Callable[[TrainPlan], None]
    evaluate: Callable[[EvaluateConfig], int]  # returns the exit code; unmeasured metrics are listed on the page
    report: Callable[[PaperReport, Path], None]  # the report, and the page that was written


@dataclass
class Reproduction:
    """The result of a reproduction: the reports, and the highest exit code of the evaluations."""

    reports: list[PaperReport] = field(default_factory=list)
    exit_code: int = 0


def page_name(paper: Paper, reading: Reading, on_paper_model: bool) -> str:
    """The file name of a paper's page. Verdicts depend on how the paper is read, so each reading has a page."""
    is_default = reading == find_reading(paper, on_paper_model, None)
    return f"{paper.number}.html" if is_default else f"{paper.number}-{reading.name}.html"


def run_reproduction(plan: ReproducePlan, stages: Stages) -> Reproduction:
    """Harvest, train and evaluate, and write <out>/<paper>.html for each paper. The runs of a paper are evaluated with
    the metric definitions of that paper.

    Several launched processes share each stage, and the first writes the pages.
    """
    group = current_process_group()
    caches = {
        dataset: source if isinstance(source, Cache) else stages.harvest(source)
        for dataset, source in plan.sources.items()
    }
    configs = [train_config(jobs, caches[jobs[0].dataset].folder, plan.config) for jobs in plan.passes]
    folders: dict[Job, list[Path]] = {}
    if group.count > 1:
        stages.train(as_one_plan(group.everywhere(lambda: [plan_training(config) for config in configs])))
    for jobs, config in zip(plan.passes, configs, strict=True):
        training = plan_training(config)
        if group.count == 1:
            stages.train(training)
        folders |= {job: [run.folder for run in training.runs if run.recipe.name == job.recipe] for job in jobs}
    result = Reproduction()
    for paper in plan.papers:
        folders_of_job = {job: job_folders for job, job_folders in folders.items() if job.paper == paper.number}
        evaluation = EvaluateConfig(
            runs=list(dict.fromkeys(folder for job_folders in folders_of_job.values() for folder in job_folders)),
            suite=plan.suite,
            tokens=plan.config.evaluate_tokens,
            mode=paper.mode,
            device=plan.config.device,
        )
        result.exit_code = max(result.exit_code, stages.evaluate(evaluation))
        if not group.is_first:
            continue
        runs = [
            load_system_run(job.system, job.recipe, read_run(folder))
            for job, job_folders in folders_of_job.items()
            for folder in job_folders
        ]
        reading = find_reading(paper, plan.on_paper_model, plan.config.reading)
        report = build_report(paper, runs, plan.on_paper_model, reading.name)
        page = plan.config.folder / page_name(paper, reading, plan.on_paper_model)
        write_page(page, reproduction_page(report, model_name(plan)))
        stages.report(report, page)
        result.reports.append(report)
    # The other processes wait here until the first has written the last page. If one of them ended earlier with an exit
    # code other than 0, the launcher would stop the first before the page is written.
    group.barrier()
    return result
