"""Runs -> result files and a table. Runs of one model and one text share every pass of the model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..cache.device import best_device, best_dtype
from ..cache.errors import UsageError
from ..cache.files import read_json
from ..cache.reader import Cache
from ..harvest.model import find_model, load_model
from ..train.sae import load_sae
from .core import Core
from .metric import Bench, Metric, Result, Subject, check_mode, read_result, write_result
from .references import REFERENCES

METRICS: dict[str, type[Metric]] = {metric.name: metric for metric in (Core,)}
SUITES = {"quick": ("core",), "full": tuple(METRICS)}


@dataclass(frozen=True)
class Request:
    """What a user can ask of an evaluation."""

    runs: Sequence[Path]
    suite: str = "quick"
    tokens: int | None = None  # None: as many as SAEBench reads, or all of the held-out text
    mode: str = "0.6.0"
    model: str | None = None
    force: bool = False
    references: bool = True
    device: str = "auto"
    dtype: str = "auto"


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    layer: int
    results: dict[str, Result]  # by metric


def metrics_of(suite: str) -> list[Metric]:
    """The metrics of a suite, or of a list of names."""
    names = SUITES.get(suite) or tuple(name.strip() for name in suite.split(","))
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise UsageError(
            f"--suite {suite}: there is no metric {unknown[0]!r}. Suites are {', '.join(SUITES)}; metrics are {', '.join(METRICS)}."
        )
    return [METRICS[name]() for name in names]


def evaluate(request: Request, progress: Callable[[int, int], None] = lambda done, total: None) -> list[Row]:
    """Evaluate every run, writing a result file for each metric; earlier results with the same settings are kept."""
    check_mode(request.mode)
    metrics = metrics_of(request.suite)
    if not request.runs:
        raise UsageError("Name the runs to evaluate: sae evaluate runs/...")
    saes = {folder: load_sae(folder) for folder in request.runs}
    groups: dict[tuple[str, str], list[Path]] = {}
    for folder, sae in saes.items():
        model = sae.origin["model"]
        if request.model and request.model != model["name"]:
            raise UsageError(
                f"{folder} was trained on {model['name']}, not on {request.model}. Leave --model out, or evaluate a run of that model."
            )
        groups.setdefault((sae.origin["cache"], model["name"]), []).append(folder)
    rows = []
    for (cache, model_name), folders in groups.items():
        bench = make_bench(request, Cache(cache), model_name)
        subjects = {
            folder: Subject(saes[folder].to(bench.model.device), saes[folder].origin["layer"]) for folder in folders
        }
        rows += evaluate_group(request, metrics, bench, subjects, progress)
    return rows


def make_bench(request: Request, cache: Cache, model_name: str) -> Bench:
    """Load the model that the cache was made with, and the text that the cache held out."""
    device = best_device(request.device)
    known = cache.identity["model"]
    source, config = find_model(
        model_name, known["revision"] if "/" in model_name and len(known["revision"]) == 40 else None
    )
    if source.revision != known["revision"]:
        raise UsageError(
            f"{cache.folder} was harvested from {model_name} at {known['revision'][:12]}, but what is found under that name is {source.revision[:12]}. "
            "Numbers of one would be reported for the other; restore that version, or harvest and train again."
        )
    model = load_model(
        source, config, dtype=best_dtype(request.dtype, device), device=device, attention=cache.identity["attention"]
    )
    contexts = cache.contexts(held_out=True)
    if request.tokens is not None:
        enough = int((contexts.length.cumsum() < request.tokens).sum()) + 1
        contexts = contexts.select(slice(0, enough))
    return Bench(model, contexts, cache.identity["skip"], request.mode)


def evaluate_group(
    request: Request,
    metrics: Sequence[Metric],
    bench: Bench,
    subjects: dict[Path, Subject],
    progress: Callable[[int, int], None],
) -> list[Row]:
    """Every metric on the subjects that lack it, all of them in one pass; reference rows ride along."""
    found: dict[Path, dict[str, Result]] = {folder: {} for folder in subjects}
    extra: dict[tuple[str, int], dict[str, Result]] = {}
    for metric in metrics:
        settings = {**metric.settings(bench), "contexts": len(bench.contexts)}
        todo = {}
        for folder, subject in subjects.items():
            earlier = None if request.force else read_result(folder, metric, settings)
            if earlier is None:
                todo[str(folder)] = subject
            else:
                found[folder][metric.name] = earlier
        if request.references and todo:
            for layer in sorted({subject.layer for subject in subjects.values()}):
                todo |= {
                    f"{name} at {layer}": Subject(make(), layer, make.everywhere) for name, make in REFERENCES.items()
                }
        for name, result in (metric.measure(bench, todo, progress) if todo else {}).items():
            if Path(name) in subjects:
                write_result(Path(name), metric, settings, result, read_json(Path(name) / "sae.json"))
                found[Path(name)][metric.name] = result
            else:
                reference, layer = name.split(" at ")
                extra.setdefault((reference, int(layer)), {})[metric.name] = result
    rows = [Row(folder.name, subjects[folder].layer, results) for folder, results in found.items()]
    return rows + [Row(name, layer, results) for (name, layer), results in extra.items()]


def flat(row: Row) -> dict[str, Any]:
    """A row as one flat dictionary: metric.category.name -> number."""
    values = {
        f"{m}.{c}.{n}": v for m, r in row.results.items() for c, group in r.metrics.items() for n, v in group.items()
    }
    return {"name": row.name, "layer": row.layer, **values}
