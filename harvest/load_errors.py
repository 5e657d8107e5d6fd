"""Translate errors from loading and running a model into messages that tell the user what to do.

For malformed files, transformers, tokenizers and torch raise errors of any type. So every error is translated: its type
and text go into the message, and the error itself becomes the cause. The context managers of this module enclose only
calls into transformers, tokenizers and torch.
"""

import contextlib
import errno
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..common.errors import DamagedError, SaeError, UnavailableError, UsageError
from ..common.memory import out_of_memory
from . import mini
from .dataset_reader import is_network_error

LONGEST_TEXT = 300  # maximum number of characters quoted from another library's error
OWN_ERRORS = (SaeError, KeyboardInterrupt, SystemExit, GeneratorExit)
PARTS = {"config": "config.json", "tokenizer": "tokenizer's files", "weights": "weights"}


@contextlib.contextmanager
def translate_load_errors(name: str, part: str = "weights") -> Iterator[None]:
    """Turn any error from loading a part of a model ("config", "tokenizer" or "weights") into an SaeError."""
    try:
        yield
    except OWN_ERRORS:
        raise
    except SafetensorError as error:
        raise DamagedError(f"The weights of {name} are damaged: {error}. Download them again.") from error
    except pickle.UnpicklingError as error:
        raise DamagedError(
            f"The weights of {name} are rejected: {describe(pickle.UnpicklingError(reason_of(error)))}. They are in "
            "a pickle file, which can contain code; only tensors are read from such a file. Use a safetensors version "
            "of the model."
        ) from error
    except BaseException as error:  # also panics of tokenizers, which are not Exceptions
        if translated := load_error(error, name):
            raise translated from error
        is_folder = (Path(name) / "config.json").is_file() or name == mini.NAME
        if is_folder and not isinstance(error, (OSError, ImportError)):
            raise DamagedError(
                f"The {PARTS[part]} of {name} cannot be loaded: {describe(error)}. {advice(part)}"
            ) from error
        raise UnavailableError(
            f"The model {name} could not be loaded: {describe(error)}. Give a Hub id, a folder, or --model {mini.NAME}."
        ) from error


def reason_of(error: pickle.UnpicklingError) -> str:
    """Torch's reason for rejecting a pickle, without the advice to read the pickle anyway."""
    text = str(error).partition("WeightsUnpickler error:")[2] or "it contains more than tensors"
    return text.split("Please use")[0].split("Check the documentation")[0]


def advice(part: str) -> str:
    """Advice for a malformed part of a model."""
    if part == "config":
        return "Download config.json again, or correct what is wrong in it."
    return f"Download the {PARTS[part]} again, or save them again with save_pretrained of the installed transformers."


@contextlib.contextmanager
def translate_model_errors(name: str, attention: str = "eager") -> Iterator[None]:
    """Translate any error that a model's code raises when the model is first built or run. An SaeError is raised
    unchanged.
    """
    try:
        yield
    except OWN_ERRORS:
        raise
    except Exception as error:
        if attention != "eager" and isinstance(error, (ValueError, ImportError)):
            raise UsageError(f"--attention {attention} cannot be used: {describe(error)}.") from error
        if out_of_memory(error):
            raise UnavailableError(out_of_memory_sentence(name, error)) from error
        raise DamagedError(
            f"The model {name} cannot be run: {describe(error)}. Its config.json makes no sense for the installed "
            "transformers: download it again, or correct what is wrong in it."
        ) from error


def cannot_be_built(config: Any, why: BaseException | str) -> SaeError:
    """The error for a configuration from which transformers cannot build a model."""
    reason = why if isinstance(why, str) else describe(why)
    return DamagedError(
        f"The config.json of {model_name(config)} describes a model that transformers cannot build: {reason}."
        f"{odd_values(config)} {advice('config')}"
    )


def model_name(config: Any) -> str:
    """The place that a configuration was loaded from; if it has none, its model type."""
    return str(getattr(config, "_name_or_path", "") or config.model_type)


def describe(error: BaseException) -> str:
    """The type of an error and its text, in one line."""
    text = " ".join(str(error).split())
    text = text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]} ..."
    return f"{text.rstrip('.')} ({type(error).__name__})" if text else type(error).__name__


def odd_values(config: Any) -> str:
    """A sentence listing implausible numbers in a configuration; empty if there are none."""
    with contextlib.suppress(Exception):  # from a malformed configuration
        odd = list(dict.fromkeys(find_odd_values(config.to_dict())))
        return f" Odd values in it: {', '.join(odd[:5])}." if odd else ""
    return ""


def find_odd_values(content: dict[str, Any]) -> Iterator[str]:
    """The negative, zero and huge sizes in a configuration and its parts, each as `name = value`."""
    for name, value in content.items():
        if isinstance(value, dict):
            yield from find_odd_values(value)
        elif type(value) is int and "token" not in name and not name.endswith("_id"):
            is_size = "chunk" not in name and any(w in name for w in ("size", "dim", "heads", "layers", "experts"))
            if value < 0 or value >= 2**31 or (value == 0 and is_size):
                yield f"{name} = {value}"


def out_of_memory_sentence(name: str, error: BaseException) -> str:
    return (
        f"The memory is too small to load {name}: {describe(error)}. Use a machine with more memory, --dtype bfloat16, "
        "or a smaller model."
    )


def load_error(error: BaseException, name: str) -> SaeError | None:
    """The error to raise if a model is missing or inaccessible, the network is down or the disk is full; else None.

    transformers raises an OSError in all of these cases; the causes of that error show which case it is.
    """
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__) is not None and len(causes) < 20:
        causes.append(cause)

    def caused_by(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    accept_license = f"accept its license at https://huggingface.co/{name}, then run `hf auth login`."
    if caused_by(GatedRepoError):
        return UnavailableError(f"{name} is gated: {accept_license} To try `sae` without it, use --model {mini.NAME}")
    if caused_by(RepositoryNotFoundError):
        return UnavailableError(
            f"There is no model {name} on the Hub that you can read. Check the name. For a private model, run "
            f"`hf auth login`. Or give a folder, or --model {mini.NAME}."
        )
    if caused_by(RevisionNotFoundError):
        return UsageError(f"The model {name} has no such revision. Give a commit of the model with --revision.")
    if sentence := unsupported_model(causes, name):
        return UsageError(sentence)
    if any(isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT) for cause in causes):
        return UnavailableError(
            f"The model {name} could not be loaded: the disk is full. "
            "Free some space, or set HF_HOME to a folder on another disk."
        )
    if any(isinstance(cause, Exception) and out_of_memory(cause) for cause in causes):
        return UnavailableError(out_of_memory_sentence(name, error))
    if caused_by(LocalEntryNotFoundError) or any(
        isinstance(cause, Exception) and is_network_error(cause) for cause in causes
    ):
        gated = f" If you have not done so yet, {accept_license}" if name.startswith("google/gemma") else ""
        return UnavailableError(
            f"The model {name} could not be loaded: the Hub cannot be reached, and not all of its files are on this "
            f"machine. Check the network, and that HF_HUB_OFFLINE is not set.{gated} "
            f"To try `sae` without it, use --model {mini.NAME}"
        )
    return None


def unsupported_model(causes: list[BaseException], name: str) -> str | None:
    """The message for a model that transformers cannot load in its present form; None for any other error."""
    said = " ".join(map(str, causes))
    if (
        Path(name).is_dir()
        and (gguf := sorted(Path(name).glob("*.gguf")))
        and not any(Path(name).glob("*.safetensors"))
    ):
        return (
            f"{name} contains {gguf[0].name} and no safetensors. GGUF is not read: load it with transformers "
            "(gguf_file=...), and save the dequantized model with save_pretrained."
        )
    if "trust_remote_code" in said:
        return (
            f"{name} needs its own Python code, which is never run here (trust_remote_code is not set). Choose a model "
            "whose architecture is part of transformers."
        )
    if "does not recognize this architecture" in said:
        return (
            f"The installed transformers does not know the architecture of {name}. Update transformers, or choose "
            "another model."
        )
    if any(words in said for words in ("attn_implementation", "attention implementation", "FlashAttention")):
        return f"The attention of {name} cannot be computed with the given --attention: {describe(causes[0])}."
    for package in ("bitsandbytes", "gptqmodel", "auto_gptq", "autoawq", "optimum", "compressed_tensors"):
        if package in said.lower():
            return (
                f"{name} is quantized, and transformers needs {package} to load it. Install {package}, or choose the "
                "unquantized model."
            )
    return None
