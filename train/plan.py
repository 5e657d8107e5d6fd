"""The training plan: the runs that a TrainConfig requests. Each run is checked and has a folder.

    runs/<variant>-L12-n512-s0-<digest6>/
        run.json             everything that determines the result, and the versions and device that produced it
        metrics.jsonl        one line per logged step
        checkpoints/         resumable states
        sae.safetensors, sae.json      written when training is done, sae.json last

The digest covers everything that determines the result, so the same command finds the same folder and resumes the run.
"""

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..cache.batch_order import BatchOrder
from ..cache.hooks import Hook
from ..cache.opening import concat_caches
from ..cache.planned import PlannedCache
from ..cache.ring import RingCache
from ..common.device import resolve_device
from ..common.errors import UsageError
from ..common.files import digest_of, sae_home
from ..common.formatting import format_count
from ..common.precision import recorded_precision, resolve_precision
from ..common.process_group import rank_and_count
from .accumulate import check_parts, reasons_against
from .config import FIXED, TrainConfig, check_seeds
from .deal import RankShare
from .estimate import check_disk_space, describe_size, describe_time
from .hooks import hooks_to_train
from .memory import untrained_variant
from .parse import parse_options, parse_width
from .passes import copies_fit, describe_copies, describe_kernels, describe_passes, plan_passes, reason_against_capture
from .precision import describe_precision, describe_products, explain_other_precision, find_folder, require_precision
from .recipe import Recipe, find_recipe
from .sae import SAE, load_sae, read_run_record, read_sae_record
from .shares import deal_runs, describe_shares
from .sources import AnyCache, describe_masked_rows, known_variance, open_source, places_of
from .store_reading import describe_pulling, prepare_local_folder
from .stored_options import stored_options
from .variant import RunConfig, Variant

FORMAT = 1

CURVE_POINTS, MAX_LOG_INTERVAL = 100, 50


def default_log_interval(steps: int) -> int:
    """The steps between log lines for a run of `steps` steps: at most 50, and at most a hundredth of the run."""
    return min(MAX_LOG_INTERVAL, max(1, steps // CURVE_POINTS))


@dataclass
class Run:
    """One training run: its folder, and everything that determines its result.

    A `Run` is accepted wherever a path is accepted.
    """

    recipe: Recipe
    options: dict[str, Any]
    hook: Hook
    seed: int
    shuffle_seed: int
    config: RunConfig
    cache: AnyCache
    folder: Path = Path()
    compiled: bool = False
    stored: Mapping[str, Any] | None = None  # all options that the run was started with; None: a new run
    changed: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)  # for a finished run; see Variant.changed
    notes: Sequence[str] = ()  # sentences about its options, shown in the plan
    requested: Mapping[str, Any] = field(default_factory=dict)  # TrainConfig.record() of its plan
    problem: str | None = None  # why the run failed

    def __fspath__(self) -> str:
        return str(self.folder)

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def steps(self) -> int:
        return self.config.steps

    @property
    def done(self) -> bool:
        return (self.folder / "sae.json").exists()

    def load(self, device: str = "cpu") -> SAE:
        """The trained SAE, ready to encode raw activations. Raises UsageError if the run is not finished."""
        return load_sae(self.folder, device)

    def identity(self) -> dict[str, Any]:
        """Everything that determines the result."""
        return {
            "variant": self.recipe.name,
            "options": self.options,
            **self.hook._asdict(),
            "seed": self.seed,
            "order_seed": self.shuffle_seed,
            **self.config.identity(),
            "cache": self.cache.array_digest(self.hook.array),
            **({"compiled": True} if self.compiled else {}),
        }

    def default_name(self) -> str:
        """The name of the run folder.

        For a planned cache, the name ends in `*`: the digest depends on the rows of the cache.
        """
        digest = "*" if isinstance(self.cache, PlannedCache) else digest_of(self.identity())[:6]
        site = "" if self.hook.site == "resid_post" else f"-{self.hook.site}"
        l0 = "" if self.config.l0 is None else f"-l0_{self.config.l0:g}"
        exact = "-literal" if self.config.paper_exact else ""
        prefix = f"{self.recipe.name}-L{self.hook.layer:02d}{site}-n{self.config.d_sae}{l0}{exact}"
        return f"{prefix}-s{self.seed}-{digest}"

    @property
    def cache_folders(self) -> list[str]:
        """The folders or addresses of the caches."""
        return places_of(self.cache)

    @property
    def batches_key(self) -> tuple[Any, ...]:
        """The key of the batches: runs with the same key share one pass over the data."""
        return (*self.cache_folders, self.hook, self.config.batch_size, self.shuffle_seed)

    def describe(self) -> str:
        c = self.config
        return (
            f"train    {self.recipe.name} {c.d_in} -> {c.d_sae}, {self.hook}, seed {self.seed}: "
            f"{c.steps:,} steps x {c.batch_size:,} tokens -> {self.folder}"
        )


@dataclass(frozen=True)
class TrainPlan:
    """The runs that a TrainConfig requests. Nothing has been written. `run_training` in train/run.py trains them."""

    config: TrainConfig
    runs: list[Run]

    @property
    def unfinished(self) -> list[Run]:
        """The runs that are still to be trained, or to be resumed."""
        return [run for run in self.runs if not run.done]

    @cached_property
    def planned_passes(self) -> list[list[Run]]:
        """The passes, planned to fit into the memory that is free when this property is first read."""
        streaming = isinstance(self.config.source, RingCache)  # when streaming, all runs are on the device at once
        return plan_passes(self.unfinished, resolve_device(self.config.device), streaming)

    @property
    def passes(self) -> list[list[Run]]:
        """The unfinished runs, grouped into passes. The runs of a pass are on the device together.

        Raises UnavailableError for a run that does not fit on the device; the message says what would fit.
        """
        left = [[run for run in runs if not run.done] for runs in self.planned_passes]
        return [runs for runs in left if runs]

    @cached_property
    def in_background(self) -> bool:
        """Whether checkpoints are written while training continues.

        This depends on the memory that is free when this property is first read.

        If the copies of the states do not fit into memory beside the runs, training waits for each checkpoint instead.
        """
        device = resolve_device(self.config.device)
        return all(copies_fit(runs, device) for runs in self.planned_passes)

    @cached_property
    def eager_because(self) -> str:
        """The reason why steps are launched one by one, worded as the end of a sentence; "" if they form a CUDA graph.

        Depends on the memory that is free at the first access.
        """
        if self.config.capture == "off":
            return "--capture off"
        return reason_against_capture(self.planned_passes, resolve_device(self.config.device))

    @cached_property
    def shares(self) -> list[RankShare]:
        """The runs that each launched process trains, as indices into `runs`. Times a few steps of each recipe."""
        unfinished = {number: run for number, run in enumerate(self.runs) if not run.done}
        return deal_runs(unfinished, resolve_device(self.config.device), rank_and_count()[1])

    def describe(self, time: bool = False) -> list[str]:
        """The lines that `sae train` prints first.

        If `time` is set, memory and time are estimated as well, which takes a few seconds. If several processes were
        launched, only the first returns lines, because it assigns the runs.
        """
        rank, count = rank_and_count()
        if rank:
            return []
        lines = [run.describe() for run in self.runs]
        lines += [f"note     {note}" for note in dict.fromkeys(note for run in self.runs for note in run.notes)]
        lines += dict.fromkeys(filter(None, (describe_masked_rows(run.cache, run.hook.array) for run in self.runs)))
        lines += dict.fromkeys(filter(None, (describe_precision(run.config.precision) for run in self.unfinished)))
        if not self.unfinished:
            return lines
        lines.append(describe_size(self.unfinished, self.unfinished[0].folder.parent))
        lines += (pulling := describe_pulling(self.planned_passes))
        if not pulling and (self.config.local_cache or self.config.local_folder):
            lines.append("note     --local-cache and --local-folder have no effect: no cache is in an object store")
        if count > 1:
            lines += describe_shares(self.shares, self.runs, self.config.device, time)
        else:
            lines += describe_passes(self.planned_passes, device := resolve_device(self.config.device))
            if torch.device(device).type == "cuda":
                because = f"launched one by one: {self.eager_because}" if self.eager_because else "in CUDA graphs"
                lines.append(f"steps    {because}")
                lines += filter(None, [describe_kernels(self.unfinished, device)])
                lines += describe_products(self.unfinished, device)
            if time or not self.in_background:
                lines.append(describe_copies(self.passes, device, self.in_background))
            if time:
                lines += describe_time(self.passes, self.config.device, from_store=bool(pulling))
        if time and count == 1 and (started := [r for r in self.unfinished if (r.folder / "checkpoints").exists()]):
            lines.append(
                f"note     {format_count(len(started), 'run')} will be resumed; the time includes steps taken so far"
            )
        if time and any(run.compiled for run in self.unfinished):
            lines.append(
                "note     the time is estimated without --compile, which adds minutes to the first step and speeds up "
                "the others"
            )
        return lines


def plan_training(config: TrainConfig, reserved: Mapping[Path, float] = {}) -> TrainPlan:
    """Plan the runs that a config requests. Writes nothing.

    Args:
        config: what to train. If the config's source is a `PlannedCache`, the plan equals the plan for the finished
            cache, except for values that depend on the rows. The variance is unknown, so options that scale with it
            stay unscaled (a note says so). Folder names end in `*` instead of a digest.
        reserved: folder -> bytes that a harvest will write into it before or during training.

    Raises:
        UsageError: something is wrong with the config; the message lists every problem.
        UnavailableError: the runs do not fit on a disk, a run does not fit into memory, or the device does not exist.
        DamagedError: a record of an existing run is damaged.
    """
    runs = [resume_run(folder, config) for folder in config.resume] if config.resume else new_runs(config)
    for run in runs:
        if run.done:
            read_sae_record(run.folder)
    plan = TrainPlan(config, runs)
    check_disk_space(plan.unfinished, reserved)
    prepare_local_folder(plan.planned_passes, config.local_cache)
    _ = plan.passes, plan.in_background, plan.eager_because  # raise now if a run does not fit into free memory
    return plan


def new_runs(config: TrainConfig) -> list[Run]:
    """The runs of a config without `resume`: every combination of layer, recipe, L0 and seed."""
    check_seeds(config.shuffle_seed, *config.seeds)
    precision = resolve_precision(config.precision, resolve_device(config.device))
    recipes = [find_recipe(name) for name in dict.fromkeys(config.variants)]
    options = parse_options(config.options, recipes)
    runs: list[Run] = []
    problems: dict[str, None] = {}
    arrays = None if config.source is None else list(config.source.widths)
    for hook in hooks_to_train(config.layers, config.site, config.modules, arrays, config.caches):
        cache = open_source(config, hook)
        for recipe, l0 in itertools.product(recipes, dict.fromkeys(config.l0) or (None,)):
            try:
                sizes = make_run_config(config, recipe, cache, hook)
            except UsageError as error:
                problems[str(error)] = None
                continue
            run_config = sizes._replace(l0=l0, paper_exact=config.paper_exact, precision=precision)
            for seed in dict.fromkeys(config.seeds):
                run = Run(recipe, options[recipe.name], hook, seed, config.shuffle_seed, run_config, cache)
                run.compiled, run.requested = config.compiled, config.record()
                unnamed = replace(run, config=run_config._replace(precision=None)).default_name()
                run.folder = find_folder(config.out or sae_home() / "runs", run.default_name(), unnamed, precision)
                runs.append(run)
    problems |= dict.fromkeys(check_options(runs))
    if problems:
        raise UsageError("\n".join(problems))
    return runs


def check_options(runs: Iterable[Run]) -> Iterator[str]:
    """Yield an error for each run that cannot be built, before anything is allocated or written.

    Sets `notes` of each run and, for runs that have been started, `stored` and `changed`.
    """
    built: dict[Any, Variant] = {}  # most runs differ only in their seed
    for run in runs:
        record = read_run_record(run.folder)
        run.stored = stored_options(record, run.folder)
        asked = not run.done or "precision" in run.requested
        if record and asked and (error := explain_other_precision(run.folder, record, run.config.precision)):
            yield error
            continue
        if record and (changes := record.get("accumulate_since")):
            run.config = run.config._replace(accumulate=changes[-1][1])
        key = run.recipe.name, run.config, json.dumps(run.stored, sort_keys=True)
        if key not in built:
            try:
                with torch.device("meta"):
                    built[key] = run.recipe.make(run.config, run.options, run.stored)
            except UsageError as error:
                if not run.done:
                    yield str(error)
                continue
        run.notes, run.changed = built[key].notes, built[key].changed
        yield from accumulate_errors(run, built[key])


def accumulate_errors(run: Run, variant: Variant) -> Iterator[str]:
    """Yield an error if a run has to compute its batches in parts but its recipe cannot do so."""
    if run.config.accumulate > 1 and (reasons := reasons_against(variant)):
        yield f"{run.recipe.name} cannot be trained with --accumulate: {'; '.join(reasons)}. Leave it out."


def make_run_config(config: TrainConfig, recipe: Recipe, cache: AnyCache, hook: Hook) -> RunConfig:
    """The sizes of a run from the config. What the config leaves out is the recipe's default, or one epoch of steps."""
    array = cache.require_array(*hook)
    d_in = cache.array(array).shape[1]
    batch_size = recipe.batch_size if config.batch_size is None else config.batch_size
    if batch_size < 1:
        raise UsageError(f"--batch-size {batch_size} is not positive.")
    parts = check_parts(config.accumulate or 1, batch_size, config.compiled)
    if isinstance(cache, RingCache):
        epoch = cache.cumulative_batches(batch_size)[-1]
    else:
        epoch = BatchOrder(cache.chunk_rows, batch_size, 0).batches_per_epoch
    steps = epoch if config.steps is None else config.steps
    if steps < 1:
        raise UsageError(f"--steps {steps} would train nothing. Give a positive number.")
    if steps * batch_size >= 2**63:
        raise UsageError(f"--steps {steps} of {batch_size:,} tokens are more than 2^63 tokens. Give fewer steps.")
    if isinstance(cache, RingCache) and steps > epoch:
        raise UsageError(
            f"--steps {steps} is too many: {cache.layout.rows:,} tokens are {epoch:,} batches of {batch_size:,}, "
            "and --stream reads them once. Give more --tokens, or fewer --steps."
        )
    width = parse_width(config.width, recipe, d_in)
    return RunConfig(d_in, width, steps, batch_size, variance=known_variance(cache, array), accumulate=parts)


def resume_run(folder: Path, config: TrainConfig) -> Run:
    """The run of an existing folder, as its run.json describes it. Raises UsageError if the run cannot be resumed."""
    record = read_run_record(folder)
    if record is None:
        raise UsageError(f"{folder} is not a run folder: it has no run.json. Give --resume a folder under runs/.")
    default = TrainConfig()
    if changed := [flag for flag, name in FIXED.items() if getattr(config, name) != getattr(default, name)]:
        raise UsageError(
            f"{', '.join(changed)} cannot be changed once a run has started. "
            f"Leave {'it' if len(changed) == 1 else 'them'} out to resume {folder}, or start a new run."
        )
    if "imported_from" in record:
        raise UsageError(f"{folder} was imported from another library; it has no training to resume.")
    if record["format"] != FORMAT:
        raise UsageError(
            f"{folder}/run.json has format {record['format']}, but this version reads {FORMAT}. "
            "Use the version that wrote it."
        )
    if "ring" in record:
        raise UsageError(
            f"{folder} was trained with --stream, on activations in {record['cache_folders'][0]} that are removed "
            "once they are read. To resume it, repeat the `sae train --stream` command that started it."
        )
    cache = concat_caches(config.caches or record["cache_folders"], config.local_folder)
    hook = Hook(record["layer"], record["site"])
    run_config = RunConfig.from_record(record, known_variance(cache, cache.require_array(*hook)))
    require_precision(folder, recorded_precision(record), resolve_device(config.device))
    if config.accumulate is not None:
        parts = check_parts(config.accumulate, run_config.batch_size, record.get("compiled", False))
        run_config = run_config._replace(accumulate=parts)
    run = Run(
        find_recipe(record["variant"]), record["options"], hook, record["seed"], record["order_seed"], run_config,
        cache, folder, record.get("compiled", False), requested=config.record(),
    )  # fmt: skip
    run.stored = stored_options(record, folder)
    if errors := list(accumulate_errors(run, untrained_variant(run, "meta"))):
        raise UsageError("\n".join(errors))
    if run.identity()["cache"] != record["cache"]:
        raise UsageError(
            f"{folder} was not trained on the cache {', '.join(run.cache_folders)}. Give its cache with --cache."
        )
    return run
