"""PEFT adapters that are merged into a model before it is harvested or evaluated."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.utils import cached_file

from ..cache.models import find_folder, folder_digests, folder_label, is_digest
from ..common.errors import DamagedError, UsageError
from ..common.files import parse_json, read_file
from ..common.packages import import_extra
from ..common.remote_code import never_asking
from .load_errors import translate_load_errors

# For these kinds of adapters, peft loads a tokenizer or other adapters. Adapters of these kinds cannot be merged into a
# model.
LOADING_KINDS = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "CPT", "XLORA")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class AdapterSource:
    """The name, location and pinned revision of an adapter, like `ModelSource` for a model."""

    name: str
    location: str  # a Hub id or a folder
    revision: str  # a commit of the Hub, or the sha256 of the files
    base: str | None  # the model it was trained for, according to its configuration

    def identity(self) -> dict[str, str]:
        return {"name": self.name, "revision": self.revision}

    @property
    def hub_revision(self) -> dict[str, Any]:
        return {} if Path(self.location).is_dir() else {"revision": self.revision}


def find_adapter(name: str, revision: str | None = None) -> AdapterSource:
    """Find an adapter and pin its revision. The weights are not read.

    Raises UsageError if the adapter does not exist or is not stored as safetensors, and UnavailableError if the Hub
    cannot be reached.
    """
    import_extra("adapters", "--adapter")
    folder = Path(name)
    if name.startswith((".", "/", "~")) and not folder.is_dir():
        raise UsageError(f"There is no folder {name}. Give --adapter a folder with {CONFIG}, or a Hub id.")
    if folder.is_dir():
        if not (folder / CONFIG).exists():
            raise UsageError(f"{name} holds no PEFT adapter: it has no {CONFIG}.")
        if not (folder / WEIGHTS).exists():
            raise UsageError(
                f"{name} has no {WEIGHTS}. Adapters are only read from safetensors: a .bin file can run code when it "
                "is read. Load it with peft and save it again with save_pretrained."
            )
        digest = folder_digests(folder)[0]
        return AdapterSource(folder_label(folder.resolve(), digest), str(folder), digest, base_of(folder / CONFIG))
    with translate_load_errors(name):
        config = Path(str(cached_file(name, CONFIG, **({"revision": revision} if revision else {}))))
        cached_file(name, WEIGHTS, **({"revision": revision} if revision else {}))
    commit = revision or config.parent.name  # the Hub's cache names each commit's folder after the commit
    return AdapterSource(name, name, commit, base_of(config))


def find_recorded_adapters(records: Sequence[Mapping[str, str]], folders: Sequence[str]) -> tuple[AdapterSource, ...]:
    """Find the adapters that a model's record names. `folders` are searched for local adapters.

    Raises UsageError if an adapter is not found.
    """
    found = []
    for record in records:
        if not is_digest(record["revision"]):
            found.append(find_adapter(record["name"], record["revision"]))
            continue
        try:
            found.append(find_adapter(str(find_folder(record, folders))))
        except UsageError as error:
            raise UsageError(
                f"The adapter {record['name']} is needed. {error} Run the same `sae harvest` again with --adapter "
                "FOLDER, which records its new location."
            ) from error
    return tuple(found)


def base_of(config: Path) -> str | None:
    """The model an adapter was trained for, according to its configuration.

    Raises DamagedError if the adapter's configuration cannot be read, and UsageError if peft does not know the
    adapter's kind.
    """
    from peft import PeftType

    remedy = "Save or download the adapter again."
    record = parse_json(read_file(config, remedy), config, remedy)
    if not isinstance(record, dict) or not isinstance(record.get("peft_type"), str):
        raise DamagedError(f"{config} does not name the adapter's kind (peft_type). Save or download it again.")
    if (kind := record["peft_type"]) not in PeftType.__members__:
        raise UsageError(
            f"{config} says that the adapter is of the kind {kind}, which the installed peft does not know. Install a "
            "newer peft, or save the adapter again."
        )
    if kind in LOADING_KINDS:
        raise UsageError(
            f"{config}: the adapter is of the kind {kind}, which peft cannot merge into the weights of a model. "
            "LoRA and its variants can be merged."
        )
    base = record.get("base_model_name_or_path")
    return base if isinstance(base, str) and base else None


def merge_adapters(model: Any, adapters: Sequence[AdapterSource]) -> Any:
    """A causal language model of transformers with the adapters merged into its weights, one after the other.

    Raises UsageError if an adapter is of a kind that cannot be merged, or does not fit the model, and DamagedError if
    its file is damaged.
    """
    import peft

    for adapter in adapters:
        try:
            with never_asking():  # peft runs no code from an adapter, but may load a tokenizer that the adapter names
                adapted = peft.PeftModel.from_pretrained(model, adapter.location, **adapter.hub_revision)
        except SafetensorError as error:
            raise damaged_weights(adapter, str(error)) from error
        except MemoryError:
            raise
        except Exception as error:  # from peft, the model's own code, or patterns in the configuration
            lines = str(error).strip().splitlines() or [repr(error)]
            raise UsageError(f"The adapter {adapter.location} does not fit the model: {lines[-1].strip()}") from error
        check_all_loaded(adapted, adapter)
        if not hasattr(adapted, "merge_and_unload"):
            raise UsageError(cannot_merge(adapter, adapted.active_peft_config.peft_type))
        try:
            model = adapted.merge_and_unload(safe_merge=True)
        except (AttributeError, NotImplementedError, ValueError) as error:
            if "NaNs detected" in str(error):
                raise damaged_weights(adapter, "merged weights are not finite numbers") from error
            raise UsageError(f"{cannot_merge(adapter, adapted.active_peft_config.peft_type)} ({error})") from error
    return model.eval().requires_grad_(False)


def damaged_weights(adapter: AdapterSource, problem: str) -> DamagedError:
    return DamagedError(f"The weights of the adapter {adapter.location} are damaged: {problem}. Save it again.")


def cannot_merge(adapter: AdapterSource, kind: Any) -> str:
    return (
        f"The adapter {adapter.location} is of the kind {getattr(kind, 'value', kind)}, which peft cannot merge into "
        "the weights of a model. LoRA and its variants can be merged."
    )


def check_all_loaded(adapted: Any, adapter: AdapterSource) -> None:
    """Raise UsageError unless the adapter's file contains exactly the tensors that peft loads into the adapted model.

    peft itself ignores missing and additional tensors.
    """
    import peft

    with translate_load_errors(adapter.location):
        path = cached_file(adapter.location, WEIGHTS, **adapter.hub_revision)
        with safe_open(path, framework="pt") as file:
            in_file = set(file.keys())
    in_model = set(peft.get_peft_model_state_dict(adapted, save_embedding_layers=False))
    if different := sorted(in_file ^ in_model):
        where = "the adapter has and the model does not" if different[0] in in_file else "the adapter lacks"
        raise UsageError(
            f"The adapter {adapter.location} does not fit the model: {len(different):,} of its tensors differ, such as "
            f"{different[0]}, which {where}. It was trained for {adapter.base or 'another model'}."
        )
