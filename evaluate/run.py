"""Runs -> result files and a table. Runs of one model and one text share every pass of the model."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from ..cache.device import best_device, best_dtype
from ..cache.errors import DamagedError, SaeError, UsageError, did_you_mean
from ..cache.files import digest_of, read_json
from ..cache.layout import home
from ..cache.reader import Cache, caches, model_name
from ..harvest.model import find_model, load_model, load_tokenizer
from ..train.sae import SAE, load_sae, spec_of
from .absorption import Absorption
from .autointerp import Autointerp
from .bench import Bench, Shelf
from .core import Core
from .metric import Metric, Outcome, Progress, Result, Subject, check_mode, read_result, write_result
from .references import references
from .scr import Scr, ScrStdlib
from .sparse_probing import SparseProbing, SparseProbingStdlib
from .tpp import Tpp, TppStdlib
from .unlearning import Unlearning

KINDS = (Core, Absorption, SparseProbing, SparseProbingStdlib, Scr, ScrStdlib, Tpp, TppStdlib, Unlearning, Autointerp)
METRICS: dict[str, type[Metric]] = {metric.name: metric for metric in KINDS}
ASKED_FOR = ("autointerp",)  # it costs money: in no suite, unless an option of it is set
SUITES = {
    "quick": ("core", "absorption", "sparse_probing_stdlib", "scr_stdlib", "tpp_stdlib"),
    "full": tuple(name for name in METRICS if name not in ASKED_FOR),
}
HUB_COMMIT = 40  # hexadecimal digits; a folder's revision is a sha256, of 64


@dataclass(frozen=True)
class Request:
    """What a user can ask of an evaluation."""

    runs: Sequence[Path]
    suite: str = "quick"
    tokens: int | None = None  # None: as many as SAEBench reads, or all of the held-out text
    mode: str = "0.6.0"
    model: str | None = None
    options: Sequence[str] = ()  # metric.option=value
    data: Path | None = None  # where datasets are looked for before the Hub
    force: bool = False
    references: bool = True
    device: str = "auto"
    dtype: str = "auto"


@dataclass
class Row:
    """One line of the tables: a run, or something to read it against."""

    name: str
    subject: Subject
    folder: Path  # its results are in evaluations/ there
    record: dict[str, Any]  # sae.json, or what the reference is
    weights: str  # the digest of all that encodes and decodes, and of the layer
    results: dict[str, Result] = field(default_factory=dict)  # by metric
    failed: dict[str, SaeError] = field(default_factory=dict)  # why a metric has no result


Stage = Callable[[str], AbstractContextManager[Progress]]  # announces a metric, and takes what it tells of its work


@contextlib.contextmanager
def silent(title: str) -> Iterator[Progress]:
    yield lambda done, total, note="": None


def metrics_of(suite: str, options: Sequence[str] = ()) -> list[Metric]:
    """The metrics of a suite, or of a list of names; `options` are `metric.option=value`. Names every mistake at once."""
    names = SUITES.get(suite) or tuple(dict.fromkeys(name for part in suite.split(",") if (name := part.strip())))
    if not names:
        raise UsageError(f"--suite {suite!r} names no metric; there are {', '.join([*SUITES, *METRICS])}.")
    names += tuple(name for name in ASKED_FOR if suite in SUITES and any(o.startswith(f"{name}.") for o in options))
    wrong = [
        f"--suite {suite}: there is no metric {name}{did_you_mean(name, [*METRICS, *SUITES])}"
        for name in names
        if name not in METRICS
    ]
    asked: dict[str, dict[str, Any]] = {name: {} for name in names}
    for option in options:
        metric, _, rest = option.partition(".")
        name, equals, text = rest.partition("=")
        known = {f.name: f.default for f in fields(METRICS[metric])} if metric in METRICS else {}
        if not equals or metric not in asked or name not in known:
            wrong.append(
                f"--set {option}: write metric.option=value, with a metric of this suite"
                + (f" and an option of {metric}{did_you_mean(name, known)}" if known and name not in known else ".")
            )
            continue
        try:
            asked[metric][name] = value_like(known[name], text)
        except ValueError:
            wrong.append(f"--set {option}: {text!r} is no value for {name}, which is {known[name]!r} by default.")
    if wrong:
        raise UsageError("\n".join(wrong))
    return [METRICS[name](**asked[name]) for name in names]


def value_like(default: Any, text: str) -> Any:
    """The text as a value of the default's kind; of a tuple's elements (of an empty one: int), with commas between."""
    if isinstance(default, tuple):
        return tuple(value_like(default[0] if default else 0, part.strip()) for part in text.split(","))
    if isinstance(default, bool):
        return {"true": True, "false": False}[text.lower()] if text.lower() in ("true", "false") else int("")
    return type(default)(text)


def evaluate(request: Request, stage: Stage = silent) -> list[Row]:
    """Evaluate every run, writing a result file for each metric; earlier results with the same settings are kept.

    A metric that cannot be measured leaves its sentence in `Row.failed`, and the others are measured all the same. When
    nothing can be measured at all, the sentences are raised, with the exit code of the first.
    """
    check_mode(request.mode)
    metrics = metrics_of(request.suite, request.options)
    if not request.runs:
        raise UsageError("Name the runs to evaluate: sae evaluate runs/...")
    if request.tokens is not None and request.tokens <= 0:
        raise UsageError(f"--tokens {request.tokens} is not positive. Give how many to evaluate on, such as 20k.")
    if request.data is not None and not request.data.is_dir():
        raise UsageError(
            f"--data {request.data} is no folder. Give one that holds <name on the Hub>/<split>.jsonl or .parquet."
        )
    begun = unfinished(request.runs)
    groups: dict[Path, list[Row]] = {}
    for folder, given in {path.resolve(): path for path in request.runs}.items():
        if given in begun and len(begun) < len(request.runs):
            continue  # among others; by itself it gets its sentence from load_sae
        sae = load_sae(given)
        cache = cache_of(given, sae, request.model)
        if (site := sae.origin.get("site", "resid_post")) != "resid_post":
            raise UsageError(
                f"{given} was trained on {site}; only SAEs of resid_post can be spliced into the model yet."
            )
        record = read_json(folder / "sae.json", "sha256")
        # Not the tensors alone: k of a TopK is none of them, and one SAE can stand behind another layer.
        weights = digest_of([spec_of(sae), record["sha256"], sae.origin["layer"]])
        row = Row(folder.name, Subject(sae, sae.origin["layer"]), folder, record, weights)
        groups.setdefault(cache.folder, []).append(row)
    rows: list[Row] = []
    for cache_folder, group in groups.items():
        cache = Cache(cache_folder)
        bench = make_bench(request, cache)
        blocks = len(bench.model.blocks)
        for row in group:
            if not 0 <= row.subject.layer < blocks:
                raise DamagedError(
                    f"{row.folder}/sae.json says layer {row.subject.layer}, but {cache.identity['model']['name']} has "
                    f"layers 0 to {blocks - 1}. It was overwritten; put the right layer back."
                )
            row.subject.sae.to(bench.model.device)
        if request.references:
            group += beside(bench, cache, group)
        for metric in metrics:
            measure(metric, bench, group, request.force, stage)
        rows += [row for row in group if row.results or not row.subject.reference]
    failures = [error for row in rows for error in row.failed.values() if not row.subject.reference]
    if failures and not any(row.results for row in rows):
        raise type(failures[0])("\n".join(dict.fromkeys(map(str, failures))))
    return rows


def beside(bench: Bench, cache: Cache, group: Sequence[Row]) -> list[Row]:
    """Reference rows for each layer of a group; their results are kept on the shelf."""
    rows = []
    for layer in sorted({row.subject.layer for row in group}):
        own = [row.subject for row in group if row.subject.layer == layer]
        for name, subject in references(bench, cache.contexts(held_out=False), own).items():
            width = getattr(subject.sae, "d_sae", None)
            record = {"reference": name, "layer": layer, "d_sae": width, "text": cache.fingerprint, **bench.identity}
            digest = digest_of(record)
            folder = bench.shelf.folder / "references" / f"{name}-L{layer}-{digest[:8]}"
            rows.append(Row(name, subject, folder, record, digest))
    return rows


def unfinished(runs: Sequence[Path]) -> list[Path]:
    """Run folders that were begun and have no trained SAE yet."""
    return [run for run in runs if (run / "run.json").exists() and not (run / "sae.json").exists()]


def cache_of(folder: Path, sae: SAE, model: str | None) -> Cache:
    """The cache that a run was trained on, wherever it stands now: it holds the text that training did not see."""
    match sae.origin:
        case {"model": {"name": str(trained_on)}, "layer": int(), "cache": str(), "fingerprint": str()}:
            pass
        case _:
            raise UsageError(
                f"{folder} does not say what it was trained on (`origin` in sae.json), so nothing can be read."
            )
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
    attention = cache.identity["attention"]
    tokenizer = load_tokenizer(source)
    special = {tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id} - {None}
    return Bench(
        load_model(source, config, dtype=dtype, device=device, attention=attention),
        tokenizer,
        contexts,
        cache.identity["skip"]
        or sorted(special),  # SAEBench never counts them, and a harvest with --keep-special has them
        request.mode,
        identity={"model": source.name, "revision": source.revision, "attention": attention, "llm_dtype": dtype},
        text={"text": cache.fingerprint, "contexts": len(contexts)},
        shelf=Shelf(home() / "activations" / "evaluation"),
        data=request.data,
    )


def measure(metric: Metric, bench: Bench, rows: Sequence[Row], force: bool, stage: Stage) -> None:
    """One metric for the rows that lack it, all in one pass."""
    try:
        settings = metric.settings(bench)
    except SaeError as error:  # something that the metric reads is not there
        for row in rows:
            row.failed[metric.name] = error
        return
    if not force:
        for row in rows:
            if earlier := read_result(row.folder, metric, {**settings, "weights": row.weights}):
                row.results[metric.name] = earlier
    todo = [row for row in rows if metric.name not in row.results]
    if not todo:
        return
    outcomes: Sequence[Outcome]
    try:
        with stage(metric.name) as progress:
            outcomes = metric.measure(bench, [row.subject for row in todo], progress)
    except SaeError as error:
        outcomes = [error] * len(todo)
    except torch.OutOfMemoryError as error:
        outcomes = [SaeError(f"The device has too little memory: {error}")] * len(todo)
    for row, outcome in zip(todo, outcomes, strict=True):
        if isinstance(outcome, SaeError):
            row.failed[metric.name] = outcome
        else:
            row.results[metric.name] = outcome
            write_result(row.folder, metric, {**settings, "weights": row.weights}, outcome, row.record)


def flat(row: Row) -> dict[str, Any]:
    """A row as one flat dictionary: metric.category.name -> number; what failed, under its metric's name."""
    values = {
        f"{m}.{c}.{n}": v for m, r in row.results.items() for c, group in r.metrics.items() for n, v in group.items()
    }
    return {"name": row.name, "layer": row.subject.layer, **values, **{m: str(e) for m, e in row.failed.items()}}
