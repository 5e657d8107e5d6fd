"""Runs -> result files and a table. Runs of one model and one text share every pass of the model."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..cache.reader import Cache
from ..common.errors import SaeError, UnavailableError, UsageError
from ..common.files import digest_of
from .context import EvalContext
from .metrics.base import EvalTarget, Metric, Outcome, Progress, SAELike
from .plan import (
    EvalGroup,
    EvalRow,
    EvaluateConfig,
    EvaluatePlan,
    make_context,
    model_loader,
    plan_evaluation,
    prepare_metrics,
    read_earlier_results,
    resolve_config,
)
from .reference_saes import reference_targets
from .results import write_result

ProgressFactory = Callable[
    [str], AbstractContextManager[Progress]
]  # announces a metric, and takes what it tells of its work


@contextlib.contextmanager
def no_progress(title: str) -> Iterator[Progress]:
    yield lambda done, total, note="": None


def evaluate(request: EvaluateConfig, stage: ProgressFactory = no_progress) -> list[EvalRow]:
    """Plan and carry out. Runs that cannot be evaluated are left out; `plan` names them."""
    return run_evaluation(plan_evaluation(request), stage)


def run_evaluation(planned: EvaluatePlan, stage: ProgressFactory = no_progress) -> list[EvalRow]:
    """Measure what a plan says, writing a result file for each run and metric as soon as it is there.

    A metric that cannot be measured leaves its sentence in `Row.failed`, and the others are measured all the same. When
    nothing can be measured at all, the sentences are raised, with the exit code of the first.
    """
    rows: list[EvalRow] = []
    for group in planned.groups:
        own = list(group.rows)
        if planned.config.references:
            try:
                own += reference_rows(group)
            except UnavailableError as error:  # such as a folder that can be read and not written
                planned.notes.append(f"identity, zero, PCA and random dictionary are left out: {error}")
        for metric in planned.metrics:
            if metric.name in group.settings:
                if not planned.config.force:
                    read_earlier_results(metric, group, [row for row in own if row.target.reference])
                measure(metric, group, own, stage)
        rows += [row for row in own if row.results or not row.target.reference]
    failures = [error for row in rows for error in row.failed.values() if not row.target.reference]
    if failures and not any(row.results for row in rows):
        raise type(failures[0])("\n".join(dict.fromkeys(map(str, failures))))
    return rows


def evaluate_saes(
    saes: Mapping[str, SAELike], *, cache: Cache | Path | str, layer: int, suite: str = "quick", tokens: int | None = None,
    mode: str = "0.6.0", options: Sequence[str] = (), data: Path | str | None = None, references: bool = True,
    device: str = "auto", dtype: str = "auto", stage: ProgressFactory = no_progress,
) -> list[EvalRow]:  # fmt: skip
    """Evaluate objects without a run folder: anything with encode, (T, d_in) -> (T, d_sae), and decode, back again.

        rows = sae.evaluate_saes({"mine": my_sae}, cache="activations/...", layer=12, suite="core")
        rows[0].results["core"].metrics["sparsity"]["l0"]
        pandas.DataFrame([row.flat() for row in rows])

    They stand behind `layer`, are on `device` already, and take raw activations of the model that the cache was made
    with; its held-out text is read. The other arguments are those of `sae evaluate`. A row for each, in order, then with
    `references` the identity, zero, a PCA and a random dictionary. No result file is written for them; what no SAE
    changes is kept under activations/evaluation, as always.

    A metric that an object cannot have (absorption needs W_dec) is in `Row.failed`. Raises UsageError for an object
    that does not map rows of the model's width to such rows, and what `sae evaluate` refuses.
    """
    if not isinstance(saes, Mapping) or not saes:
        raise UsageError(
            f"Give the SAEs with their names, as {{'mine': my_sae}}, and not {type(saes).__name__} {saes!r:.60}."
        )
    request = EvaluateConfig([], suite, tokens, mode, options=options, data=Path(data) if data else None, device=device, dtype=dtype)  # fmt: skip
    metrics, device, dtype = resolve_config(request)
    cache = cache if isinstance(cache, Cache) else Cache(cache)
    ctx = make_context(request, cache, device, dtype, model_loader())
    blocks = ctx.model_config.num_hidden_layers
    if not 0 <= layer < blocks:
        raise UsageError(f"The model has layers 0 to {blocks - 1}; there is no layer {layer}.")
    for name, sae in saes.items():
        check_sae_like(name, sae, ctx)
        if (trained := getattr(sae, "origin", {}).get("layer", layer)) != layer:
            raise UsageError(f"{name} was trained after layer {trained}: give layer={trained}, and not {layer}.")
    group = EvalGroup(cache, ctx, [EvalRow(name, EvalTarget(sae, layer)) for name, sae in saes.items()])
    prepare_metrics(metrics, group, force=False)
    return run_evaluation(EvaluatePlan(replace(request, references=references), metrics, [group], ctx.artifacts), stage)


@torch.no_grad()
def check_sae_like(name: str, sae: SAELike, ctx: EvalContext) -> None:
    """UsageError unless an object encodes and decodes rows of the model's width."""
    if getattr(sae, "training", False):
        raise UsageError(
            f"{name} is in training mode, in which some activations look at the whole batch: call .eval() on it."
        )
    x_BD = torch.zeros(2, ctx.model_config.hidden_size, device=ctx.device)
    try:
        recon_BD = sae.decode(sae.encode(x_BD))
    except Exception as error:
        raise UsageError(
            f"{name} does not encode and decode rows of {x_BD.shape[1]} float32 numbers on {ctx.device}: {error}"
        ) from error
    if getattr(recon_BD, "shape", None) != x_BD.shape:
        raise UsageError(
            f"{name} makes {tuple(getattr(recon_BD, 'shape', ()))} of rows {tuple(x_BD.shape)}: encode and decode have to give the shape back."
        )


def reference_rows(group: EvalGroup) -> list[EvalRow]:
    """Reference rows for each layer of a group; their results are kept on the shelf."""
    ctx, cache, rows = group.ctx, group.cache, []
    layers = sorted({row.target.layer for row in group.rows})
    for layer in layers:
        own = [row.target for row in group.rows if row.target.layer == layer]
        for name, target in reference_targets(ctx, cache.contexts(held_out=False), own).items():
            width = getattr(target.sae, "d_sae", None)
            record = {
                "reference": name,
                "layer": layer,
                "d_sae": width,
                "text": cache.fingerprint,
                **ctx.model_identity,
            }
            digest = digest_of(record)
            folder = ctx.artifacts.folder / "references" / f"{name}-L{layer}-{digest[:8]}"
            shown = name if len(layers) == 1 else f"{name}-L{layer:02d}"
            rows.append(EvalRow(shown, target, folder, record, digest))
    return rows


def measure(metric: Metric, group: EvalGroup, rows: Sequence[EvalRow], stage: ProgressFactory) -> None:
    """One metric for the rows that lack it, all in one pass."""
    todo = group.todo(metric.name, rows)
    if not todo:
        return
    outcomes: Sequence[Outcome]
    try:
        with stage(metric.name) as progress:
            outcomes = metric.measure(group.ctx, [row.target for row in todo], progress)
    except SaeError as error:
        outcomes = [error] * len(todo)
    except torch.OutOfMemoryError as error:
        outcomes = [SaeError(f"The device has too little memory: {error}")] * len(todo)
    for row, outcome in zip(todo, outcomes, strict=True):
        if isinstance(outcome, SaeError):
            row.failed[metric.name] = outcome
            continue
        row.results[metric.name] = outcome
        if row.folder:
            settings: dict[str, Any] = {**group.settings[metric.name], "weights": row.weights}
            try:
                write_result(row.folder, metric, settings, outcome, row.record)
            except SaeError as error:  # a disk that has become full: the number is shown all the same
                row.failed[metric.name] = error
