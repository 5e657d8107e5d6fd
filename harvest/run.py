"""Run a harvest: text -> model -> cache, one pass for all layers and sites.

Each process keeps two windows of activations and all token ids in memory. A token id takes four bytes.
"""

import contextlib
import shutil
import socket
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..cache.contexts import Contexts
from ..cache.object_store import folder_or_url
from ..cache.opening import open_place
from ..cache.reader import Cache
from ..cache.writer import CacheWriter
from ..common.device import keep_freed_memory
from ..common.errors import UsageError, did_you_mean, naming
from ..common.locks import writer_lock
from ..common.process_group import ProcessGroup, current_process_group, is_first_on_this_machine
from ..common.signals import sigterm_as_ctrl_c
from .config import LAYERS, HarvestConfig
from .plan import HarvestPlan, plan_harvest
from .progress import SILENT, HarvestProgress
from .stages import check_before_text, check_folder, harvest_windows, open_cache, start_cache
from .tasks import harvest_share
from .window_draft import remove_other_drafts

SEEN_WITHIN = 60.0  # seconds after which every machine should see a new file on a network disk


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
            mlp_hidden or mlp_out, or several of them (harvest/model.py defines them). Also the input or output of any
            other module of the block, such as "mlp.gate_proj.output".
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
            storage_dtype, compress, max_norm, dtype, attention, batch_contexts, compiled, modules, share and prepare.
            `modules` are sites given by module, such as "model.layers.{layer}.mlp.gate_proj:output". They are harvested
            in addition to `sites`; if `sites` is not given, they are harvested instead of resid_post. Several tasks can
            harvest one cache: share="3/64" harvests this task's part, and prepare=True only tokenizes the text.

    Returns:
        The opened cache. As long as other shares are missing, the cache does not list the layers that this share adds.

    Raises:
        UsageError: An option is unknown or invalid, or the folder holds something else.
        UnavailableError: The model or the dataset cannot be reached, or the disk is too small.
        Interrupted: Stopped by Ctrl-C. Every committed window is safe; the same call continues the harvest.
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
    plan = plan_harvest(config, progress.say)
    cache = run_harvest(plan, progress)
    return cache if plan.store is None else open_place(plan.address)  # its chunks are not in the working folder


def run_harvest(plan: HarvestPlan, progress: HarvestProgress = SILENT) -> Cache:
    """Run a plan, or what remains of it, and open the cache. Several launched processes divide the windows.

    For a cache in a store, the working folder is opened, which contains the records but no chunks.

    If `plan.config.share` is set, only this share is run; if `plan.config.prepare` is set, only the steps before the
    first window. In both cases the cache is complete afterwards only if nothing else was missing.

    Raises UsageError if the folder holds something else, or if the processes do not see the same folder;
    UnavailableError if the disk is too small, another process is writing, or one of the launched processes has ended;
    and Interrupted on Ctrl-C, with every committed window safe.
    """
    keep_freed_memory()
    with sigterm_as_ctrl_c(), naming(plan.address, plan.folder):
        if plan.share or plan.config.prepare:
            harvest_share(plan, progress)
        else:
            harvest_ranks(plan, current_process_group(plan.device), progress)
    return Cache(plan.folder)


def harvest_ranks(plan: HarvestPlan, group: ProcessGroup, progress: HarvestProgress) -> None:
    """Harvest as one process of a group, or alone. The first process holds the folder's lock for all processes.

    One lock is enough: if the first process dies and another harvest begins, the other processes only commit missing
    windows.
    """
    with contextlib.ExitStack() as stack:

        def begin() -> tuple[CacheWriter, Contexts, dict[int, list[str]]] | None:
            if not group.is_first:
                return None
            check_folder(plan)
            stack.enter_context(writer_lock(plan.folder, "sae harvest", progress.say))
            remove_locks_of_ranks(plan.folder)
            plan.place.fetch()
            check_before_text(plan)
            writer, contexts = start_cache(plan)
            missing = writer.missing_windows()
            remove_other_drafts(plan.folder, missing)
            return writer, contexts, missing

        def fetch() -> None:
            if plan.store is not None and not group.is_first and is_first_on_this_machine():
                stack.enter_context(writer_lock(plan.folder, "sae harvest", progress.say))
                plan.place.fetch()

        begun = group.everywhere(begin)
        group.everywhere(fetch)
        # All processes use the first process's list, since their own view of a network disk can be seconds old.
        missing = group.gather(begun[2] if begun else None)[0]
        if plan.store is None:
            check_one_folder(plan.folder, group)
        writer, contexts = group.everywhere(lambda: begun[:2] if begun else open_cache(plan))
        rank = slice(group.rank, None, group.count)
        group.everywhere(
            lambda: harvest_windows(plan, writer, contexts, missing, dict(list(missing.items())[rank]), progress)
        )
        group.everywhere(lambda: writer.seal(plan.config.max_norm, plan.token_text) if group.is_first else None)


def check_one_folder(folder: Path, group: ProcessGroup) -> None:
    """Raise UsageError unless every process sees the lock note that the first process wrote into the folder."""
    note, host = folder / ".lock.holder", socket.gethostname()
    expected, first = group.gather((note.read_text() if note.exists() else "", host))[0]

    def look() -> None:
        started = time.monotonic()
        while (note.read_text() if note.exists() else "") != expected:
            if time.monotonic() - started > SEEN_WITHIN:
                raise UsageError(
                    f"{host} does not see what {first} has written into {folder}. All machines need the same folder: "
                    "set --out to a folder on a disk that all of them share, or to an address such as s3://bucket/pile."
                )
            time.sleep(1)

    group.everywhere(look)


def remove_locks_of_ranks(folder: Path) -> None:
    """Remove the folders left by killed ranks of an earlier version."""
    for rank_folder in folder.glob(".rank*"):
        shutil.rmtree(rank_folder, ignore_errors=True)
