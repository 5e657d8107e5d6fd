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
from ..cache.hooks import Hook
from ..cache.layout import Layout, fingerprint_of
from ..cache.mirror import working_folder
from ..cache.object_store import ObjectStore, is_url, open_store
from ..cache.place import FolderPlace
from ..cache.planned import PlannedCache
from ..cache.reader import Cache
from ..cache.store_place import StorePlace, take_snapshot
from ..common.cache_schemas import HARVEST_RECORD
from ..common.device import resolve_device, resolve_dtype
from ..common.errors import SaeError, UnavailableError
from ..common.files import folder_bytes, free_space
from ..common.formatting import format_bytes
from ..common.process_group import processes_on_this_machine, rank_and_count
from ..common.tokenizers import check_embedded
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
from .documents import TextSource
from .encode import DocumentEncoder
from .estimate import block_seconds_per_token
from .existing import ExistingRows, find_existing
from .identity import LITERALS, identity_of
from .model import ModelSource, find_model, load_tokenizer
from .share import HarvestShare
from .store_costs import check_working_folder, working_bytes
from .structure import embedding_rows


@dataclass(frozen=True)
class HarvestPlan:
    """A HarvestConfig with everything in it resolved: what will be read, computed and written, and where.

    description.py turns a plan into the lines that `sae harvest` prints.
    """

    config: HarvestConfig
    source: ModelSource
    model_config: Any  # transformers' configuration of the model
    tokenizer: Any
    text: TextSource
    identity: dict[str, Any]  # everything that determines the bytes of the cache
    folder: Path
    hooks: list[Hook]
    tokens: int  # rows to harvest; an upper bound if config.tokens is None
    dtype: str
    device: str
    chat: ChatEncoder | None = None  # for a text of conversations
    store: ObjectStore | None = None  # for a cache in an object store; `folder` is then its working folder

    @cached_property
    def widths(self) -> dict[str, int]:
        """Array name -> width of its rows."""
        return {hook.array: hook_width(hook, self.model_config) for hook in self.hooks}

    @property
    def share(self) -> HarvestShare | None:
        """This task's share of an array job."""
        return None if self.config.share is None else HarvestShare.parse(self.config.share)

    @property
    def command(self) -> str:
        """The command of this task, for messages to other tasks."""
        return "sae harvest --prepare" if self.config.prepare else f"sae harvest --share {self.config.share}"

    @property
    def context_format(self) -> ContextFormat:
        """How contexts begin, and which of their tokens are rows."""
        return ContextFormat.of(self.identity, self.tokenizer)

    @property
    def encoder(self) -> DocumentEncoder:
        """The encoder that turns documents into token ids."""
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
        """The place where the files of the cache are kept."""
        return FolderPlace(self.folder) if self.store is None else StorePlace(self.store, self.folder)

    @property
    def existing(self) -> ExistingRows:
        """The rows of this harvest that the folder already contains. An object store is read just once."""
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
        """Whether every planned hook is complete in the cache. False while other tasks' shares are missing."""
        return set(self.hooks) <= set(cache.hooks)

    def token_text(self, token: int) -> str:
        """The text of a token id."""
        return self.tokenizer.decode([token])

    def planned_cache(self) -> PlannedCache:
        """The cache that this plan will write. Training on it can be planned before the harvest."""
        return PlannedCache(self.folder, self.identity, self.layout, self.widths)

    @property
    def bytes_to_write(self) -> int:
        """Uncompressed bytes still to be written."""
        existing = self.existing
        if existing.cache is None:
            written = folder_bytes(self.folder) if self.store is None else 0
            return max(self.tokens * self.bytes_per_token - written, 0)
        return existing.rows_left * self.bytes_per_token_of([hook.array for hook in existing.missing])

    @property
    def layout(self) -> Layout:
        """The layout that the cache will have; its rows are an upper bound if config.tokens is None."""
        return Layout(self.tokens, self.config.window, self.config.storage_dtype, self.config.compress)

    @property
    def layout_to_fill(self) -> Layout:
        """The layout of the cache that this harvest continues, or else of the new cache."""
        cache = self.existing.cache
        return self.layout if cache is None else cache.layout

    @property
    def windows_left(self) -> Sequence[int]:
        """The windows still to be harvested by this or another process."""
        existing = self.existing
        return range(self.layout.n_windows) if existing.cache is None else existing.windows

    @property
    def windows_of_process(self) -> Sequence[int]:
        """The windows of this process's share; without a share, the windows of the rank that has the most."""
        if self.share is None:
            return self.windows_left[:: rank_and_count()[1]]
        left, of_share = self.windows_left, self.share.windows(self.layout_to_fill.n_windows)
        return of_share if isinstance(left, range) else [window for window in left if window in of_share]

    @property
    def working_bytes(self) -> int:
        """For a cache in an object store, the maximum number of bytes in the working folder."""
        return working_bytes(self.layout, self.bytes_per_token, processes_on_this_machine())

    def estimated_seconds(self) -> float:
        """The seconds of model time on one device, extrapolated from one block. Reading and writing overlap with the
        model's computation.
        """
        config = self.config
        per_block = block_seconds_per_token(
            self.model_config, dtype=self.dtype, device=self.device, attention=config.attention,
            context=config.context, batch_contexts=config.batch_contexts,
        )  # fmt: skip
        existing = self.existing
        blocks = max((hook.layer + 1 for hook in existing.missing), default=0)
        return per_block * blocks * (self.tokens if existing.cache is None else existing.rows_left)

    def unreadable_rows(self) -> dict[str, Any]:
        """How many rows of the text cannot be read, and why the first of these rows cannot be read.

        If this run has not read the text, this is what an earlier run recorded.
        """
        record = self.folder / "harvest.json"
        if self.text.read or not record.exists():
            return self.text.unreadable_rows
        with contextlib.suppress(SaeError):
            return dict(HARVEST_RECORD.read(record).get("unreadable", {}))
        return {}

    def check_space(self, needed: float, per_token: float) -> None:
        """Raise UnavailableError if the disk has no room for `needed` bytes."""
        if self.store is not None:
            return check_working_folder(self.folder, self.working_bytes)
        free = free_space(self.folder)
        if self.config.compress:  # bfloat16 compresses at least 1.3x; if the disk fills up anyway, nothing is lost
            needed, per_token = needed / 1.3, per_token / 1.3
        if 1.02 * needed > free:
            raise UnavailableError(
                f"The harvest needs {format_bytes(1.02 * needed)}, but {self.folder} has {format_bytes(free)} free. "
                f"--tokens {int(free / per_token / 1.02)} would fit."
            )


def plan_harvest(
    config: HarvestConfig, say: Callable[[str], None] = lambda sentence: None, *, suffix: str = ""
) -> HarvestPlan:
    """Check a configuration and resolve everything in it. Loads no weights and writes nothing.

    `say` is called with notes about the text and about caches of other revisions. `suffix` is appended to the name of
    the default folder.

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
        where = "The token sequence that begins each context (--bos)"
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
