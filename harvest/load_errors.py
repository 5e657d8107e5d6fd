"""Translate the errors of loading a model into messages that say what to do."""

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from ..common.errors import DamagedError, SaeError, UnavailableError, UsageError
from . import mini
from .dataset_reader import first_line, is_network_error


@contextlib.contextmanager
def translate_load_errors(name: str) -> Iterator[None]:
    """Raise whatever loading a model raises as an SaeError."""
    try:
        yield
    except SafetensorError as error:
        raise DamagedError(f"The weights of {name} are damaged: {error}. Download them again.") from error
    except Exception as error:
        if translated := load_error(error, name):
            raise translated from error
        if not isinstance(error, (OSError, ValueError, ImportError, RuntimeError)):
            raise
        raise UnavailableError(
            f"The model {name} could not be loaded: {first_line(error)} "
            f"Give a Hub id, a folder, or --model {mini.NAME}."
        ) from error


def load_error(error: Exception, name: str) -> SaeError | None:
    """The error to raise if a model is missing or refused, the network down or the disk full; None otherwise.

    transformers raises an OSError in all of these cases; its causes tell which one it is.
    """
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__) is not None:
        causes.append(cause)

    def caused_by(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    accept_license = f"accept its license at https://huggingface.co/{name}, then run `hf auth login`."
    if caused_by(GatedRepoError):
        return UnavailableError(f"{name} is gated: {accept_license} To try everything without it: --model {mini.NAME}")
    if caused_by(RepositoryNotFoundError):
        return UnavailableError(
            f"There is no model {name} on the Hub that you can read. Check the name; if it is private, run "
            f"`hf auth login`. Or give a folder, or --model {mini.NAME}."
        )
    if caused_by(RevisionNotFoundError):
        return UsageError(f"The model {name} has no such revision. Give a commit of it with --revision.")
    if sentence := unsupported_model(causes, name):
        return UsageError(sentence)
    if any(isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT) for cause in causes):
        return UnavailableError(
            f"The model {name} could not be loaded: the disk is full. "
            "Free space, or set HF_HOME to a folder on another disk."
        )
    if caused_by(LocalEntryNotFoundError) or any(
        isinstance(cause, Exception) and is_network_error(cause) for cause in causes
    ):
        gated = f" If you have not done so yet, {accept_license}" if name.startswith("google/gemma") else ""
        return UnavailableError(
            f"The model {name} could not be loaded: the Hub cannot be reached, and not all of its files are on this "
            f"machine. Check the network, and that HF_HUB_OFFLINE is not set.{gated} "
            f"To try everything without it: --model {mini.NAME}"
        )
    return None


def unsupported_model(causes: list[BaseException], name: str) -> str | None:
    """The sentence for a model that transformers cannot load as it is; None for any other error."""
    said = " ".join(map(str, causes))
    if (
        Path(name).is_dir()
        and (gguf := sorted(Path(name).glob("*.gguf")))
        and not any(Path(name).glob("*.safetensors"))
    ):
        return (
            f"{name} holds {gguf[0].name} and no safetensors. GGUF is not read: load it with transformers "
            "(gguf_file=...), and save the dequantized model with save_pretrained."
        )
    if "trust_remote_code" in said:
        return (
            f"{name} needs code of its own, which is never run here (trust_remote_code is not set). Choose a model "
            "whose architecture is part of transformers."
        )
    if "does not recognize this architecture" in said:
        return (
            f"The installed transformers does not know the architecture of {name}. Update transformers, or choose "
            "another model."
        )
    for package in ("bitsandbytes", "gptqmodel", "auto_gptq", "autoawq", "optimum", "compressed_tensors"):
        if package in said.lower():
            return (
                f"{name} is quantized, and transformers needs {package} to load it. Install that, or choose the model "
                "that is not quantized."
            )
    return None
