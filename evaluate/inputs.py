"""Open the inputs of an evaluation: the SAE of a run, the cache with its held-out text, and the model of that cache."""

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from ..cache.catalog import caches_that, find_by_fingerprint, harvest_command, model_folders, open_caches
from ..cache.context_format import ContextFormat
from ..cache.hooks import Hook
from ..cache.layout import is_ring_cache
from ..cache.models import GivenModel, model_label, same_model
from ..cache.opening import Place, open_place
from ..cache.reader import Cache
from ..cache.store_errors import TransientError
from ..common.cache_schemas import HARVEST_RECORD
from ..common.environment import installed_version
from ..common.errors import SaeError, UnavailableError, UsageError
from ..common.files import digest_of, sae_home
from ..common.process_group import rank_and_count
from ..common.special_tokens import special_token_ids
from ..common.tokenizers import tokenizer_digest
from ..harvest.model import (
    LanguageModel,
    ModelSource,
    describe_record,
    find_config,
    find_recorded_model,
    load_model,
    load_tokenizer,
)
from ..train.sae import SAE, load_sae, outline_sae, read_run_record, read_sae_record, sae_spec
from .artifacts import ArtifactCache
from .context import EvalContext
from .controls import RECIPES, base_of, conditions_digest, conditions_of
from .metrics.base import EvalTarget
from .norm_limits import norm_limit_of
from .rows import EvalRow, digest_without_seed
from .sae_text import change_for

ModelLoader = Callable[[ModelSource, str, str, str], LanguageModel]  # source, dtype, device, attention
Found = TypeVar("Found")
TRY_AGAIN = 60.0  # for this many seconds, a store that could not be reached is not tried again
UNREACHABLE: dict[Any, tuple[float, TransientError]] = {}  # place of a cache -> the time of the failure, and the error


def artifact_cache() -> ArtifactCache:
    """The cache of data that do not depend on an SAE, in `activations/evaluation`."""
    return ArtifactCache(sae_home() / "activations" / "evaluation", shared=rank_and_count()[1] > 1)


def open_reachable(place: Place | None, open_cache: Callable[[], Found]) -> Found:
    """Call `open_cache`, unless an earlier call failed less than TRY_AGAIN seconds ago because the store at `place`
    could not be reached. In that case, raise the error of the earlier call again.

    Many runs can have the same cache, and each failed attempt takes minutes.
    """
    if place in UNREACHABLE:
        failed, error = UNREACHABLE[place]
        if time.monotonic() - failed < TRY_AGAIN:
            raise error
    try:
        return open_cache()
    except TransientError as error:
        UNREACHABLE[place] = time.monotonic(), error
        raise


def find_eval_cache(folder: Path, sae: SAE, *, cache: Place | None = None, model: str | None = None) -> Cache:
    """The cache whose held-out text an SAE is evaluated on.

    This is `cache` if given, else the cache the SAE was trained on, even if it has moved to `activations/`. For an
    imported SAE that names no cache, it is the only cache of the SAE's model in `activations/`.

    Raises UsageError if there is no such cache, if several match, or if the SAE belongs to another model. Raises
    DamagedError if the cache it was trained on is damaged.
    """
    match sae.origin:
        case {"model": {"name": str()} as trained_on, "layer": int()}:
            pass
        case _:
            raise UsageError(
                f"{folder} does not record the model and layer it was trained on (`origin` in sae.json), "
                "so it cannot be evaluated."
            )
    if model and not (given := GivenModel(model)).is_base_of(trained_on):
        raise UsageError(
            f"{folder} was trained on {describe_record(trained_on)}, not on {given.describe()}. "
            "Omit --model, or evaluate a run of that model."
        )
    if cache:
        chosen = open_reachable(cache, lambda: open_place(cache))
        if not same_model(chosen.identity["model"], trained_on):
            raise UsageError(
                f"{folder} was trained on {describe_record(trained_on)}, but {cache} was harvested from "
                f"{describe_record(chosen.identity['model'])}. Use --cache to give a cache of the SAE's model."
            )
        return chosen
    recorded, fingerprint = sae.origin.get("cache"), sae.origin.get("fingerprint")
    if recorded is None and fingerprint is None:
        return only_cache_of_model(folder, sae.origin)
    try:
        place = recorded if isinstance(recorded, str) else None
        found = open_reachable(place, lambda: find_by_fingerprint(fingerprint, place))
    except UnavailableError as error:  # an address that does not answer
        raise UnavailableError(
            f"{error} Alternatively, use --cache to give another cache of {model_label(trained_on)}."
        ) from error
    if found:
        return found
    if "format" in sae.origin:  # an imported SAE was not trained on the recorded cache, which only served to verify it
        return only_cache_of_model(folder, sae.origin)
    where = f" ({recorded})" if isinstance(recorded, str) else ""
    raise UsageError(
        f"The cache that {folder} was trained on{where} was not found. It contains the text to evaluate on. "
        "Move the cache back to where it was or into activations/, harvest it again with the same options of "
        f"`sae harvest --model {model_label(trained_on)}`, or use --cache to give another cache of that model."
    )


def load_run(
    folder: Path,
    *,
    cache: Place | None = None,
    model: str | None = None,
    device: str | None = "cpu",
    max_norm: float | None = None,
) -> tuple[EvalRow, Cache]:
    """A row for a run folder, and the cache whose text the SAE is evaluated on (`find_eval_cache`).

    `max_norm` is passed to `norm_limit_of`. If `device` is None, the weights are not read (`outline_sae`).
    """
    sae = outline_sae(folder) if device is None else load_sae(folder, device)
    text_cache = find_eval_cache(folder, sae, cache=cache, model=model)
    return row_of_run(folder, sae, text_cache, max_norm), text_cache


def row_of_run(folder: Path, sae: SAE, cache: Cache, max_norm: float | None = None) -> EvalRow:
    """A row for a run folder, to be evaluated on the text of a cache.

    The digest in `weights` covers more than the tensors, because the k of a TopK is not a tensor and one SAE can be
    evaluated at several hooks.
    """
    folder = folder.resolve()
    record, hook = dict(read_sae_record(folder)), Hook.from_record(sae.origin)
    trained = read_run_record(folder)
    run: Mapping[str, Any] = trained or {}  # an imported SAE has no seed and no target L0
    weights = digest_of([sae_spec(sae), record["sha256"], *hook.record.values()])
    system = digest_without_seed(run) if "seed" in run else ""
    target = EvalTarget(sae, hook, norm_limit=norm_limit_of(sae.origin, cache, hook, max_norm), system=system)
    return EvalRow(
        folder.name, target, folder, record, weights, target_l0=run.get("l0"),
        conditions=conditions_digest(conditions_of(folder)), is_control=sae.origin.get("variant") in RECIPES,
        base=base_of(trained), sae_folder=folder,
    )  # fmt: skip


def only_cache_of_model(folder: Path, origin: Mapping[str, Any]) -> Cache:
    """The cache that was harvested from a model and has held-out text; there must be exactly one. Used for SAEs trained
    elsewhere, which do not need a particular cache."""
    model, name = origin["model"], model_label(origin["model"])

    def is_usable(c: Cache) -> bool:
        of_model = same_model(c.identity["model"], model) and not is_ring_cache(c.folder)
        return of_model and len(c.contexts(held_out=True)) > 0

    usable = caches_that(is_usable, open_caches())
    if len(usable) == 1:
        return usable[0]
    if not usable:
        command = harvest_command(name, Hook.from_record(origin), origin.get("context"))
        raise UsageError(
            f"{folder} names no cache, and no cache in {sae_home() / 'activations'} has held-out text for "
            f"{name}. Use --cache to give one, or harvest one: {command}"
        )
    listed = "\n".join(f"  --cache {c.folder}   ({c.rows:,} rows, {c.identity['data']['name']})" for c in usable)
    raise UsageError(
        f"{folder} names no cache, and {len(usable)} caches have held-out text for {name}. Choose one:\n{listed}"
    )


def check_tokens(tokens: int | None) -> None:
    if tokens is not None and tokens <= 0:
        raise UsageError(f"--tokens {tokens}: expected a positive number of tokens, such as 20k.")


def model_loader() -> ModelLoader:
    """A function that loads models and keeps the last one, so that a model that several caches share is loaded once."""

    @lru_cache(1)
    def load(source: ModelSource, dtype: str, device: str, attention: str) -> LanguageModel:
        return load_model(source, find_config(source), dtype=dtype, device=device, attention=attention)

    return load


def find_model_of(cache: Cache, given: str | None) -> tuple[ModelSource, Any]:
    """The model of a cache and its configuration: from `given`, or from where the harvest found the model, or from the
    Hub."""
    try:
        return find_recorded_model(
            cache.identity["model"], model_folders(cache), given, model_folders(cache, "adapters")
        )
    except UsageError as error:
        raise UsageError(
            f"{cache.place} was harvested from {describe_record(cache.identity['model'])}. {error} If the "
            "folder has moved, name it with --model FOLDER. If it has changed, restore it, or harvest and "
            "train again. Otherwise, results of one model would be reported for another."
        ) from error


def check_tokenizer(cache: Cache, source: ModelSource, tokenizer: Any) -> tuple[str, ...]:
    """Compare a model's tokenizer with the tokenizer of a cache.

    Returns a note if the files are the same, but the installed library versions load them as a tokenizer that differs
    from the one in the harvest.

    Raises UsageError if the files have changed.
    """
    expected, found = cache.identity.get("tokenizer"), tokenizer_digest(tokenizer)
    if expected in (None, found):
        return ()
    made_with = versions_of_harvest(cache)
    differing = [f"{name} {made}" for name, made in made_with.items() if made != installed_version(name)]
    if differing and source.is_pinned:
        return (
            f"the tokenizer of {source.label} differs from the tokenizer of the harvest, although its files "
            f"are the same: the harvest used {' and '.join(differing)}. Install the same to make sure that "
            "texts are tokenized in the same way",
        )
    raise UsageError(
        f"{cache.place} was harvested with a different tokenizer (sha256 {str(expected)[:12]}) from the one in "
        f"{source.argument} (sha256 {found[:12]}), so its token ids would stand for different text. Restore the "
        "tokenizer's files, or use --model to give the folder that has them. If they are lost, harvest and train again."
    )


def versions_of_harvest(cache: Cache) -> dict[str, str]:
    """The versions of transformers and tokenizers with which a cache was harvested, if the cache records them."""
    with contextlib.suppress(SaeError, KeyError, TypeError):
        versions = HARVEST_RECORD.read(cache.folder / "harvest.json")["environment"]["versions"]
        return {name: versions[name] for name in ("transformers", "tokenizers") if isinstance(versions.get(name), str)}
    return {}


def model_identity_of(source: ModelSource, attention: str, dtype: str) -> dict[str, Any]:
    """What identifies the model and the way in which it computes; part of the settings of every result."""
    record = source.identity()
    adapters = {"adapters": record["adapters"]} if "adapters" in record else {}
    return {"model": source.name, "revision": source.revision, **adapters, "attention": attention, "llm_dtype": dtype}


def make_context(
    cache: Cache,
    *,
    mode: str = "0.6.0",
    tokens: int | None = None,
    data: Path | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    precision: str = "float32",
    load: ModelLoader | None = None,
    model: str | None = None,
    origin: Mapping[str, Any] | None = None,
) -> EvalContext:
    """The evaluation context of a cache: its model, found but not loaded yet, and its held-out text.

    The text is the first contexts of the held-out text, as many as are needed for `tokens` tokens (default: all of
    them). `model` is the model's folder, if it has moved since the harvest. `origin` is the record of where the SAEs
    come from; for imported SAEs, it determines the first token of the contexts and their length. `precision` is the
    precision of the SAEs' matrix products.

    Raises UsageError if the model or the tokenizer on this machine differs from the one that the cache was harvested
    with, or if the cache has no held-out text.
    """
    load = load or model_loader()
    source, model_config = find_model_of(cache, model)
    contexts = cache.contexts(held_out=True)
    if not len(contexts):
        raise UsageError(
            f"{cache.place} has no held-out text to evaluate on. Harvest again with --held-out above 0, or with more "
            "text."
        )
    if tokens is not None:
        contexts = contexts.select(slice(0, 1 + int((contexts.length.cumsum() < tokens).sum())))
    attention = cache.identity["attention"]
    tokenizer = load_tokenizer(source)
    notes = check_tokenizer(cache, source, tokenizer)
    form = ContextFormat.of(cache.identity, tokenizer)
    # SAEBench never counts special tokens, so they are skipped even if the cache was harvested with --keep-special.
    special = {*form.skip_ids, *special_token_ids(tokenizer), *([] if form.bos_id is None else [form.bos_id])}
    form = replace(form, skip_ids=tuple(sorted(special)))
    change = change_for(origin or {}, form, cache.identity["context"], tokenizer)
    contexts = change.apply(contexts)
    return EvalContext(
        load_model=lambda: load(source, dtype, device, attention),
        tokenizer=tokenizer,
        contexts=contexts,
        context_format=change.format(form),
        mode=mode,
        model_identity=model_identity_of(source, attention, dtype),
        model_argument=source.argument,
        text_identity={"text": cache.fingerprint, "contexts": len(contexts), **change.identity},
        artifacts=artifact_cache(),
        data=data,
        device=device,
        precision=precision,
        model_config=model_config.get_text_config(),
        change=change,
        notes=notes,
    )
