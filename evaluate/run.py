"""Runs -> result files and a table. Runs of one model and one text share every pass of the model."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..cache.device import best_device, best_dtype
from ..cache.errors import UsageError
from ..cache.files import read_json
from ..cache.reader import Cache, caches, model_name
from ..harvest.model import find_model, load_model
from ..train.sae import SAE, load_sae
from .core import Core
from .metric import Bench, Metric, Result, Subject, check_mode, read_result, write_result
from .references import REFERENCES

METRICS: dict[str, type[Metric]] = {metric.name: metric for metric in (Core,)}
SUITES = {"quick": ("core",), "full": tuple(METRICS)}
HUB_COMMIT = 40  # hexadecimal digits; a folder's revision is a sha256, of 64


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


@dataclass
class Row:
    """One line of the table: a run, or something to read it against (without a folder)."""

    name: str
    subject: Subject
    folder: Path | None = None
    results: dict[str, Result] = field(default_factory=dict)  # by metric


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
    if request.tokens is not None and request.tokens <= 0:
        raise UsageError(f"--tokens {request.tokens} is not positive. Give how many to evaluate on, such as 20k.")
    begun = unfinished(request.runs)
    groups: dict[Path, list[Row]] = {}
    for folder, given in {path.resolve(): path for path in request.runs}.items():
        if given in begun and len(begun) < len(request.runs):
            continue  # among others; by itself it gets its sentence from load_sae
        sae = load_sae(given)
        if (site := sae.origin.get("site", "resid_post")) != "resid_post":
            raise UsageError(
                f"{given} was trained on {site}; only SAEs of resid_post can be spliced into the model yet."
            )
        cache = cache_of(given, sae, request.model)
        groups.setdefault(cache.folder, []).append(Row(folder.name, Subject(sae, sae.origin["layer"]), folder))
    rows = []
    for cache_folder, group in groups.items():
        bench = make_bench(request, Cache(cache_folder))
        for row in group:
            row.subject.sae.to(bench.model.device)
        if request.references:
            layers = sorted({row.subject.layer for row in group})
            group += [
                Row(kind.name, Subject(kind(), layer, kind.everywhere)) for layer in layers for kind in REFERENCES
            ]
        for metric in metrics:
            measure(metric, bench, group, request.force, progress)
        rows += [row for row in group if row.results]
    return rows


def unfinished(runs: Sequence[Path]) -> list[Path]:
    """Run folders that were begun and have no trained SAE yet."""
    return [run for run in runs if (run / "run.json").exists() and not (run / "sae.json").exists()]


def cache_of(folder: Path, sae: SAE, model: str | None) -> Cache:
    """The cache that a run was trained on, wherever it stands now: it holds the text that training did not see."""
    if not sae.origin.keys() >= {"model", "layer", "cache", "fingerprint"}:
        raise UsageError(
            f"{folder} does not say what it was trained on (`origin` in sae.json), so nothing can be read."
        )
    trained_on = sae.origin["model"]["name"]
    if model and model_name(model) != trained_on:
        raise UsageError(
            f"{folder} was trained on {trained_on}, not on {model}. Leave --model out, or evaluate a run of that model."
        )
    recorded = Path(sae.origin["cache"])
    opened = [cache for cache in caches().values() if isinstance(cache, Cache)]
    candidates = ([Cache(recorded)] if (recorded / "zarr.json").exists() else []) + opened
    for cache in candidates:
        if cache.fingerprint == sae.origin["fingerprint"]:
            return cache
    raise UsageError(
        f"The cache that {folder} was trained on is gone: it was {recorded}, and held the text to evaluate on. "
        f"Put it back, or under activations/, or make it again with the same `sae harvest --model {trained_on}`."
    )


def make_bench(request: Request, cache: Cache) -> Bench:
    """Load the model that the cache was made with, and the text that the cache held out."""
    name, revision = cache.identity["model"]["name"], cache.identity["model"]["revision"]
    source, config = find_model(name, revision if len(revision) == HUB_COMMIT else None)
    if source.revision != revision:
        raise UsageError(
            f"{cache.folder} was harvested from {name} at {revision[:12]}, but what is found under that name is {source.revision[:12]}. "
            "Numbers of one would be reported for the other; restore that version, or harvest and train again."
        )
    contexts = cache.contexts(held_out=True)
    if not len(contexts):
        raise UsageError(
            f"{cache.folder} holds no held-out text to evaluate on. Harvest again with --held-out above 0, or more text."
        )
    if request.tokens is not None:
        contexts = contexts.select(slice(0, 1 + int((contexts.length.cumsum() < request.tokens).sum())))
    device = best_device(request.device)
    dtype = best_dtype(request.dtype, device)
    model = load_model(source, config, dtype=dtype, device=device, attention=cache.identity["attention"])
    text = {"llm_dtype": dtype, "text": cache.fingerprint, "contexts": len(contexts)}
    return Bench(model, contexts, cache.identity["skip"], {"mode": request.mode, **text})


def measure(
    metric: Metric, bench: Bench, rows: Sequence[Row], force: bool, progress: Callable[[int, int], None]
) -> None:
    """One metric for the rows that lack it, all in one pass. Rows without a folder ride along when there is a pass."""
    if not force:
        for row in rows:
            earlier = row.folder and read_result(row.folder, metric, settings_of(metric, bench, row.folder))
            if earlier:
                row.results[metric.name] = earlier
    todo = [row for row in rows if metric.name not in row.results]
    if any(row.folder for row in todo):
        for row, result in zip(todo, metric.measure(bench, [row.subject for row in todo], progress), strict=True):
            row.results[metric.name] = result
            if row.folder:
                settings = settings_of(metric, bench, row.folder)
                write_result(row.folder, metric, settings, result, read_json(row.folder / "sae.json"))


def settings_of(metric: Metric, bench: Bench, folder: Path) -> dict[str, Any]:
    """Everything that decides a result: a file with other settings is of another measurement."""
    with (folder / "sae.safetensors").open("rb") as file:
        weights = hashlib.file_digest(file, "sha256").hexdigest()
    return {**asdict(metric), **bench.settings, "weights": weights}  # type: ignore[call-overload]


def flat(row: Row) -> dict[str, Any]:
    """A row as one flat dictionary: metric.category.name -> number."""
    values = {
        f"{m}.{c}.{n}": v for m, r in row.results.items() for c, group in r.metrics.items() for n, v in group.items()
    }
    return {"name": row.name, "layer": row.subject.layer, **values}
