"""Run a harvest: text -> model -> cache, one pass for all layers and sites.

Besides two windows of activations, each process keeps the token ids in memory, four bytes per token.
"""

import contextlib
import shutil
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..cache.contexts import Contexts
from ..cache.layout import Hook, Layout, fingerprint_of
from ..cache.object_store import folder_or_url
from ..cache.reader import Cache, is_ring_cache
from ..cache.store_place import check_address
from ..cache.writer import CacheWriter, harvest_started, recorded_tokens
from ..common.cache_schemas import HARVEST_RECORD
from ..common.device import keep_freed_memory
from ..common.errors import DamagedError, UsageError, did_you_mean, naming
from ..common.files import digest_of, writer_lock
from ..common.process_group import ProcessGroup, current_process_group, is_first_on_this_machine
from .architectures import check_loaded_sites
from .config import LAYERS, HarvestConfig
from .contexts import make_contexts
from .load_errors import translate_model_errors
from .model import LanguageModel, load_trunk
from .plan import HarvestPlan, plan_harvest
from .progress import SILENT, HarvestProgress
from .tokenize_checkpoint import TokenizeCheckpoint, remove_checkpoint
from .window_draft import remove_other_drafts
from .windows import WindowComputer, write_windows


def harvest_activations(
    model: str = HarvestConfig.model, *, layers: int | Sequence[int] = LAYERS,
    sites: str | Sequence[str] = HarvestConfig.sites, dataset: str | Path | None = None, tokens: int | None = None,
    context: int = HarvestConfig.context, held_out: float | None = None, out: str | Path | None = None,
    device: str = "auto", seed: int = 0, progress: HarvestProgress = SILENT, **options: Any,
) -> Cache:  # fmt: skip
    """Run a language model over text and write its activations to a cache on disk, like `sae harvest`.

        cache = sae.harvest_activations("gemma-2-mini", layers=[5, 12], tokens=100_000)
        for x in cache.batches(layer=12, batch_size=4096):  # (4096, d_in) float32
            ...

    A finished cache is opened, an interrupted one is continued, and missing layers are added.

    Args:
        model: Hub id, folder, or "gemma-2-mini", the small model that comes with this package.
        layers: Zero-based blocks; the residual stream after each is harvested.
        sites: "resid_post" (the residual stream after the block), resid_pre, resid_mid, attn_out, attn_z, mlp_in,
            mlp_hidden or mlp_out, or several of them (harvest/model.py says what they are). Any other module of the
            block: "mlp.gate_proj.output".
        dataset: Hub id, a .txt, .jsonl, .parquet or .arrow file, a folder of them, or "python-stdlib". Default: the
            Pile, or python-stdlib for gemma-2-mini.
        tokens: Rows to harvest. Default: ten million, or all of a shorter text.
        context: Tokens in a context, BOS included.
        held_out: Share of the documents that is kept for evaluation. Default: 0.05.
        out: Folder of the cache, or an address such as "s3://bucket/pile". Default: a folder under activations/, named
            after model, dataset and settings.
        device: "auto", "cpu", "cuda" or "cuda:N".
        seed: Order of contexts and rows, and choice of held-out documents.
        progress: Callbacks for rows done and for messages. Default: silent.
        **options: Any other field of `sae.harvest.plan.HarvestConfig`: revision, dataset_revision, subset, split,
            text_column, chat_column, roles, bos, keep_special, skip_positions, skip_tokens, pack, window,
            storage_dtype, compress, max_norm, dtype, attention, batch_contexts, and modules: more sites, as
            "model.layers.{layer}.mlp.gate_proj:output", which replace resid_post if `sites` is not given.

    Returns:
        The cache, opened.

    Raises:
        UsageError: An option is unknown or invalid, or the folder holds something else.
        UnavailableError: The model or the dataset cannot be reached, or the disk is too small.
        Interrupted: Stopped by Ctrl-C. Every committed window is safe; the same call continues.
    """
    known = {field.name for field in fields(HarvestConfig)} - {"origins"}
    for name in options:
        if name not in known:
            raise UsageError(f"harvest_activations has no option {name!r}{did_you_mean(name, known)}")
    if sites is HarvestConfig.sites and options.get("modules"):
        sites = ()  # modules replace the default
    config = HarvestConfig(
        model=str(model), layers=(layers,) if isinstance(layers, int) else tuple(layers),
        sites=(sites,) if isinstance(sites, str) else tuple(sites),
        dataset=None if dataset is None else str(dataset), tokens=tokens, context=context, held_out=held_out,
        out=folder_or_url(out), device=device, seed=seed, **options,
    )  # fmt: skip
    return run_harvest(plan_harvest(config, progress.say), progress)


def run_harvest(plan: HarvestPlan, progress: HarvestProgress = SILENT) -> Cache:
    """Run a plan, or the rest of it, and open the cache. Several launched processes share the windows.

    Raises UsageError if the folder holds something else, UnavailableError if the disk is too small or another process
    is writing, and Interrupted on Ctrl-C, with every committed window safe.
    """
    group = current_process_group(plan.device)
    keep_freed_memory()
    with contextlib.ExitStack() as stack, sigterm_as_ctrl_c(), naming(plan.address, plan.folder):
        if group.is_first:
            check_folder(plan)
            stack.enter_context(writer_lock(plan.folder, "sae harvest", progress.say))
            remove_locks_of_ranks(plan.folder)
            plan.place.fetch()
            if plan.config.tokens is not None and not Contexts.is_complete(
                plan.folder
            ):  # reading the text can take long
                plan.check_space(plan.config.tokens * plan.bytes_per_token, plan.bytes_per_token)
            writer, contexts = start_cache(plan)
        group.barrier()  # the tokens and the arrays' metadata are written
        if plan.store is not None and not group.is_first and is_first_on_this_machine():
            stack.enter_context(writer_lock(plan.folder, "sae harvest", progress.say))
            plan.place.fetch()
        group.barrier()  # every machine has them
        if not group.is_first:
            contexts = Contexts.read(plan.folder, recorded_tokens(plan.folder))
            writer = CacheWriter(plan.folder, plan.identity, cache_layout(plan, contexts), plan.widths, plan.place)
        missing = writer.missing_windows()
        if group.is_first:
            remove_other_drafts(plan.folder, missing)
        group.barrier()  # every process has seen the same list
        if missing:
            harvest_missing(plan, writer, contexts, missing, group, progress)
        group.barrier()
        if group.is_first:
            writer.seal(plan.config.max_norm, plan.token_text)
        group.barrier()
    return Cache(plan.folder)


def remove_locks_of_ranks(folder: Path) -> None:
    """Remove the folders that the ranks of an earlier version left when they were killed."""
    for rank_folder in folder.glob(".rank*"):
        shutil.rmtree(rank_folder, ignore_errors=True)


def start_cache(plan: HarvestPlan) -> tuple[CacheWriter, Contexts]:
    """Write what precedes the first window: tokens, harvest.json and array metadata."""
    contexts = read_or_tokenize(plan)
    HARVEST_RECORD.write_if_changed(plan.folder / "harvest.json", plan.record())
    writer = CacheWriter(plan.folder, plan.identity, cache_layout(plan, contexts), plan.widths, plan.place)
    writer.place.begin()
    remove_checkpoint(plan.folder)  # from here on the tokens are read, never made again
    return writer, contexts


def harvest_missing(
    plan: HarvestPlan, writer: CacheWriter, contexts: Contexts, missing: Mapping[int, list[str]], group: ProcessGroup,
    progress: HarvestProgress,
) -> None:  # fmt: skip
    """Harvest this process's share of the missing windows."""
    rows = {window: len(writer.layout.row_range(window)) for window in missing}
    plan.check_space(
        sum(rows[window] * plan.bytes_per_token_of(arrays) for window, arrays in missing.items()), plan.bytes_per_token
    )
    if len(missing) < writer.layout.n_windows:
        existing = writer.layout.n_windows - len(missing)
        progress.say(f"{existing} of {writer.layout.n_windows} windows already exist.")
    share = dict(list(missing.items())[group.rank :: group.count])
    if share:
        computer = WindowComputer(plan, contexts, writer.layout, progress, drafts=True)
        computer.set_model(load_model_for(plan, share, group.device))
        write_windows(computer, writer, share, progress)


def check_folder(plan: HarvestPlan) -> None:
    """Raise UsageError if the folder or address holds something other than this harvest. Touches nothing in it."""
    if plan.store is not None:
        check_address(plan.store, fingerprint_of(plan.identity))
    elif plan.folder.is_dir():
        harvest_started(plan.folder, fingerprint_of(plan.identity))
        check_not_ring(plan.folder)


def check_not_ring(folder: Path) -> None:
    """Raise UsageError if windows are missing from the folder on purpose."""
    if is_ring_cache(folder):
        raise UsageError(
            f"{folder} keeps only the windows that `sae train --stream` is about to read. "
            "To keep a whole cache, harvest with another --out."
        )


def cache_layout(plan: HarvestPlan, contexts: Contexts) -> Layout:
    """The layout of the cache, whose number of rows is known once the text is tokenized."""
    kept = plan.context_format.row_mask(contexts)[~contexts.held_out]
    return Layout(int(kept.sum()), plan.config.window, plan.config.storage_dtype, plan.config.compress)


def load_model_for(plan: HarvestPlan, windows: Mapping[int, Sequence[str]], device: str) -> LanguageModel:
    """The model up to the deepest layer among the arrays of these windows.

    Raises UsageError unless its own numbers prove the sites.
    """
    hooks = sorted({Hook.from_array(name) for names in windows.values() for name in names})
    last = max(hook.layer for hook in hooks)
    model = load_trunk(
        plan.source, plan.model_config, last, dtype=plan.dtype, device=device, attention=plan.config.attention
    )
    with translate_model_errors(plan.source.argument, plan.config.attention):
        check_loaded_sites(model, plan.model_config, hooks)
    return model


def read_or_tokenize(plan: HarvestPlan) -> Contexts:
    """The contexts to run: those that an earlier start of this harvest wrote, or tokenized and written now.

    Raises DamagedError if they are not those that the cache was started with.
    """
    digest = recorded_tokens(plan.folder)
    if not (harvest_started(plan.folder, fingerprint_of(plan.identity)) and Contexts.is_complete(plan.folder)):
        contexts = tokenize(plan)
        if digest not in (None, digest_of(contexts.file_records())):
            raise DamagedError(
                f"{plan.folder} was started with different tokens than its text gives now, probably because of another "
                "version of tokenizers. Use another --out."
            )
        contexts.write(plan.folder)
    return Contexts.read(plan.folder, digest)


def tokenize(plan: HarvestPlan) -> Contexts:
    """Tokenize the text of a plan, continuing from its checkpoint if there is one."""
    config = plan.config
    return make_contexts(
        plan.text, plan.encoder, plan.context_format, TokenizeCheckpoint(plan.folder, plan.identity),
        tokens=plan.tokens, exactly=config.tokens is not None, context=config.context, held_out=config.held_out_share,
        seed=config.seed, pack=config.pack,
    )  # fmt: skip


@contextlib.contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """Treat SIGTERM, with which schedulers preempt jobs, like Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread can set signal handlers
        return
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
