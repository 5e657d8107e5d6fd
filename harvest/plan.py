"""What is asked of a harvest, resolved to what pins it: model, text, hooks, sizes, folder. Nothing is written here."""

import contextlib
import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel

from ..cache.layout import BLOSC, CHUNK_ROWS, FORMAT, SITES, WINDOW_ROWS, Hook, fingerprint_of
from ..cache.reader import Cache, list_caches, recorded_modules
from ..common.device import best_device, best_dtype, free_memory
from ..common.environment import environment_record
from ..common.errors import SaeError, UnavailableError, UsageError
from ..common.files import digest_of, folder_bytes, free_space, sae_home
from ..common.formatting import format_bytes
from . import mini
from .architectures import check_context, check_layers, check_sites, hook_width, module_name, shorten
from .contexts import TextSource, specials
from .dataset_reader import first_line
from .datasets import EMBEDDED, PILE, open_text
from .model import LanguageModel, ModelSource, find_model, load_tokenizer

LAYERS = (5, 12, 19)
TOKENS = 10_000_000
# What the papers' MSE and explained variance of one SAE imply for the rows; derived, so a check of plausibility only.
IMPLIED_VARIANCE = {("google/gemma-2-2b", 12): 5.6, ("google/gemma-2-2b", 19): 24.0}
TIMED_CONTEXT = 2048  # the attention of a longer one can take all of the memory, and few documents are as long


@dataclass(frozen=True)
class HarvestConfig:
    """What a user can ask of a harvest."""

    model: str = "google/gemma-2-2b"
    revision: str | None = None
    layers: Sequence[int] = LAYERS
    sites: Sequence[str] = ("resid_post",)
    dataset: str | None = None  # None: the Pile, or the embedded text for the embedded model
    dataset_revision: str | None = None
    subset: str | None = None  # a configuration of the dataset
    split: str = "train"
    text_column: str = "text"
    tokens: int | None = None  # None: ten million, or all of a shorter text
    context: int = 128
    held_out: float | None = None  # None: 0.05; the embedded text holds out its own documents
    keep_special: bool = False
    pack: bool = False
    window: int = WINDOW_ROWS
    storage_dtype: str = "bfloat16"
    compress: bool = False
    max_norm: float | None = None  # rows whose norm is over so many medians are marked
    dtype: str = "auto"
    attention: str = "eager"  # the implementation in which Gemma's soft-capping is exact
    batch_contexts: int = 32
    seed: int = 0
    device: str = "auto"
    out: Path | None = None
    origins: Mapping[str, str] = field(default_factory=dict)  # flag -> "flag" or "file:line", of what was not default

    @property
    def held_out_share(self) -> float:
        return 0.05 if self.held_out is None else self.held_out


@dataclass(frozen=True)
class HarvestPlan:
    """A request, resolved: what will be read, computed and written, and where."""

    request: HarvestConfig
    source: ModelSource
    config: Any
    tokenizer: Any
    text: TextSource
    identity: dict[str, Any]
    folder: Path
    hooks: list[Hook]
    tokens: int
    dtype: str
    device: str

    @cached_property
    def widths(self) -> dict[str, int]:
        """Array -> numbers in a row."""
        return {hook.array: hook_width(hook, self.config) for hook in self.hooks}

    def bytes_of(self, arrays: Sequence[str]) -> int:
        """Bytes that a token takes in these arrays, uncompressed, and where it came from."""
        return sum(2 * self.widths[name] + 4 for name in arrays) + 6

    @property
    def bytes_per_token(self) -> int:
        return self.bytes_of(list(self.widths))

    def record(self) -> dict[str, Any]:
        """What `sae cache repair` needs to ask for the same again, from anywhere, and when the Hub has moved on; and with
        what it was asked for last. With what a window was made stands in its commit."""
        asked = asdict(self.request)
        for name in ("model", "dataset"):
            if asked[name] and Path(asked[name]).exists():
                asked[name] = str(Path(asked[name]).resolve())
        if self.source.on_hub:
            asked["revision"] = self.source.revision
        if "split" in self.text.identity:  # on the Hub
            asked["dataset_revision"] = self.text.identity["revision"]
        asked = {name: value for name, value in asked.items() if name not in ("layers", "sites", "device", "out")}
        modules = recorded_modules(self.folder) | self.modules  # those of layers that were harvested before stay
        return asked | {
            "device": self.device,
            "modules": dict(sorted(modules.items())),
            "environment": environment_record(),
        }

    @property
    def modules(self) -> dict[str, str]:
        """Array -> where its hook is in transformers' words."""
        return {hook.array: module_name(hook, self.config) for hook in self.hooks}

    @property
    def harvested(self) -> Cache | None:
        """The cache, where everything that is planned is in it."""
        with contextlib.suppress(SaeError):
            cache = Cache(self.folder)
            return cache if set(self.hooks) <= set(cache.hooks) else None
        return None

    @property
    def bytes_to_write(self) -> int:
        """Bytes that the cache still takes, uncompressed."""
        return 0 if self.harvested else max(self.tokens * self.bytes_per_token - folder_bytes(self.folder), 0)

    def check_space(self, needed: float, per_token: float) -> None:
        """OutsideError when so many bytes do not fit on the disk."""
        free = free_space(self.folder)
        if self.request.compress:  # bfloat16 shrinks by 1.3 at least; a disk that is full in the end loses nothing
            needed, per_token = needed / 1.3, per_token / 1.3
        if 1.02 * needed > free:
            fits = int(free / per_token / 1.02)
            raise UnavailableError(
                f"The harvest needs {format_bytes(1.02 * needed)} and {self.folder} has {format_bytes(free)} free. --tokens {fits} would fit."
            )


def plan_harvest(request: HarvestConfig, tell: Callable[[str], None] = lambda sentence: None) -> HarvestPlan:
    """Resolve everything to what pins it. Loads no weights and writes nothing. `tell` takes sentences about the text."""
    name = (EMBEDDED if request.model == mini.NAME else PILE) if request.dataset is None else request.dataset
    check(request, name)
    source, config = find_model(request.model, request.revision)
    hooks = sorted({Hook(layer, site) for layer in request.layers for site in request.sites})
    check_layers(config, [hook.layer for hook in hooks], request.model)
    check_sites(config, hooks)
    check_context(config, request.context, request.model)
    device = best_device(request.device)
    dtype = best_dtype(request.dtype, device)
    tokenizer = load_tokenizer(source)
    text = open_text(
        name,
        tokenizer=tokenizer,
        revision=request.dataset_revision,
        subset=request.subset,
        split=request.split,
        column=request.text_column,
        seed=request.seed,
        tell=tell,
    )
    identity = {
        "format": FORMAT,
        "model": source.identity(),
        "dtype": dtype,
        "attention": request.attention,
        "tokenizer": digest_of(tokenizer.backend_tokenizer.to_str()),
        "data": text.identity,
        "tokens": request.tokens or f"up to {TOKENS}",
        "context": request.context,
        "held_out": "by name" if name == EMBEDDED else request.held_out_share,
        "skip": [] if request.keep_special else specials(tokenizer),
        "pack": request.pack,
        "seed": request.seed,
        "window_rows": request.window,
        "chunk_rows": min(CHUNK_ROWS, request.window),
        "storage_dtype": request.storage_dtype,
        "compress": BLOSC if request.compress else None,
    }
    short = source.name.rstrip("/").split("/")[-1]
    folder = request.out or sae_home() / "activations" / f"{short}--{text.name}--{fingerprint_of(identity)[:8]}"
    if request.out is None and not folder.exists():
        tell_of_older(folder, identity, source.on_hub, tell)
    return HarvestPlan(
        request, source, config, tokenizer, text, identity, folder, hooks, request.tokens or TOKENS, dtype, device
    )


def tell_of_older(folder: Path, identity: dict[str, Any], on_hub: bool, tell: Callable[[str], None]) -> None:
    """Say so when the same was harvested from another revision: the Hub has moved on since, or a file has changed."""

    def unpinned(one: dict[str, Any]) -> dict[str, Any]:
        return one | {"model": one["model"]["name"], "data": one["data"]["name"]}

    for other in list_caches(folder.parent).values():
        if isinstance(other, Cache) and unpinned(other.identity) == unpinned(identity):
            flags = f" --revision {other.identity['model']['revision']}" if on_hub else ""
            if "split" in identity["data"]:  # on the Hub
                flags += f" --dataset-revision {other.identity['data']['revision']}"
            instead = f" To go on with that one instead:{flags}" if flags else ""
            tell(f"{other.folder} is the same harvest of other revisions.{instead}")


def check(request: HarvestConfig, text: str) -> None:
    """UsageError for what can be seen to be wrong before anything is opened."""
    if "" in (request.model, request.dataset):
        raise UsageError("--model and --dataset cannot be empty. Leave --dataset out for the model's own.")
    if request.tokens is not None and request.tokens <= 0:
        raise UsageError(f"--tokens {request.tokens} is not positive. Give how many rows to harvest, such as 10M.")
    if request.tokens is not None and request.tokens > 2**40:
        raise UsageError(
            f"--tokens {request.tokens} is more than 2^40, a million million. Give how many rows to harvest, such as 10M."
        )
    if not 2 <= request.context <= 65535:
        raise UsageError(
            f"--context {request.context} is out of range: a context is BOS and at least one token, at most 65,535."
        )
    if request.window <= 0 or request.window % min(CHUNK_ROWS, request.window):
        raise UsageError(
            f"--window {request.window} is no whole number of chunks: give a multiple of {CHUNK_ROWS:,}, or less than that."
        )
    if request.window > max(WINDOW_ROWS, request.tokens or TOKENS):
        raise UsageError(
            f"--window {request.window} is more than there will be tokens, and a window is kept in memory and filled up on disk. Give less."
        )
    if not 0 <= request.seed < 2**63:
        raise UsageError(f"--seed {request.seed} is out of range: give 0 to 2^63 - 1.")
    if text == EMBEDDED and request.held_out is not None:
        raise UsageError(f"--held-out cannot be given for {EMBEDDED}: it holds out its own documents, one in ten.")
    if not 0 <= request.held_out_share < 1:
        raise UsageError(
            f"--held-out {request.held_out} is no fraction of the documents: give 0 up to, but not including, 1."
        )
    if request.storage_dtype not in ("bfloat16", "uint16"):
        raise UsageError(
            f"--storage-dtype {request.storage_dtype} is unknown: bfloat16, or uint16 for readers that lack it."
        )
    unknown = [site for site in request.sites if site not in SITES]
    if unknown:
        raise UsageError(f"--site {unknown[0]} is unknown: give one of {', '.join(SITES)}.")
    if request.max_norm is not None and not request.max_norm > 1:
        raise UsageError(
            f"--max-norm {request.max_norm} would mark half of the rows: give a multiple of the median, such as 10."
        )


def estimated_seconds(plan: HarvestPlan) -> float:
    """How long the model will take: one block of its shape, with random weights, timed on this device.

    What else a harvest does runs beside it.
    """
    config = copy.deepcopy(plan.config.get_text_config())
    config.vocab_size, config.pad_token_id = 8, 0
    shorten(config, 1)
    settings = {"dtype": getattr(torch, plan.dtype), "attn_implementation": plan.request.attention}
    with torch.random.fork_rng():
        try:
            model = LanguageModel(AutoModel.from_config(config, **settings).to(plan.device).eval())
        except (ValueError, ImportError) as error:
            raise UsageError(f"--attention {plan.request.attention} cannot be used: {first_line(error)}") from error
    at_once, length = 1, min(plan.request.context, TIMED_CONTEXT)
    while True:  # more contexts at once until a pass can be timed
        ids = torch.zeros(at_once, length, dtype=torch.long, device=plan.device)
        times = []
        for _ in range(3):  # the first pass of a shape is slower
            started = time.perf_counter()
            model.capture(ids, [0])[0].float().mean().item()
            times.append(time.perf_counter() - started)
        spent = min(times)
        if spent > 0.1 or at_once >= plan.request.batch_contexts:
            break
        at_once = min(4 * at_once, plan.request.batch_contexts)
    del model
    free_memory(plan.device)
    blocks = max(hook.layer for hook in plan.hooks) + 1
    return spent / ids.numel() * blocks * plan.tokens
