"""Check that every system of the five papers builds, trains, resumes and loads in every reading.

    python benchmarks/readings.py > benchmarks/results/DATE-readings.md

Each system is planned with its options, as in `sae reproduce`, and trained for two steps on random rows of width 32.
The run is then cut back to its first step, planned again and resumed. "resumes" means that the weights are the same bit
for bit; "loads" means that the finished SAE is read from its files and reconstructs rows to finite numbers. The sizes,
rates and decay in the table are those of a run on the papers' model without flags. In the column `optimizer`, `wd` is
the weight decay with its form and the parameters to which it applies, `reaches` is the largest share of the learning
rate that a run reaches if its warm-up is longer than the run, `b_dec` says how this bias is initialized, and the last
word is the normalization of the input.
"""

import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from sae.cache.contexts import Contexts
from sae.cache.layout import Layout
from sae.cache.loader import as_uint16
from sae.cache.opening import open_cache
from sae.cache.reader import Cache
from sae.cache.writer import CacheWriter, WindowRows
from sae.common.errors import SaeError
from sae.evaluate.papers.claims import PAPERS, Paper, Reading
from sae.evaluate.papers.parse import load_paper
from sae.train.optimization import Optimization
from sae.train.parse import parse_options, parse_width
from sae.train.plan import Run, TrainPlan, plan_training
from sae.train.recipe import find_recipe
from sae.train.run import run_training
from sae.train.variant import RunConfig
from sae.workflows.jobs import Job, ReproduceConfig, group_by_pass, jobs_of, train_config

D_IN, ROWS, BATCH, STEPS, LAYER = 32, 256, 64, 2, 12
HEADS = ("builds", "steps", "resumes", "loads")


class Checked(NamedTuple):
    """The result for one job in one reading: how many of HEADS passed, and the problem that stopped the job."""

    reading: str
    job: Job
    passed: int
    problem: str = ""


def random_cache(folder: Path) -> Cache:
    """Normally distributed rows with a nonzero mean, as a finished cache of layer 12 of a model called `synthetic`."""
    layout = Layout(ROWS, ROWS)
    Contexts(
        ids=np.zeros((ROWS // 16, 17), np.uint32), length=np.full(ROWS // 16, 17, np.uint16),
        document=np.arange(ROWS // 16, dtype=np.uint32), held_out=np.zeros(ROWS // 16, np.bool_),
    ).write(folder)  # fmt: skip
    identity = {"model": {"name": "synthetic", "revision": "0"}, "data": {"name": "normal"}, "context": 17}
    array = f"layer_{LAYER:02d}"
    writer = CacheWriter(folder, identity, layout, {array: D_IN})
    generator = torch.Generator().manual_seed(0)
    rows_RD = torch.randn(ROWS, D_IN, generator=generator) + torch.randn(D_IN, generator=generator)
    for window in writer.missing_windows():
        number = np.arange(ROWS)
        bits = {array: as_uint16(rows_RD.bfloat16())}
        places = (number // 16).astype(np.uint32), (number % 16 + 1).astype(np.uint16)
        writer.write_window(window, WindowRows(bits, *places), {})
    writer.finish(None)
    return open_cache(folder)


def pairs() -> Iterator[tuple[Paper, Reading]]:
    """Every paper, with each of its readings."""
    for paper in map(load_paper, PAPERS):
        for reading in paper.readings:
            yield paper, reading


def check_reading(paper: Paper, reading: Reading, cache: Path, folder: Path) -> list[Checked]:
    """Train every system of a paper in one reading; cut back, resume and load the runs."""
    config = ReproduceConfig(
        [paper.number], model="synthetic", reading=reading.name, cache=cache, layers=[LAYER], seeds=[0], steps=STEPS,
        batch_size=BATCH, device="cpu", out=folder,
    )  # fmt: skip
    checked = []
    for jobs in group_by_pass(jobs_of(paper, config, on_paper_model=False)):
        try:
            check_jobs(jobs, cache, config)
            checked += [Checked(reading.name, job, len(HEADS)) for job in jobs]
        except SaeError:  # check them one by one, to find the problem
            for job in jobs:
                alone = replace(config, out=folder / "alone" / job.system / job.recipe)
                checked.append(check_alone(reading.name, job, cache, alone))
    return checked


def check_alone(reading: str, job: Job, cache: Path, config: ReproduceConfig) -> Checked:
    try:
        check_jobs([job], cache, config)
    except SaeError as error:
        return Checked(reading, job, getattr(error, "passed", 0), str(error).splitlines()[-1].strip())
    return Checked(reading, job, len(HEADS))


class CheckFailed(SaeError):
    """The problem with a run, and how many of HEADS passed before it."""

    def __init__(self, passed: int, sentence: str) -> None:
        super().__init__(sentence)
        self.passed = passed


def check_jobs(jobs: Sequence[Job], cache: Path, config: ReproduceConfig) -> None:
    """Raises SaeError unless each job builds, trains, resumes to the same weights and loads."""
    runs = train(jobs, cache, config)
    weights = [weights_of(run) for run in runs]
    for run in runs:
        for name in ("sae.json", "sae.safetensors"):
            (run.folder / name).unlink()
        shutil.rmtree(run.folder / "checkpoints" / f"step-{STEPS:08d}")
        if not (run.folder / "checkpoints" / f"step-{STEPS - 1:08d}" / "state.json").exists():
            raise CheckFailed(2, f"{run.name} has no checkpoint of step {STEPS - 1} to resume from")
    rows_RD = torch.from_numpy(Cache(cache).read_chunk(f"layer_{LAYER:02d}", 0).copy()).view(torch.bfloat16).float()
    for run, whole in zip(train(jobs, cache, config), weights, strict=True):
        if weights_of(run) != whole:
            raise CheckFailed(2, f"{run.name} has different weights after it is resumed")
        sae = run.load()
        recon_RD = sae.decode(sae.encode(rows_RD), rows_RD)
        if recon_RD.shape != rows_RD.shape or not recon_RD.isfinite().all():
            raise CheckFailed(
                3, f"{run.name} reconstructs rows with shape {tuple(recon_RD.shape)} or with values that are not finite"
            )


def train(jobs: Sequence[Job], cache: Path, config: ReproduceConfig) -> list[Run]:
    """Plan a pass and train its unfinished runs. The first step has a checkpoint."""
    plan = plan_training(replace(train_config(jobs, cache, config), checkpoint_every=STEPS - 1))
    try:
        run_training(TrainPlan(plan.config, plan.runs))
    except SaeError as error:
        raise CheckFailed(1, str(error)) from error
    return plan.runs


def weights_of(run: Run) -> bytes:
    return (run.folder / "sae.safetensors").read_bytes()


def optimization_of(job: Job, d_in: int = 2304) -> Optimization:
    """The optimizer of a job's variant, built at the papers' width without allocating it."""
    recipe = find_recipe(job.recipe)
    sizes = d_in, parse_width(job.width, recipe, d_in), job.steps, job.batch_size or recipe.batch_size
    with torch.device("meta"):
        options = parse_options(job.options, [recipe])[recipe.name]
        return recipe.make(RunConfig(*sizes, paper_exact=job.paper_exact, variance=24.0), options).optimization


def describe_optimization(settings: Optimization, steps: int) -> str:
    decay = f"decay from {settings.decay_start:.0%}" if settings.decay_start < 1 else "no decay"
    parts = [f"lr {settings.lr:g}", f"warm-up {settings.warmup_steps(steps)}", decay]
    if settings.weight_decay:
        parts.append(f"wd {settings.weight_decay:g} {settings.weight_decay_form}, {settings.weight_decay_on}")
    parts.append(f"clip {'none' if settings.clip is None else f'{settings.clip:g}'}")
    if (share := settings.peak_share(steps)) < 1:
        parts.append(f"reaches {share:.0%}")
    return ", ".join([*parts, f"b_dec {settings.b_dec_init}", settings.normalize])


def page(checked: Sequence[tuple[Paper, Sequence[Checked]]]) -> Iterator[str]:
    """The table as Markdown."""
    every = [one for _, ones in checked for one in ones]
    whole = sum(one.passed == len(HEADS) for one in every)
    yield "# Checks of every system of the five papers in every reading\n"
    yield f"{date.today()}, torch {torch.__version__}, on CPU.\n"
    yield "The script checks that every system of the five papers builds, trains, resumes and loads in every"
    yield f"[reading](../../docs/how-to/reproduce.md#readings).{(__doc__ or '').partition('.')[2].rstrip()}\n"
    yield f"{whole} of {len(every)} combinations of reading, system and recipe pass all four checks.\n"
    heads = ["paper", "reading", "system", "recipe", "width", "steps x batch", "optimizer", *HEADS]
    yield f"| {' | '.join(heads)} |\n|{' --- |' * len(heads)}"
    for paper, ones in checked:
        home = ReproduceConfig([paper.number], reading=ones[0].reading)
        at_home = {(job.system, job.recipe): job for job in jobs_of(paper, home, on_paper_model=True)}
        for one in ones:
            job = at_home[one.job.system, one.job.recipe]
            marks = ["yes"] * one.passed + [f"**no**: {one.problem}", *[""] * len(HEADS)]
            settings = describe_optimization(optimization_of(job), job.steps)
            sizes = [job.width or "", f"{job.steps:,} x {job.batch_size:,}", settings]
            yield f"| {' | '.join([paper.number, one.reading, job.system, job.recipe, *sizes, *marks[: len(HEADS)]])} |"


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        cache = random_cache(Path(temporary) / "cache").folder
        checked = [
            (paper, check_reading(paper, reading, cache, Path(temporary) / f"{paper.number}-{reading.name}"))
            for paper, reading in pairs()
        ]
    for line in page(checked):
        print(line)
    if any(one.passed < len(HEADS) for _, ones in checked for one in ones):
        sys.exit(1)


if __name__ == "__main__":
    main()
