"""The plan of a harvest: model, text, hooks, sizes and folder, checked and estimated before anything is written."""

import contextlib
import shutil
import tempfile
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..cache.context_format import ContextFormat
from ..cache.layout import Hook, Layout, fingerprint_of
from ..cache.mirror import working_folder
from ..cache.object_store import ObjectStore, is_url, open_store
from ..cache.place import FolderPlace
from ..cache.planned import PlannedCache
from ..cache.reader import Cache
from ..cache.statistics import describe_statistics
from ..cache.store_place import StorePlace, take_snapshot
from ..common.cache_schemas import HARVEST_RECORD
from ..common.device import resolve_device, resolve_dtype
from ..common.errors import SaeError, UnavailableError
from ..common.files import folder_bytes, free_space
from ..common.formatting import format_bytes, format_duration
from ..common.process_group import processes_on_this_machine, rank_and_count
from ..common.special_tokens import choose_bos, token_text
from ..common.tokenizers import check_embedded, describe_tokens, tokens_without_embedding
from . import mini
from .architectures import (
    check_context,
    check_layers,
    check_sites,
    hook_width,
    hooks_of_sites,
    module_name,
)
from .cache_folder import default_folder, is_begun, mention_other_revisions
from .chat import ChatEncoder
from .config import TOKENS, HarvestConfig, check_config, check_layers_are_used
from .datasets import EMBEDDED_TEXT, PILE, open_text
from .division import describe_division
from .documents import UNREADABLE, TextSource, describe_unreadable
from .encode import DocumentEncoder
from .estimate import block_seconds_per_token
from .existing import ExistingRows, find_existing
from .identity import LITERALS, identity_of
from .model import ModelSource, find_model, load_tokenizer
from .share import HarvestShare
from .store_costs import check_working_folder, harvest_requests, working_bytes
from .structure import embedding_rows

# (model, layer) -> the elementwise variance that the papers' MSE and explained variance of one SAE imply. As it is
# derived, it only serves as a plausibility check.
IMPLIED_VARIANCE = {("google/gemma-2-2b", 12): 5.6, ("google/gemma-2-2b", 19): 24.0}


@dataclass(frozen=True)
class HarvestPlan:
    """What will be read, computed and written, and where: a HarvestConfig with everything in it resolved.

    `describe` returns what `sae harvest` prints before the work (all that `sae harvest --dry-run` prints), `summary`
    what it prints afterwards.
    """

    config: HarvestConfig
    source: ModelSource
    model_config: Any  # transformers' configuration of the model
    tokenizer: Any
    text: TextSource
    identity: dict[str, Any]  # everything that decides a byte of the cache
    folder: Path
    hooks: list[Hook]
    tokens: int  # rows to harvest; an upper bound where config.tokens is None
    dtype: str
    device: str
    chat: ChatEncoder | None = None  # for a text of conversations
    store: ObjectStore | None = None  # of a cache in an object store; `folder` is then its working folder

    @cached_property
    def widths(self) -> dict[str, int]:
        """Array name -> width of its rows."""
        return {hook.array: hook_width(hook, self.model_config) for hook in self.hooks}

    @property
    def share(self) -> HarvestShare | None:
        """The share of an array job that this task does."""
        return None if self.config.share is None else HarvestShare.parse(self.config.share)

    @property
    def command(self) -> str:
        """What other tasks are told that this one does."""
        return "sae harvest --prepare" if self.config.prepare else f"sae harvest --share {self.config.share}"

    @property
    def context_format(self) -> ContextFormat:
        """What contexts begin with, and which of their tokens are rows."""
        return ContextFormat.of(self.identity, self.tokenizer)

    @property
    def encoder(self) -> DocumentEncoder:
        """What turns the documents into token ids."""
        return DocumentEncoder(
            self.tokenizer, self.context_format.bos_id, LITERALS in self.identity, self.chat,
            embedding_rows(self.model_config),
        )  # fmt: skip

    @property
    def modules(self) -> dict[str, str]:
        """Array name -> the hooked module, as transformers names it."""
        return {hook.array: module_name(hook, self.model_config) for hook in self.hooks}

    def bytes_per_token_of(self, arrays: Sequence[str]) -> int:
        """Uncompressed bytes per token: bfloat16 activations and a float32 norm per array, then row_ctx and row_pos."""
        return sum(2 * self.widths[name] + 4 for name in arrays) + 6

    @property
    def bytes_per_token(self) -> int:
        return self.bytes_per_token_of(list(self.widths))

    @property
    def address(self) -> str:
        """The folder or address of the cache."""
        return str(self.folder) if self.store is None else self.store.url

    @cached_property
    def place(self) -> FolderPlace:
        """Where the files of the cache are kept."""
        return FolderPlace(self.folder) if self.store is None else StorePlace(self.store, self.folder)

    @property
    def existing(self) -> ExistingRows:
        """What the folder already holds of this harvest; an address is looked at once."""
        return find_existing(self._records_folder, fingerprint_of(self.identity), self.hooks, self.config.max_norm)

    @cached_property
    def _records_folder(self) -> Path:
        if self.store is None:
            return self.folder
        folder = Path(tempfile.mkdtemp(prefix="sae-plan-"))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        take_snapshot(self.store, folder)
        return folder

    @property
    def finished_cache(self) -> Cache | None:
        """The cache, if every planned hook is already in it."""
        existing = self.existing
        return existing.cache if existing.is_finished else None

    def is_complete(self, cache: Cache) -> bool:
        """Whether every planned hook is complete in the cache: not after a share of which others are missing."""
        return set(self.hooks) <= set(cache.hooks)

    def token_text(self, token: int) -> str:
        """The text of a token id."""
        return self.tokenizer.decode([token])

    def planned_cache(self) -> PlannedCache:
        """The cache that this plan will write, for training to be planned on it before the harvest."""
        return PlannedCache(self.folder, self.identity, self.layout, self.widths)

    @property
    def bytes_to_write(self) -> int:
        """Uncompressed bytes still to be written."""
        existing = self.existing
        if existing.cache is None:
            written = folder_bytes(self.folder) if self.store is None else 0
            return max(self.tokens * self.bytes_per_token - written, 0)
        return existing.rows_left * self.bytes_per_token_of([hook.array for hook in existing.missing])

    def describe(self) -> list[str]:
        """The lines that `sae harvest` prints before any work. Timing one block of the model takes a few seconds."""
        existing = self.existing
        rows = self.tokens if existing.cache is None else existing.rows_left
        per_token = self.bytes_per_token_of([hook.array for hook in existing.missing])
        size = f"{rows:,} tokens x {per_token:,} B = {format_bytes(rows * per_token)}"
        if self.config.tokens is None and existing.cache is None:
            size = f"up to {size}"
        if self.config.compress:
            size += " before compression"
        return [
            *self.describe_source(),
            *([] if existing.is_finished else self.describe_size(size, existing)),
            *describe_division(
                self.share,
                self.layout_to_fill,
                self.windows_of_process,
                self.config.context,
                self.model_config,
                {hook: self.widths[hook.array] for hook in existing.missing},
                self.dtype,
                self.device,
            ),
            f"time     {self.describe_time()}",
            f"cache    {existing.describe(self.address, self.config.max_norm)}",
        ]

    def describe_size(self, size: str, existing: ExistingRows) -> list[str]:
        """The lines of `describe` about what is written: where, how much, and in how many requests."""
        free = f"{format_bytes(free_space(self.folder))} free"
        if self.store is None:
            return [f"size     {size}; {free}"]
        windows = self.layout.n_windows if existing.cache is None else existing.windows_left
        requests = harvest_requests(self.layout, len(existing.missing), windows)
        return [
            f"size     {size}",
            f"store    {self.address}: about {requests.writes:,} writes and {requests.reads:,} reads",
            f"local    {self.folder}: up to {format_bytes(self.working_bytes)} at a time; {free}",
        ]

    @property
    def layout(self) -> Layout:
        """The layout that the cache will have; its rows are an upper bound where config.tokens is None."""
        return Layout(self.tokens, self.config.window, self.config.storage_dtype, self.config.compress)

    @property
    def layout_to_fill(self) -> Layout:
        """The layout of the cache that has begun, or that will be."""
        cache = self.existing.cache
        return self.layout if cache is None else cache.layout

    @property
    def windows_left(self) -> Sequence[int]:
        """The windows that are to be harvested, by this process or another."""
        existing = self.existing
        return range(self.layout.n_windows) if existing.cache is None else existing.windows

    @property
    def windows_of_process(self) -> Sequence[int]:
        """Those of this process: of its share, or of the rank that has the most."""
        if self.share is None:
            return self.windows_left[:: rank_and_count()[1]]
        left, of_share = self.windows_left, self.share.windows(self.layout_to_fill.n_windows)
        return of_share if isinstance(left, range) else [window for window in left if window in of_share]

    @property
    def working_bytes(self) -> int:
        """The most bytes that the working folder of a cache in an object store holds."""
        return working_bytes(self.layout, self.bytes_per_token, processes_on_this_machine())

    def describe_source(self) -> list[str]:
        """The lines of `describe` about the model, its hooks and the text."""
        held_out = "a tenth" if self.identity["held_out"] == "by name" else f"{self.config.held_out_share:.0%}"
        return [
            f"model    {self.source.label} at {self.source.revision[:12]}, computed in {self.dtype} on {self.device}",
            *(
                f"adapter  {adapter.name}, merged into the model; trained for {adapter.base or 'an unnamed model'}"
                for adapter in self.source.adapters
            ),
            *(f"hook     {h.name} = {self.modules[h.array]}, {self.widths[h.array]} wide" for h in self.hooks),
            f"text     {self.text.name} at {self.text.identity['revision'][:12]}, {held_out} of the documents held out",
            *self.describe_format(),
        ]

    def describe_format(self) -> list[str]:
        """The lines of `describe` about what contexts begin with and which of their tokens are left out."""
        form, choice = self.context_format, choose_bos(self.tokenizer, self.config.bos)
        token = "none" if form.bos_id is None else f"{token_text(self.tokenizer, form.bos_id)} (id {form.bos_id})"
        lines = [f"bos      {token}: {choice.reason if form.bos_id == choice.id else 'as this cache was begun'}"]
        if self.chat is not None:
            wrote = f"what {' and '.join(self.chat.roles)} wrote" if self.chat.roles else "all that is written"
            lines.append(f"chat     {self.config.chat_column} through the tokenizer's template; rows are {wrote}")
        left_out = [f"the first {form.skip_positions} positions of each context"] if form.skip_positions else []
        if self.config.skip_tokens:
            left_out.append(", ".join(repr(token_text(self.tokenizer, token)) for token in form.skip_ids))
        if beyond := tokens_without_embedding(self.tokenizer, rows := embedding_rows(self.model_config)):
            lines.append(
                f"unknown  {describe_tokens(beyond)}: tokens of the tokenizer beyond the {rows:,} rows of the model's "
                "embedding; a text that has one is refused"
            )
        return [*lines, *([f"left out {'; '.join(left_out)}"] if left_out else [])]

    def describe_time(self) -> str:
        """The estimated time as text. It is also part of the plans of --stream and `sae reproduce`.

        Of several launched processes only the first, which prints, measures it.
        """
        rank, processes = rank_and_count()
        if rank > 0:
            return "estimated by the first process"
        if self.finished_cache:
            return "none: the cache is finished"
        where = self.device if processes == 1 else f"{processes} processes"
        rows, mine = map(self.layout_to_fill.rows_in, (self.windows_left, self.windows_of_process))
        seconds = self.estimated_seconds() * mine / max(rows, 1)
        return f"about {format_duration(seconds)} of model time on {where}, extrapolated from timing one block"

    def estimated_seconds(self) -> float:
        """How long the model computes on one device, from timing one block. Reading and writing overlap with it."""
        config = self.config
        per_block = block_seconds_per_token(
            self.model_config, dtype=self.dtype, device=self.device, attention=config.attention,
            context=config.context, batch_contexts=config.batch_contexts,
        )  # fmt: skip
        existing = self.existing
        blocks = max((hook.layer + 1 for hook in existing.missing), default=0)
        return per_block * blocks * (self.tokens if existing.cache is None else existing.rows_left)

    def summary(self, cache: Cache, seconds: float) -> list[str]:
        """The lines that `sae harvest` prints when the cache is finished: each array's statistics, rows and time."""
        lines = []
        for hook in self.hooks:
            implied = IMPLIED_VARIANCE.get((cache.model, hook.layer)) if hook.site == "resid_post" else None
            expected = f" (about {implied:g} follows from the papers' numbers)" if implied else ""
            lines.append(f"{hook.array:8s} {describe_statistics(cache.statistics(hook.array))}{expected}")
            lines += cache.describe_outliers(hook)
        contexts = cache.contexts(held_out=False)
        left_out = int(contexts.length.sum()) - cache.rows
        chosen = self.config.roles or self.config.skip_positions or self.config.skip_tokens
        kind = "tokens" if chosen else "special tokens"
        counts = {why: count for why, count in self.text.skipped.items() if count and why != UNREADABLE}
        skipped = "".join(f", {count:,} {why} documents skipped" for why, count in counts.items())
        if sentence := describe_unreadable(self.unreadable_rows()):
            lines.append(f"skipped  {sentence}")
        lines.append(
            f"done     {cache.rows:,} rows from {len(contexts):,} contexts ({left_out:,} {kind} left out"
            f"{skipped}) in {seconds:.0f} s; `sae cache verify` re-reads every byte"
        )
        return lines

    def unreadable_rows(self) -> dict[str, Any]:
        """How many rows of the text could not be read, and the first: of this run, or as an earlier one recorded."""
        record = self.folder / "harvest.json"
        if self.text.read or not record.exists():
            return self.text.unreadable_rows
        with contextlib.suppress(SaeError):
            return dict(HARVEST_RECORD.read(record).get("unreadable", {}))
        return {}

    def check_space(self, needed: float, per_token: float) -> None:
        """Raise UnavailableError if `needed` bytes do not fit on the disk."""
        if self.store is not None:
            return check_working_folder(self.folder, self.working_bytes)
        free = free_space(self.folder)
        if self.config.compress:  # bfloat16 shrinks at least 1.3x, and nothing is lost if the disk does fill up
            needed, per_token = needed / 1.3, per_token / 1.3
        if 1.02 * needed > free:
            raise UnavailableError(
                f"The harvest needs {format_bytes(1.02 * needed)} and {self.folder} has {format_bytes(free)} free. "
                f"--tokens {int(free / per_token / 1.02)} would fit."
            )


def plan_harvest(
    config: HarvestConfig, say: Callable[[str], None] = lambda sentence: None, *, suffix: str = ""
) -> HarvestPlan:
    """Check a configuration and resolve everything in it. Loads no weights and writes nothing.

    `say` receives notes about the text and about caches of other revisions; `suffix` ends the default folder's name.

    Raises UsageError for a configuration that cannot be harvested and UnavailableError if the model or the text cannot
    be reached.
    """
    dataset = (EMBEDDED_TEXT if config.model == mini.NAME else PILE) if config.dataset is None else config.dataset
    check_config(config, dataset)
    source, model_config = find_model(config.model, config.revision, config.adapters)
    hooks = hooks_of_sites(model_config, config.layers, config.sites, config.modules)
    check_layers(model_config, [hook.layer for hook in hooks], config.model)
    check_layers_are_used(config, hooks)
    check_sites(model_config, hooks)
    check_context(model_config, config.context, config.model)
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    tokenizer = load_tokenizer(source)
    form = ContextFormat.choose(
        tokenizer, bos=config.bos, keep_special=config.keep_special, skip_positions=config.skip_positions,
        skip_tokens=config.skip_tokens,
    )  # fmt: skip
    if form.bos_id is not None:
        where = "What each context begins with (--bos)"
        check_embedded([form.bos_id], embedding_rows(model_config), tokenizer, where)
    chat = None if config.chat_column is None else ChatEncoder(tokenizer, tuple(config.roles))
    text = open_text(
        dataset, tokenizer=tokenizer, revision=config.dataset_revision, subset=config.subset, split=config.split,
        column=config.chat_column or config.text_column, seed=config.seed, say=say, chat=chat is not None,
    )  # fmt: skip
    identity = identity_of(config, source, dtype, tokenizer, form, text, held_out_by_name=dataset == EMBEDDED_TEXT)
    identity |= {} if chat is None else {"chat": chat.identity()}

    store = open_store(config.out, write=True) if is_url(config.out) else None

    def folder_of(identity: dict[str, Any]) -> Path:
        if store is not None:
            task = "" if config.share is None else f"--share-{config.share.replace('/', '-of-')}"
            return working_folder(store.url, task)
        return Path(config.out) if config.out else default_folder(identity, text, suffix)

    older = {key: value for key, value in identity.items() if key != LITERALS}
    if store is None and older != identity and is_begun(folder_of(older), older, has_own_name=config.out is None):
        identity = older
    folder = folder_of(identity)
    if config.out is None and not folder.exists():
        mention_other_revisions(folder, identity, source, say)
    tokens = config.tokens or TOKENS
    return HarvestPlan(
        config, source, model_config, tokenizer, text, identity, folder, hooks, tokens, dtype, device, chat, store
    )
