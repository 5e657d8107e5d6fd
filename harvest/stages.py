"""The stages of a harvest: first the text and the metadata, then the windows.

Single processes, ranks and tasks of an array job all use these stages.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ..cache.contexts import Contexts
from ..cache.hooks import Hook
from ..cache.layout import Layout, fingerprint_of, is_ring_cache
from ..cache.store_place import check_address
from ..cache.writer import CacheWriter, harvest_started, recorded_tokens
from ..common.cache_schemas import HARVEST_RECORD
from ..common.errors import DamagedError, UsageError
from ..common.files import digest_of
from .architectures import check_loaded_sites
from .compiled import compile_blocks
from .contexts import make_contexts
from .load_errors import translate_model_errors
from .model import LanguageModel, load_trunk
from .plan import HarvestPlan
from .progress import HarvestProgress
from .request import request_of, request_turn
from .tokenize_checkpoint import TokenizeCheckpoint, remove_checkpoint
from .windows import WindowComputer, write_windows


def start_cache(plan: HarvestPlan, check: Callable[[], None] = lambda: None) -> tuple[CacheWriter, Contexts]:
    """Write what precedes the first window: tokens, harvest.json and array metadata.

    `check` is called before each step; an exception that it raises ends the work.
    """
    contexts = read_or_tokenize(plan, check)
    with request_turn(plan.folder):
        HARVEST_RECORD.write_if_changed(plan.folder / "harvest.json", request_of(plan))
    writer = CacheWriter(plan.folder, plan.identity, cache_layout(plan, contexts), plan.widths, plan.place)
    writer.place.begin()
    remove_checkpoint(plan.folder)  # from now on the tokens are read, not computed
    writer.place.remove_claims(reversed(writer.place.claim_files()))  # including those of tasks that died
    return writer, contexts


def open_cache(plan: HarvestPlan) -> tuple[CacheWriter, Contexts]:
    """Like `start_cache`, for a process that opens what another process has written."""
    contexts = Contexts.read(plan.folder, recorded_tokens(plan.folder))
    return CacheWriter(plan.folder, plan.identity, cache_layout(plan, contexts), plan.widths, plan.place), contexts


def harvest_windows(
    plan: HarvestPlan, writer: CacheWriter, contexts: Contexts, missing: Mapping[int, list[str]],
    mine: Mapping[int, list[str]], progress: HarvestProgress,
) -> None:  # fmt: skip
    """Harvest those of the missing windows that are in `mine`."""
    if not missing:
        return
    rows = {window: len(writer.layout.row_range(window)) for window in missing}
    plan.check_space(
        sum(rows[window] * plan.bytes_per_token_of(arrays) for window, arrays in missing.items()), plan.bytes_per_token
    )
    if len(missing) < writer.layout.n_windows:
        existing = writer.layout.n_windows - len(missing)
        progress.say(f"{existing} of {writer.layout.n_windows} windows already exist.")
    if mine:
        plan.place.check_writes()
        computer = WindowComputer(plan, contexts, writer.layout, progress, drafts=True)
        computer.set_model(load_model_for(plan, mine, plan.device))
        write_windows(computer, writer, mine, progress)


def check_folder(plan: HarvestPlan) -> None:
    """Raise UsageError if the folder or address contains something other than this harvest. Changes nothing in it."""
    if plan.store is not None:
        check_address(plan.store, plan.identity)
    elif plan.folder.is_dir():
        harvest_started(plan.folder, fingerprint_of(plan.identity), plan.identity)
        check_not_ring(plan.folder)


def check_not_ring(folder: Path) -> None:
    """Raise UsageError for a ring of `sae train --stream`, from which windows are missing on purpose."""
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

    Raises UsageError unless a probe of the loaded model confirms the sites.
    """
    hooks = sorted({Hook.from_array(name) for names in windows.values() for name in names})
    last = max(hook.layer for hook in hooks)
    model = load_trunk(
        plan.source, plan.model_config, last, dtype=plan.dtype, device=device, attention=plan.config.attention
    )
    with translate_model_errors(plan.source.argument, plan.config.attention):
        check_loaded_sites(model, plan.model_config, hooks)
    if plan.config.compiled:
        compile_blocks(model, hooks)
    return model


def read_or_tokenize(plan: HarvestPlan, check: Callable[[], None] = lambda: None) -> Contexts:
    """The contexts to run. If no earlier start of this harvest wrote the contexts, the text is tokenized and the
    contexts are written now.

    Raises DamagedError if the cache was started with other contexts.
    """
    if not (harvest_started(plan.folder, fingerprint_of(plan.identity)) and Contexts.is_complete(plan.folder)):
        contexts = tokenize(plan, check)
        check()
        digest = recorded_tokens(plan.folder)  # read here, because another task may have begun the cache meanwhile
        if digest not in (None, digest_of(contexts.file_records())):
            raise DamagedError(
                f"The tokens recorded in {plan.folder} differ from those that its text is tokenized into now, probably "
                "because the version of tokenizers has changed. Use another --out."
            )
        contexts.write(plan.folder)
    return Contexts.read(plan.folder, recorded_tokens(plan.folder))


def tokenize(plan: HarvestPlan, check: Callable[[], None] = lambda: None) -> Contexts:
    """Tokenize the text of a plan, continuing from its checkpoint if there is one."""
    config = plan.config
    return make_contexts(
        plan.text, plan.encoder, plan.context_format, TokenizeCheckpoint(plan.folder, plan.identity, check),
        tokens=plan.tokens, exactly=config.tokens is not None, context=config.context, held_out=config.held_out_share,
        seed=config.seed, pack=config.pack,
    )  # fmt: skip


def check_before_text(plan: HarvestPlan) -> None:
    """Raise UnavailableError if the requested rows do not fit on the disk, or if the store cannot be written to.

    This check is made before the text is read, because reading the text can take a long time.
    """
    if Contexts.is_complete(plan.folder):
        return
    plan.place.check_writes()
    if plan.config.tokens is not None:
        plan.check_space(plan.config.tokens * plan.bytes_per_token, plan.bytes_per_token)
