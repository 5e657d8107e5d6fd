"""What an evaluation will do, found before anything is measured: which runs, on what text, what of it is kept already.

Everything that can be refused is refused here, and no model has been loaded.
"""

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..cache.reader import Cache, is_ring, list_caches, model_name
from ..common.device import best_device, best_dtype
from ..common.errors import DamagedError, SaeError, UnavailableError, UsageError
from ..common.files import digest_of, os_error, read_json, sae_home
from ..common.formatting import format_bytes
from ..harvest.model import LanguageModel, ModelSource, find_model, load_model, load_tokenizer
from ..train.sae import SAE, load_sae, sae_spec
from .artifacts import ArtifactCache, remove_stale_temporaries
from .context import EvalContext
from .metrics.base import EvalTarget, Metric, MetricResult, check_mode
from .metrics.registry import metrics_of_suite
from .results import read_result

HUB_COMMIT_LENGTH = 40  # hexadecimal digits; a folder's revision is a sha256, of 64
RESULT_BYTES, RESULT_BYTES_PER_LATENT = 1 << 20, 1024  # bytes that have to be free for the results of a run


@dataclass(frozen=True)
class EvaluateConfig:
    """What a user can ask of an evaluation."""

    runs: Sequence[Path]
    suite: str = "quick"
    tokens: int | None = None  # None: as many as SAEBench reads, or all of the held-out text
    mode: str = "0.6.0"
    model: str | None = None
    cache: Path | None = None  # whose held-out text is read; None: that of the cache that a run was trained on
    options: Sequence[str] = ()  # metric.option=value
    data: Path | None = None  # where datasets are looked for before the Hub
    force: bool = False
    references: bool = True
    device: str = "auto"
    dtype: str = "auto"


@dataclass
class EvalRow:
    """One line of the tables: a run, an SAE that Python gave, or something to read it against."""

    name: str
    target: EvalTarget
    folder: Path | None = None  # its results are in evaluations/ there; of an object, nowhere
    record: dict[str, Any] = field(default_factory=dict)  # sae.json, or what the reference is
    weights: str = ""  # the digest of all that encodes and decodes, and of the layer
    results: dict[str, MetricResult] = field(default_factory=dict)  # by metric
    failed: dict[str, SaeError] = field(default_factory=dict)  # why a metric has no result

    def flat(self) -> dict[str, Any]:
        """One flat dictionary: metric.category.name -> number or None; what failed, under its metric's name."""
        values = {
            f"{metric}.{category}.{name}": value
            for metric, result in self.results.items()
            for category, group in result.metrics.items()
            for name, value in group.items()
        }
        return {"name": self.name, "layer": self.target.layer, **values, **{m: str(e) for m, e in self.failed.items()}}


@dataclass
class EvalGroup:
    """The rows of one cache: they share every pass of the model. `settings` are of the metrics that can be measured."""

    cache: Cache
    ctx: EvalContext
    rows: list[EvalRow]
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)

    def todo(self, metric: str, rows: Sequence[EvalRow] | None = None) -> list[EvalRow]:
        """The rows that lack a metric, and for which it has not failed."""
        return [r for r in (self.rows if rows is None else rows) if metric not in r.results and metric not in r.failed]


@dataclass
class EvaluatePlan:
    request: EvaluateConfig
    metrics: list[Metric]
    groups: list[EvalGroup]
    artifacts: ArtifactCache
    refused: dict[Path, SaeError] = field(default_factory=dict)  # runs that cannot be evaluated
    notes: list[str] = field(default_factory=list)

    @property
    def rows(self) -> list[EvalRow]:
        return [row for group in self.groups for row in group.rows]


def plan_evaluation(request: EvaluateConfig) -> EvaluatePlan:
    """Open the runs, find their text, and see what was measured with the same settings before.

    A run that cannot be evaluated is in `Plan.refused`, a metric that cannot be measured in `Row.failed`; when nothing
    is left to measure or to show, that is raised.
    """
    metrics, device, dtype = resolve_config(request)
    if not request.runs:
        raise UsageError("Name the runs to evaluate: sae evaluate runs/...")
    found = EvaluatePlan(request, metrics, [], ArtifactCache(sae_home() / "activations" / "evaluation"))
    begun, here = unfinished_runs(request.runs), list_caches()
    rows: dict[Path, list[EvalRow]] = {}
    for folder, given in {path.resolve(): path for path in request.runs}.items():
        if given in begun and len(begun) < len(request.runs):
            continue  # among others; by itself it gets its sentence from load_sae
        try:
            row, cache = load_run(given, folder, request, here, device)
        except SaeError as error:
            found.refused[folder] = error
            continue
        rows.setdefault(cache.folder, []).append(row)
        if request.cache and row.record["origin"].get("fingerprint") not in (None, cache.fingerprint):
            found.notes.append(f"{given} was trained on another cache than {cache.folder}: it may have seen that text.")
    load = model_loader()
    for cache_folder, own in rows.items():
        cache = Cache(cache_folder)
        try:
            group = EvalGroup(cache, make_context(request, cache, device, dtype, load), own)
        except SaeError as error:
            found.refused |= dict.fromkeys((row.folder for row in own if row.folder), error)
            continue
        check_group(found, group)
        if group.rows:
            found.groups.append(group)
    raise_if_nothing_to_do(found)
    if any(group.todo(metric.name) for group in found.groups for metric in metrics):
        try:
            check_writable(found.artifacts.folder, 0)
        except UnavailableError as error:
            raise UnavailableError(
                f"{error} What no SAE changes is kept there; SAE_HOME=... names another home."
            ) from error
        remove_stale_temporaries(found.artifacts.folder)
    return found


def resolve_config(request: EvaluateConfig) -> tuple[list[Metric], str, str]:
    """The metrics, the device and the dtype; UsageError for what makes no sense, whatever the SAEs are."""
    check_mode(request.mode)
    metrics = metrics_of_suite(request.suite, request.options)
    if request.tokens is not None and request.tokens <= 0:
        raise UsageError(f"--tokens {request.tokens} is not positive. Give how many to evaluate on, such as 20k.")
    if request.data is not None and not request.data.is_dir():
        raise UsageError(
            f"--data {request.data} is no folder. Give one that holds <name on the Hub>/<split>.jsonl or .parquet."
        )
    device = best_device(request.device)
    return metrics, device, best_dtype(request.dtype, device)


def load_run(
    given: Path, folder: Path, request: EvaluateConfig, here: Mapping[Path, Cache | SaeError], device: str
) -> tuple[EvalRow, Cache]:
    """A run folder as a row, and the cache whose text it is evaluated on."""
    sae = load_sae(given, device)
    cache = find_cache(given, sae, request, here)
    if (site := sae.origin.get("site", "resid_post")) != "resid_post":
        raise UsageError(f"{given} was trained on {site}; only SAEs of resid_post can be spliced into the model yet.")
    return row_of_run(folder, sae), cache


def row_of_run(folder: Path, sae: SAE) -> EvalRow:
    """`weights` is not of the tensors alone: k of a TopK is none of them, and one SAE can stand behind another layer."""
    record = read_json(folder / "sae.json", "sha256")
    weights = digest_of([sae_spec(sae), record["sha256"], sae.origin["layer"]])
    return EvalRow(folder.resolve().name, EvalTarget(sae, sae.origin["layer"]), folder, record, weights)


def unfinished_runs(runs: Sequence[Path]) -> list[Path]:
    """Run folders that were begun and have no trained SAE yet."""
    return [run for run in runs if (run / "run.json").exists() and not (run / "sae.json").exists()]


def find_cache(folder: Path, sae: SAE, request: EvaluateConfig, here: Mapping[Path, Cache | SaeError]) -> Cache:
    """The cache that is named; that of the training, wherever it stands now; or, of an SAE that came without one, the
    only one of its model. It holds the text that training did not see.
    """
    match sae.origin:
        case {"model": {"name": str(trained_on)}, "layer": int()}:
            pass
        case _:
            raise UsageError(
                f"{folder} does not say what it was trained on (`origin` in sae.json), so nothing can be read."
            )
    if request.model and model_name(request.model) != trained_on:
        raise UsageError(
            f"{folder} was trained on {trained_on}, not on {request.model}. Leave --model out, or evaluate a run of that model."
        )
    if request.cache:
        if (cache := Cache(request.cache)).model != trained_on:
            raise UsageError(f"{folder} was trained on {trained_on}, and {request.cache} holds text for {cache.model}.")
        return cache
    opened = [cache for cache in here.values() if isinstance(cache, Cache)]
    recorded, fingerprint = sae.origin.get("cache"), sae.origin.get("fingerprint")
    if recorded is None and fingerprint is None:
        return only_cache_of_model(folder, trained_on, opened)
    if isinstance(recorded, str) and (Path(recorded) / "zarr.json").exists():
        opened.insert(0, Cache(recorded))
    for cache in opened:
        if cache.fingerprint == fingerprint:
            return cache
    gone = f"is gone: it was {recorded}, and" if isinstance(recorded, str) else "is not here: it"
    raise UsageError(
        f"The cache that {folder} was trained on {gone} held the text to evaluate on. "
        f"Put it back, or under activations/, make it again with the same `sae harvest --model {trained_on}`, or name "
        "another of that model with --cache."
    )


def only_cache_of_model(folder: Path, model: str, opened: Sequence[Cache]) -> Cache:
    """For an SAE that was trained elsewhere: any held-out text of its model serves."""
    serving = [c for c in opened if c.model == model and not is_ring(c.folder) and len(c.contexts(held_out=True))]
    if len(serving) == 1:
        return serving[0]
    if not serving:
        raise UsageError(
            f"{folder} came without a cache, and none under {sae_home() / 'activations'} holds held-out text for {model}. Make one "
            f"with `sae harvest --model {model}`, or name one with --cache."
        )
    listed = "\n".join(f"  --cache {c.folder}   ({c.rows:,} rows, {c.identity['data']['name']})" for c in serving)
    raise UsageError(
        f"{folder} came without a cache, and {len(serving)} hold held-out text for {model}. Say which:\n{listed}"
    )


ModelLoader = Callable[[ModelSource, str, str, str], LanguageModel]  # source, dtype, device, attention


def model_loader() -> ModelLoader:
    """Keeps the model that was asked for last, so that several caches of one model load it once."""

    @lru_cache(1)
    def load(source: ModelSource, dtype: str, device: str, attention: str) -> LanguageModel:
        _, config = find_model(source.location, source.revision if source.on_hub else None)
        return load_model(source, config, dtype=dtype, device=device, attention=attention)

    return load


def make_context(request: EvaluateConfig, cache: Cache, device: str, dtype: str, load: ModelLoader) -> EvalContext:
    """The model that the cache was made with, found and not yet loaded, and the text that the cache held out."""
    name, revision = cache.identity["model"]["name"], cache.identity["model"]["revision"]
    source, config = find_model(name, revision if len(revision) == HUB_COMMIT_LENGTH else None)
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
    attention = cache.identity["attention"]
    tokenizer = load_tokenizer(source)
    special = {tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id} - {None}
    return EvalContext(
        lambda: load(source, dtype, device, attention),
        tokenizer,
        contexts,
        cache.identity["skip"]
        or sorted(special),  # SAEBench never counts them, and a harvest with --keep-special has them
        request.mode,
        identity={"model": source.name, "revision": source.revision, "attention": attention, "llm_dtype": dtype},
        text={"text": cache.fingerprint, "contexts": len(contexts)},
        artifacts=ArtifactCache(sae_home() / "activations" / "evaluation"),
        data=request.data,
        device=device,
        config=config.get_text_config(),
    )


def check_group(found: EvaluatePlan, group: EvalGroup) -> None:
    """See of each row and metric whether it was measured, fails, or is to be measured; leave out rows that cannot be."""
    config, name = group.ctx.model_config, group.ctx.model_identity["model"]
    for row in list(group.rows):
        layer, d_in = row.target.layer, row.target.sae.d_in  # type: ignore[attr-defined]
        if not 0 <= layer < config.num_hidden_layers:
            refuse_row(found, group, row, DamagedError(
                f"{row.folder}/sae.json says layer {layer}, but {name} has layers 0 to {config.num_hidden_layers - 1}. "
                "It was overwritten; put the right layer back."
            ))  # fmt: skip
        elif d_in != config.hidden_size:
            refuse_row(found, group, row, UsageError(
                f"{row.folder} reads rows of {d_in} numbers, and those of {name} have {config.hidden_size}: it is of another model."
            ))  # fmt: skip
    prepare_metrics(found.metrics, group, found.config.force)
    for row in list(group.rows):
        if row.folder and any(row in group.todo(metric.name) for metric in found.metrics):
            try:
                check_writable(
                    row.folder / "evaluations", RESULT_BYTES + RESULT_BYTES_PER_LATENT * row.target.sae.d_sae
                )  # type: ignore[attr-defined]
            except SaeError as error:
                refuse_row(found, group, row, error)
            else:
                remove_stale_temporaries(row.folder / "evaluations")


def prepare_metrics(metrics: Sequence[Metric], group: EvalGroup, force: bool) -> None:
    """The settings of every metric that can be measured, and what was measured with the same before."""
    for metric in metrics:
        try:
            group.settings[metric.name] = metric.settings(group.ctx)
        except SaeError as error:  # something that the metric reads is not there
            record_failure(metric, group.rows, error)
            continue
        if not force:
            read_earlier_results(metric, group, group.rows)
        if lacking := group.todo(metric.name):
            try:
                metric.check()
            except SaeError as error:
                record_failure(metric, lacking, error)
                del group.settings[metric.name]


def record_failure(metric: Metric, rows: Sequence[EvalRow], error: SaeError) -> None:
    for row in rows:
        row.failed[metric.name] = error


def read_earlier_results(metric: Metric, group: EvalGroup, rows: Sequence[EvalRow]) -> None:
    for row in rows:
        if row.folder:
            try:
                earlier = read_result(row.folder, metric, {**group.settings[metric.name], "weights": row.weights})
            except SaeError as error:
                row.failed[metric.name] = error
            else:
                if earlier:
                    row.results[metric.name] = earlier


def refuse_row(found: EvaluatePlan, group: EvalGroup, row: EvalRow, error: SaeError) -> None:
    group.rows.remove(row)
    if row.folder:
        found.refused[row.folder] = error


def check_writable(folder: Path, room: int) -> None:
    """OutsideError unless files can be written there, and `room` bytes are free beside what is written now."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    probe = there / f".writable.tmp-{os.getpid()}"
    try:
        probe.write_bytes(b"\0" * 4096)
        probe.unlink()
        free = shutil.disk_usage(there).free
    except OSError as error:
        raise os_error(error, folder) from error
    if free < room:
        raise UnavailableError(
            f"The disk is full: {folder} has {format_bytes(free)} left, and a result can need {format_bytes(room)}. Free space."
        )


def raise_if_nothing_to_do(found: EvaluatePlan) -> None:
    """The sentences of all that is refused, when nothing can be measured and nothing was; their exit code, if it is one."""
    if any(metric.name not in row.failed for row in found.rows for metric in found.metrics):
        return
    errors = [*found.refused.values(), *(error for row in found.rows for error in row.failed.values())]
    kind = type(errors[0]) if len({error.exit_code for error in errors}) == 1 else SaeError
    raise kind("\n".join(dict.fromkeys(map(str, errors))))
