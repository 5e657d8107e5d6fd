"""Train and evaluate jobs with the package's own functions, and write their records.

Nothing here trains or measures: runs are planned by `plan_training`, trained in one pass by `run_training`, and
measured by `evaluate_saes`.
"""

import json
import math
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import group_topk  # noqa: F401  (registers its recipe)
import torch
from jobs import Job
from records import Known, write_record
from split_texts import Caches, open_caches

from sae.common.errors import Interrupted, SaeError, UnavailableError
from sae.common.files import digest_of
from sae.evaluate.metrics.base import MetricColumn, MetricResult
from sae.evaluate.metrics.registry import METRICS
from sae.evaluate.rows import EvalRow
from sae.evaluate.run import evaluate_saes
from sae.train.config import TrainConfig
from sae.train.plan import Run, TrainPlan, plan_training
from sae.train.run import run_training
from sae.train.sae import read_sae_record

MEASURES = {  # name in a record -> metric, category, number
    "l0": ("core", "sparsity", "l0"),
    "kl": ("core", "model_behavior_preservation", "kl_div_score"),
    "ce": ("core", "model_performance_preservation", "ce_loss_score"),
    "ev": ("core", "reconstruction_quality", "fve"),
    "alive": ("core", "misc_metrics", "frac_alive"),
    "corr_mean": ("core", "correlation", "mean"),
    "corr_top": ("core", "correlation", "quantile_99.9"),
    "decoder_top": ("core", "dictionary", "decoder_cosine_quantile_99.9"),
    "absorption": ("absorption", "mean", "mean_absorption_fraction_score"),
    "absorption_full": ("absorption", "mean", "mean_full_absorption_score"),
    "splits": ("absorption", "mean", "mean_num_split_features"),
    **{f"probe_k{k}": ("sae_probes", "sae", f"sae_top_{k}_test_auc") for k in (1, 16)},
    **{name: ("stability", "stability", name) for name in ("decoder_pw_mcc", "decoder_pw_mcc_null", "recurring")},
}
BY_UNIT = ("kl", "ev", "absorption", "probe_k1", "probe_k16")
PROBE_KS = (1, 16)
DIGITS = 7


@dataclass
class Bench:
    """The files on this machine that the comparison uses.

    Attributes:
        home: texts, caches and run folders; also SAE_HOME.
        records: folder of the records.
        seed_jobs: the resolved jobs of the seeds that a stability job compares.
        spent: seconds spent on harvests, texts and models in this call, by model.
    """

    design: Mapping[str, Any]
    home: Path
    records: Path
    say: Callable[[str], None]
    commit: str
    seed_jobs: Callable[[Job], Sequence[Job]]
    spent: dict[str, float] = field(default_factory=dict)
    opened: dict[str, tuple[set[int], Caches]] = field(default_factory=dict)

    def caches(self, model: str, layer: int) -> Caches:
        """The caches of a model, which contain at least its main layers and this layer."""
        layers = {*self.design["model"][model]["layers"], layer}
        known = self.opened.get(model)
        if known is None or not layers <= known[0]:
            started = time.monotonic()
            layers |= known[0] if known else set()
            caches = open_caches(self.design, model, sorted(layers), self.home, self.say)
            self.opened[model] = (layers, caches)
            self.spent[model] = self.spent.get(model, 0.0) + time.monotonic() - started
        return self.opened[model][1]

    def run_unit(self, unit: Sequence[Known]) -> list[Path]:
        """Train the jobs of one unit together, evaluate them, and write a record for each. Returns the new files."""
        first = unit[0].job
        caches = self.caches(first.model, first.layer)
        if first.part == "stability":
            return [self.measure_stability(one, caches) for one in unit]
        runs, trained = self.train([one.job for one in unit], caches)
        good = {one.job.id: run for one, run in zip(unit, runs, strict=True) if not run.problem}
        by_id = {one.job.id: one.job for one in unit}
        results, seconds, errors = self.evaluate({name: by_id[name] for name in good}, good, caches)
        return [
            write_record(
                self.records,
                one.job,
                self.content(one, run, results, trained, seconds, caches) | errors.get(one.job.id, {}),
            )
            for one, run in zip(unit, runs, strict=True)
        ]

    def plan(self, job: Job, caches: Caches) -> Run:
        """The run of a job. A finished run is found again in its folder, whose name is derived from
        everything that determines its result."""
        options = list(job.options)
        if job.rate is not None:
            options.append(f"lr={job.rate:g}")
        config = TrainConfig(
            variants=[job.recipe], layers=(job.layer,), seeds=(job.seed,), shuffle_seed=job.seed,
            caches=(caches.train.folder,), steps=job.steps, batch_size=job.batch_size, width=job.width,
            l0=() if job.l0 is None else (job.l0,), paper_exact=job.paper_exact, options=options,
            out=self.home / "runs", device="cpu", precision="float32", checkpoint_every=500,
        )  # fmt: skip
        (run,) = plan_training(config).runs
        return run

    def train(self, jobs: Sequence[Job], caches: Caches) -> tuple[list[Run], float]:
        """Train the runs of jobs in one pass. Returns the runs (those that failed have a `problem`) and the seconds."""
        runs, started = [self.plan(job, caches) for job in jobs], time.monotonic()
        distinct = list({run.folder: run for run in runs}.values())
        plan = TrainPlan(TrainConfig(device="cpu", precision="float32", checkpoint_every=500), distinct)
        try:
            run_training(plan)
        except Interrupted:
            raise
        except SaeError:
            if not any(run.problem for run in distinct):
                raise
        problems = {run.folder: run.problem for run in distinct}
        for run in runs:
            run.problem = problems[run.folder]
        return runs, time.monotonic() - started

    def evaluate(
        self, jobs: Mapping[str, Job], runs: Mapping[str, Run], caches: Caches
    ) -> tuple[dict[str, dict[str, MetricResult]], dict[str, float], dict[str, dict[str, Any]]]:
        """Return three mappings: job id -> the metric results of its run; metric -> the seconds that it took for all
        runs; and job id -> an entry "errors" for the record, which says why the run lacks a metric.

        Raises UnavailableError if data or packages are missing, which another machine may have.
        """
        results: dict[str, dict[str, MetricResult]] = {name: {} for name in runs}
        seconds: dict[str, float] = {}
        errors: dict[str, dict[str, Any]] = {}
        if not runs:
            return results, seconds, errors
        fixed, first = self.design["fixed"], next(iter(jobs.values()))
        tuning = first.part == "tune"
        options = {
            "core": [], "absorption": [f"absorption.words={fixed['absorption_words']}"],
            "sae_probes": [
                f"sae_probes.datasets={','.join(map(str, fixed['datasets']))}",
                f"sae_probes.max_texts={fixed['probe_texts']}", f"sae_probes.ks={','.join(map(str, PROBE_KS))}",
            ],
        }  # fmt: skip
        suites = ["core"] if tuning else ["core", "absorption", *(["sae_probes"] if first.probes else [])]
        saes = {name: run.load() for name, run in runs.items()}
        for suite in suites:
            started = time.monotonic()
            rows = evaluate_saes(
                saes, cache=caches.tune if tuning else caches.test, layer=first.layer, suite=suite,
                tokens=fixed["tuning_tokens" if tuning else "test_tokens"], options=options[suite], references=False,
                device="cpu", dtype="float32",
            )  # fmt: skip
            seconds[suite] = time.monotonic() - started
            for row in rows:
                try:
                    results[row.name] |= found(row, suite)
                except UnavailableError:
                    raise
                except SaeError as error:
                    errors.setdefault(row.name, {"errors": {}})["errors"][suite] = str(error)
        return results, seconds, errors

    def measure_stability(self, one: Known, caches: Caches) -> Path:
        """Measure the stability of the seeds of a system. A run whose files are not on this machine is trained
        again."""
        job, started = one.job, time.monotonic()
        runs, _ = self.train(self.seed_jobs(job), caches)
        content = self.base(one, caches)
        good = [run for run in runs if not run.problem]
        if len(good) < 2:
            content["failed"] = "fewer than two of its runs have finished"
        else:
            rows = evaluate_saes(
                {run.name: run.load() for run in good}, cache=caches.test, layer=job.layer, suite="stability",
                systems={run.name: job.system for run in good}, references=False, device="cpu", dtype="float32",
            )  # fmt: skip
            by_seed = [measures(found(row, "stability")) for row in rows]
            content |= {
                "seeds": {str(run.seed): weights_digest(run) for run in good},
                "metrics": {name: [one[name]["value"] for one in by_seed] for name in by_seed[0]},
            }
        content["seconds"] = {"all": round(time.monotonic() - started, 1)}
        return write_record(self.records, job, content)

    def base(self, one: Known, caches: Caches) -> dict[str, Any]:
        """The fields that every record has."""
        return {
            "id": one.job.id, "digest": one.digest, "job": one.job.identity(), "date": date.today().isoformat(),
            "commit": self.commit, "versions": {name: version(name) for name in ("torch", "numpy", "transformers")}
            | {"python": platform.python_version()},
            "caches": caches.record(), "cpu": cpu_name(), "threads": torch.get_num_threads(),
        }  # fmt: skip

    def content(
        self, one: Known, run: Run, results: Mapping[str, Mapping[str, MetricResult]], trained: float,
        seconds: Mapping[str, float], caches: Caches,
    ) -> dict[str, Any]:  # fmt: skip
        """The record of a run. The seconds of the unit are divided equally among its runs."""
        content = self.base(one, caches)
        count = max(1, len(results))
        shared = {name: round(value / count, 1) for name, value in {"train": trained, **seconds}.items()}
        content |= {"d_sae": run.config.d_sae, "shared_by": count, "seconds": shared}
        if run.problem:
            return content | {"failed": run.problem}
        measured = results[one.job.id]
        return content | {
            "weights": weights_digest(run), "metrics": measures(measured), "units": unit_values(measured),
            "training": last_metrics(run), "flags": [flag for one in measured.values() for flag in one.flags][:6],
        }  # fmt: skip


def found(row: EvalRow, suite: str) -> dict[str, MetricResult]:
    """The result of a metric, computed without outlier rows. Raises the metric's error if it could not be measured."""
    if suite in row.errors:
        raise row.errors[suite]
    return {suite: row.results[suite].sound}


def measures(results: Mapping[str, MetricResult]) -> dict[str, dict[str, float | None]]:
    """The value of each measure, and its interval over the text."""
    values: dict[str, dict[str, float | None]] = {}
    for name, (metric, category, number) in MEASURES.items():
        if metric in results:
            value = results[metric].metrics.get(category, {}).get(number)
            low, high = results[metric].intervals.get(category, {}).get(number) or (None, None)
            values[name] = {"value": rounded(value), "low": rounded(low), "high": rounded(high)}
    return values


def unit_values(results: Mapping[str, MetricResult]) -> dict[str, dict[str, float]]:
    """Values by document, letter or data set, for comparisons of two runs."""
    values = {}
    for name in BY_UNIT:
        metric, category, number = MEASURES[name]
        if metric in results:
            by_unit = METRICS[metric].values_by_unit(results[metric], MetricColumn("", category, number)).values
            if metric == "core":
                # A unit is named "<digest of the text> <number>". The number suffices, since a record names the caches.
                by_unit = {unit.rsplit(" ", 1)[-1]: value for unit, value in by_unit.items()}
            values[name] = {unit: float(f"{value:.6g}") for unit, value in by_unit.items()}
    return values


def last_metrics(run: Run) -> dict[str, float]:
    """The last line of metrics.jsonl: L0, losses, and the counts of the mechanisms."""
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    return {key: value for key, value in json.loads(lines[-1]).items() if isinstance(value, int | float)}


def rounded(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.{DIGITS}g}")


def weights_digest(run: Run) -> str:
    """A digest that is equal for two runs only if their SAEs are equal bit for bit."""
    sae = read_sae_record(run.folder)
    return digest_of({key: sae[key] for key in ("sha256", "activation", "pre_bias")})[:16]  # type: ignore[literal-required]


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
