"""Find a language model, pin its bytes, and load it with transformers."""

import contextlib
import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from ..cache.model_files import pickled_weights, read_foreign
from ..cache.models import (
    GivenModel,
    ModelRecord,
    find_folder,
    folder_digests,
    folder_label,
    is_digest,
    model_label,
    remember_folder,
)
from ..common.errors import DamagedError, UsageError
from ..common.remote_code import from_pretrained
from ..common.special_tokens import special_tokens
from . import mini
from .adapters import CONFIG as ADAPTER_CONFIG
from .adapters import AdapterSource, find_adapter, find_recorded_adapters, merge_adapters
from .building import build_without_numbers, check_memory, quiet_transformers
from .language_tower import is_multimodal, needed_files, tower_class
from .load_errors import translate_load_errors
from .pickled import check_pickled
from .structure import check_config, check_config_file, truncate_config

COMMIT_LENGTH = 40  # hexadecimal digits of a commit of the Hub


@dataclass(frozen=True)
class ModelSource:
    """A model's name, the location that it is loaded from, and the revision that pins its bytes."""

    name: str  # as recorded and displayed (cache/models.py)
    location: str  # a Hub id or a folder
    revision: str  # a commit of the Hub, or the sha256 of the files
    adapters: tuple[AdapterSource, ...] = ()  # to be merged into it, in this order

    @property
    def on_hub(self) -> bool:
        return not Path(self.location).is_dir()

    @property
    def is_pinned(self) -> bool:
        """Whether the revision covers every file that the model and its tokenizer are built from."""
        if self.on_hub:
            return len(self.revision) == COMMIT_LENGTH
        return folder_digests(Path(self.location))[0] == self.revision

    @property
    def older_digests(self) -> tuple[str, ...]:
        """The digests of the model's folder that earlier versions may have recorded. Empty for a model on the Hub."""
        return () if self.on_hub else folder_digests(Path(self.location))[1:]

    @property
    def argument(self) -> str:
        """The value by which `find_model` and --model find this model."""
        return mini.NAME if self.name == mini.NAME else self.location

    def identity(self) -> dict[str, Any]:
        """The model's record (cache/models.py)."""
        adapters = {"adapters": [adapter.identity() for adapter in self.adapters]} if self.adapters else {}
        return {"name": self.name, "revision": self.revision, **adapters}

    @property
    def label(self) -> str:
        """The display name of the model."""
        return model_label(self.identity())


def find_model(name: str, revision: str | None = None, adapters: Sequence[str] = ()) -> tuple[ModelSource, Any]:
    """Find a model and pin its revision. Returns its source and its transformers configuration; loads no weights.

    `adapters` are folders or Hub ids of PEFT adapters that are merged into it.

    Raises UsageError if there is no such folder or the folder contains an adapter, and UnavailableError if the Hub
    cannot be reached or the model's license has not been accepted.
    """
    folder = mini.WEIGHTS if name == mini.NAME else Path(name)
    if folder.is_dir() and revision is not None:
        raise UsageError(f"--revision selects a commit on the Hub, and {name} is a local folder. Leave it out.")
    if name.startswith((".", "/", "~")) and not folder.is_dir():
        raise UsageError(f"There is no folder {name}. Give a folder with a model, a Hub id, or --model {mini.NAME}.")
    found = tuple(map(find_adapter, adapters))
    if folder.is_dir():
        if (folder / ADAPTER_CONFIG).exists():
            raise UsageError(holds_adapter(name))
        digest = folder_digests(folder)[0]
        label = name if name == mini.NAME else folder_label(folder.resolve(), digest)
        source = ModelSource(label, str(folder), digest, found)
        return source, find_config(source)
    config = find_config(ModelSource(name, name, revision or "unknown"))
    return ModelSource(name, name, getattr(config, "_commit_hash", None) or revision or "unknown", found), config


def holds_adapter(name: str) -> str:
    """The error message for a folder with an adapter.

    Given such a folder, transformers would load the model that the adapter names.
    """
    return (
        f"{name} holds a PEFT adapter ({ADAPTER_CONFIG}). Give the model that it was trained for with --model, and "
        f"the adapter with --adapter {name}. If the folder contains a whole model into which the adapter was merged, "
        f"move {ADAPTER_CONFIG} out of it."
    )


def find_config(source: ModelSource) -> Any:
    """transformers' configuration of a model."""
    file = config_file(source)
    with translate_load_errors(source.argument, "config"):
        if file is not None and file.is_file():
            check_config_file(read_foreign(file), str(file))
        config = from_pretrained(AutoConfig, source.location, **hub_revision(source))
        check_config(config, source.argument)
    return config


def config_file(source: ModelSource) -> Path | None:
    """The config.json of a model, if it is on this machine."""
    if not source.on_hub:
        return Path(source.location) / "config.json"
    found = try_to_load_from_cache(source.location, "config.json", revision=hub_revision(source).get("revision"))
    return Path(found) if isinstance(found, str) else None


def find_recorded_model(
    record: ModelRecord, folders: Sequence[str] = (), given: str | None = None, adapter_folders: Sequence[str] = ()
) -> tuple[ModelSource, Any]:
    """Find the model that a record names: on the Hub, or in a folder with the same files.

    Returns the same as `find_model`. If the record describes a folder, `folders` are tried in order; `given` is a model
    that the user names instead. The adapters are found in the same way, in `adapter_folders`.

    Raises UsageError if `given` is another model, if the folder is not found, or if the model has changed.
    """
    name, revision = record["name"], record["revision"]
    adapters = find_recorded_adapters(record.get("adapters", ()), adapter_folders)
    if given is not None and not (model := GivenModel(given)).is_base_of(record):
        raise UsageError(f"{model.describe()} is another model.")
    if is_digest(revision) and name != mini.NAME:
        first = [given] if given is not None and Path(given).is_dir() else []
        folder = find_folder(record, [*first, *([name] if Path(name).is_absolute() else []), *folders])
        if first:
            remember_folder(folder, revision)
        source, config = find_model(str(folder))
        return replace(source, name=name, revision=revision, adapters=adapters), config
    source, config = find_model(name, revision if len(revision) == COMMIT_LENGTH else None)
    if source.revision != revision:
        raise UsageError(f"{name} is now at revision {source.revision[:12]}, not at {revision[:12]}.")
    return replace(source, adapters=adapters), config


def describe_record(record: ModelRecord) -> str:
    """A model's name and, for a folder, its digest, for an error message."""
    digest = f" (sha256 {record['revision'][:12]})" if is_digest(record.get("revision")) else ""
    return model_label(record) + digest


def load_tokenizer(source: ModelSource) -> Any:
    """The tokenizer of a model, as its files define it. `choose_bos` decides what contexts begin with."""
    with translate_load_errors(source.argument, "tokenizer"):
        tokenizer = from_pretrained(AutoTokenizer, source.location, **hub_revision(source))
        check_tokenizer(tokenizer, source.argument)
    return tokenizer


def check_tokenizer(tokenizer: Any, name: str) -> None:
    """Use a tokenizer once, so that it raises its errors now: some malformed files are read without an error.

    For some models transformers makes a tokenizer from config.json alone, with special tokens and at most one other
    token. Raises DamagedError for such a tokenizer.
    """
    tokenizer("a", add_special_tokens=False)
    tokenizer("a")
    special_tokens(tokenizer)
    if len(tokenizer) <= len(tokenizer.added_tokens_decoder) + 1:
        raise DamagedError(
            f"The tokenizer of {name} has only special tokens: its files, such as tokenizer.json, are missing. "
            "Download them, or save them next to the weights with the tokenizer's save_pretrained."
        )


def load_first_blocks(
    source: ModelSource, config: Any, last_layer: int, *, dtype: str, device: str, attention: str
) -> Any:
    """transformers' model up to a layer, without the later blocks and the unembedding.

    If there are adapters, the whole model is loaded, since adapters name modules of the whole model.
    """
    if source.adapters:
        return load_whole_model(source, config, dtype=dtype, device=device, attention=attention)
    kind = tower_class(config, with_unembedding=False) if is_multimodal(config) else AutoModel
    first = copy.deepcopy(config)
    truncate_config(first, last_layer + 1)
    try:
        return load_transformer(kind, source, first, dtype, device, attention)
    except DamagedError:  # in Gemma 3n and 4 the number of blocks determines the shape of tensors outside the blocks
        return load_transformer(kind, source, config, dtype, device, attention)


def load_whole_model(source: ModelSource, config: Any, *, dtype: str, device: str, attention: str | None) -> Any:
    """transformers' model with its unembedding. If `attention` is None, transformers chooses an implementation."""
    kind = tower_class(config, with_unembedding=True) if is_multimodal(config) else AutoModelForCausalLM
    model = load_transformer(kind, source, config, dtype, device, attention)
    return merge_adapters(model, source.adapters) if source.adapters else model


def load_transformer(
    kind: Any, source: ModelSource, config: Any, dtype: str, device: str, attention: str | None
) -> Any:
    """A transformers model with the weights of `source`. Raises DamagedError unless all weights are present."""
    revision = hub_revision(source)
    with contextlib.ExitStack() as stack:
        stack.enter_context(quiet_transformers())
        stack.enter_context(translate_load_errors(source.argument))
        check_memory(build_without_numbers(config, kind), source.argument, dtype, device)
        if not source.on_hub:
            for path in pickled_weights(Path(source.location)):
                check_pickled(path)
        location = source.location
        if is_multimodal(config):
            location = stack.enter_context(needed_files(location, revision, config, kind))
        model, info = from_pretrained(
            kind,
            location,
            config=config,
            dtype=getattr(torch, dtype),
            attn_implementation=attention,
            device_map=device,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **(revision if location == source.location else {}),
        )
    if getattr(model, "_hf_peft_config_loaded", False):  # the Hub id is that of an adapter
        raise UsageError(holds_adapter(source.argument))
    wrong = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
    if wrong:  # transformers has filled them with random numbers
        raise DamagedError(
            f"The weights of {source.location} do not match its config.json: {wrong[0]} is missing or has another "
            f"shape ({len(wrong):,} such tensors in all). Download them again."
        )
    return model.eval().requires_grad_(False)


def hub_revision(source: ModelSource) -> dict[str, str]:
    return {"revision": source.revision} if source.on_hub and source.revision != "unknown" else {}
