"""What is asked of training, as runs: each with its recipe, its options, its cache and its folder.

    runs/<variant>-L12-n512-s0-<digest6>/
        run.json             everything that decides the result, and what it was made with
        metrics.jsonl        one line per logged step
        checkpoints/         resumable states
        sae.safetensors, sae.json      written when training is done, sae.json last

The digest is of everything that decides the result, so the same command finds the same folder and goes on with it.
"""

import itertools
import json
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from ..cache.catalog import canonical_model_name, find_cache
from ..cache.concat import ConcatCache, concat_caches
from ..cache.layout import SITES, Hook
from ..cache.loader import BatchOrder
from ..cache.reader import Cache
from ..cache.ring import RingCache
from ..common.errors import UsageError
from ..common.files import digest_of, read_json, sae_home
from .estimate import Planned, check_disk_space
from .recipe import Recipe, find_recipe
from .variant import RunConfig

FORMAT = 1
RECORDED = (
    "format",
    "variant",
    "options",
    "layer",
    "site",
    "seed",
    "order_seed",
    "cache",
    "cache_folders",
    "resolved",
    *RunConfig.SIZES,
)


@dataclass(frozen=True)
class TrainConfig:
    """What a user can ask of training."""

    variants: Sequence[str] = ()
    layers: Sequence[int] = (12,)
    site: str = "resid_post"
    seeds: Sequence[int] = (0,)
    caches: Sequence[Path] = ()
    ring: RingCache | None = None  # instead of caches: what is harvested while training runs
    model: str | None = None
    steps: int | None = None  # None: one epoch of the cache
    batch_size: int | None = None  # None: the recipe's
    width: str | None = None  # "4x", "16k" or a number; None: the recipe's
    l0: Sequence[float] = ()  # latents a token, for every recipe; none: its own default
    paper_exact: bool = False
    options: Sequence[str] = ()  # "option=value" or "variant.option=value"
    shuffle_seed: int = 0
    resume: Sequence[Path] = ()
    out: Path | None = None
    device: str = "auto"
    log_every: int = 50
    checkpoint_every: int = 1000
    log: Sequence[str] = ()  # loggers, by name
    compiled: bool = False  # steps go through torch.compile
    origins: Mapping[str, str] = field(default_factory=dict)  # flag -> "flag" or "file:line", of what was not default

    def record(self) -> dict[str, Any]:
        """The request as JSON, under the names that run.json has always used."""
        on_disk = {"paper_exact": "literal", "shuffle_seed": "order_seed"}
        values = {on_disk.get(f.name, f.name): getattr(self, f.name) for f in fields(self) if f.name != "ring"}
        return json.loads(json.dumps(values, default=str))


@dataclass
class Run:
    """One run: what decides its result, and its folder."""

    recipe: Recipe
    options: dict[str, Any]
    hook: Hook
    seed: int
    shuffle_seed: int
    config: RunConfig
    cache: Cache | ConcatCache | RingCache
    folder: Path = Path()
    compiled: bool = False
    notes: Sequence[str] = ()  # what the plan says of its options
    asked: Mapping[str, Any] = field(default_factory=dict)  # the request it came from
    problem: str | None = field(default=None)  # why it was given up

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def steps(self) -> int:
        return self.config.steps

    def identity(self) -> dict[str, Any]:
        """Everything that decides the result."""
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
        digest = digest_of(self.identity())[:6]
        site = "" if self.hook.site == "resid_post" else f"-{self.hook.site}"
        knobs = ("" if self.config.l0 is None else f"-l0_{self.config.l0:g}") + "-literal" * self.config.paper_exact
        return f"{self.recipe.name}-L{self.hook.layer:02d}{site}-n{self.config.d_sae}{knobs}-s{self.seed}-{digest}"

    @property
    def planned(self) -> Planned:
        return self.recipe, self.options, self.config

    @property
    def cache_folders(self) -> list[str]:
        caches = self.cache.caches if isinstance(self.cache, ConcatCache) else [self.cache]
        return [str(cache.folder.resolve()) for cache in caches]

    @property
    def order(self) -> tuple[Any, ...]:
        """What decides the batches: runs of the same read each once, together."""
        return (*self.cache_folders, self.hook, self.config.batch_size, self.shuffle_seed)

    @property
    def done(self) -> bool:
        return (self.folder / "sae.json").exists()


def plan_training(request: TrainConfig, beside: Mapping[Path, float] = {}) -> list[Run]:
    """The runs asked for, each checked and with its folder; nothing is written. UsageError names all that is wrong.

    OutsideError where they do not fit on a disk, with the bytes that something else writes into folders `beside`.
    """
    runs = [resume_run(folder, request) for folder in request.resume] if request.resume else new_runs(request)
    check_disk_space([(run.planned, run.folder) for run in runs if not run.done], beside)
    return runs


def new_runs(request: TrainConfig) -> list[Run]:
    """The runs of a request that goes on with none."""
    check_seeds(request.shuffle_seed, *request.seeds)
    if request.site not in SITES:
        raise UsageError(f"--site {request.site} is unknown: give one of {', '.join(SITES)}.")
    recipes = [find_recipe(name) for name in dict.fromkeys(request.variants)]
    given = parse_options(request.options, recipes)
    runs, problems = [], []
    for layer in dict.fromkeys(request.layers):
        hook = Hook(layer, request.site)
        cache = request.ring or (concat_caches(request.caches) if request.caches else find_cache(request.model, hook))
        if request.caches and canonical_model_name(request.model) not in (
            None,
            name := cache.identity["model"]["name"],
        ):
            raise UsageError(
                f"The --cache given holds activations of {name}, not of {request.model}. Leave --model out."
            )
        d_in = cache.array(cache.require_array(*hook)).shape[1]
        # Of a ring no row is known yet.
        variance = None if isinstance(cache, RingCache) else cache.statistics(hook.array)["variance"]
        for recipe, l0 in itertools.product(recipes, dict.fromkeys(request.l0) or (None,)):
            try:
                sizes = make_run_config(request, recipe, cache, d_in)
                config = sizes._replace(l0=l0, paper_exact=request.paper_exact, variance=variance)
                with torch.device("meta"):  # every mistake shows here, before anything is allocated or written
                    notes = recipe.make(config, given[recipe.name]).notes
            except UsageError as error:
                problems.append(str(error))
                continue
            for seed in dict.fromkeys(request.seeds):
                options, order = given[recipe.name], request.shuffle_seed
                run = Run(recipe, options, hook, seed, order, config, cache, compiled=request.compiled, notes=notes)
                run.asked = request.record()
                run.folder = (request.out or sae_home() / "runs") / run.default_name()
                runs.append(run)
    if problems:
        raise UsageError("\n".join(dict.fromkeys(problems)))
    return runs


def check_seeds(*seeds: int) -> None:
    for seed in seeds:
        if not 0 <= seed < 2**63:
            raise UsageError(f"The seed {seed} is out of range: --seed and --order-seed are 0 to 2^63 - 1.")


def group_by_pass(runs: Iterable[Run]) -> list[list[Run]]:
    """What is trained on one pass each, and is on the device together."""
    together: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        together.setdefault(run.order, []).append(run)
    return list(together.values())


def make_run_config(
    request: TrainConfig, recipe: Recipe, cache: Cache | ConcatCache | RingCache, d_in: int
) -> RunConfig:
    """The sizes of a run: what was asked for, else the recipe's, and one epoch."""
    batch_size = recipe.batch_size if request.batch_size is None else request.batch_size
    if batch_size < 1:
        raise UsageError(f"--batch-size {batch_size} is not positive.")
    rolling = isinstance(cache, RingCache)
    epoch = (
        cache.cumulative_batches(batch_size)[-1]
        if rolling
        else BatchOrder(cache.chunk_rows, batch_size, 0).batches_per_epoch
    )
    steps = epoch if request.steps is None else request.steps
    if steps < 1:
        raise UsageError(f"--steps {steps} would train nothing.")
    if steps * batch_size >= 2**63:
        raise UsageError(f"--steps {steps} of {batch_size:,} tokens are more than can be counted. Give fewer.")
    if rolling and steps > epoch:
        raise UsageError(
            f"--steps {steps} is more than there is: {cache.layout.rows:,} tokens are {epoch:,} batches of {batch_size:,}, "
            "and --stream reads them once. Give more --tokens, or fewer --steps."
        )
    return RunConfig(d_in, parse_width(request.width, recipe, d_in), steps, batch_size)


def resume_run(folder: Path, request: TrainConfig) -> Run:
    """The run of a folder, as its run.json describes it."""
    if not (folder / "run.json").exists():
        raise UsageError(f"{folder} holds no run (no run.json). `sae train --resume` takes a folder under runs/.")
    fixed = {
        "--variant": "variants", "--layer": "layers", "--site": "site", "--seed": "seeds", "--model": "model", "--steps": "steps", "--width": "width",
        "--batch-size": "batch_size", "--l0": "l0", "--paper-exact": "paper_exact", "--set": "options", "--shuffle-seed": "shuffle_seed", "--out": "out", "--compile": "compiled",
    }  # fmt: skip
    changed = [flag for flag, name in fixed.items() if getattr(request, name) != getattr(TrainConfig(), name)]
    if changed:
        raise UsageError(
            f"{', '.join(changed)} cannot change a run that has begun. Leave them out to go on with {folder}, or start a new run."
        )
    if "imported_from" in read_json(folder / "run.json"):
        raise UsageError(f"{folder} was imported from another library; there is no training to go on with.")
    record = read_json(folder / "run.json", *RECORDED)
    if record["format"] != FORMAT:
        raise UsageError(f"{folder}/run.json has format {record['format']}; this version reads {FORMAT}. Upgrade.")
    if "ring" in record:
        raise UsageError(
            f"{folder} is trained on activations that are harvested meanwhile, into {record['cache_folders'][0]}. "
            "To go on with it, repeat the `sae train --stream` command that began it."
        )
    cache = concat_caches(request.caches or list(map(Path, record["cache_folders"])))
    recipe = find_recipe(record["variant"])
    hook = Hook(record["layer"], record["site"])
    cache.require_array(*hook)
    config = RunConfig.from_record(record, cache.statistics(hook.array)["variance"])
    seeds, compiled = (record["seed"], record["order_seed"]), record.get("compiled", False)
    run = Run(recipe, record["options"], hook, *seeds, config, cache, folder, compiled)
    if run.identity()["cache"] != record["cache"]:
        raise UsageError(
            f"{', '.join(run.cache_folders)} is not what {folder} was trained on. Give that cache with --cache."
        )
    return run


def parse_width(asked: str | None, recipe: Recipe, d_in: int) -> int:
    """d_sae from "4x" (times d_in), "16k" (times 1024) or a number."""
    if asked is None:
        return round(recipe.width * d_in)
    try:
        unit = {"x": d_in, "k": 1024}.get(asked[-1:].lower())
        return round(float(asked[:-1]) * unit) if unit else int(asked)
    except (ValueError, OverflowError):
        raise UsageError(
            f"--width {asked} is no width: give a number such as 2304, 16k, or 8x for eight times d_in."
        ) from None


def parse_options(given: Sequence[str], recipes: Sequence[Recipe]) -> dict[str, dict[str, Any]]:
    """`--set` as {variant: {option: value}}. A bare option goes to every variant that has it."""
    parsed: dict[str, dict[str, Any]] = {recipe.name: {} for recipe in recipes}
    keys: set[str] = set()
    for text in given:
        key, equals, value = text.partition("=")
        variant, dot, option = key.rpartition(".")
        if not equals:
            raise UsageError(f"--set {text} has no value: write --set option=value, or variant.option=value.")
        if dot and variant not in parsed:
            raise UsageError(f"--set {text}: {variant} is not among the variants {', '.join(parsed)}.")
        if key in keys:
            raise UsageError(f"--set gives {key} more than once; several values of an option are several commands.")
        keys.add(key)
        targets = [variant] if dot else [r.name for r in recipes if option in r.option_types()] or list(parsed)
        for target in targets:
            parsed[target][option] = parse_value(value)
    return parsed


def parse_value(text: str) -> Any:
    """A TOML value; `none` is None, and anything else is a string."""
    if text.lower() == "none":
        return None
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
