"""The jobs of the comparison, made from design.toml, in the order in which they are run.

A job is one run with its evaluation, or the stability of the seeds of a system. Its settings can depend on the records
of other jobs: its learning rate on those of the tuning jobs, its L0 on the L0 of another system. `resolve` looks them
up.
"""

import functools
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

HERE = Path(__file__).resolve().parent
PARTS = ("tune", "middle", "own", "beside", "frontier", "also")
LIKE_L0 = 1.1  # largest ratio of two L0 that are compared
THREADS_GAIN = 1.8  # speed-up of two threads, for estimates

Records = Mapping[str, Mapping[str, Any]]  # id of a job -> its record, for each job with a valid record


@dataclass(frozen=True)
class Job:
    """One run; or, if `part` is "stability", the comparison of the seeds of a system.

    Attributes:
        options: options of the recipe, as for --set.
        l0: the target; None: the recipe's own.
        rate: the learning rate; None: that of the recipe or reading.
        rate_of: the system whose tuned rate it uses; "": none.
        l0_of: the part and system whose mean L0 is its target.
        same_as: the job is run only if seed 0 differs from seed 0 of this system.
        of: for stability, the part that the compared runs belong to.
        seeds: for stability, the seeds of the compared runs.
    """

    model: str
    part: str
    block: str
    system: str
    layer: int
    seed: int
    recipe: str = ""
    width: str = "1x"
    options: tuple[str, ...] = ()
    paper_exact: bool = False
    steps: int = 0
    batch_size: int = 0
    l0: float | None = None
    rate: float | None = None
    rate_of: str = ""
    l0_of: tuple[str, str] | None = None
    same_as: str = ""
    of: str = ""
    seeds: tuple[int, ...] = ()
    probes: bool = False
    seconds: float = 0.0  # estimated, with one thread

    @property
    def id(self) -> str:
        place = f"{self.model}/{self.part}/{self.system}"
        if self.part == "stability":
            return f"{place}/{self.of}-L{self.layer}"
        rate = f"-lr{self.rate:g}" if self.part == "tune" else ""
        l0 = f"-l0_{self.l0:g}" if self.part == "frontier" else ""
        return f"{place}/L{self.layer}{rate}{l0}-s{self.seed}"

    @property
    def runs(self) -> list[str]:
        """For stability, the ids of the jobs that it compares."""
        return [f"{self.model}/{self.of}/{self.system}/L{self.layer}-s{seed}" for seed in self.seeds]

    @property
    def unit(self) -> tuple[Any, ...]:
        """Jobs with the same unit are trained in one pass."""
        seed = None if self.part == "stability" else self.seed
        return self.model, self.part, self.block, self.layer, seed, self.batch_size, self.steps, self.l0_of is not None

    @property
    def stretch(self) -> tuple[Any, ...]:
        """Jobs with the same stretch are run one after the other without other jobs in between: the seeds of a block,
        and their stability."""
        return self.model, self.of or self.part, self.block, self.layer

    def identity(self) -> dict[str, Any]:
        """The fields that decide the result, once rate and L0 are known."""
        names = (
            "model", "part", "system", "layer", "seed", "recipe", "width", "options", "paper_exact", "steps",
            "batch_size", "l0", "rate", "of", "probes",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}


def gain(threads: int) -> float:
    """The speed-up of several threads over one, for estimates."""
    return THREADS_GAIN if threads > 1 else 1.0


def load_design(path: Path = HERE / "design.toml") -> dict[str, Any]:
    with open(path, "rb") as file:
        return tomllib.load(file)


def make_jobs(design: Mapping[str, Any]) -> list[Job]:
    """All jobs in order. In a job, `rate_of`, `l0_of` and `same_as` name the systems on whose records it depends."""
    return [job for model in design["model"] for job in jobs_of_model(design, model)]


def jobs_of_model(design: Mapping[str, Any], model: str) -> Iterator[Job]:
    fixed, about = design["fixed"], design["model"][model]
    systems = {
        name: one
        for block in fixed["blocks"]
        for name, one in design["system"].items()
        if one["block"] == block and model in one.get("models", [model])
    }
    main = about["main_layer"]
    maker = Maker(design, model)
    for name, one in systems.items():
        if "rate_of" not in one and "l0_of" not in one:
            for rate in fixed["rates"]:
                yield maker.job("tune", name, main, fixed["tune_seed"], steps=fixed["tune_steps"], rate=rate)
    yield from maker.seeds_and_stability("middle", systems, [main])
    yield from maker.own()
    for l0 in about["frontier"]:
        for name, one in systems.items():
            if one.get("frontier"):
                yield maker.job("frontier", name, main, 0, l0=l0)
    yield from maker.seeds_and_stability("middle", systems, [layer for layer in about["layers"] if layer != main])
    for also in design.get("also", []):
        if also["model"] == model:
            chosen = {name: systems[name] | {"block": "also"} for name in also["systems"]}
            yield from maker.seeds_and_stability("also", chosen, also["layers"])


class Maker:
    """Creates the jobs for one model."""

    def __init__(self, design: Mapping[str, Any], model: str) -> None:
        self.design, self.model = design, model
        self.fixed, self.about = design["fixed"], design["model"][model]
        self.place = list(design["model"]).index(model)  # in `ms`

    def seconds(self, ms: Sequence[float], steps: int, kind: str, probes: bool) -> float:
        """The estimated seconds to train and evaluate with one thread."""
        known = self.about["seconds"]
        return ms[self.place] / 1000 * steps + known[kind] + probes * known["probes"]

    def job(self, part: str, name: str, layer: int, seed: int, **changes: Any) -> Job:
        """A job that trains a system of the design."""
        one = self.design["system"][name]
        steps = changes.get("steps", self.fixed["steps"])
        options = one.get("options", {}) | one.get("on", {}).get(self.model, {})
        with_probes = part == "middle" and (self.place > 0 or layer == self.about["main_layer"])
        job = Job(
            self.model, part, one["block"], name, layer, seed, one["recipe"], one.get("width", "1x"),
            tuple(f"{key}={set_value(value)}" for key, value in options.items()),
            steps=steps, batch_size=self.fixed["batch_size"],
            l0=None if one.get("free") or "l0_of" in one else self.about["l0"],
            rate_of="" if part == "tune" else one.get("rate_of", name),
            l0_of=("middle", one["l0_of"]) if "l0_of" in one else None,
            probes=with_probes,
            seconds=self.seconds(one["ms"], steps, "tune" if part == "tune" else "run", with_probes),
        )  # fmt: skip
        if part == "middle" and seed:
            job = replace(job, same_as=one.get("same_as", ""))
        return replace(job, **changes)

    def seeds_and_stability(
        self, part: str, systems: Mapping[str, Mapping[str, Any]], layers: Sequence[int]
    ) -> Iterator[Job]:
        """The jobs, block by block and layer by layer: for each seed the systems of the block, then the stability of
        each system."""
        seeds = self.fixed["seeds"]
        for block in dict.fromkeys(one["block"] for one in systems.values()):
            names = [name for name, one in systems.items() if one["block"] == block]
            for layer in layers:
                for seed in seeds:
                    for name in names:
                        if seed in systems[name].get("seeds", seeds):
                            yield replace(self.job(part, name, layer, seed), block=block)
                for name in names:
                    if len(own_seeds := systems[name].get("seeds", seeds)) > 1:
                        yield Job(
                            self.model, "stability", block, name, layer, 0, of=part, seeds=tuple(own_seeds),
                            same_as=systems[name].get("same_as", ""), seconds=self.about["seconds"]["tune"],
                        )  # fmt: skip

    def own(self) -> Iterator[Job]:
        """The jobs of the papers' own readings, each followed by the systems that are trained at the L0 of that
        reading."""
        layer = self.about["main_layer"]
        for name, one in self.design.get("own", {}).items():
            steps, batch_size = one.get("steps", self.fixed["steps"]), one.get("batch_size", self.fixed["batch_size"])
            recipe, options, exact = reading_options(one["paper"], one["reading"], one["system"])
            seeds, block = one.get("seeds", self.fixed["own_seeds"]), f"own-{one['paper']}"
            for seed in seeds:
                yield Job(
                    self.model, "own", block, name, layer, seed, recipe, one.get("width", "1x"), options, exact,
                    steps, batch_size, seconds=self.seconds(one["ms"], steps, "run", False),
                )  # fmt: skip
            for beside in one.get("beside", []):
                for seed in seeds:
                    job = self.job("beside", beside, layer, seed, l0=None, l0_of=("own", name))
                    yield replace(job, system=f"{name}-{beside}", block=block)


@functools.cache
def reading_options(number: str, reading: str, system: str) -> tuple[str, tuple[str, ...], bool]:
    """The recipe of a paper's system, its options in a reading, and whether the reading uses the paper's settings
    verbatim."""
    from sae.evaluate.papers.parse import load_paper
    from sae.evaluate.papers.report import find_reading
    from sae.workflows.jobs import set_options

    paper = load_paper(number)
    found, one = find_reading(paper, False, reading), paper.systems[system]
    return one.recipes[0], set_options(one.recipes[0], paper, found, one), found.literal


def set_value(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


# --- settings that depend on records ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """The tuned rate of a system.

    Attributes:
        at_end: whether it is the smallest or the largest rate of the grid.
        missed: whether every rate missed the L0 by more than a tenth; if so, the rate is the best of all rates.
    """

    rate: float
    at_end: bool
    missed: bool


def choose_rate(design: Mapping[str, Any], model: str, system: str, records: Records) -> Choice | None:
    """The rate with the highest KL score on the tuning documents; None until all rates have been tried."""
    maker, about = Maker(design, model), design["model"][model]
    found: list[tuple[float, float, bool]] = []
    for rate in design["fixed"]["rates"]:
        job = maker.job(
            "tune", system, about["main_layer"], design["fixed"]["tune_seed"],
            steps=design["fixed"]["tune_steps"], rate=rate,
        )  # fmt: skip
        record = records.get(job.id)
        if record is None:
            return None
        if "failed" not in record:
            kl, l0 = (record["metrics"][name]["value"] for name in ("kl", "l0"))
            found.append((kl, rate, job.l0 is None or 1 / LIKE_L0 <= l0 / job.l0 <= LIKE_L0))
    if not found:
        return None
    kept = [one for one in found if one[2]]
    rate = max(kept or found)[1]
    return Choice(rate, rate in (min(design["fixed"]["rates"]), max(design["fixed"]["rates"])), not kept)


def mean_l0(design: Mapping[str, Any], job: Job, records: Records) -> float | None:
    """The mean L0 of the runs that `l0_of` names, rounded to a tenth, or to a whole number for a recipe that keeps k
    latents."""
    assert job.l0_of is not None
    part, system = job.l0_of
    one = design["own" if part == "own" else "system"][system]
    seeds = one.get("seeds", design["fixed"]["own_seeds" if part == "own" else "seeds"])
    ids = [f"{job.model}/{part}/{system}/L{job.layer}-s{seed}" for seed in seeds]
    values = [records[one]["metrics"]["l0"]["value"] for one in ids if "metrics" in records.get(one, {})]
    if not values or any(one not in records for one in ids):
        return None
    value = mean(values)
    return float(max(1, round(value))) if job.recipe == "topk" else max(0.1, round(value, 1))


def resolve(design: Mapping[str, Any], job: Job, records: Records) -> Job | str:
    """The job with its rate and L0, or a message: what the job waits for, or "same as ..." if it need not be run."""
    if job.same_as:
        ids = [f"{job.model}/{job.of or job.part}/{one}/L{job.layer}-s0" for one in (job.system, job.same_as)]
        if any(one not in records for one in ids):
            return f"waits for seed 0 of {job.system} and {job.same_as}"
        own, other = (records[one].get("weights") for one in ids)
        if own == other:
            return f"same as {job.same_as}, bit for bit"
    if any(one not in records for one in job.runs):
        return "waits for its seeds"
    if job.rate_of:
        choice = choose_rate(design, job.model, job.rate_of, records)
        if choice is None:
            return f"waits for the tuning of {job.rate_of}"
        job = replace(job, rate=choice.rate)
    if job.l0_of:
        l0 = mean_l0(design, job, records)
        if l0 is None:
            return f"waits for the L0 of {job.l0_of[1]}"
        job = replace(job, l0=l0)
    return job
