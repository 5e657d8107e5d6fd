"""The lines that `sae harvest` prints: its plan before the work, and the statistics of the cache afterwards."""

from ..cache.reader import Cache
from ..cache.statistics import describe_statistics
from ..common.files import free_space
from ..common.formatting import format_bytes, format_duration
from ..common.memory import available_memory
from ..common.process_group import rank_and_count
from ..common.special_tokens import choose_bos, token_text
from ..common.tokenizers import describe_tokens, tokens_without_embedding
from .device_window import SHARE, fits_on_gpu
from .division import WINDOWS_IN_MEMORY, describe_division, weight_bytes, window_bytes
from .documents import UNREADABLE, describe_unreadable
from .existing import ExistingRows
from .plan import HarvestPlan
from .store_costs import harvest_requests
from .structure import embedding_rows

# (model, layer) -> elementwise variance, derived from the MSE and explained variance that a paper reports for one SAE.
# These values only serve as a plausibility check.
IMPLIED_VARIANCE = {("google/gemma-2-2b", 12): 5.6, ("google/gemma-2-2b", 19): 24.0}


def describe_harvest(plan: HarvestPlan) -> list[str]:
    """The lines that `sae harvest` prints before any work. Timing one block of the model takes a few seconds."""
    existing = plan.existing
    rows = plan.tokens if existing.cache is None else existing.rows_left
    per_token = plan.bytes_per_token_of([hook.array for hook in existing.missing])
    size = f"{rows:,} tokens x {per_token:,} B = {format_bytes(rows * per_token)}"
    if plan.config.tokens is None and existing.cache is None:
        size = f"up to {size}"
    if plan.config.compress:
        size += " before compression"
    return [
        *describe_source(plan),
        *([] if existing.is_finished else describe_size(plan, size, existing)),
        *describe_division(
            plan.share,
            plan.layout_to_fill,
            plan.windows_of_process,
            plan.config.context,
            plan.model_config,
            {hook: plan.widths[hook.array] for hook in existing.missing},
            plan.dtype,
            plan.device,
        ),
        *describe_window(plan),
        f"time     {describe_time(plan)}",
        f"cache    {existing.describe(plan.address, plan.config.max_norm)}",
    ]


def describe_source(plan: HarvestPlan) -> list[str]:
    """The lines about the model, its hooks and the text."""
    held_out = "a tenth" if plan.identity["held_out"] == "by name" else f"{plan.config.held_out_share:.0%}"
    return [
        f"model    {plan.source.label} at {plan.source.revision[:12]}, computed in {plan.dtype} on {plan.device}"
        f"{', with compiled blocks' if plan.config.compiled else ''}",
        *(
            f"adapter  {adapter.name}, merged into the model; trained for {adapter.base or 'an unnamed model'}"
            for adapter in plan.source.adapters
        ),
        *(f"hook     {h.name} = {plan.modules[h.array]}, {plan.widths[h.array]} wide" for h in plan.hooks),
        f"text     {plan.text.name} at {plan.text.identity['revision'][:12]}, {held_out} of the documents held out",
        *describe_format(plan),
    ]


def describe_format(plan: HarvestPlan) -> list[str]:
    """The lines about how contexts begin and which tokens are left out."""
    form, choice = plan.context_format, choose_bos(plan.tokenizer, plan.config.bos)
    token = "none" if form.bos_id is None else f"{token_text(plan.tokenizer, form.bos_id)} (id {form.bos_id})"
    lines = [f"bos      {token}: {choice.reason if form.bos_id == choice.id else 'as this cache was begun'}"]
    if plan.chat is not None:
        wrote = f"the tokens that {' and '.join(plan.chat.roles)} wrote" if plan.chat.roles else "all tokens"
        lines.append(f"chat     {plan.config.chat_column}, rendered with the tokenizer's template; rows are {wrote}")
    left_out = [f"the first {form.skip_positions} positions of each context"] if form.skip_positions else []
    if plan.config.skip_tokens:
        left_out.append(", ".join(repr(token_text(plan.tokenizer, token)) for token in form.skip_ids))
    if beyond := tokens_without_embedding(plan.tokenizer, rows := embedding_rows(plan.model_config)):
        lines.append(
            f"unknown  {describe_tokens(beyond)}: tokens of the tokenizer beyond the {rows:,} rows of the model's "
            "embedding; a text that contains one is rejected"
        )
    return [*lines, *([f"left out {'; '.join(left_out)}"] if left_out else [])]


def describe_size(plan: HarvestPlan, size: str, existing: ExistingRows) -> list[str]:
    """The lines about what is written: where, how much, and in how many requests."""
    free = f"{format_bytes(free_space(plan.folder))} free"
    if plan.store is None:
        return [f"size     {size}; {free}"]
    windows = plan.layout.n_windows if existing.cache is None else existing.windows_left
    requests = harvest_requests(plan.layout, len(existing.missing), windows)
    return [
        f"size     {size}",
        f"store    {plan.address}: about {requests.writes:,} writes and {requests.reads:,} reads",
        f"local    {plan.folder}: up to {format_bytes(plan.working_bytes)} at a time; {free}",
    ]


def describe_window(plan: HarvestPlan) -> list[str]:
    """On a GPU, the line about where a window is assembled and measured."""
    widths = {hook: plan.widths[hook.array] for hook in plan.existing.missing}
    if not plan.device.startswith("cuda") or not widths:
        return []
    free = available_memory(plan.device) - (weight_bytes(plan.model_config, list(widths), plan.dtype) or 0)
    size = window_bytes(plan.layout_to_fill, 2 * sum(widths.values()))
    if fits_on_gpu(size, free):
        memory = f"the memory of {plan.device}, and {WINDOWS_IN_MEMORY} x that size in pinned host memory"
    else:
        memory = (
            f"host memory: it is larger than {SHARE:.0%} of the {format_bytes(max(free, 0))} that the model leaves "
            f"free on {plan.device}"
        )
    return [f"window   {format_bytes(size)} in {memory}"]


def describe_time(plan: HarvestPlan) -> str:
    """The estimated time of a harvest as text, which `sae train --stream` also prints in its plan.

    If several processes are launched, only the first one measures the time, since only the first one prints.
    """
    rank, processes = rank_and_count()
    if rank > 0:
        return "estimated by the first process"
    if plan.finished_cache:
        return "none: the cache is finished"
    where = plan.device if processes == 1 else f"{processes} processes"
    rows, mine = map(plan.layout_to_fill.rows_in, (plan.windows_left, plan.windows_of_process))
    seconds = plan.estimated_seconds() * mine / max(rows, 1)
    return f"about {format_duration(seconds)} of model time on {where}, extrapolated from timing one block"


def summarize_harvest(plan: HarvestPlan, cache: Cache, seconds: float) -> list[str]:
    """The lines that `sae harvest` prints when the cache is finished: the statistics of each array, rows and time."""
    lines = []
    for hook in plan.hooks:
        implied = IMPLIED_VARIANCE.get((cache.model, hook.layer)) if hook.site == "resid_post" else None
        expected = f" (the papers' numbers imply about {implied:g})" if implied else ""
        lines.append(f"{hook.array:8s} {describe_statistics(cache.statistics(hook.array))}{expected}")
        lines += cache.describe_outliers(hook)
    contexts = cache.contexts(held_out=False)
    left_out = int(contexts.length.sum()) - cache.rows
    chosen = plan.config.roles or plan.config.skip_positions or plan.config.skip_tokens
    kind = "tokens" if chosen else "special tokens"
    counts = {why: count for why, count in plan.text.skipped.items() if count and why != UNREADABLE}
    skipped = "".join(f", {count:,} {why} documents skipped" for why, count in counts.items())
    if sentence := describe_unreadable(plan.unreadable_rows()):
        lines.append(f"skipped  {sentence}")
    lines.append(
        f"done     {cache.rows:,} rows from {len(contexts):,} contexts ({left_out:,} {kind} left out"
        f"{skipped}) in {seconds:.0f} s; `sae cache verify` re-reads every byte"
    )
    return lines
