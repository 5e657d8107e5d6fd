"""Run an evaluation: measure every metric, with one pass of the model per text for all SAEs, and write the results."""

import contextlib
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from ..cache.hooks import Hook
from ..cache.object_store import is_url
from ..cache.opening import open_place
from ..cache.reader import Cache
from ..cache.removal import kept_caches
from ..common.addresses import disk_path
from ..common.device import keep_freed_memory
from ..common.errors import UsageError, did_you_mean
from ..common.process_group import current_process_group, rank_and_count
from ..harvest.architectures import check_sites, hook_width
from ..train.sae import SAE
from .context import EvalContext
from .controls import control_rows
from .inputs import make_context
from .measure import (
    ProgressFactory,
    add_control_notes,
    measure_all,
    no_progress_bar,
    reference_rows_if_possible,
    use_precision,
)
from .metrics.base import EvalTarget, SAELike, reconstruct
from .norm_limits import cached_norm_limit, norm_limit_of
from .plan import EvaluateConfig, EvaluatePlan, plan_evaluation, prepare_metrics, resolve_config
from .ranks import measure_over_ranks
from .rows import EvalGroup, EvalRow, add_notes, placed


def evaluate(config: EvaluateConfig, progress: ProgressFactory = no_progress_bar) -> list[EvalRow]:
    """Plan and run an evaluation. Runs that cannot be evaluated are left out; `plan_evaluation` says which and why."""
    return run_evaluation(plan_evaluation(config), progress)


def run_evaluation(
    plan: EvaluatePlan, progress: ProgressFactory = no_progress_bar, *, all_rows: bool = True
) -> list[EvalRow]:
    """Carry out a plan and write a result file for each run and metric as soon as it has been measured.

    Returns the rows of all runs, each group followed by its reference rows. If a metric fails, its error is stored in
    `EvalRow.errors`, and the other metrics still run. Several processes of a launcher share the work
    (evaluate/ranks.py), and each returns all rows; if `all_rows` is false, rows measured by other processes have no
    results.

    If no metric could be measured at all, raises all errors as one, with the exit code of the first. Raises
    UnavailableError if another process of the launcher has ended.
    """
    keep_freed_memory()
    ranks = current_process_group()
    rows: list[EvalRow] = []
    with plan.artifacts.in_use(), contextlib.ExitStack() as kept:
        caches = kept_caches((group.cache.place for group in plan.groups), "sae evaluate")
        ranks.everywhere(lambda: kept.enter_context(caches))
        if ranks.count > 1:
            by_group: Iterable[list[EvalRow]] = measure_over_ranks(plan, ranks, progress, all_rows)
        else:
            by_group = measure_here(plan, progress)
        for group_rows in by_group:
            add_notes(group_rows)
            add_control_notes(group_rows)
            rows += [row for row in group_rows if row.results or not row.is_reference]

    def check() -> None:
        errors = [error for row in rows for error in row.errors.values() if not row.is_reference]
        if errors and all_rows and not any(row.results for row in rows):
            raise type(errors[0])("\n".join(dict.fromkeys(map(str, errors))))

    ranks.everywhere(check)
    return rows


def measure_here(plan: EvaluatePlan, progress: ProgressFactory) -> Iterator[list[EvalRow]]:
    """The rows of each group, measured in this process."""
    for group in plan.groups:
        use_precision(group.rows, group.ctx.precision)
        references = reference_rows_if_possible(plan, group) if plan.config.references else []
        references += control_rows(group, plan.config.controls)
        use_precision(references, group.ctx.precision)
        measure_all(plan, group, {metric.name: group.rows for metric in plan.metrics}, references, progress)
        yield [*group.rows, *references]


def evaluate_saes(
    saes: Mapping[str, SAELike] | Sequence[str | os.PathLike[str]],
    *,
    cache: Cache | Path | str | None = None,
    layer: int | None = None,
    site: str = "resid_post",
    suite: str = "quick",
    tokens: int | None = None,
    mode: str = "0.6.0",
    max_norm: float | Literal["none"] | None = None,
    norm_limit: float | None = None,
    systems: Mapping[str, str] | None = None,
    options: Sequence[str] = (),
    data: Path | str | None = None,
    force: bool = False,
    references: bool = True,
    controls: Sequence[str | os.PathLike[str]] = (),
    device: str = "auto",
    dtype: str = "auto",
    precision: str = "float32",
    progress: ProgressFactory = no_progress_bar,
) -> list[EvalRow]:
    """Evaluate SAEs, which are your own objects or runs of `train_saes`, on held-out text.

    Examples:
        >>> import pandas, sae
        >>> runs = sae.train_saes(["topk", "relu"], cache="activations/...", layers=[12])
        >>> rows = sae.evaluate_saes(runs, suite="core")
        >>> pandas.DataFrame([row.flat() for row in rows])
        >>>
        >>> rows = sae.evaluate_saes({"mine": my_sae}, cache="activations/...", layer=12, suite="core")
        >>> rows[0].results["core"].metrics["sparsity"]["l0"]
        31.8

    Args:
        saes: Either a mapping of names to objects, or a sequence of run folders (anything `os.PathLike`). Objects have
            `encode`, (T, d_in) -> (T, d_sae), and `decode`, (T, d_sae) -> (T, d_in). The objects take raw activations,
            must be on `device` already, and need `cache` and `layer`; no result files are written for them. Run folders
            record model, layer and cache; their results are read from and written to `<run>/evaluations/<metric>.json`,
            as in `sae evaluate`.
        cache: The cache whose held-out text is read and whose model is run. For run folders, it defaults to the cache
            that each run was trained on.
        layer: The zero-based block whose activations the objects were trained on. Not for run folders, which record it.
        site: The site in that block: "resid_post" (the residual stream after it) or another site of `sae harvest`.
        suite: "quick", "full", or names of metrics separated by commas, such as "core,absorption".
        tokens: How many tokens of held-out text to read. Default: as many as SAEBench reads, or all.
        mode: Definitions of the metrics: "0.6.0" (SAEBench's current ones) or "2024-12" (those behind the papers'
            numbers).
        max_norm: Rows whose norm exceeds this multiple of the median norm, such as attention sinks, are outliers: the
            model keeps its own activations there, and these rows are not counted. "none": all rows count. Default: the
            limit that the SAE was trained with, which run folders record; for objects, the limit of the cache.
        norm_limit: For objects, the limit as an absolute norm.
        systems: A mapping from the names of objects that differ only by seed to the name of their common system, such
            as {"topk-0": "topk", "topk-1": "topk"}. Stability compares the objects of one system with each other.
        options: Options of metrics, as "metric.option=value".
        data: A folder to search for datasets before the Hub: `<name on the Hub>/<split>.jsonl` or `.parquet`.
        force: Measure again even if a run has a result with the same settings.
        references: Add rows for the identity, zero, a PCA and a random dictionary.
        controls: Controls of the run folders, as returned by `sae.train_controls`, to add as reference rows.
        device: Where the model computes: "auto", "cpu", "cuda", ... If a launcher (torchrun) has started several
            processes, they divide the run folders among themselves; each process uses its own GPU and returns all rows.
        dtype: The dtype that the model computes in: "auto", "bfloat16" or "float32".
        precision: The precision of the SAEs' matrix products: "float32", "tf32" or "bfloat16". Your own objects compute
            in their own precision and accept only "float32".
        progress: Called with each metric's name; see `ProgressFactory`.

    Returns:
        A row per SAE, in order, then the reference rows. `row.results[metric].metrics[category][name]` is a number over
        all rows, as SAEBench defines it. `row.results[metric].sound` is the result without outlier rows.
        `row.errors[metric]` says why a metric has no result (absorption, for example, needs an object with `W_dec`).
        `row.results[metric].notes` and `row.notes` warn about misleading numbers. `row.flat()` is one dictionary for a
        data frame.

    Raises:
        UsageError: an object does not encode and decode activations of the model's width, a run folder cannot be
            evaluated, or an argument is invalid.
        DamagedError: a file of a run or cache is corrupt.
        UnavailableError: the model is not available, the disk is full or not writable, or the device is out of memory.
    """
    config = EvaluateConfig(
        [], suite, tokens, mode, options=options, data=disk_path(data) if data else None, force=force,
        references=references, controls=[disk_path(folder) for folder in controls], device=device, dtype=dtype,
        precision=precision, max_norm=math.inf if max_norm == "none" else max_norm,
    )  # fmt: skip
    if isinstance(saes, Mapping):
        if rank_and_count()[1] > 1:
            raise UsageError(
                "A launcher has started several processes, and only run folders can be divided among them. Give run "
                "folders, or start a single process for SAEs without a run folder."
            )
        if cache is None or layer is None:
            raise UsageError(
                "SAEs without a run folder need cache= and layer=, such as cache='activations/...', layer=12."
            )
        opened = cache if isinstance(cache, Cache) else open_place(cache)
        plan = plan_objects(saes, opened, Hook(layer, site), config, norm_limit, systems)
    elif isinstance(saes, str) or not isinstance(saes, Sequence):
        raise UsageError(
            f"Expected a mapping of names to SAEs, as in {{'mine': my_sae}}, or a list of run folders. Found "
            f"{type(saes).__name__} {saes!r:.60}."
        )
    else:
        if layer is not None or site != "resid_post":
            raise UsageError("Run folders record their layer and site: omit layer= and site=.")
        if norm_limit is not None:
            raise UsageError("Run folders record their norm limit: omit norm_limit=, or give max_norm=.")
        if systems is not None:
            raise UsageError("Run folders record which of them differ only by seed: omit systems=.")
        place = cache.place if isinstance(cache, Cache) else cache
        plan = plan_folders(saes, replace(config, cache=place if place is None or is_url(place) else Path(place)))
    return run_evaluation(plan, progress)


def plan_folders(folders: Sequence[str | os.PathLike[str]], config: EvaluateConfig) -> EvaluatePlan:
    """The plan for run folders. Unlike in `plan_evaluation`, a run that cannot be evaluated raises an error."""
    plan = plan_evaluation(replace(config, runs=[disk_path(folder) for folder in folders]))
    problems = [f"{folder} has not finished training." for folder in plan.unfinished]
    problems += map(str, plan.refused.values())
    if problems:
        kind = type(next(iter(plan.refused.values()))) if plan.refused else UsageError
        raise kind("\n".join(dict.fromkeys(problems)))
    return plan


def plan_objects(
    saes: Mapping[str, SAELike],
    cache: Cache,
    hook: Hook,
    config: EvaluateConfig,
    norm_limit: float | None = None,
    systems: Mapping[str, str] | None = None,
) -> EvaluatePlan:
    """The plan for objects without a run folder. By default, they have the norm limit of the cache."""
    if not saes:
        raise UsageError("There are no SAEs to evaluate. Give a mapping of names to SAEs, as in {'mine': my_sae}.")
    systems = systems or {}
    if unknown := [name for name in systems if name not in saes]:
        raise UsageError(
            f"systems= has the key {unknown[0]}, which is not among the SAEs{did_you_mean(unknown[0], saes)}"
        )
    metrics, device, dtype = resolve_config(config)
    if config.precision != "float32" and (own := [name for name, sae in saes.items() if not isinstance(sae, SAE)]):
        raise UsageError(f"{own[0]} is not an SAE of this package, so its precision cannot be chosen: omit precision=.")
    ctx = make_context(
        cache, mode=config.mode, tokens=config.tokens, data=config.data, device=device, dtype=dtype,
        precision=config.precision,
    )  # fmt: skip
    layers = ctx.model_config.num_hidden_layers
    if not 0 <= hook.layer < layers:
        raise UsageError(f"There is no layer {hook.layer}: the model has layers 0 to {layers - 1}.")
    check_sites(ctx.model_config, [hook])
    for name, sae in saes.items():
        check_sae_like(name, sae, hook, ctx)
        origin = getattr(sae, "origin", {})
        if "layer" in origin and (trained := Hook.from_record(origin)) != hook:
            raise UsageError(
                f"{name} was trained {placed(trained)}, not {placed(hook)}: pass layer={trained.layer}, "
                f'site="{trained.site}".'
            )
    rows = []
    for name, sae in saes.items():
        origin, limit = getattr(sae, "origin", {}), norm_limit
        if limit is None and config.max_norm is None and "norm_limit" not in origin:
            limit = cached_norm_limit(cache, hook)
        elif limit is None:
            limit = norm_limit_of(origin, cache, hook, config.max_norm)
        rows.append(EvalRow(name, EvalTarget(sae, hook, norm_limit=limit, system=systems.get(name, ""))))
    group = EvalGroup(cache, ctx, rows)
    prepare_metrics(metrics, group, force=False)
    return EvaluatePlan(config, metrics, [group], ctx.artifacts)


@torch.no_grad()
def check_sae_like(name: str, sae: SAELike, hook: Hook, ctx: EvalContext) -> None:
    """Raise UsageError unless an object can encode and decode activations of the hook's width and all results are
    finite."""
    if getattr(sae, "training", False):
        raise UsageError(
            f"{name} is in training mode, in which some activations depend on the whole batch. Call .eval() on it."
        )
    generator = torch.Generator().manual_seed(0)
    x_BD = torch.randn(2, hook_width(hook, ctx.model_config), generator=generator).to(ctx.device)
    try:
        f_BF = sae.encode(x_BD)
        recon_BD = reconstruct(sae, f_BF, x_BD)
    except Exception as error:
        raise UsageError(
            f"{name} cannot encode and decode float32 activations of width {x_BD.shape[1]} on {ctx.device}: {error}"
        ) from error
    if getattr(recon_BD, "shape", None) != x_BD.shape:
        raise UsageError(
            f"{name} turns {tuple(x_BD.shape)} into {tuple(getattr(recon_BD, 'shape', ()))}: decode(encode(x)) must "
            "have the shape of x."
        )
    if not all(torch.isfinite(torch.as_tensor(part)).all() for part in (f_BF, recon_BD)):
        raise UsageError(f"{name} returns NaN or infinity for finite activations. Its weights may not be finite.")
