"""The options of a harvest, and the checks that need neither the model nor the text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..cache.hooks import SITES, Hook, is_site
from ..cache.layout import CHUNK_ROWS, WINDOW_ROWS
from ..cache.outliers import MAX_NORM, check_max_norm
from ..common.errors import UsageError
from ..common.process_group import rank_and_count
from .datasets import EMBEDDED_TEXT
from .share import HarvestShare

LAYERS = (5, 12, 19)
TOKENS = 10_000_000


@dataclass(frozen=True)
class HarvestConfig:
    """The options of `sae harvest`, named like its flags."""

    model: str = "google/gemma-2-2b"
    revision: str | None = None  # of the model, on the Hub
    adapters: Sequence[str] = ()  # folders or Hub ids of PEFT adapters, merged into the model
    layers: Sequence[int] = LAYERS
    sites: Sequence[str] = ("resid_post",)
    modules: Sequence[str] = ()  # more sites: model.layers.{layer}.mlp.gate_proj:output
    dataset: str | None = None  # None: the Pile, or the embedded text for the embedded model
    dataset_revision: str | None = None
    subset: str | None = None  # a configuration of the dataset
    split: str = "train"
    text_column: str = "text"
    chat_column: str | None = None  # instead of text_column: messages, rendered with the chat template
    roles: Sequence[str] = ()  # harvest only what these roles wrote in a conversation; empty: all of it
    tokens: int | None = None  # None: ten million, or all of a shorter text
    context: int = 128  # tokens, BOS included
    bos: str = "auto"  # what contexts begin with: "auto", "none", or a token as text or id; see choose_bos
    held_out: float | None = None  # share of the documents; None: 0.05, or 0.1 for the embedded text
    keep_special: bool = False  # harvest the rows of BOS, EOS and pad too
    skip_positions: int = 0  # leave out this many positions at the start of a context, BOS included
    skip_tokens: Sequence[str] = ()  # tokens that are left out, as text or id
    pack: bool = False  # several documents in a context
    window: int = WINDOW_ROWS  # rows shuffled and written together
    storage_dtype: str = "bfloat16"
    compress: bool = False
    max_norm: float | None = MAX_NORM  # mask rows whose norm exceeds this multiple of the median; None: mask none
    dtype: str = "auto"
    attention: str = "eager"  # computes Gemma's soft-capping exactly
    batch_contexts: int = 32  # contexts in a forward pass
    compiled: bool = False  # compile the blocks of the model
    seed: int = 0
    device: str = "auto"
    out: Path | str | None = None
    share: str | None = None  # "3/64": only the windows of this share, for one of several tasks
    prepare: bool = False  # only cut the text into contexts and write the metadata
    origins: Mapping[str, str] = field(default_factory=dict)  # non-default flag -> "flag" or "file:line"

    @property
    def held_out_share(self) -> float:
        return 0.05 if self.held_out is None else self.held_out


def check_config(config: HarvestConfig, dataset: str) -> None:
    """Raise UsageError for values that are invalid for every model and text."""
    if config.model.encode(errors="replace").decode() != config.model:
        raise UsageError(
            f"The path --model {config.model} is not UTF-8, so transformers and tokenizers cannot open it. Rename the "
            "folder, or pass a symbolic link to it that has a UTF-8 name."
        )
    if "" in (config.model, config.dataset):
        raise UsageError("--model and --dataset cannot be empty. Leave out --dataset for the model's default text.")
    if not config.layers or not (config.sites or config.modules):
        raise UsageError("There is nothing to harvest: give at least one layer and one site.")
    if wrong := [layer for layer in config.layers if not isinstance(layer, int)]:
        raise UsageError(f"invalid layer {wrong[0]!r}: expected a whole number.")
    check_sizes(config)
    check_share(config)
    named: dict[str, Sequence[str | None]] = {
        "--text-column": [config.text_column], "--chat-column": [config.chat_column], "--roles": config.roles,
        "--adapter": config.adapters, "--revision": [config.revision], "--subset": [config.subset],
        "--split": [config.split], "--dataset-revision": [config.dataset_revision],
    }  # fmt: skip
    if empty := [flag for flag, values in named.items() if any(value == "" for value in values)]:
        raise UsageError(f"{empty[0]} cannot be empty. Give a name, or leave out the option.")
    if config.chat_column is not None and config.text_column != HarvestConfig.text_column:
        raise UsageError(
            f"--text-column {config.text_column} and --chat-column {config.chat_column} cannot both be read. Leave one "
            "out."
        )
    if config.roles and config.chat_column is None:
        raise UsageError("--roles selects parts of conversations: name their column with --chat-column messages.")
    if not 0 <= config.seed < 2**63:
        raise UsageError(f"invalid --seed {config.seed}: expected 0 to 2^63 - 1.")
    if dataset == EMBEDDED_TEXT and config.held_out is not None:
        raise UsageError(
            f"--held-out has no effect on {EMBEDDED_TEXT}, which always holds out one document in ten. Leave it out."
        )
    if not 0 <= config.held_out_share < 1:
        raise UsageError(f"invalid --held-out {config.held_out}: expected a share from 0 up to, but not including, 1.")
    if config.storage_dtype not in ("bfloat16", "uint16"):
        raise UsageError(
            f"unknown --storage-dtype {config.storage_dtype}: expected bfloat16, or uint16 for readers without "
            "bfloat16."
        )
    check_site_names(config.sites)
    check_max_norm(config.max_norm)


def check_share(config: HarvestConfig) -> None:
    """Raise UsageError for a malformed --share, or one that conflicts with --prepare or with a launcher."""
    given = "--prepare" if config.prepare else "--share"
    if config.share is not None:
        HarvestShare.parse(config.share)
        if config.prepare:
            raise UsageError("--prepare cuts the text for every share. Leave --share out.")
    if (config.share is not None or config.prepare) and (count := rank_and_count()[1]) > 1:
        raise UsageError(
            f"{given} is for independent tasks, but a launcher has started {count} processes that work together. "
            f"Leave out {given} or the launcher."
        )


def check_site_names(sites: Sequence[str]) -> None:
    """Raise UsageError for a name that cannot be a site of any model."""
    for site in sites:
        if not is_site(site):
            raise UsageError(
                f"unknown --site {site}: expected one of {', '.join(SITES)}, or the input or output of a module of "
                "the block, such as mlp.gate_proj.output."
            )


def check_sizes(config: HarvestConfig) -> None:
    """The checks of `check_config` for tokens, contexts and windows."""
    tokens, context, window = config.tokens, config.context, config.window
    if not isinstance(tokens, int | None):
        raise UsageError(f"invalid tokens {tokens!r}: expected a whole number, such as 10_000_000.")
    if tokens is not None and not 0 < tokens <= 2**40:
        raise UsageError(
            f"invalid --tokens {tokens}: expected 1 to 2^40 (about 10^12). Give how many rows to harvest, such as 10M."
        )
    if not 2 <= context <= 65535:
        raise UsageError(
            f"invalid --context {context}: expected 2 to 65,535, since a context is BOS and at least one token."
        )
    if not isinstance(config.skip_positions, int) or not 0 <= config.skip_positions < context:
        raise UsageError(
            f"invalid --skip-positions {config.skip_positions}: expected 0 or more, and fewer than the {context} "
            "tokens of a context."
        )
    if window <= 0 or window % min(CHUNK_ROWS, window):
        raise UsageError(
            f"invalid --window {window}: expected a multiple of {CHUNK_ROWS:,}, or a positive number below that."
        )
    if window > max(WINDOW_ROWS, tokens or TOKENS):
        raise UsageError(
            f"--window {window} exceeds the number of tokens. A whole window is kept in memory, and its files are "
            "padded to whole chunks. Give a smaller --window."
        )


def check_layers_are_used(config: HarvestConfig, hooks: Sequence[Hook]) -> None:
    """Raise UsageError for --layer flags that have no effect because every --module names its own layer."""
    used = {hook.layer for hook in hooks}
    if "layer" in config.origins and used.isdisjoint(config.layers):
        layers = ", ".join(map(str, sorted(used)))
        raise UsageError(
            f"--layer {config.layers[0]} has no effect: the modules belong to layer {layers}. Leave it out, or write "
            "{layer} in --module for the number of the block."
        )
